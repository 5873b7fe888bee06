"""Where views are kept: answers by what was asked, in resumable shards, and the finished views of a split.

An answer's key is what made it: prompt with history, model, settings. So only a history that changed is asked for
again. Shards are written to a temporary name and renamed: a run that is killed loses the current batch only. A shard is
named by its contents, so several writers never use one name.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from anyo_lightning.data.splits import Split
from anyo_lightning.disk import cache_folder, renamed_to, set_aside, text_sha256
from anyo_lightning.errors import InputError
from anyo_lightning.views.prompts import Kind

ANSWERS: dict[str, Any] = {"key": pl.String, "answer": pl.String, "finish": pl.String}
COST: dict[str, Any] = {"seconds": pl.Float64, "tokens": pl.Int64}  # missing in shards of earlier versions
VIEWS: dict[str, Any] = {
    "user_id": pl.String,
    "item_ids": pl.List(pl.String),
    "texts": pl.List(pl.String),
    "outcome": pl.String,
}


@dataclass(frozen=True)
class Answer:
    """What a model said.

    Attributes:
        text: Cleaned.
        finish: `stop`, `length` when it was cut, `refused` when the endpoint says so.
        tokens: Read and written for it; None if they were not counted.
        seconds: Its share of its batch's time; None if it was not measured.
    """

    text: str
    finish: str
    tokens: int | None = None
    seconds: float | None = None


class AnswerStore:
    """Answers of one model under one prompt and settings, by the hash of what was asked.

    Args:
        folder: Holds one folder for each settings.
        settings: Everything that decides an answer, except the prompt itself.
    """

    def __init__(self, folder: Path, settings: Mapping[str, str]) -> None:
        described = json.dumps(settings, sort_keys=True, indent=1)
        self.folder = folder / text_sha256(described)[:32]
        self.settings = described

    def key(self, prompt: str) -> str:
        """The name of a prompt's answer."""
        return text_sha256(f"{self.settings}\n{prompt}")[:32]

    def read(self) -> dict[str, Answer]:
        """All answers; a damaged shard is set aside, which means that its prompts are asked again."""
        answers: dict[str, Answer] = {}
        for path in sorted(self.folder.glob("*.parquet")):
            try:
                table = pl.read_parquet(path, glob=False)
                known = dict(table.schema) in (ANSWERS, ANSWERS | COST)
                if not known or table.select(list(ANSWERS)).null_count().sum_horizontal().item():
                    raise ValueError("other columns than those of an answer")
            except (OSError, ValueError, pl.exceptions.PolarsError) as error:
                set_aside(path, reason=f"damaged ({error})")
                continue
            answers |= {
                row["key"]: Answer(row["answer"], row["finish"], row.get("tokens"), row.get("seconds"))
                for row in table.iter_rows(named=True)
            }
        return answers

    def write(self, answers: Mapping[str, Answer]) -> None:
        """Add a shard."""
        note = self.folder / "settings.json"
        if not note.is_file():
            with renamed_to(note) as temporary:
                temporary.write_text(self.settings)
        rows = [(key, answer.text, answer.finish, answer.seconds, answer.tokens) for key, answer in answers.items()]
        name = text_sha256(json.dumps(rows))[:16]
        _write_parquet(pl.DataFrame(rows, schema=ANSWERS | COST, orient="row"), self.folder / f"{name}.parquet")


@dataclass(frozen=True)
class WrittenView:
    """A view of one user's history.

    Attributes:
        items: (items,) what it was written from.
        texts: For `summarise` one text; for `rewrite` one per item, None to keep the item's own text.
    """

    items: np.ndarray
    texts: tuple[str | None, ...]


def views_file(kind: Kind, split: Split) -> Path:
    """Where `anyo augment` puts the views of a split, and `CLLMRec` looks for them."""
    return cache_folder() / "views" / f"{kind}-{_identity(split)}.parquet"


def cost_of(answers: Collection[Answer]) -> dict[str, float]:
    """Seconds and tokens that these answers took when they were written; empty if one of them is unknown."""
    seconds, tokens = ([getattr(answer, name) for answer in answers] for name in COST)
    return {} if None in seconds or None in tokens else {"seconds": sum(seconds), "tokens": sum(tokens)}


def write_views(
    file: Path,
    rows: Sequence[tuple[str, list[str], list[str | None], str]],
    *,
    kind: Kind,
    split: Split,
    settings: str,
    cost: Mapping[str, float] | None = None,
) -> None:
    """Write the finished views of a split.

    Args:
        file: Parquet file: user, items that it was written from, texts, outcome.
        rows: Its rows.
        kind: What the views are.
        split: The split; noted in the file.
        settings: What made them; noted in the file.
        cost: What `cost_of` says of their answers; noted in the file unless empty.
    """
    metadata = {"kind": kind, "split": _identity(split), "settings": settings}
    if cost:
        metadata["cost"] = json.dumps(dict(cost))
    _write_parquet(pl.DataFrame(rows, schema=VIEWS, orient="row"), file, metadata)


def read_views(file: Path, *, kind: Kind, split: Split) -> dict[int, list[WrittenView]]:
    """The views that can be used, by user.

    Raises:
        InputError: When there is no such file, it cannot be read, or it holds views of another kind or split.
    """
    if not file.is_file():
        raise InputError(f"Expected views written by `anyo augment --kind {kind}` with this --data, got no {file}")
    try:
        found, table = pl.read_parquet_metadata(file), pl.read_parquet(file, glob=False)
        rows = list(table.select(list(VIEWS)).iter_rows())
    except (OSError, pl.exceptions.PolarsError) as error:
        raise InputError(f"Expected a Parquet file of views, got {file}: {' '.join(str(error).split())}") from error
    for name, expected in {"kind": kind, "split": _identity(split)}.items():
        if found.get(name) != expected:
            raise InputError(f"Expected views of {name} {expected}, got {found.get(name)} in {file}")
    users = {name: index for index, name in enumerate(split.user_ids.tolist())}
    items = {name: index for index, name in enumerate(split.item_ids.tolist())}
    views: dict[int, list[WrittenView]] = {}
    for user, item_ids, texts, outcome in rows:
        if outcome == "written":
            source = np.array([items[item] for item in item_ids], dtype=np.int64)
            views.setdefault(users[user], []).append(WrittenView(source, tuple(texts)))
    return views


def read_views_cost(file: Path) -> dict[str, float]:
    """What writing the views of a file took, as `cost_of` says; empty for a file of an earlier version."""
    cost: dict[str, float] = json.loads(pl.read_parquet_metadata(file).get("cost", "{}"))
    return cost


def _identity(split: Split) -> str:
    """A hash over the split and the items' texts (which a split's fingerprint leaves out)."""
    return text_sha256(json.dumps([split.fingerprint, split.item_texts]))[:16]


def _write_parquet(table: pl.DataFrame, path: Path, metadata: dict[str, str] | None = None) -> None:
    with renamed_to(path) as temporary:
        table.write_parquet(temporary, metadata=metadata)

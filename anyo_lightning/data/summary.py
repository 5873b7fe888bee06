"""What was read and what a split holds: figures for `anyo data`, and the normalised tables as Parquet."""

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import polars as pl
from rich.console import Console
from rich.table import Table

from anyo_lightning.data.schema import Source
from anyo_lightning.data.splits import STAGE_NAMES, Split, placeholder
from anyo_lightning.disk import renamed_to

Summary = dict[str, dict[str, str | int | float]]


def summarise(
    split: Split,
    source: Source,
    count_tokens: Callable[[list[str]], np.ndarray] | None = None,
    token_budget: int | None = None,
) -> Summary:
    """Count what was read, what is left and how much of it a language model can read.

    Args:
        split: The split.
        source: What it was made of.
        count_tokens: Gives the number of tokens of each text, what separates items included; `None` leaves the tokens
            out.
        token_budget: Number of tokens that a history may take; `None` leaves the fit out.

    Returns:
        Sections `read`, `kept`, `split`, `items per user`, `ties`, `texts` and, with `count_tokens`, `tokens per item`
        and `token budget`; each maps a name to a figure.
    """
    lengths = np.diff(split.offsets)
    tied_pairs = np.diff(split.timestamps)[split.offsets[1:][lengths > 1] - 2] == 0
    without_text = sum(text == placeholder(name) for text, name in _texts(split))
    counts = split.counts
    repeated = {stage: split.repeated_targets(stage) for stage in ("validation", "test")}
    summary: Summary = {
        "read": {
            "users": source.interactions["user_id"].n_unique(),
            "items": source.items.height,
            "interactions": source.interactions.height,
            "columns of the catalogue": ", ".join(source.items.columns),
        },
        "kept": {name: counts.pop(name) for name in ("users", "items", "interactions")},
        "split": {
            "data set": split.name,
            "strategy": split.strategy,
            "fingerprint": split.fingerprint,
            **{name.replace("_", " "): count for name, count in counts.items() if name != "tied_interactions"},
            **{
                f"repeated {stage} targets": f"{count:,} ({count / counts[f'{stage}_targets']:.1%})"
                for stage, count in repeated.items()
                if count
            },
        },
        "items per user": _distribution(lengths),
        "ties": {
            "policy": split.ties,
            "interactions with a tie": _share(split.tied),
            "users whose last two are tied": _share(tied_pairs),
            "repeated interactions": _repeated(split),
        },
        "texts": {
            "items with text": split.catalogue_size - without_text,
            "items without text": without_text,
            "first item": split.item_texts[0],
        },
    }
    if count_tokens is not None:
        tokens = np.asarray(count_tokens(split.item_texts), dtype=np.int64)
        summary["tokens per item"] = _distribution(tokens)
        if token_budget is not None:
            summary["token budget"] = _fit(split, tokens, token_budget)
    return summary


def print_summary(summary: Summary) -> None:
    """Print a summary as one table.

    Args:
        summary: What `summarise` returned.
    """
    table = Table(show_header=False, title="Data")
    for section, figures in summary.items():
        table.add_section()
        for row, (name, figure) in enumerate(figures.items()):
            shown = (
                f"{figure:,.1f}" if isinstance(figure, float) else f"{figure:,}" if isinstance(figure, int) else figure
            )
            table.add_row("" if row else section, name, shown)
    Console().print(table, markup=False)


def write_parquet(split: Split, folder: Path) -> None:
    """Write the split's tables, which `read_files` reads back with its default names of columns.

    With the same settings they give the same fingerprint (`shuffle` and a rating threshold apart: they have been
    applied); with the strategy `column` and the column `split` they give the same stages.

    Args:
        folder: Gets `interactions.parquet` (`user_id`, `item_id`, `timestamp`, `split`) and `items.parquet`
            (`item_id`, `text`), each under a temporary name first.
        split: The split.
    """
    stages = np.array(STAGE_NAMES)
    interactions = pl.DataFrame(
        {
            "user_id": pl.Series(split.user_ids, dtype=pl.String)[split.user_of_interaction],
            "item_id": pl.Series(split.item_ids, dtype=pl.String)[split.items],
            "timestamp": split.timestamps,
            "split": pl.Series(stages, dtype=pl.String)[split.stages],
        }
    )
    texts = [None if text == placeholder(name) else text for text, name in _texts(split)]
    items = pl.DataFrame(
        {"item_id": pl.Series(split.item_ids, dtype=pl.String), "text": pl.Series(texts, dtype=pl.String)}
    )
    for name, table in (("interactions", interactions), ("items", items)):
        with renamed_to(folder / f"{name}.parquet") as unfinished:
            table.write_parquet(unfinished)


def _texts(split: Split) -> Iterable[tuple[str, str]]:
    return zip(split.item_texts, split.item_ids, strict=True)


def _distribution(values: np.ndarray) -> dict[str, str | int | float]:
    quartiles = np.percentile(values, [0, 25, 50, 75, 95, 100])
    names = ("least", "first quartile", "median", "third quartile", "95th percentile", "most")
    return {**dict(zip(names, map(float, quartiles), strict=True)), "mean": float(values.mean())}


def _share(flags: np.ndarray) -> str:
    return f"{flags.sum():,} ({flags.mean():.1%})" if len(flags) else "0"


def _repeated(split: Split) -> int:
    """The interactions of a user with an item that the user had before."""
    pairs = pl.DataFrame({"user": split.user_of_interaction, "item": split.items})
    return split.interactions - pairs.n_unique()


def _fit(split: Split, tokens: np.ndarray, budget: int) -> dict[str, str | int | float]:
    """How many of the latest whole items of each test history fit the budget."""
    queries = split.queries("test")
    positions = np.concatenate([[0], np.cumsum(tokens[split.items])])
    first = np.searchsorted(positions, positions[queries.history_end] - budget)
    fitting = np.minimum(queries.history_end - first, queries.history_lengths)
    return {
        "tokens": budget,
        "items that fit, median": float(np.median(fitting)),
        "items that fit, mean": float(fitting.mean()),
        "histories that fit whole": _share(fitting == queries.history_lengths),
        "interactions that fit": f"{fitting.sum() / queries.history_lengths.sum():.1%}",
    }

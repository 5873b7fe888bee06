"""`anyo compare --foreign NAME=FILE`: another system's top-k lists as a row, ranked as our evaluator ranks.

Users, targets and histories are those of the runs in the table. A target's rank is 1 + (items of the list before it) +
(other items of the list that tie with it) / 2; a target that is not in the list was not found. Where the runs mask
histories, a list's items of the user's history are left out, except for the target itself: they do not compete. A list
as long as the longest one is then known to fewer places, and figures at higher cutoffs are left out; a shorter list has
ended by itself. Of items that tie at the end of a list, only those in it count.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from jaxtyping import Float, Int

from anyo_lightning.compare.foreign_files import read_lists, refuse_unknown
from anyo_lightning.compare.rows import is_rank_metric
from anyo_lightning.compare.variants import TestedRun, Variant
from anyo_lightning.errors import InputError
from anyo_lightning.evaluation.intervals import bootstrap_means
from anyo_lightning.evaluation.metrics import (
    average_popularity,
    coverage,
    gini,
    novelty,
    popularity_ranks,
    serendipity,
)
from anyo_lightning.runs import RunFolder

OF_LISTS = {"coverage": coverage, "gini": gini}
OF_COUNTS = ("popularity", "novelty", "serendipity")  # of training interactions


class ForeignLists(RunFolder):
    """Lists in the place of a run folder: what a comparison reads of one is in memory, and nothing is written."""

    def __init__(self, path: Path, predictions: pl.DataFrame, catalogue: pl.DataFrame) -> None:
        super().__init__(path)
        self.predictions, self.catalogue = predictions, catalogue

    def read_predictions(self, columns: Sequence[str] | None = None, *, optional: Sequence[str] = ()) -> pl.DataFrame:
        """The runs' test rows with these lists and their ranks."""
        there = self.predictions.columns
        return self.predictions.select(there if columns is None else [*columns, *(n for n in optional if n in there)])

    def read_catalogue(self) -> pl.DataFrame:
        """The runs' catalogue."""
        return self.catalogue


@dataclass(frozen=True, eq=False)
class TestRows:
    """What all lists are ranked against: a run's test rows, by numbers."""

    __test__ = False  # not for pytest

    run: TestedRun
    predictions: pl.DataFrame
    catalogue: pl.DataFrame
    user_ids: pl.Series  # distinct, in order of their first row
    user: Int[np.ndarray, "rows"]
    target: Int[np.ndarray, "rows"]
    excluded: list[Int[np.ndarray, "items"]]  # of the history, without the target; nothing where it is not masked

    @classmethod
    def read(cls, run: TestedRun) -> "TestRows":
        """Read a run's predictions and catalogue.

        Raises:
            InputError: There are none, or of an earlier version without histories.
        """
        predictions, catalogue = run.folder.read_predictions(), run.folder.read_catalogue()
        if "history_item_ids" not in predictions.columns:
            raise InputError(f"Expected histories in {run.folder.predictions_file}, found none: test the run again")
        user_ids = predictions["user_id"].unique(maintain_order=True)
        items = pl.Enum(catalogue["item_id"])
        user = predictions["user_id"].cast(pl.Enum(user_ids)).to_physical().to_numpy().astype(np.int64)
        target = predictions["target_item_id"].cast(items).to_physical().to_numpy().astype(np.int64)
        excluded = [np.zeros(0, dtype=np.int64)] * len(target)
        if run.content["protocol"]["history_masked"]:
            histories = predictions["history_item_ids"]
            seen = histories.explode().cast(items).to_physical().to_numpy().astype(np.int64)
            parts = np.split(seen, np.cumsum(histories.list.len().to_numpy())[:-1])
            excluded = [np.setdiff1d(part, [own]) for part, own in zip(parts, target, strict=True)]
        return cls(run, predictions, catalogue, user_ids, user, target, excluded)


@dataclass(frozen=True, eq=False)
class RankedLists:
    """One file's lists, ranked."""

    path: Path
    ranks: Float[np.ndarray, "rows"]  # infinite where the list lacks the target
    lists: list[Int[np.ndarray, "items"]]  # for each row
    known: int  # how many places all lists are known to
    left_out: int  # items of histories
    without: int  # users that have no list


def read_foreign(named: Sequence[str], variants: Sequence[Variant], metrics: Sequence[str]) -> list[Variant]:
    """Read lists of other systems for the split of tested runs.

    Args:
        named: `NAME=FILE` each; several files of one name are several trainings of one system, one row.
        variants: Of the runs; all are of one split and protocol.
        metrics: What the table shows.

    Returns:
        A row for each name.

    Raises:
        InputError: A name or a file is not given or taken twice, a file cannot be read (see `read_lists`), users or
            items are not of the split, or masking histories leaves nothing of a list.
    """
    taken = {name for variant in variants for name in (variant.label, variant.runs[0].content["variant"])}
    files: dict[str, list[Path]] = {}
    for text in named:
        name, _, file = text.partition("=")
        if not name.strip() or not file:
            raise InputError(f"Expected foreign to be NAME=FILE, got {text!r}")
        if name in taken:
            raise InputError(f"Expected a name for foreign that no run has, got {name!r}")
        if Path(file) in files.setdefault(name, []):
            raise InputError(f"Expected each file of foreign {name} once, got {file} twice")
        files[name].append(Path(file))
    rows = TestRows.read(variants[0].runs[0])
    return [_variant(name, [_ranked(path, rows) for path in paths], rows, metrics) for name, paths in files.items()]


def _ranked(path: Path, rows: TestRows) -> RankedLists:
    """Read a file and rank each row's target in its user's list."""
    table = read_lists(path)
    refuse_unknown(table["user_id"], rows.user_ids, "the users that have a test target", path)
    refuse_unknown(table["item_id"], rows.catalogue["item_id"], "items of the split", path)
    table = table.with_columns(
        user=pl.col("user_id").cast(pl.Enum(rows.user_ids)).to_physical().cast(pl.Int64),
        item=pl.col("item_id").cast(pl.Enum(rows.catalogue["item_id"])).to_physical().cast(pl.Int64),
    ).sort("user", "key", maintain_order=True)
    user, item, key = (table[name].to_numpy() for name in ("user", "item", "key"))
    edges = np.searchsorted(user, np.arange(len(rows.user_ids) + 1))
    lengths = np.diff(edges)
    length, usual = int(lengths.max()), int(np.bincount(lengths[lengths > 0]).argmax())
    ranks, lists = np.full(len(rows.user), np.inf), []
    known, left_out = length, dict[int, int]()  # the latter by user
    for row, (of, target, excluded) in enumerate(zip(rows.user, rows.target, rows.excluded, strict=True)):
        items, keys = item[edges[of] : edges[of + 1]], key[edges[of] : edges[of + 1]]
        kept = ~np.isin(items, excluded)
        left_out[of] = int((~kept).sum())
        if len(items) >= usual:  # cut off there; a shorter one has ended
            known = min(known, int(kept.sum()))
        items, keys = items[kept], keys[kept]
        lists.append(items)
        for own in keys[items == target]:
            ranks[row] = 1 + np.sum(keys < own) + (np.sum(keys == own) - 1) / 2
    if known == 0:
        raise InputError(
            f"Expected lists without items of the users' histories in {path}, which the runs mask, got nothing else in "
            f"at least one: leave seen items out, or write more than {length} items for each user"
        )
    return RankedLists(path, ranks, lists, known, sum(left_out.values()), int((np.diff(edges) == 0).sum()))


def _variant(name: str, ranked: Sequence[RankedLists], rows: TestRows, metrics: Sequence[str]) -> Variant:
    """The row of a system, with what it cannot show."""
    known, without = min(lists.known for lists in ranked), max(lists.without for lists in ranked)
    users = f", {without:,} of {len(rows.user_ids):,} users without a list" if without else ""
    note = f"{name}: lists of another system, beyond which nothing counts as found"
    if removed := sum(lists.left_out for lists in ranked):
        note += f"; {removed:,} items of histories in them were left out"
    reasons = {metric: reason for metric in metrics if (reason := _reason(metric, known, rows))}
    shown = [metric for metric in metrics if metric not in reasons]
    runs = tuple(_run(name, lists, rows, shown) for lists in ranked)
    return Variant(f"{name} (top {known}{users})", runs, left_out=reasons, list_length=known, note=f"{note}.")


def _reason(metric: str, known: int, rows: TestRows) -> str | None:
    """Why lists known to so many places cannot give a metric; None where they can."""
    kind, cutoff = _parts(metric)
    if cutoff > known:
        return f"its lists are known to {known} places"
    if is_rank_metric(metric) or (cutoff and kind in OF_LISTS):
        return None
    if not cutoff or kind not in OF_COUNTS:
        return "lists cannot give it"
    return None if "training_count" in rows.catalogue.columns else "the runs' catalogue.parquet has no training counts"


def _parts(metric: str) -> tuple[str, int]:
    """`("coverage", 10)` for `test/coverage@10`; a cutoff of 0 where there is none."""
    kind, _, cutoff = metric.removeprefix("test/").partition("@")
    return kind, int(cutoff) if cutoff.isdigit() else 0


def _run(name: str, lists: RankedLists, rows: TestRows, metrics: Sequence[str]) -> TestedRun:
    """Lists in the form of a tested run of the same split and protocol."""
    ids = rows.catalogue["item_id"].to_numpy()
    predictions = rows.predictions.drop("top_scores", strict=False).with_columns(
        pl.Series("rank", lists.ranks, pl.Float64),
        pl.Series("top_item_ids", [ids[items].tolist() for items in lists.lists], pl.List(pl.String)),
    )
    content = {
        "variant": name,
        "seed": None,
        "split": rows.run.content["split"],
        "protocol": rows.run.content["protocol"] | {"index": "Flat"},
        "metrics": {metric: _figure(metric, lists, rows) for metric in metrics if not is_rank_metric(metric)},
        "slices": {},
        "cost": {},
        "environment": {},
    }
    return TestedRun(ForeignLists(lists.path, predictions, rows.catalogue), content)


def _figure(metric: str, lists: RankedLists, rows: TestRows) -> dict[str, float | None]:
    """A figure beside rank metrics, as metrics.json has it."""
    kind, k = _parts(metric)
    first = np.unique(rows.user, return_index=True)[1]  # a user with several targets is still shown one list
    tops = np.full((len(first), k), -1)
    for place, row in enumerate(first):
        items = lists.lists[row][:k]
        tops[place, : len(items)] = items
    if kind in OF_LISTS:
        return {"value": OF_LISTS[kind](tops, len(rows.catalogue)), "low": None, "high": None}
    counts = rows.catalogue["training_count"].to_numpy()
    if kind == "serendipity":
        popular = popularity_ranks(rows.target, counts, rows.excluded)
        values = serendipity(lists.ranks, popular, rows.user, k)
    else:
        function = average_popularity if kind == "popularity" else novelty
        values = function(tops[tops[:, 0] >= 0], counts)  # of nothing there is no mean
    low, high = bootstrap_means(values[:, None])
    return {"value": float(values.mean()), "low": float(low[0]), "high": float(high[0])}

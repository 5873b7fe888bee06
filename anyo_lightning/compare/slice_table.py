"""Figures of parts of the test rows, for every row of a table over the same parts.

metrics.json has slices too, but rows of a table with several seeds need per-user values. Which slice a test row is in
is what the runs' predictions.parquet say; a group in which they differ is left out: how long an item's text is depends
on what a run reads.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
from jaxtyping import Float

from anyo_lightning.compare.rows import KEYS, SharedRows, in_order
from anyo_lightning.compare.stats import Difference, differences_to
from anyo_lightning.compare.variants import Variant
from anyo_lightning.evaluation.intervals import bootstrap_means
from anyo_lightning.evaluation.slices import GROUPS, slice_masks
from anyo_lightning.runs import RunFolder

RESAMPLES = 1000  # half of a table's: there are many slices, and their intervals are wide


@dataclass(frozen=True)
class SliceFigure:
    """One figure of one row of the table in one slice, with its 95% bootstrap interval."""

    value: float
    low: float
    high: float
    difference: Difference | None  # to the baseline, corrected over the rows; None for it and without one


@dataclass(frozen=True)
class Slice:
    """A part of the test rows; `metrics` has, for each metric, a figure for each row of the table."""

    group: str
    name: str
    rows: int
    users: int
    metrics: dict[str, tuple[SliceFigure | None, ...]]  # None for a row that cannot show the metric


def slice_table(
    variants: Sequence[Variant], shared: SharedRows, metrics: Sequence[str], baseline: Variant | None = None
) -> tuple[Slice, ...]:
    """Every slice of every group that the runs agree on, for the rank metrics among `metrics`.

    Args:
        variants: The rows of the table.
        shared: Their ranks.
        metrics: Rank metrics, as in metrics.json.
        baseline: The row that the others are compared with, paired by user.
    """
    slices = []
    for group, masks in slice_masks(_agreed(variants, shared.keys)).items():
        for name, mask in masks.items():
            values = {metric: shared.values(metric, mask) for metric in metrics}
            figures = {metric: _figures(variants, metric, of_metric, baseline) for metric, of_metric in values.items()}
            users = len(next(iter(values.values())))
            slices.append(Slice(group, name, int(mask.sum()), users, figures))
    return tuple(slices)


def _figures(
    variants: Sequence[Variant], metric: str, values: Float[np.ndarray, "users variants"], baseline: Variant | None
) -> tuple[SliceFigure | None, ...]:
    """A metric of each row of the table, None where it cannot show the metric."""
    shown = [row for row, variant in enumerate(variants) if metric not in variant.left_out]
    base = next((place for place, row in enumerate(shown) if variants[row] is baseline), None)
    values = values[:, shown]
    low, high = bootstrap_means(values, resamples=RESAMPLES)
    differences = differences_to(values, base)
    columns = zip(shown, values.mean(axis=0).tolist(), low.tolist(), high.tolist(), differences, strict=True)
    found = {row: SliceFigure(*figure) for row, *figure in columns}
    return tuple(found.get(row) for row in range(len(variants)))


def _agreed(variants: Sequence[Variant], keys: pl.DataFrame) -> pl.DataFrame:
    """The columns of groups that are the same in all runs, row by row."""
    first, *others = [run.folder for variant in variants for run in variant.runs]
    agreed = _groups(first, keys)
    for run in others:
        found = _groups(run, keys)
        same = [name for name in agreed.columns if name in found.columns and _equal(agreed[name], found[name])]
        agreed = agreed.select(same)
    return agreed


def _groups(run: RunFolder, keys: pl.DataFrame) -> pl.DataFrame:
    """The columns of groups that a run has."""
    return in_order(run.read_predictions(KEYS, optional=tuple(GROUPS.values())), keys).drop(KEYS)


def _equal(one: pl.Series, other: pl.Series) -> bool:
    """As text, since bands that were cut at other places are of another type."""
    return one.cast(pl.String).equals(other.cast(pl.String))

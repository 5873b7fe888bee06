"""Figures of parts of the test rows, for every row of a table over the same parts.

metrics.json has slices too, but rows of a table with several seeds need per-user values. Which slice a test row is in
is what the runs' predictions.parquet say; a group in which they differ is left out: how long an item's text is depends
on what a run reads.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from anyo_lightning.compare.rows import KEYS, SharedRows, in_order
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


@dataclass(frozen=True)
class Slice:
    """A part of the test rows; `metrics` has, for each metric, a figure for each row of the table."""

    group: str
    name: str
    rows: int
    users: int
    metrics: dict[str, tuple[SliceFigure | None, ...]]  # None for a row that cannot show the metric


def slice_table(variants: Sequence[Variant], shared: SharedRows, metrics: Sequence[str]) -> tuple[Slice, ...]:
    """Every slice of every group that the runs agree on, for the rank metrics among `metrics`.

    Args:
        variants: The rows of the table.
        shared: Their ranks.
        metrics: Rank metrics, as in metrics.json.
    """
    slices = []
    for group, masks in slice_masks(_agreed(variants, shared.keys)).items():
        for name, mask in masks.items():
            values = [shared.values(metric, mask) for metric in metrics]
            low, high = bootstrap_means(np.concatenate(values, axis=1), resamples=RESAMPLES)
            ends = np.stack([np.concatenate(values, axis=1).mean(axis=0), low, high], axis=1)
            figures = [SliceFigure(*map(float, end)) for end in ends]
            size = len(variants)
            by_metric = {
                metric: tuple(
                    None if metric in variant.left_out else figures[size * column + row]
                    for row, variant in enumerate(variants)
                )
                for column, metric in enumerate(metrics)
            }
            slices.append(Slice(group, name, int(mask.sum()), len(values[0]), by_metric))
    return tuple(slices)


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

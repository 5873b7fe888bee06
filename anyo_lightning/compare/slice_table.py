"""Figures of parts of the test rows, for every row of a table over the same parts.

metrics.json has slices too, but each run's own: runs with several seeds need per-user values, and the length of an
item's text depends on what a run reads. Here all rows are cut the same way.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from anyo_lightning.compare.rows import KEYS, SharedRows
from anyo_lightning.compare.variants import Variant
from anyo_lightning.evaluation.intervals import bootstrap_means
from anyo_lightning.evaluation.slices import HISTORY_BANDS, WORD_BANDS, Masks, bands

RESAMPLES = 1000  # half of a table's: there are many slices, and their intervals are wide
POPULARITY = ("head", "middle", "tail", "unseen")  # by falling number of training interactions


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
    metrics: dict[str, tuple[SliceFigure, ...]]


def slice_table(
    variants: Sequence[Variant], shared: SharedRows, catalogue: pl.DataFrame, metrics: Sequence[str]
) -> tuple[Slice, ...]:
    """Every slice of every group, for the rank metrics among `metrics`.

    Args:
        variants: The rows of the table.
        shared: Their ranks.
        catalogue: `item_id` and `text`, whose words are counted.
        metrics: Rank metrics, as in metrics.json.
    """
    slices = []
    for group, masks in _masks(variants[0], shared, catalogue).items():
        for name, mask in masks.items():
            if not mask.any():
                continue
            values = [shared.values(metric, mask) for metric in metrics]
            low, high = bootstrap_means(np.concatenate(values, axis=1), resamples=RESAMPLES)
            ends = np.stack([np.concatenate(values, axis=1).mean(axis=0), low, high], axis=1)
            figures = [SliceFigure(*map(float, end)) for end in ends]
            size = len(variants)
            by_metric = {
                metric: tuple(figures[size * column : size * (column + 1)]) for column, metric in enumerate(metrics)
            }
            slices.append(Slice(group, name, int(mask.sum()), len(values[0]), by_metric))
    return tuple(slices)


def _masks(variant: Variant, shared: SharedRows, catalogue: pl.DataFrame) -> Masks:
    """The rows of each slice, as `evaluation.slices.slice_masks` parts them but with words for every run."""
    run = variant.runs[0]
    columns = ["history_length", "target_count", "target_tied"]
    rows = shared.keys.join(
        run.folder.read_predictions([*KEYS, *columns]), on=KEYS, how="left", maintain_order="left"
    ).join(
        catalogue.select(target_item_id="item_id", words=pl.col("text").str.count_matches(r"\S+")),
        on="target_item_id",
        how="left",
        maintain_order="left",
    )
    tied = rows["target_tied"].to_numpy()
    sizes = {name: part["rows"] for name, part in run.content["slices"].get("target popularity", {}).items()}
    return {
        "target popularity": _popularity(rows["target_count"].to_numpy(), sizes),
        "history length": bands(rows["history_length"].to_numpy(), HISTORY_BANDS),
        "target tied": {"yes": tied, "no": ~tied},
        "target words": bands(rows["words"].fill_null(0).to_numpy(), WORD_BANDS),
    }


def _popularity(target_count: np.ndarray, sizes: dict[str, int]) -> dict[str, np.ndarray]:
    """Popularity bands again from the number of rows that the run counted in each.

    Where the head ends depends on items that are nobody's target, which only the run knew. But bands follow each other
    by training interactions, and items with the same number are in one band, so that the sizes say it all.
    """
    place = np.argsort(np.argsort(-target_count, kind="stable"))
    masks, start = {}, 0
    for name in POPULARITY:
        end = start + sizes.get(name, 0)
        masks[name] = (place >= start) & (place < end)
        start = end
    return masks

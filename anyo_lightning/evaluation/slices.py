"""Parts of the test rows that are worth a figure of their own, each with its number of rows and its intervals.

A mean over all targets hides who pays: rare and unseen targets, short histories, and targets whose place in the
history is a guess because their timestamp is shared. Which part a row is in is a column of predictions.parquet, so that
a comparison of runs cuts rows as each run's test did.
"""

from collections.abc import Collection, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import polars as pl
from jaxtyping import Bool, Float, Int

from anyo_lightning.evaluation.intervals import bootstrap_means
from anyo_lightning.evaluation.metrics import user_metrics

HEAD_SHARE = 0.2  # of the items with a training interaction, the most frequent
TAIL_SHARE = 0.5  # the least frequent
POPULARITY = ("head", "middle", "tail", "unseen")
HISTORY_BANDS = (20, 50, 100, 200)
TOKEN_BANDS = (8, 16, 32)
WORD_BANDS = (4, 8, 16)
GROUPS = {  # what is sliced by: its title, and its column in predictions.parquet
    "target popularity": "target_popularity",
    "history length": "history_band",
    "target tied": "target_tied",
    "target words": "target_words_band",
    "target tokens": "target_tokens_band",
}

Masks = dict[str, dict[str, Bool[np.ndarray, "rows"]]]


def slice_masks(rows: pl.DataFrame) -> Masks:
    """Which rows belong to which slice, as their columns say.

    Args:
        rows: The columns of `GROUPS`: bands as `popularity_band` and `band` give them, `target_tied` as a Boolean. A
            group whose column is missing or not known for each row is left out.

    Returns:
        A mask for each name in each group, in the order of the bands; slices without a row are left out.
    """
    masks: Masks = {}
    for group, column in GROUPS.items():
        if column not in rows.columns or rows[column].null_count():
            continue
        values, kind = rows[column], rows[column].dtype
        names = {name: name for name in kind.categories} if isinstance(kind, pl.Enum) else {"yes": True, "no": False}
        found = {name: (values == value).to_numpy() for name, value in names.items()}
        masks[group] = {name: mask for name, mask in found.items() if mask.any()}
    return masks


def popularity_band(target: Int[np.ndarray, "rows"], training_counts: Int[np.ndarray, "catalogue"]) -> pl.Series:
    """Of each row's target: `head`, `middle`, `tail`, or `unseen` in training (see `popularity_bounds`)."""
    count = training_counts[target]
    head, tail = popularity_bounds(training_counts)
    band = np.select([count >= head, count > tail, count > 0], [0, 1, 2], 3)
    return _enum(band, POPULARITY)


def popularity_bounds(training_counts: Int[np.ndarray, "catalogue"]) -> tuple[int, int]:
    """Fewest training interactions of a head item, and most of a tail item.

    The head is the fifth of the items with a training interaction that has most of them, the tail the half that has
    fewest. Items at the edge with the same count stay together.
    """
    seen = np.sort(training_counts[training_counts > 0])
    if len(seen) == 0:
        return 1, 0
    head = int(seen[-max(1, round(HEAD_SHARE * len(seen)))])
    tail = int(seen[max(0, round(TAIL_SHARE * len(seen)) - 1)])
    return head, tail


def band(values: Int[np.ndarray, "rows"], edges: Sequence[int]) -> pl.Series:
    """The band of each value: up to the first edge, between edges, or above the last one."""
    names = [f"1-{edges[0]}", *(f"{low + 1}-{high}" for low, high in pairwise(edges)), f"over {edges[-1]}"]
    return _enum(np.searchsorted(np.asarray(edges), values), names)


def slice_figures(
    masks: Masks,
    ranks: Float[np.ndarray, "rows"],
    user: Int[np.ndarray, "rows"],
    cutoffs: Sequence[int],
    *,
    prefix: str,
    extra: Collection[str] = (),
) -> dict[str, dict[str, dict[str, Any]]]:
    """Rank metrics of each slice, means over its users with the 95% intervals of those means.

    Args:
        masks: As `slice_masks` gives them.
        ranks: Mid-rank of each row's target.
        user: The user of each row.
        cutoffs: The k of the metrics.
        prefix: Put before each metric's name.
        extra: What is added of `EXTRA_RANK_METRICS`. Figures of lists are not: a slice is of targets, which lists do
            not have.

    Returns:
        For each group and slice: `rows`, `users` and `metrics`, `{"test/ndcg@10": {"value", "low", "high"}, …}`.
    """
    return {
        group: {name: _slice(ranks[mask], user[mask], cutoffs, prefix, extra) for name, mask in of_group.items()}
        for group, of_group in masks.items()
    }


def _enum(numbers: np.ndarray, names: Sequence[str]) -> pl.Series:
    """Names by their numbers, as a type that keeps their order, also in a Parquet file."""
    return pl.Series(np.asarray(names, dtype=object)[numbers], dtype=pl.Enum(names))


def _slice(
    ranks: np.ndarray, user: np.ndarray, cutoffs: Sequence[int], prefix: str, extra: Collection[str]
) -> dict[str, Any]:
    """One slice's figures."""
    by_user = user_metrics(ranks, user, cutoffs, extra)
    values = np.stack(list(by_user.values()), axis=1)
    metrics = {
        prefix + name: {"value": float(mean), "low": float(low), "high": float(high)}
        for name, mean, low, high in zip(by_user, values.mean(axis=0), *bootstrap_means(values), strict=True)
    }
    return {"rows": len(ranks), "users": len(values), "metrics": metrics}

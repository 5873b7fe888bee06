"""Parts of the test rows that are worth a figure of their own, each with its number of rows and its intervals.

A mean over all targets hides who pays: rare and unseen targets, short histories, and targets whose place in the
history is a guess because their timestamp is shared.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from anyo_lightning.evaluation.intervals import bootstrap_means
from anyo_lightning.evaluation.metrics import user_metrics

HEAD_SHARE = 0.2  # of the items with a training interaction, the most frequent
TAIL_SHARE = 0.5  # the least frequent
HISTORY_BANDS = (20, 50, 100, 200)
TOKEN_BANDS = (8, 16, 32)
WORD_BANDS = (4, 8, 16)

Masks = dict[str, dict[str, Bool[np.ndarray, "rows"]]]


def slice_masks(
    *,
    target: Int[np.ndarray, "rows"],
    history_length: Int[np.ndarray, "rows"],
    tied: Bool[np.ndarray, "rows"],
    training_counts: Int[np.ndarray, "catalogue"],
    item_words: Int[np.ndarray, "catalogue"] | None = None,
    item_tokens: Int[np.ndarray, "catalogue"] | None = None,
) -> Masks:
    """Which rows belong to which slice.

    Args:
        target: Each row's target.
        history_length: Number of items in each row's history.
        tied: Whether the target shares its timestamp with another interaction of the user.
        training_counts: Training interactions of each item of the catalogue.
        item_words: Words of each item's text, where it has one: known to every run, unlike tokens.
        item_tokens: Tokens of each item's text, where they are known.

    Returns:
        A mask for each name in each group: `target popularity` (head, middle, tail, unseen), `history length`,
        `target tied` and, where known, `target words` and `target tokens`. Slices without a row are left out.
    """
    count = training_counts[target]
    head, tail = popularity_bounds(training_counts)
    groups: Masks = {
        "target popularity": {
            "head": count >= head,
            "middle": (count > tail) & (count < head),
            "tail": (count > 0) & (count <= tail) & (count < head),
            "unseen": count == 0,
        },
        "history length": bands(history_length, HISTORY_BANDS),
        "target tied": {"yes": tied, "no": ~tied},
    }
    if item_words is not None:
        groups["target words"] = bands(item_words[target], WORD_BANDS)
    if item_tokens is not None:
        groups["target tokens"] = bands(item_tokens[target], TOKEN_BANDS)
    return {group: {name: mask for name, mask in masks.items() if mask.any()} for group, masks in groups.items()}


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


def slice_figures(
    masks: Masks,
    ranks: Float[np.ndarray, "rows"],
    user: Int[np.ndarray, "rows"],
    cutoffs: Sequence[int],
    *,
    prefix: str = "test/",
) -> dict[str, dict[str, dict[str, Any]]]:
    """Rank metrics of each slice, means over its users with the 95% intervals of those means.

    Args:
        masks: As `slice_masks` gives them.
        ranks: Mid-rank of each row's target.
        user: The user of each row.
        cutoffs: The k of the metrics.
        prefix: Put before each metric's name.

    Returns:
        For each group and slice: `rows`, `users` and `metrics`, `{"test/ndcg@10": {"value", "low", "high"}, …}`.
    """
    return {
        group: {name: _slice(ranks[mask], user[mask], cutoffs, prefix) for name, mask in of_group.items()}
        for group, of_group in masks.items()
    }


def bands(values: Int[np.ndarray, "rows"], edges: Sequence[int]) -> dict[str, Bool[np.ndarray, "rows"]]:
    """Masks of the values up to the first edge, between edges, and above the last one."""
    band = np.searchsorted(np.asarray(edges), values)
    names = [f"1-{edges[0]}", *(f"{low + 1}-{high}" for low, high in pairwise(edges))]
    return {name: band == index for index, name in enumerate([*names, f"over {edges[-1]}"])}


def _slice(ranks: np.ndarray, user: np.ndarray, cutoffs: Sequence[int], prefix: str) -> dict[str, Any]:
    """One slice's figures."""
    by_user = user_metrics(torch.from_numpy(ranks), torch.from_numpy(user), cutoffs)
    values = torch.stack(list(by_user.values()), dim=1).numpy()
    metrics = {
        prefix + name: {"value": float(mean), "low": float(low), "high": float(high)}
        for name, mean, low, high in zip(by_user, values.mean(axis=0), *bootstrap_means(values), strict=True)
    }
    return {"rows": len(ranks), "users": len(values), "metrics": metrics}

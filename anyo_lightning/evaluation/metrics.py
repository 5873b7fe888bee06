"""Ranking metrics as pure functions of arrays: from ranks to figures for each user.

A row is a (user, target) with its rank among the whole catalogue (`ranking.mid_ranks`). A user may have several rows;
every figure is computed for each user first, so that a user with many targets counts once. For one target per user, HR
and Recall are the same.

This file needs numpy alone: `anyo compare` works with it and loads no torch.

Reference:
    Krichene and Rendle, "On Sampled Metrics for Item Recommendation", KDD 2020: why the whole catalogue is ranked.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int


def hit_rate(ranks: Float[np.ndarray, "rows"], user: Int[np.ndarray, "rows"], k: int) -> Float[np.ndarray, "users"]:
    """1 for each user with at least one target among the first k, otherwise 0; users in ascending order."""
    hits, _ = _sum_by_user(ranks <= k, user)
    return (hits > 0).astype(np.float64)


def recall(ranks: Float[np.ndarray, "rows"], user: Int[np.ndarray, "rows"], k: int) -> Float[np.ndarray, "users"]:
    """Share of each user's targets among the first k; users in ascending order."""
    hits, targets = _sum_by_user(ranks <= k, user)
    return hits / targets


def ndcg(ranks: Float[np.ndarray, "rows"], user: Int[np.ndarray, "rows"], k: int) -> Float[np.ndarray, "users"]:
    """Normalised discounted cumulative gain of each user, with binary relevance; users in ascending order.

    It is Σ 1/log2(1 + rank) over the user's targets with rank ≤ k, divided by the largest such sum that the user's
    number of targets n allows: Σ 1/log2(1 + i) for i from 1 to min(n, k); at most 1.
    """
    gains, targets = _sum_by_user((ranks <= k) / np.log2(1 + ranks.astype(np.float64)), user)
    best = np.cumsum(1 / np.log2(np.arange(2, k + 2)))
    # Several targets of one user that tie across the cutoff share a mid-rank and could gain more than the places give.
    return np.minimum(gains / best[np.minimum(targets, k) - 1], 1.0)


def mrr(ranks: Float[np.ndarray, "rows"], user: Int[np.ndarray, "rows"], k: int) -> Float[np.ndarray, "users"]:
    """1 / (rank of each user's best target) if that rank is ≤ k, otherwise 0; users in ascending order."""
    users, index = np.unique(user, return_inverse=True)
    best = np.full(len(users), np.inf)
    np.minimum.at(best, index, ranks)
    return (best <= k) / best


RANK_METRICS = {"hr": hit_rate, "recall": recall, "ndcg": ndcg, "mrr": mrr}


def user_metrics(
    ranks: Float[np.ndarray, "rows"], user: Int[np.ndarray, "rows"], cutoffs: Sequence[int]
) -> dict[str, Float[np.ndarray, "users"]]:
    """All rank metrics of each user at all cutoffs; a figure of a run is the mean of one of these.

    Args:
        ranks: Mid-rank of each row's target; infinite for a target that was not retrieved.
        user: The user of each row, in any order.
        cutoffs: The k of hr@k, recall@k, ndcg@k and mrr@k.

    Returns:
        One vector per metric, in ascending order of users: `{"hr@10": …, "recall@10": …, "ndcg@10": …, "mrr@10": …}`.
    """
    return {f"{name}@{k}": function(ranks, user, k) for k in cutoffs for name, function in RANK_METRICS.items()}


def coverage(top_items: Int[np.ndarray, "lists k"], catalogue_size: int) -> float:
    """Share of the catalogue that occurs in at least one list; ids of -1 (an empty place) are left out."""
    return int((_exposure(top_items, catalogue_size) > 0).sum()) / catalogue_size


def gini(top_items: Int[np.ndarray, "lists k"], catalogue_size: int) -> float:
    """Gini coefficient of how often each item of the catalogue is recommended.

    It is Σ (2i − n − 1) x_i / (n Σ x) over the n items in ascending order of their counts x: 0 when all items are
    recommended equally often, near 1 when all lists hold the same few.
    """
    counts = np.sort(_exposure(top_items, catalogue_size)).astype(np.float64)
    if counts.sum() == 0:
        return 0.0
    weights = 2.0 * np.arange(1, catalogue_size + 1) - catalogue_size - 1
    return float((weights * counts).sum() / (catalogue_size * counts.sum()))


def average_popularity(
    top_items: Int[np.ndarray, "lists k"], training_counts: Int[np.ndarray, "catalogue"]
) -> Float[np.ndarray, "lists"]:
    """Mean number of training interactions of the items in each list; ids of -1 are left out."""
    present = top_items >= 0
    counts = training_counts[np.maximum(top_items, 0)] * present
    return np.asarray(counts.sum(axis=1) / np.maximum(present.sum(axis=1), 1))


def _sum_by_user(values: np.ndarray, user: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sum of the values and number of rows of each user, users in ascending order."""
    _, index, rows = np.unique(user, return_inverse=True, return_counts=True)
    return np.bincount(index, weights=values, minlength=len(rows)), rows


def _exposure(top_items: np.ndarray, catalogue_size: int) -> np.ndarray:
    """How many lists hold each item."""
    return np.bincount(top_items[top_items >= 0], minlength=catalogue_size)

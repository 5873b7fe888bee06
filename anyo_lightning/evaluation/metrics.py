"""Ranking metrics as pure functions of arrays: from ranks to figures for each user.

A row is a (user, target) with its rank among the whole catalogue (`ranking.mid_ranks`). A user may have several rows;
every figure is computed for each user first, so that a user with many targets counts once. For one target per user, HR
and Recall are the same.

This file needs numpy alone: `anyo compare` works with it and loads no torch.

Reference:
    Krichene and Rendle, "On Sampled Metrics for Item Recommendation", KDD 2020: why the whole catalogue is ranked.
    Kaminskas and Bridge, "Diversity, Serendipity, Novelty, and Coverage", ACM TiiS 2016: a survey of what is measured
    beside accuracy.
"""

from collections.abc import Collection, Sequence
from typing import Literal, get_args

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


def precision(ranks: Float[np.ndarray, "rows"], user: Int[np.ndarray, "rows"], k: int) -> Float[np.ndarray, "users"]:
    """Number of each user's targets among the first k, divided by k; users in ascending order."""
    hits, _ = _sum_by_user(ranks <= k, user)
    return hits / k


def average_precision(
    ranks: Float[np.ndarray, "rows"], user: Int[np.ndarray, "rows"], k: int
) -> Float[np.ndarray, "users"]:
    """Average precision of each user, whose mean over users is MAP; users in ascending order.

    It is Σ (targets up to that rank / rank) over the user's targets with rank ≤ k, divided by min(n, k) for n targets,
    as in RecBole, so that a list can reach 1; trec_eval's `map_cut` divides by n. For one target it is MRR.
    """
    order = np.lexsort((ranks, user))
    of, rank = user[order], ranks[order]
    new_user = np.append(True, of[1:] != of[:-1])[: len(of)]
    new_rank = new_user | np.append(True, rank[1:] != rank[:-1])[: len(of)]
    first = np.maximum.accumulate(np.where(new_user, np.arange(len(of)), 0))
    starts = np.flatnonzero(new_rank)
    ends = np.append(starts[1:], len(of))  # targets that tie are all up to their mid-rank
    found = np.repeat(ends, ends - starts) - first
    gains, targets = _sum_by_user(np.where(rank <= k, np.minimum(found / rank, 1.0), 0.0), of)
    return gains / np.minimum(targets, k)


Extra = Literal["precision", "map", "novelty", "ild", "serendipity"]
EXTRA: tuple[Extra, ...] = get_args(Extra)  # what is worked out where it is asked for
RANK_METRICS = {"hr": hit_rate, "recall": recall, "ndcg": ndcg, "mrr": mrr}
EXTRA_RANK_METRICS = {"precision": precision, "map": average_precision}


def user_metrics(
    ranks: Float[np.ndarray, "rows"],
    user: Int[np.ndarray, "rows"],
    cutoffs: Sequence[int],
    extra: Collection[str] = (),
) -> dict[str, Float[np.ndarray, "users"]]:
    """Rank metrics of each user at all cutoffs; a figure of a run is the mean of one of these.

    Args:
        ranks: Mid-rank of each row's target; infinite for a target that was not retrieved.
        user: The user of each row, in any order.
        cutoffs: The k of hr@k, recall@k, ndcg@k and mrr@k.
        extra: What is added of `EXTRA_RANK_METRICS`; other names are passed over.

    Returns:
        One vector per metric, in ascending order of users: `{"hr@10": …, "recall@10": …, "ndcg@10": …, "mrr@10": …}`.
    """
    functions = RANK_METRICS | {name: function for name, function in EXTRA_RANK_METRICS.items() if name in extra}
    return {f"{name}@{k}": function(ranks, user, k) for k in cutoffs for name, function in functions.items()}


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
    return _mean_over_lists(training_counts, top_items)


def novelty(
    top_items: Int[np.ndarray, "lists k"], training_counts: Int[np.ndarray, "catalogue"]
) -> Float[np.ndarray, "lists"]:
    """Mean self-information of the items in each list, in bits; ids of -1 are left out.

    That of an item is −log2 p, where p is its share of all training interactions; an item without any counts as one
    with a single interaction.

    Reference:
        Zhou et al., "Solving the apparent diversity-accuracy dilemma of recommender systems", PNAS 2010.
        Vargas and Castells, "Rank and relevance in novelty and diversity metrics for recommender systems", RecSys 2011
        (expected free discovery, without discount).
    """
    information = np.log2(max(1, training_counts.sum())) - np.log2(np.maximum(training_counts, 1))
    return _mean_over_lists(information, top_items)


def serendipity(
    ranks: Float[np.ndarray, "rows"],
    popularity_ranks: Float[np.ndarray, "rows"],
    user: Int[np.ndarray, "rows"],
    k: int,
) -> Float[np.ndarray, "users"]:
    r"""Share of each user's k places that hold a target which the most popular items do not; users in ascending order.

    It is |(R \ PM) ∩ T| / k for the list R, the targets T, and the list PM of a primitive recommender, here the k
    most popular items. It is at most precision@k, and 0 for popularity itself.

    Args:
        ranks: Mid-rank of each row's target.
        popularity_ranks: The same for a ranking by popularity, as `popularity_ranks` gives them.
        user: The user of each row, in any order.
        k: Length of both lists.

    Reference:
        Ge, Delgado-Battenfeld and Jannach, "Beyond accuracy: evaluating recommender systems by coverage and
        serendipity", RecSys 2010.
    """
    hits, _ = _sum_by_user((ranks <= k) & (popularity_ranks > k), user)
    return hits / k


def popularity_ranks(
    target: Int[np.ndarray, "rows"],
    training_counts: Int[np.ndarray, "catalogue"],
    excluded: Sequence[Int[np.ndarray, "items"]] | None,
) -> Float[np.ndarray, "rows"]:
    """Mid-rank of each row's target in a ranking by training interactions.

    Args:
        target: Each row's target.
        training_counts: Of all items.
        excluded: For each row the items that do not compete, each once and without the target; None excludes nothing.
    """
    counts, wanted = np.sort(training_counts), training_counts[target]
    below, up_to = (np.searchsorted(counts, wanted, side=side) for side in ("left", "right"))
    higher, tied = len(counts) - up_to, up_to - below
    if excluded is not None:
        of_excluded = [training_counts[items] for items in excluded]
        pairs = list(zip(of_excluded, wanted, strict=True))
        higher = higher - np.array([np.count_nonzero(found > own) for found, own in pairs], dtype=np.int64)
        tied = tied - np.array([np.count_nonzero(found == own) for found, own in pairs], dtype=np.int64)
    return np.asarray(1 + higher + (tied - 1) / 2)  # a target ties with itself


def _mean_over_lists(values: Float[np.ndarray, "catalogue"], top_items: Int[np.ndarray, "lists k"]) -> np.ndarray:
    """Mean of the items' values in each list; 0 for an empty one."""
    present = top_items >= 0
    found = values[np.maximum(top_items, 0)] * present
    return np.asarray(found.sum(axis=1) / np.maximum(present.sum(axis=1), 1))


def _sum_by_user(values: np.ndarray, user: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sum of the values and number of rows of each user, users in ascending order."""
    _, index, rows = np.unique(user, return_inverse=True, return_counts=True)
    return np.bincount(index, weights=values, minlength=len(rows)), rows


def _exposure(top_items: np.ndarray, catalogue_size: int) -> np.ndarray:
    """How many lists hold each item."""
    return np.bincount(top_items[top_items >= 0], minlength=catalogue_size)

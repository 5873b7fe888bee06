"""Ranking metrics as pure functions of tensors: ranks first, then figures for each user.

A row is a (user, target). Its rank comes from the scores of the whole catalogue, so nothing is sampled, and tied
items share the middle of the ranks that they occupy: a model that scores all items alike gets a rank in the middle of
the catalogue and not the first. A user may have several rows; every figure is computed for each user first, so that a
user with many targets counts once. For one target a user, HR and Recall are the same.

This file knows neither Lightning nor transformers.

Reference:
    Krichene and Rendle, "On Sampled Metrics for Item Recommendation", KDD 2020: why the whole catalogue is ranked.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def mid_ranks(
    scores: Float[Tensor, "rows catalogue"],
    target: Int[Tensor, "rows"],
    excluded: Bool[Tensor, "rows catalogue"] | None = None,
) -> Float[Tensor, "rows"]:
    """Rank of each row's target: 1 + (items that score higher) + (other items that score the same) / 2.

    Args:
        scores: Score of every item of the catalogue, any sign, finite.
        target: Index of the target.
        excluded: True where an item does not compete, such as the items of the history. The target always competes.

    Returns:
        Ranks in float64, from 1 on; with ties they may end in .5.

    Example:
        >>> mid_ranks(torch.tensor([[-1.0, -2.0, -1.0, -5.0]]), torch.tensor([0]))
        tensor([1.5000], dtype=torch.float64)
    """
    target_scores = scores.gather(1, target[:, None])
    higher = scores > target_scores
    tied = scores == target_scores
    if excluded is not None:
        higher = higher & ~excluded
        tied = tied & ~excluded
    tied = tied.scatter(1, target[:, None], False)  # a target does not tie with itself
    return 1 + higher.sum(1, dtype=torch.float64) + tied.sum(1, dtype=torch.float64) / 2


def hit_rate(ranks: Float[Tensor, "rows"], user: Int[Tensor, "rows"], k: int) -> Float[Tensor, "users"]:
    """1 for each user with at least one target among the first k, else 0; users in ascending order."""
    hits, _ = _sum_by_user((ranks <= k).double(), user)
    return (hits > 0).double()


def recall(ranks: Float[Tensor, "rows"], user: Int[Tensor, "rows"], k: int) -> Float[Tensor, "users"]:
    """Share of each user's targets among the first k; users in ascending order."""
    hits, targets = _sum_by_user((ranks <= k).double(), user)
    return hits / targets


def ndcg(ranks: Float[Tensor, "rows"], user: Int[Tensor, "rows"], k: int) -> Float[Tensor, "users"]:
    """Normalised discounted cumulative gain of each user, with binary relevance; users in ascending order.

    It is Σ 1/log2(1 + rank) over the user's targets with rank ≤ k, divided by the largest such sum that the user's
    number of targets n allows: Σ 1/log2(1 + i) for i from 1 to min(n, k); at most 1.
    """
    gains, targets = _sum_by_user((ranks <= k).double() / torch.log2(1 + ranks.double()), user)
    best = torch.cumsum(1 / torch.log2(torch.arange(2, k + 2, device=ranks.device).double()), dim=0)
    # Several targets of one user that tie across the cutoff share a mid-rank and could gain more than the places give.
    return (gains / best[targets.clamp(max=k) - 1]).clamp(max=1.0)


def mrr(ranks: Float[Tensor, "rows"], user: Int[Tensor, "rows"], k: int) -> Float[Tensor, "users"]:
    """1 / (rank of each user's best target) if that rank is ≤ k, else 0; users in ascending order."""
    users, index = torch.unique(user, return_inverse=True)
    best = ranks.new_full((len(users),), torch.inf).scatter_reduce(0, index, ranks, "amin").double()
    return (best <= k).double() / best


def user_metrics(
    ranks: Float[Tensor, "rows"], user: Int[Tensor, "rows"], cutoffs: Sequence[int]
) -> dict[str, Float[Tensor, "users"]]:
    """All rank metrics of each user at all cutoffs; a figure of a run is the mean of one of these.

    Args:
        ranks: Mid-rank of each row's target; infinite for a target that was not retrieved.
        user: The user of each row, in any order.
        cutoffs: The k of hr@k, recall@k, ndcg@k and mrr@k.

    Returns:
        One vector a metric, in ascending order of users: `{"hr@10": …, "recall@10": …, "ndcg@10": …, "mrr@10": …}`.
    """
    functions = {"hr": hit_rate, "recall": recall, "ndcg": ndcg, "mrr": mrr}
    return {f"{name}@{k}": function(ranks, user, k) for k in cutoffs for name, function in functions.items()}


def coverage(top_items: Int[Tensor, "lists k"], catalogue_size: int) -> float:
    """Share of the catalogue that occurs in at least one list; ids of -1 (an empty place) are left out."""
    return int((_exposure(top_items, catalogue_size) > 0).sum()) / catalogue_size


def gini(top_items: Int[Tensor, "lists k"], catalogue_size: int) -> float:
    """Gini coefficient of how often each item of the catalogue is recommended.

    It is Σ (2i − n − 1) x_i / (n Σ x) over the n items in ascending order of their counts x: 0 when all items are
    recommended equally often, near 1 when all lists hold the same few.
    """
    counts = _exposure(top_items, catalogue_size).sort().values.double()
    if counts.sum() == 0:
        return 0.0
    weights = 2 * torch.arange(1, catalogue_size + 1, device=counts.device).double() - catalogue_size - 1
    return float((weights * counts).sum() / (catalogue_size * counts.sum()))


def average_popularity(
    top_items: Int[Tensor, "lists k"], training_counts: Int[Tensor, "catalogue"]
) -> Float[Tensor, "lists"]:
    """Mean number of training interactions of the items in each list; ids of -1 are left out."""
    present = top_items >= 0
    counts = training_counts[top_items.clamp(min=0)].double() * present
    return counts.sum(1) / present.sum(1).clamp(min=1)


def _sum_by_user(values: Tensor, user: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of the values and number of rows of each user, users in ascending order."""
    _, index, rows = torch.unique(user, return_inverse=True, return_counts=True)
    return torch.zeros(len(rows), dtype=values.dtype, device=values.device).index_add(0, index, values), rows


def _exposure(top_items: Tensor, catalogue_size: int) -> Tensor:
    """How many lists hold each item."""
    return torch.bincount(top_items[top_items >= 0].flatten(), minlength=catalogue_size)

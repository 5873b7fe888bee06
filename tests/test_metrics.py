"""Ranks and figures against torchmetrics, by hand, and on the cases that torchmetrics gets wrong."""

import math

import numpy as np
import pytest
import torch
from torchmetrics.functional.retrieval import (
    retrieval_hit_rate,
    retrieval_normalized_dcg,
    retrieval_recall,
    retrieval_reciprocal_rank,
)

from anyo_lightning.evaluation.intervals import bootstrap_means
from anyo_lightning.evaluation.metrics import (
    average_popularity,
    coverage,
    gini,
    hit_rate,
    mrr,
    ndcg,
    recall,
    user_metrics,
)
from anyo_lightning.evaluation.scores import mask, mid_ranks

ORACLES = {
    "hr": retrieval_hit_rate,
    "recall": retrieval_recall,
    "ndcg": retrieval_normalized_dcg,
    "mrr": retrieval_reciprocal_rank,
}


@pytest.mark.parametrize("targets", [1, 4])
@pytest.mark.parametrize("k", [1, 3, 10, 50])
def test_metrics_equal_torchmetrics_on_positive_scores(targets: int, k: int) -> None:
    """With one and with several targets per user, each user's figure is torchmetrics's."""
    generator = torch.Generator().manual_seed(targets)
    users, catalogue = 20, 50
    scores = torch.rand(users, catalogue, generator=generator) + 0.1
    target = torch.stack([torch.randperm(catalogue, generator=generator)[:targets] for _ in range(users)])
    ranks = mid_ranks(scores.repeat_interleave(targets, 0), target.flatten()).numpy()
    ours = user_metrics(ranks, np.arange(users).repeat(targets), [k])
    relevant = torch.zeros(users, catalogue, dtype=torch.bool).scatter(1, target, True)
    for name, oracle in ORACLES.items():
        expected = [oracle(scores[row], relevant[row], top_k=k) for row in range(users)]
        np.testing.assert_allclose(ours[f"{name}@{k}"], torch.stack(expected).numpy(), rtol=1e-6, atol=1e-6)


def test_negative_scores_rank_as_positive_ones() -> None:
    """Adding a constant changes no rank, although all scores are then below zero."""
    scores = torch.rand(30, 40, generator=torch.Generator().manual_seed(0))
    target = torch.arange(30)
    torch.testing.assert_close(mid_ranks(scores - 5, target), mid_ranks(scores, target))


def test_ties_share_the_middle_of_their_ranks() -> None:
    """Two higher, the target tied with two others: ranks 3, 4 and 5, so 4; all alike: the middle of the catalogue."""
    scores = torch.tensor([[9.0, 8.0, 1.0, 1.0, 1.0, 0.0]])
    assert mid_ranks(scores, torch.tensor([3])).item() == 4
    assert mid_ranks(torch.zeros(1, 6), torch.tensor([0])).item() == 3.5


def test_excluded_items_do_not_compete_and_the_target_always_does() -> None:
    """Two of the three higher items and one of the two tied ones are excluded, and the target itself, in vain."""
    scores, target = torch.tensor([[9.0, 8.0, 7.0, 1.0, 1.0, 1.0]]), torch.tensor([3])
    mask(scores, [np.array([0, 1, 3, 4, 0])], target)
    assert scores[0].tolist() == [-math.inf, -math.inf, 7, 1, -math.inf, 1]
    assert mid_ranks(scores, target).item() == 2.5


def test_metrics_by_hand() -> None:
    """Ranks 1, 4 and 30 of three users: HR@5 = 1, 1, 0; NDCG@5 = 1, 1/log2(5), 0; MRR@5 = 1, 1/4, 0."""
    ranks, user = np.array([1.0, 4.0, 30.0]), np.arange(3)
    assert hit_rate(ranks, user, 5).tolist() == [1, 1, 0]
    assert recall(ranks, user, 5).tolist() == [1, 1, 0]
    assert ndcg(ranks, user, 5).tolist() == pytest.approx([1, 1 / math.log2(5), 0])
    assert mrr(ranks, user, 5).tolist() == [1, 0.25, 0]


def test_each_user_counts_once_however_many_targets() -> None:
    """A user with 9 hits and one with a single miss: HR is 1/2, not 9/10; rows may come in any order."""
    ranks = np.array([1.0] * 5 + [99.0] + [1.0] * 4)
    user = np.array([7] * 5 + [3] + [7] * 4)
    assert hit_rate(ranks, user, 10).tolist() == [0, 1]
    assert recall(ranks, user, 10).mean() == 0.5


def test_a_target_outside_the_top_k_or_not_retrieved_counts_nothing() -> None:
    """Rank k + 1, k + 1/2 (a tie across the edge) and infinity give 0 everywhere."""
    ranks, user = np.array([11.0, 10.5, np.inf]), np.arange(3)
    assert all(not values.any() for values in user_metrics(ranks, user, [10]).values())


def test_metrics_never_fall_as_k_grows_for_one_target_per_user() -> None:
    """HR, Recall, NDCG and MRR are monotone in k and within 0 and 1."""
    ranks = np.random.default_rng(1).integers(1, 60, 200).astype(float)
    values = user_metrics(ranks, np.arange(200), range(1, 61))
    for name in ("hr", "recall", "ndcg", "mrr"):
        by_k = np.stack([values[f"{name}@{k}"] for k in range(1, 61)])
        assert (np.diff(by_k, axis=0) >= 0).all()
        assert by_k.min() >= 0
        assert by_k.max() <= 1


def test_ndcg_of_tied_targets_is_at_most_one() -> None:
    """Three targets of one user that tie at ranks 1 to 3 have rank 2 each: 3/log2(3) over the ideal sum, below 1."""
    value = ndcg(np.array([2.0, 2.0, 2.0]), np.zeros(3, dtype=int), 10).item()
    assert value == pytest.approx(3 / math.log2(3) / (1 + 1 / math.log2(3) + 0.5))
    assert value < 1


def test_coverage_gini_and_popularity_by_hand() -> None:
    """Lists (0, 1), (0, 1), (0, empty): 2 of 4 items; counts 0, 0, 2, 3 have Gini (−1·0 + 1·2 + 3·3 − 3·0)/(4·5)."""
    lists = np.array([[0, 1], [0, 1], [0, -1]])
    assert coverage(lists, 4) == 0.5
    assert gini(lists, 4) == pytest.approx(11 / 20)
    assert average_popularity(lists, np.array([10, 4, 1, 0])).tolist() == [7, 7, 10]
    assert gini(np.array([[0, 1], [2, 3]]), 4) == 0
    assert gini(np.array([[-1]]), 4) == 0


def test_bootstrap_is_seeded_and_as_wide_as_theory_says() -> None:
    """For 2,000 users the interval is mean ± 1.96 standard errors within a tenth of its width, twice the same."""
    values = np.random.default_rng(0).normal(3, 2, size=(2000, 2))
    low, high = bootstrap_means(values)
    error = values.std(axis=0) / math.sqrt(2000)
    np.testing.assert_allclose((high - low) / 2, 1.96 * error, rtol=0.1)
    np.testing.assert_array_equal(bootstrap_means(values), [low, high])


def test_bootstrap_above_fifty_thousand_users_continues_where_resampling_stops() -> None:
    """50,000 users resampled and 50,001 by formula give intervals of the same width."""
    values = np.random.default_rng(0).random((50_001, 1))
    resampled, formula = bootstrap_means(values[:-1], resamples=500), bootstrap_means(values)
    np.testing.assert_allclose(np.diff(resampled, axis=0), np.diff(formula, axis=0), rtol=0.15)


def test_bootstrap_intervals_cover_the_true_mean_nineteen_times_in_twenty() -> None:
    """Of 300 samples of 200 users with a known hit rate of .2, some 285 intervals hold it."""
    generator = np.random.default_rng(5)
    samples = (generator.random((200, 300)) < 0.2).astype(float)
    low, high = bootstrap_means(samples, resamples=1000)
    assert 0.91 < np.mean((low <= 0.2) & (high >= 0.2)) < 0.98


def test_ndcg_of_targets_tied_across_the_cutoff_is_at_most_one() -> None:
    """Three targets of one user tie on the ranks 1 to 3: their mid-rank 2 is within k = 2 for all three."""
    ranks, user = np.array([2.0, 2.0, 2.0]), np.array([0, 0, 0])
    assert ndcg(ranks, user, 2).item() == 1.0

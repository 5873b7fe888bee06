"""Whether the comparison's tests and intervals keep what they promise: by oracle, by hand, and by simulation."""

import numpy as np
import pytest
from scipy import stats

from anyo_lightning.compare.stats import holm, paired_differences, sign_flip_p
from anyo_lightning.evaluation.intervals import bootstrap_means

SIMULATIONS = 1000
USERS = 300
TOLERANCE = 0.014  # 1.96 standard errors of a share of 5% in 1,000 simulations


def values(generator: np.random.Generator, metric: str, users: int = USERS) -> tuple[np.ndarray, np.ndarray]:
    """Two systems' figures of the same users, ranks log-uniform and alike: neither is better."""
    ease = generator.uniform(0, np.log(500), users)
    ranks = np.exp(np.abs(ease + generator.normal(0, 1, (2, users)))).round()
    first, second = np.where(ranks <= 10, 1.0 if metric == "hr" else 1 / np.log2(1 + ranks), 0)
    return first, second


@pytest.mark.parametrize("kind", ["few", "hr", "ndcg", "all differ"])
def test_sign_flips_agree_with_scipy(kind: str) -> None:
    """Exactly where all sign patterns are tried, otherwise within the error of 20,000 permutations."""
    generator = np.random.default_rng(1)
    if kind in ("hr", "ndcg"):
        first, second = values(generator, kind)
        differences = first - second + (generator.random(USERS) < 0.04)
    else:
        differences = generator.normal(0.4, 1, 10) if kind == "few" else generator.normal(0.1, 1, 400)
    oracle = stats.permutation_test(
        (differences,), np.mean, permutation_type="samples", n_resamples=20_000, rng=np.random.default_rng(2)
    ).pvalue
    found = sign_flip_p(np.concatenate([differences, np.zeros(5)]), resamples=20_000)
    assert 0.001 < oracle < 0.9
    assert found == pytest.approx(oracle, rel=1e-9 if kind == "few" else 0, abs=4 * np.sqrt(2 * oracle / 20_000))


def test_sign_flips_of_equal_systems_say_one() -> None:
    """Nobody differs; also where values differ in their last bit only."""
    assert sign_flip_p(np.zeros(20)) == 1
    assert sign_flip_p(np.full(20, 1e-17)) == 1


def test_sign_flips_of_many_users_agree_with_other_flips() -> None:
    """More users of NDCG than are flipped at once: as 2,000 flips of another kind say."""
    generator = np.random.default_rng(0)
    first, second = values(generator, "ndcg", 60_000)
    differences = first - second
    assert (differences != 0).sum() > 10_000
    signs = generator.integers(0, 2, (2000, 60_000), dtype=np.int8) * 2 - 1
    flipped = np.abs([float(row @ differences) for row in signs])
    assert sign_flip_p(differences) == pytest.approx(np.mean(flipped >= abs(differences.sum())), abs=0.03)


def test_holm_by_hand() -> None:
    """Sorted .01 .02 .03 .04 times 4 3 2 1, never falling: .04 .06 .06 .06; at most 1."""
    assert holm([0.03, 0.01, 0.04, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1, 1]
    assert holm([]) == []


def test_effect_size_by_hand() -> None:
    """Differences 1, 1, 1, -1: mean .5, standard deviation 1; none where nobody differs."""
    systems = np.array([[1.0, 0], [1, 0], [1, 0], [-1, 0]])
    found = paired_differences(systems, np.zeros(4))
    assert [difference.effect_size for difference in found] == [0.5, 0]
    assert [difference.value for difference in found] == [0.5, 0]


@pytest.mark.parametrize("metric", ["hr", "ndcg"])
def test_identical_systems_raise_no_more_false_alarms_than_promised(metric: str) -> None:
    """Of 1,000 pairs that differ by luck, p < .05 in at most 5% ± 1.4%, and not in next to none either."""
    generator = np.random.default_rng(3)
    pairs = [values(generator, metric) for _ in range(SIMULATIONS)]
    p = np.array([sign_flip_p(first - second, resamples=999) for first, second in pairs])
    assert 0.025 <= np.mean(p < 0.05) <= 0.05 + TOLERANCE


def test_holm_keeps_the_alarms_of_a_whole_table_at_its_rate() -> None:
    """100 tables of ten systems no better than the baseline: some alarm in about 5 of them, some 40 without Holm."""
    generator = np.random.default_rng(4)
    tables, corrected, raw = 100, 0, 0
    for _ in range(tables):
        p = [sign_flip_p(np.subtract(*values(generator, "hr")), resamples=999) for _ in range(10)]
        corrected += min(holm(p)) < 0.05
        raw += min(p) < 0.05
    assert corrected <= 10
    assert raw >= 20


@pytest.mark.parametrize("better_by", [0.0, 0.03])
def test_intervals_cover_the_true_difference_at_their_rate(better_by: float) -> None:
    """1,000 pairs of which one system hits that much more often: 95% ± 1.4% of intervals hold the difference."""
    generator = np.random.default_rng(5)
    reference = (generator.random((USERS, SIMULATIONS)) < 0.2).astype(float)
    gained = (reference == 0) & (generator.random(reference.shape) < (0.1 + better_by) / 0.8)
    lost = (reference == 1) & (generator.random(reference.shape) < 0.1 / 0.2)
    differences = gained.astype(float) - lost
    low, high = bootstrap_means(differences, resamples=1000)
    covered = np.mean((low <= better_by) & (better_by <= high))
    assert abs(covered - 0.95) <= TOLERANCE


def test_paired_intervals_are_far_narrower_than_unpaired_ones() -> None:
    """Runs that share most of each user's luck."""
    generator = np.random.default_rng(0)
    luck = generator.normal(size=250)
    run, baseline = luck + 0.1 + generator.normal(0, 0.3, 250), luck + generator.normal(0, 0.3, 250)
    difference = paired_differences(run[:, None], baseline)[0]
    assert difference.high - difference.low < 0.5 * np.ptp(bootstrap_means(run[:, None]))

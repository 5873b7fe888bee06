"""The sign-flip test against enumeration, and against very many flips where few users decide (heavy tails)."""

import itertools

import numpy as np
import pytest
from scipy import stats

from anyo_lightning.compare.stats import paired_differences, sign_flip_p


@pytest.mark.parametrize("users", [0, 1, 2, 5, 9, 13])
def test_small_samples_are_enumerated(users: int) -> None:
    """All sign patterns; users who do not differ take no part."""
    generator = np.random.default_rng(users)
    differences = generator.choice([-1, 0.5, 1, 1 / 3], users) + generator.choice([0, 0.25], users)
    patterns = itertools.product([1, -1], repeat=users)
    sums = np.array([sum(sign * value for sign, value in zip(signs, differences, strict=True)) for signs in patterns])
    expected = np.mean(np.abs(sums) >= abs(differences.sum()) - 1e-9)
    assert sign_flip_p(np.concatenate([differences, np.zeros(4)])) == pytest.approx(expected, rel=1e-12)


def heavy_tailed(users: int) -> np.ndarray:
    """Reciprocal ranks up to 5,000 of two systems: next to nothing for most users, up to 1 for a few."""
    generator = np.random.default_rng(6)
    ranks = generator.integers(100, 5000, (2, users)).astype(float)
    ranks[0, :5] = 1
    return np.asarray(1 / ranks[0] - 1 / ranks[1])


def test_a_few_users_decide() -> None:
    """Of 20,000 differences five are near 1: p is .057, where a normal distribution says .036."""
    differences = heavy_tailed(20_000)
    generator = np.random.default_rng(0)
    flips, extreme = 50_000, 0
    for _ in range(50):
        signs = generator.integers(0, 2, (flips // 50, len(differences)), dtype=np.int8).astype(np.float32) * 2 - 1
        extreme += int((np.abs(signs @ differences.astype(np.float32)) >= abs(differences.sum())).sum())
    oracle = extreme / flips
    normal = 2 * stats.norm.sf(abs(differences.sum()) / np.sqrt((differences**2).sum()))
    assert abs(normal - oracle) > 0.015  # what it would be without flips
    assert sign_flip_p(differences) == pytest.approx(oracle, abs=4 * np.sqrt(oracle / 9_999 + oracle / flips))


@pytest.mark.parametrize("users", [200, 12_000])
def test_values_on_a_lattice_keep_their_ties(users: int) -> None:
    """Hits won and lost: p is a binomial's, ties with the observed sum included."""
    differences = np.ones(users)
    differences[: int(users / 2 - 0.85 * np.sqrt(users))] = -1
    won = int((differences > 0).sum())
    expected = stats.binomtest(won, users).pvalue
    assert 0.05 < expected < 0.15
    assert sign_flip_p(differences) == pytest.approx(expected, abs=4 * np.sqrt(expected / 9_999))


def test_each_system_is_tested_as_if_alone() -> None:
    """Systems share their flips; what others differ in changes no p, nor does an error of rounding in the values."""
    generator = np.random.default_rng(1)
    differences = generator.normal(0.05, 1, (700, 3)) * (generator.random((700, 3)) < [0.9, 0.01, 0.5])
    together = [found.p for found in paired_differences(differences, np.zeros(700))]
    assert together[1] == paired_differences(differences[:, 1:2], np.zeros(700))[0].p
    moved = np.where(differences == 0, generator.uniform(-1e-15, 1e-15, differences.shape), differences * (1 + 1e-15))
    assert together == [found.p for found in paired_differences(moved, np.zeros(700))]

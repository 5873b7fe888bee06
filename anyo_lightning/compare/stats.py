"""Paired comparison of systems on the same users: interval, permutation test, Holm's correction, effect size.

What two systems have in common (hard users, easy users) cancels in a paired difference, so that its interval is far
narrower than the two systems' own intervals make one think. The user is the unit: users are independent, their rows
and seeds are not, so both are averaged to one value per user first.

Reference:
    Smucker, Allan and Carterette, "A Comparison of Statistical Significance Tests for Information Retrieval
    Evaluation", CIKM 2007 (the randomisation test is what the others are judged by).
    Holm, "A Simple Sequentially Rejective Multiple Test Procedure", 1979.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy import stats

from anyo_lightning.evaluation.intervals import bootstrap_means

SIGNIFICANCE = 0.05
RESAMPLES = 9_999
SMALLEST_APPROXIMATED = 10_000  # differing users; there the lattice of a test on 0/1 values is finer than p ± .001
MAGNITUDES_APPROXIMATED = 200  # distinct |differences|; with more there is no lattice to speak of


@dataclass(frozen=True)
class Difference:
    """Mean of (a system − a reference) over users."""

    value: float
    low: float  # 95% bootstrap interval
    high: float
    p: float  # sign-flip permutation test, two-sided
    p_holm: float  # corrected for the number of systems compared with this reference
    effect_size: float  # Cohen's d of paired values: mean / standard deviation of the differences

    @property
    def clear(self) -> bool:
        """Whether the difference is significant after the correction."""
        return self.p_holm < SIGNIFICANCE


def paired_differences(
    systems: Float[np.ndarray, "users systems"], reference: Float[np.ndarray, "users"]
) -> list[Difference]:
    """Each system against one reference, corrected for their number; all see the same bootstrap users.

    Args:
        systems: One value per user and system.
        reference: The reference's values for the same users in the same order.

    Returns:
        One difference per system, positive where the system is higher.
    """
    assert len(systems) == len(reference), f"Expected the same users, got {len(systems)} and {len(reference)}"
    if systems.shape[1] == 0:
        return []
    differences = systems - reference[:, None]
    low, high = bootstrap_means(differences)
    p = [sign_flip_p(column) for column in differences.T]
    columns = zip(differences.mean(axis=0), low, high, p, holm(p), effect_sizes(differences), strict=True)
    return [Difference(*map(float, column)) for column in columns]


def sign_flip_p(differences: Float[np.ndarray, "users"], *, resamples: int = RESAMPLES) -> float:
    """Two-sided paired permutation test: were the two systems the same, each difference might as well be negated.

    It is `scipy.stats.permutation_test` with `permutation_type="samples"` on the mean difference, and is that where the
    differing users are few enough for all sign patterns. Otherwise users are grouped by |difference|, of which rank
    metrics know only a few: the signed sum of n users with the same v is v · (2 · Binomial(n, ½) − n), so a permutation
    costs one draw per group instead of one per user. With many groups or very many users, where that sum is normal, its
    normal distribution with variance Σ difference² is used.

    Args:
        differences: One per user. Zeros take no part, since negating them changes nothing.
        resamples: Permutations drawn, always with the same seed.

    Returns:
        The p-value, 1 where no user differs or one alone.
    """
    differing = differences[np.abs(differences) > 1e-12]
    if len(differing) < 2:
        return 1.0
    if 2 ** len(differing) <= resamples:
        test = stats.permutation_test((differing,), np.sum, permutation_type="samples", n_resamples=resamples)
        return float(test.pvalue)
    total = abs(float(differing.sum()))
    # Rounded, since equal differences of averaged values may differ in their last bit.
    magnitudes, counts = np.unique(np.abs(differing).round(9), return_counts=True)
    if len(differing) > SMALLEST_APPROXIMATED or len(magnitudes) > MAGNITUDES_APPROXIMATED:
        return float(2 * stats.norm.sf(total / np.sqrt(np.sum(differing**2))))
    generator = np.random.default_rng(0)
    flipped = (2 * generator.binomial(counts, 0.5, size=(resamples, len(counts))) - counts) @ magnitudes
    return float((1 + np.sum(np.abs(flipped) >= total - 1e-6)) / (1 + resamples))


def holm(p: list[float]) -> list[float]:
    """Holm's step-down p-values: those below α are rejected with a family-wise error of at most α.

    The i-th smallest of m becomes the largest so far of (m − i + 1) · p, at most 1.
    """
    order = np.argsort(p)
    stepped = np.asarray(p)[order] * np.arange(len(p), 0, -1)
    corrected = np.empty(len(p))
    corrected[order] = np.minimum(1.0, np.maximum.accumulate(stepped))
    return [float(value) for value in corrected]


def effect_sizes(differences: Float[np.ndarray, "users systems"]) -> Float[np.ndarray, "systems"]:
    """Mean of each column in standard deviations of its users; 0 where no user differs."""
    if len(differences) < 2:
        return np.zeros(differences.shape[1])
    mean, deviation = differences.mean(axis=0), differences.std(axis=0, ddof=1)
    return np.divide(mean, deviation, out=np.zeros_like(mean), where=deviation > 1e-12)

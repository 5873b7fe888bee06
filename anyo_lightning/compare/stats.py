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

from anyo_lightning.evaluation.intervals import bootstrap_means

SIGNIFICANCE = 0.05
RESAMPLES = 9_999
PATTERNS_AT_ONCE, USERS_AT_ONCE = 256, 4096  # 8 MiB in float64


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
    p = sign_flip_p(differences).tolist()
    columns = zip(differences.mean(axis=0), low, high, p, holm(p), effect_sizes(differences), strict=True)
    return [Difference(*map(float, column)) for column in columns]


def differences_to(values: Float[np.ndarray, "users systems"], reference: int | None) -> list[Difference | None]:
    """Each system against one of them, None for that one; all None without a reference."""
    if reference is None:
        return [None] * values.shape[1]
    found: list[Difference | None] = list(
        paired_differences(np.delete(values, reference, axis=1), values[:, reference])
    )
    return [*found[:reference], None, *found[reference:]]


def sign_flip_p(
    differences: Float[np.ndarray, "users *systems"], *, resamples: int = RESAMPLES
) -> Float[np.ndarray, "*systems"]:
    """Two-sided paired permutation test: were the two systems the same, each difference might as well be negated.

    With so few differing users that `resamples` would be as many as all sign patterns, all are tried, and p is exact.
    Otherwise p is estimated from random patterns, to within a standard error of √(p (1 - p) / resamples): 0.002 at
    p = 0.05. No distribution is assumed: the sum's normal approximation is far off where a few users decide, as in
    reciprocal ranks at high cutoffs, and where values lie on a lattice, as hits do.

    Args:
        differences: One per user and, with a second axis, system. Zeros take no part: negating them changes nothing.
        resamples: Random sign patterns, always with the same seed, the same for all systems. p is at least
            1 / (1 + resamples).

    Returns:
        The p-value of each system, 1 where no user differs or one alone.
    """
    columns = differences.reshape(len(differences), -1)
    columns = np.where(np.abs(columns) > 1e-12, columns, 0.0)
    columns = columns[columns.any(axis=1)]
    users, systems = columns.shape
    sums = columns.sum(axis=0)
    # Sums of the same values in another order differ in their last bits.
    least = np.abs(sums) - 1e-9 * np.abs(columns).sum(axis=0)
    extreme = np.ones(systems)
    generator = np.random.default_rng(0)
    for start in range(0, resamples, PATTERNS_AT_ONCE):
        patterns = min(PATTERNS_AT_ONCE, resamples - start)
        kept = np.zeros((patterns, systems))  # the sums of the values that are not negated
        for first in range(0, users, USERS_AT_ONCE):
            block = columns[first : first + USERS_AT_ONCE]
            bits = np.frombuffer(generator.bytes(patterns * USERS_AT_ONCE // 8), dtype=np.uint8)
            kept += np.unpackbits(bits).reshape(patterns, -1)[:, : len(block)].astype(np.float64) @ block
        extreme += (np.abs(2 * kept - sums) >= least).sum(axis=0)
    p = extreme / (1 + resamples)
    for system in np.flatnonzero(np.count_nonzero(columns, axis=0) <= np.log2(resamples)):
        p[system] = np.mean(np.abs(_all_sums(columns[:, system])) >= least[system])
    return p.reshape(differences.shape[1:])


def _all_sums(values: Float[np.ndarray, "users"]) -> Float[np.ndarray, "patterns"]:
    """The sums of the values under all sign patterns; zeros count once."""
    sums = np.zeros(1)
    for value in values[values != 0]:
        sums = np.concatenate([sums + value, sums - value])
    return sums


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

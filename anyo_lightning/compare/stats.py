"""Paired comparison of two runs on the same users."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from anyo_lightning.evaluation.intervals import bootstrap_means


@dataclass(frozen=True)
class Difference:
    """Mean of (a run − the baseline) over users, with its 95% interval."""

    value: float
    low: float
    high: float

    @property
    def clear(self) -> bool:
        """Whether the interval leaves zero out."""
        return self.low > 0 or self.high < 0


def paired_difference(
    run: Float[np.ndarray, "users"], baseline: Float[np.ndarray, "users"], *, resamples: int = 2000, seed: int = 0
) -> Difference:
    """Bootstrap interval of the mean difference, drawing users with both of their values.

    What two runs have in common (hard users, easy users) cancels, so that it is far narrower than the two runs' own
    intervals make one think.

    Args:
        run: One value a user.
        baseline: The baseline's values for the same users in the same order.
        resamples: How many times the users are drawn again.
        seed: Of the draws.

    Returns:
        The difference, positive where the run is higher.
    """
    assert run.shape == baseline.shape, f"Expected the same users, got {run.shape} and {baseline.shape}"
    difference = run - baseline
    low, high = bootstrap_means(difference[:, None], resamples=resamples, seed=seed)[:, 0]
    return Difference(float(difference.mean()), float(low), float(high))

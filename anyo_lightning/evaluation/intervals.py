"""95% bootstrap intervals of a mean over users.

The user is what is drawn again: rows of one user are not independent, users are. The same number of users gives the
same draws, so intervals can be repeated, and the two sides of a paired difference see the same users.

Reference:
    Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13 (percentile interval).
"""

import numpy as np
from jaxtyping import Float

CONFIDENCE = 0.95
NORMAL_QUANTILE = 1.959964  # of the standard normal at 0.975
LARGEST_RESAMPLED = 50_000
DRAWS_AT_ONCE = 2**22  # 32 MiB of indices


def bootstrap_means(
    values: Float[np.ndarray, "users metrics"], *, resamples: int = 2000
) -> Float[np.ndarray, "2 metrics"]:
    """Lower and upper end of the 95% percentile interval of each column's mean.

    Above 50,000 users the interval is mean ± 1.96 standard errors, which the percentile interval has reached by then
    to about a hundredth of its width, at a fraction of the time.

    Args:
        values: One row per user.
        resamples: How many times the users are drawn again.

    Returns:
        The lower ends, then the upper ends. One user alone gives the mean itself twice.
    """
    users, metrics = values.shape
    assert users > 0, "an interval needs at least one user"
    if users > LARGEST_RESAMPLED:
        half = NORMAL_QUANTILE * values.std(axis=0, ddof=1) / np.sqrt(users)
        return np.stack([values.mean(axis=0) - half, values.mean(axis=0) + half])
    generator = np.random.default_rng(0)
    means = np.empty((resamples, metrics))
    step = max(1, DRAWS_AT_ONCE // users)
    for start in range(0, resamples, step):
        rows = min(step, resamples - start)
        draws = generator.integers(users, size=(rows, users))
        draws += np.arange(rows)[:, None] * users
        times_drawn = np.bincount(draws.ravel(), minlength=rows * users).reshape(rows, users)
        means[start : start + rows] = times_drawn @ values / users
    tail = 50 * (1 - CONFIDENCE)
    ends: Float[np.ndarray, "2 metrics"] = np.percentile(means, [tail, 100 - tail], axis=0)
    return ends

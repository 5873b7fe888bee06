"""Learning-rate schedule: linear warm-up, cosine to zero."""

import math
from collections.abc import Callable


def warmup_cosine(steps: int, *, warmup: float) -> Callable[[int], float]:
    """The factor of the learning rate at each step.

    Args:
        steps: Number of steps in all.
        warmup: Share of them over which the factor rises from zero to one.

    Returns:
        Step to factor; zero from `steps` on.
    """
    rising = max(round(steps * warmup), 1)

    def factor(step: int) -> float:
        if step < rising:
            return (step + 1) / rising
        done = min((step - rising) / max(steps - rising, 1), 1.0)
        return 0.5 * (1 + math.cos(math.pi * done))

    return factor

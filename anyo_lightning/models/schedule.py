"""Learning-rate schedule: linear warm-up, then a cosine to zero or nothing more."""

import math
from collections.abc import Callable


def learning_rate_schedule(steps: int, *, warmup: float, decay: bool) -> Callable[[int], float]:
    """The factor of the learning rate at each step.

    Args:
        steps: Number of steps in total.
        warmup: Share of them over which the factor rises from zero to one.
        decay: Whether it then falls to zero by a cosine; otherwise it stays one.

    Returns:
        Step to factor; with decay zero from `steps` on.
    """
    rising = max(round(steps * warmup), 1)

    def factor(step: int) -> float:
        if step < rising:
            return (step + 1) / rising
        if not decay:
            return 1.0
        done = min((step - rising) / max(steps - rising, 1), 1.0)
        return 0.5 * (1 + math.cos(math.pi * done))

    return factor

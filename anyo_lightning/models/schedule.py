"""Learning rates: of which parameters, and their linear warm-up, then a cosine to zero or nothing more."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from anyo_lightning.errors import InputError


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


def parameter_groups(module: nn.Module, learning_rates: Mapping[str, float]) -> list[dict[str, Any]]:
    """A module's trained parameters, for an optimizer.

    Args:
        module: The module.
        learning_rates: Learning rates of parameters by the start of their name; the longest that fits counts.

    Raises:
        InputError: Nothing is trained, or no trained parameter's name starts so.
    """
    if not any(parameter.requires_grad for parameter in module.parameters()):
        raise InputError(f"Nothing to train in {type(module).__name__}: set model.encoders.backbone.lora, or test it")
    starts = sorted(learning_rates, key=len, reverse=True)
    groups: dict[str, list[nn.Parameter]] = {start: [] for start in (*starts, "")}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            groups[next(start for start in groups if name.startswith(start))].append(parameter)
    if unused := [start for start in starts if not groups[start]]:
        raise InputError(f"Expected learning_rates for starts of trained parameters' names, got {', '.join(unused)}")
    return [
        {"params": parameters, "name": start or "others"} | ({"lr": learning_rates[start]} if start else {})
        for start, parameters in groups.items()
        if parameters
    ]

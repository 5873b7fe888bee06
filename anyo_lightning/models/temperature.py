"""`Temperature`: a learned τ by which cosines are divided before a softmax."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from anyo_lightning.errors import InputError

LOWEST, HIGHEST = 0.01, 1.0  # CLIP's floor; above 1, cosines cannot tell one of many items from the others


class Temperature(nn.Module):
    """`τ = start · exp(x)`, where x is learned from 0, towards which weight decay pulls it, too.

    Args:
        start: τ before the first step.

    Raises:
        InputError: As `check_temperature`.

    Reference: Radford et al., CLIP (arXiv 2103.00020), section 2.5.
    """

    def __init__(self, start: float) -> None:
        super().__init__()
        check_temperature(start)
        self.start = start
        self.log_ratio = nn.Parameter(torch.zeros(()))

    def forward(self) -> Float[Tensor, ""]:
        """τ."""
        return self.start * self.log_ratio.exp()

    @torch.no_grad()
    def clip(self) -> None:
        """Take τ back to between 0.01 and 1 after a step; its gradient is as anywhere else."""
        self.log_ratio.clamp_(math.log(LOWEST / self.start), math.log(HIGHEST / self.start))


def check_temperature(start: float) -> None:
    """Refuse a start that a learned temperature cannot have.

    Raises:
        InputError: It is not between 0.01 and 1.
    """
    if not LOWEST <= start <= HIGHEST:
        raise InputError(f"Expected model.temperature between {LOWEST} and {HIGHEST:g}, got {start}")

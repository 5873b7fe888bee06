"""From an LLM's hidden states to the space in which inner products rank items."""

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


class Projector(nn.Module):
    """`scale · Linear(dropout(norm(x)))`, or with `hidden` a two-layer perceptron with GELU.

    The hidden states of a causal LLM lie in a narrow cone: a few directions carry most of their variance, so that
    an untrained linear map sees nearly the same state everywhere. LayerNorm and, for frozen vectors, `whiten` undo
    that. Weights start at standard deviation `gain / sqrt(inputs)`, biases at zero.

    Args:
        width: Width of the inputs.
        dim: Width of the outputs.
        hidden: Width of a hidden layer; None for a linear map.
        dropout: On the normalised inputs.
        norm: Whether to apply LayerNorm first.
        gain: Standard deviation of the outputs at the start, for inputs of variance 1.
        scale: Factor of the outputs; `dim ** -0.5` on one side keeps inner products independent of `dim`.
    """

    def __init__(
        self,
        width: int,
        dim: int,
        *,
        hidden: int | None = None,
        dropout: float = 0.0,
        norm: bool = True,
        gain: float = 1.0,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width) if norm else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        last = nn.Linear(width if hidden is None else hidden, dim)
        first = [] if hidden is None else [nn.Linear(width, hidden), nn.GELU()]
        self.map = nn.Sequential(*first, last)
        self.scale = scale
        for layer in self.map:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=(gain if layer is last else 1.0) * layer.in_features**-0.5)
                nn.init.zeros_(layer.bias)

    def forward(self, states: Float[Tensor, "... width"]) -> Float[Tensor, "... dim"]:
        """Project states of any leading shape."""
        projected: Tensor = self.map(self.dropout(self.norm(states)))
        return projected * self.scale


class UnitLength(nn.Module):
    """`x / |x|`, so that inner products are cosines."""

    def forward(self, vectors: Float[Tensor, "*rows dim"]) -> Float[Tensor, "*rows dim"]:
        """Normalise the last dimension."""
        return F.normalize(vectors, dim=-1)

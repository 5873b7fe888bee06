"""From an LLM's hidden states to the space in which inner products rank items."""

import torch
from jaxtyping import Float
from torch import Tensor, nn


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


def whiten(vectors: Float[Tensor, "items width"], *, shrinkage: float = 1e-3) -> Float[Tensor, "items width"]:
    """Centre vectors and rotate and scale them so that their covariance is the identity: `whitening`, applied."""
    mean, rotation = whitening(vectors, shrinkage=shrinkage)
    return ((vectors.double() - mean) @ rotation).to(vectors.dtype)


def whitening(
    vectors: Float[Tensor, "items width"], *, shrinkage: float = 1e-3
) -> tuple[Float[Tensor, " width"], Float[Tensor, "width width"]]:
    """The mean and the symmetric matrix (ZCA) that give vectors the identity as their covariance.

    Computes `(x - mean) · U diag(1 / sqrt(λ + shrinkage·λ_max)) Uᵀ` with covariance `U diag(λ) Uᵀ`: directions far
    below the largest, such as those that fewer items than dimensions leave empty, are not blown up.

    Args:
        vectors: One a row.
        shrinkage: Added to each eigenvalue, as a share of the largest.

    Returns:
        In float64.

    Reference: Su et al., Whitening Sentence Representations (arXiv 2103.15316), eq. 4; Kessy et al. 2018 (ZCA).
    """
    mean = vectors.double().mean(0)
    centred = vectors.double() - mean
    values, directions = torch.linalg.eigh(centred.T @ centred / len(vectors))
    # Where all vectors are equal but for rounding, that is not blown up, and the matrix is finite in float32 too.
    least = max(1e-10 * float(vectors.double().square().mean()), torch.finfo(torch.float32).tiny)
    scales = (values.clamp(min=0) + shrinkage * values.max()).clamp(min=least).rsqrt()
    return mean, (directions * scales) @ directions.T

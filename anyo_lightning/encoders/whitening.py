"""Whitening: vectors of covariance 1, measured once."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from anyo_lightning import distributed


class Whitened(nn.Module):
    """`(x - mean) · W`, so that the states have covariance 1; mean and W are measured once, before training.

    The raw EOS states of all texts point in nearly one direction (SmolLM2's first 3 layers: mean cosine .997), so
    that their cosines say nothing until training has removed what they share.
    """

    mean: Tensor
    rotation: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("rotation", torch.eye(width))

    def forward(self, states: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows width"]:
        """Whiten the last dimension."""
        return (states - self.mean) @ self.rotation

    @property
    def measured(self) -> bool:
        """Whether the statistics have been taken, here or in a checkpoint."""
        return not torch.equal(self.rotation, torch.eye(len(self.rotation), device=self.rotation.device))

    @torch.no_grad()
    def measure(self, encode: Callable[[], object]) -> None:
        """Take the statistics of the states that reach this module while `encode` runs."""
        seen: list[Tensor] = []
        with self.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])):
            encode()
        mean, rotation = whitening(torch.cat(seen))
        self.mean.copy_(mean)
        self.rotation.copy_(rotation)
        for statistic in (self.mean, self.rotation):  # of the first process, whose weights DDP gives to all
            distributed.take_from_first(statistic)


def whiten(
    vectors: Float[Tensor, "items width"],
    *,
    by: Float[Tensor, "others width"] | None = None,
    shrinkage: float = 1e-3,
) -> Float[Tensor, "items width"]:
    """Centre vectors and rotate and scale them so that their covariance is the identity: `whitening`, applied.

    Args:
        vectors: One per row.
        by: Others whose rotation and scales are taken instead: their covariance is then the identity.
        shrinkage: As in `whitening`.
    """
    _, rotation = whitening(vectors if by is None else by, shrinkage=shrinkage)
    return ((vectors.double() - vectors.double().mean(0)) @ rotation).to(vectors.dtype)


def leading_components(vectors: Float[Tensor, "items width"], count: int) -> Float[Tensor, "items components"]:
    """Coordinates of vectors along their principal directions, each with mean 0 and variance 1 (PCA whitening).

    Computes `(x - mean)·u_i / sqrt(λ_i)` with covariance `Σ_i λ_i u_i u_iᵀ`, λ falling. Each direction has the sign
    that makes its entry of the largest size positive, so that the same vectors have the same coordinates.

    Args:
        vectors: One per row.
        count: The most coordinates.

    Returns:
        As many as are wanted, or as there are directions in which the vectors differ (λ above a millionth of the
        largest): fewer than there are vectors, at most their width.
    """
    centred = vectors.double() - vectors.double().mean(0)
    values, directions = torch.linalg.eigh(centred.T @ centred / len(vectors))
    values, directions = values.flip(0)[:count], directions.flip(1)[:, :count]
    # Vectors that are equal except for rounding have no directions.
    least = max(1e-6 * float(values[0]), 1e-10 * float(vectors.double().square().mean()))
    values, directions = values[values > least], directions[:, values > least]
    largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
    return (centred @ (directions * largest.sign() * values.rsqrt())).to(vectors.dtype)


def whitening(
    vectors: Float[Tensor, "items width"], *, shrinkage: float = 1e-3
) -> tuple[Float[Tensor, " width"], Float[Tensor, "width width"]]:
    """The mean and the symmetric matrix (ZCA) that give vectors the identity as their covariance.

    Computes `(x - mean) · U diag(1 / sqrt(λ + shrinkage·λ_max)) Uᵀ` with covariance `U diag(λ) Uᵀ`: directions far
    below the largest, such as those that fewer items than dimensions leave empty, are not blown up.

    Args:
        vectors: One per row.
        shrinkage: Added to each eigenvalue, as a share of the largest.

    Returns:
        In float64.

    Reference: Su et al., Whitening Sentence Representations (arXiv 2103.15316), eq. 4; Kessy et al. 2018 (ZCA).
    """
    mean = vectors.double().mean(0)
    centred = vectors.double() - mean
    values, directions = torch.linalg.eigh(centred.T @ centred / len(vectors))
    # If all vectors are equal except for rounding, the rounding is not blown up, and the matrix is finite in float32.
    least = max(1e-10 * float(vectors.double().square().mean()), torch.finfo(torch.float32).tiny)
    scales = (values.clamp(min=0) + shrinkage * values.max()).clamp(min=least).rsqrt()
    return mean, (directions * scales) @ directions.T

"""What follows the language model's state, as few linear maps as it takes: for files that others read.

Whitening, LayerNorm, projector and its scale are modules of ours. Written out, they are `layers(norm(state) - mean)`,
perhaps at length 1, where everything linear between two activations is one matrix.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from anyo_lightning.encoders.projector import Projector, UnitLength
from anyo_lightning.encoders.whitening import Whitened


class NotExpressibleError(Exception):
    """A part of a run has no form in which others could open it; the message says why, without a full stop."""


@dataclass(frozen=True, eq=False)
class Layer:
    """`weight · x + bias`, and GELU after it where there is a further layer."""

    weight: Float[Tensor, "out width"]
    bias: Float[Tensor, " out"]


@dataclass(frozen=True, eq=False)
class FlatHead:
    """`layers(norm(x) - mean)`, in float64.

    Attributes:
        layer_norm: Whether x is first brought to mean 0 and variance 1 (plus 1e-5) over its own entries.
        mean: Subtracted before the first layer, where states are whitened: they differ by little of their size, so
            that in float32 a bias after the product would lose digits.
        layers: With GELU between them; there may be none.
        unit_length: Whether the result is scaled to length 1.
    """

    layer_norm: bool
    mean: Float[Tensor, " width"] | None
    layers: list[Layer]
    unit_length: bool


def flatten(head: nn.Module) -> FlatHead:
    """A head of ours, written out.

    Args:
        head: Of `Projector`, `Whitened`, `UnitLength` and what torch has for these.

    Raises:
        NotExpressibleError: It has other parts, or these in another order.
    """
    layer_norm, unit_length, mean = False, False, None
    layers: list[Layer] = []
    weight: Tensor | None = None  # of what has been composed since the last activation
    bias: Tensor | None = None

    def compose(more: Tensor, further: Tensor) -> tuple[Tensor, Tensor]:
        if weight is None or bias is None:
            return more, further
        return more @ weight, more @ bias + further

    for part in _parts(head):
        if unit_length:
            raise NotExpressibleError(f"its {type(part).__name__} follows the scaling to length 1")
        if isinstance(part, nn.LayerNorm):
            if weight is not None or layers or mean is not None or part.eps != 1e-5:
                raise NotExpressibleError("its LayerNorm is not the first part, with torch's own epsilon")
            layer_norm = True
            weight, bias = torch.diag(part.weight.detach().double()), part.bias.detach().double()
        elif isinstance(part, Whitened):
            rotation = part.rotation.double().T
            if weight is None and not layers:
                mean = part.mean.double()
                weight, bias = rotation, rotation.new_zeros(len(rotation))
            else:
                weight, bias = compose(rotation, -rotation @ part.mean.double())
        elif isinstance(part, nn.Linear):
            weight, bias = compose(part.weight.detach().double(), part.bias.detach().double())
        elif isinstance(part, _Scale):
            if weight is None or bias is None:
                raise NotExpressibleError("its scale follows no linear map")
            weight, bias = part.factor * weight, part.factor * bias
        elif isinstance(part, nn.GELU) and weight is not None and bias is not None:
            layers.append(Layer(weight, bias))
            weight = bias = None
        elif isinstance(part, UnitLength):
            unit_length = True
        else:
            raise NotExpressibleError(f"it has a {type(part).__name__}")
    if weight is not None and bias is not None:
        layers.append(Layer(weight, bias))
    return FlatHead(layer_norm, mean, layers, unit_length)


class _Scale(nn.Module):
    """The factor of a projector's outputs."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor


def _parts(head: nn.Module) -> Iterator[nn.Module]:
    """The parts in order, without those that do nothing in evaluation."""
    if isinstance(head, nn.Sequential):
        for part in head:
            yield from _parts(part)
    elif isinstance(head, Projector):
        yield from _parts(nn.Sequential(head.norm, head.map, _Scale(head.scale)))
    elif not isinstance(head, nn.Identity | nn.Dropout):
        yield head

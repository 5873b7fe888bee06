"""Heads of ours, written out as linear maps: the same vectors, and what cannot be written out."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from anyo_lightning.encoders.projector import Projector, UnitLength
from anyo_lightning.encoders.whitening import Whitened
from anyo_lightning.serving.flat_heads import FlatHead, NotExpressibleError, flatten

WIDTH = 12


def applied(head: FlatHead, states: Tensor) -> Tensor:
    """`layers(norm(x) - mean)` as the docstring says it."""
    states = states.double()
    if head.layer_norm:
        states = F.layer_norm(states, states.shape[-1:])
    if head.mean is not None:
        states = states - head.mean
    for number, layer in enumerate(head.layers):
        states = (F.gelu(states) if number else states) @ layer.weight.T + layer.bias
    return (F.normalize(states, dim=-1) if head.unit_length else states).float()


def whitened() -> Whitened:
    part = Whitened(WIDTH)
    part.mean.copy_(torch.randn(WIDTH))
    part.rotation.copy_(torch.randn(WIDTH, WIDTH))
    return part


def trained(projector: Projector) -> Projector:
    """With weights that differ from those at the start in every part."""
    for parameter in projector.parameters():
        nn.init.normal_(parameter)
    return projector


@pytest.mark.parametrize(
    "make",
    [
        lambda: trained(Projector(WIDTH, 5, scale=0.3)),
        lambda: trained(Projector(WIDTH, 5, norm=False)),
        lambda: trained(Projector(WIDTH, 5, hidden=7, dropout=0.5, scale=2.0)),
        lambda: nn.Sequential(trained(Projector(WIDTH, 5)), UnitLength()),
        lambda: nn.Sequential(whitened(), trained(Projector(WIDTH, 5, hidden=7, norm=False)), UnitLength()),
        lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), whitened(), nn.Linear(WIDTH, 3)),
        lambda: nn.Sequential(whitened(), UnitLength()),
        lambda: nn.Sequential(UnitLength()),
        lambda: nn.Sequential(nn.LayerNorm(WIDTH)),
    ],
)
def test_a_head_written_out_gives_the_same_vectors(make: object) -> None:
    torch.manual_seed(0)
    head = make().eval()  # type: ignore[operator]
    states = torch.randn(9, WIDTH)
    found = flatten(head)
    assert_close(applied(found, states), head(states), rtol=1e-4, atol=1e-4)
    assert len(found.layers) == 1 + any(isinstance(part, nn.GELU) for part in head.modules()) - (
        not any(p.requires_grad for p in head.parameters()) and found.mean is None
    )


@pytest.mark.parametrize(
    ("head", "reason"),
    [
        (nn.Sequential(nn.Linear(WIDTH, 5), nn.Tanh()), "it has a Tanh"),
        (nn.Sequential(nn.Linear(WIDTH, 5), nn.LayerNorm(5)), "LayerNorm is not the first"),
        (nn.Sequential(nn.LayerNorm(WIDTH, eps=1e-12)), "LayerNorm is not the first"),
        (nn.Sequential(UnitLength(), nn.Linear(WIDTH, 5)), "Linear follows the scaling"),
        (nn.Sequential(nn.GELU(), nn.Linear(WIDTH, 5)), "it has a GELU"),
    ],
)
def test_other_heads_are_refused(head: nn.Module, reason: str) -> None:
    with pytest.raises(NotExpressibleError, match=reason):
        flatten(head)

"""Ranks on devices that lack float64, such as Apple's MPS."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from anyo_lightning.evaluation.ranking import mid_ranks


class WithoutFloat64(TorchDispatchMode):
    """Refuses float64, except for converting what has been counted, which happens on the CPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Run the operator and look at what comes out."""
        found = func(*args, **(kwargs or {}))
        given = [arg for arg in args if isinstance(arg, torch.Tensor)]
        if isinstance(found, torch.Tensor) and found.dtype == torch.float64:
            converted = func is torch.ops.aten._to_copy.default
            assert converted or any(tensor.dtype == torch.float64 for tensor in given), f"{func} made float64"
            assert all(tensor.ndim <= 1 for tensor in given), f"{func} reads scores in float64"
        return found


@pytest.mark.parametrize("masked", [False, True])
def test_ranks_are_counted_in_integers(masked: bool) -> None:
    """And are those that a loop counts, halves included."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(-5, 5, (50, 40), generator=generator).float()
    target = torch.randint(40, (50,), generator=generator)
    excluded = torch.rand(50, 40, generator=generator) < 0.3 if masked else None
    with WithoutFloat64():
        ranks = mid_ranks(scores, target, excluded)
    assert ranks.device.type == "cpu"
    for row, rank in enumerate(ranks.tolist()):
        wanted = float(scores[row, target[row]])
        others = [
            float(scores[row, item])
            for item in range(40)
            if item != target[row] and (excluded is None or not excluded[row, item])
        ]
        assert rank == 1 + sum(score > wanted for score in others) + sum(score == wanted for score in others) / 2

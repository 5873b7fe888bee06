"""`compile: true`: a model's layers as one compiled function, which fuses what is between its products.

All layers share one code: it is compiled for the first batch, with symbolic sizes, and serves all others. Only passes
with gradients are compiled, and of these not the last layer's (which computes only what is read: `last_layer.reading`)
nor batches of one row, for which the compiler would make a version of its own; all else runs as it is. So a run
compiles once, or twice where the first layer's input needs no gradient. What the compiler makes is kept in our cache
folder.
"""

import os
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from anyo_lightning.disk import cache_folder
from anyo_lightning.errors import InputError

CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"  # torch's own, documented


def compile_layers(model: nn.Module, device: torch.device) -> None:
    """Let all layers but the last run compiled, in place; their weights and names stay.

    Args:
        model: A transformers model.
        device: Where it runs.

    Raises:
        InputError: When the model has no layers to compile, or this machine no compiler that works.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if len(layers) < 2:
        raise InputError(f"Expected two layers or more for compile, which leaves out the last, got {len(layers)}")
    os.environ.setdefault(CACHE_VARIABLE, str(cache_folder() / "compiled"))
    check_compiler(device)
    kind: Any = type(layers[0])
    compiled: Any = torch.compile(kind.forward, dynamic=True)

    def forward(self: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        packed = kwargs.get("shared_prefix") is not None
        if torch.is_grad_enabled() and (packed or len(hidden_states) > 1):
            return compiled(self, hidden_states, *args, **kwargs)
        return kind.forward(self, hidden_states, *args, **kwargs)

    # A class of its own rather than `layer.compile()`: recomputed activations and hooks stay outside of it.
    wrapped = type(kind.__name__, (kind,), {"forward": forward})
    for layer in layers[:-1]:
        if type(layer) is kind:
            layer.__class__ = wrapped


def check_compiler(device: torch.device) -> None:
    """Compile a sum, so that a machine that cannot says so before anything is trained.

    Args:
        device: Whose compiler: C++ for a CPU, Triton for a GPU.

    Raises:
        InputError: When it cannot.
    """
    numbers = torch.ones(8, device=device)
    try:
        torch.compile(_sum, dynamic=True)(numbers)
    except Exception as error:  # whatever a compiler, a missing header or a full disk may raise
        name = "a C++ compiler (such as g++)" if device.type == "cpu" else "Triton"
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"Expected {name} that works for compile, got: {reason}") from error


def _sum(states: Tensor) -> Tensor:
    return (states.sin() + 1).sum()

"""The last layer of a language model, computed only at the tokens whose states are read."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from anyo_lightning.internals import recomputes_activations

# Models whose last layer runs once, last, and works on each position alone in these parts.
READ_ALONE = ("gemma", "gemma2", "gemma3_text", "granite", "llama", "mistral", "olmo2", "qwen2", "qwen3", "smollm3")
POSITION_WISE = ("self_attn.q_proj", "self_attn.o_proj", "mlp")


@contextmanager
def reading(model: Any, read: tuple[Tensor, Tensor] | None, shape: torch.Size) -> Iterator[None]:
    """Inside, the last layer's position-wise parts are computed at these positions and give zeros elsewhere.

    All positions are computed in models of other families, and where gradient checkpointing computes layers again,
    outside of this context.

    Args:
        model: transformers' model.
        read: Rows and columns of the states that are read; None reads all.
        shape: Rows and columns of the input.
    """
    parts = []
    if read is not None and model.config.model_type in READ_ALONE and not recomputes_activations(model):
        parts = [model.layers[-1].get_submodule(name) for name in POSITION_WISE]
        # Not `nonzero` of a mask, for whose size a GPU would be waited for. A place that is read n times is computed n
        # times and counts as 1/n each time, so that its gradient is not n times too large.
        places = (read[0] * shape[1] + read[1]).flatten()
        counts = torch.zeros(shape.numel(), device=places.device).index_add(0, places, torch.ones_like(places).float())
        shares = 1 / counts.index_select(0, places)
    before = [part.__dict__.get("forward") for part in parts]  # set by a library's own hooks
    for part in parts:
        part.forward = partial(_at, places, shares, part.forward)
    try:
        yield
    finally:
        for part, forward in zip(parts, before, strict=True):
            del part.forward
            if forward is not None:
                part.forward = forward


def _at(
    places: Int[Tensor, " places"],
    shares: Float[Tensor, " places"],
    forward: Callable[[Tensor], Tensor],
    states: Float[Tensor, "batch tokens width"],
) -> Float[Tensor, "batch tokens out"]:
    """A position-wise `forward` at some positions, counted over the whole batch; zeros elsewhere."""
    batch, tokens, _ = states.shape
    found = forward(states.flatten(0, 1)[places][None])[0]
    found = found * shares[:, None].to(found.dtype)
    return found.new_zeros(batch * tokens, found.shape[1]).index_add(0, places, found).view(batch, tokens, -1)

"""The attention "auto": causal attention by blocks where a CPU is faster with it, torch's kernels elsewhere."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from anyo_lightning.internals import outside_of_counting
from anyo_lightning.llm.blocked_attention import causal_attention, causal_attention_op

LONGEST = 1024  # tokens; probabilities are kept for the backward pass, which is memory quadratic in the length


def automatic_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    shared_prefix: tuple[int, int] | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """`causal_attention` on a CPU where there is no mask, transformers' `sdpa` elsewhere.

    With `shared_prefix` (its tokens, those of each row) the batch is one row, as `Packed` lays it out: the prefix
    attends to itself, each row to the prefix and to itself, and the mask is left out.
    """
    causal = getattr(module, "is_causal", False) if is_causal is None else is_causal
    if shared_prefix is not None:
        assert causal
        states = _after_a_prefix(query, key, value, *shared_prefix, dropout=dropout, scaling=scaling)
        return states.transpose(1, 2).contiguous(), None
    ours = (
        causal
        and attention_mask is None
        and query.shape[2] == key.shape[2]
        and options.get("position_bias") is None
        and _is_for_blocks(query, key, value, dropout)
    )
    if not ours:
        output, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **options
        )
        return output, None
    return _by_blocks(query, key, value, scaling).transpose(1, 2).contiguous(), None


def _is_for_blocks(query: Tensor, key: Tensor, value: Tensor, dropout: float) -> bool:
    return (
        query.device.type == "cpu"
        and query.dtype in (torch.bfloat16, torch.float32)
        and query.dtype == key.dtype == value.dtype
        and dropout == 0.0
        and key.shape[2] <= LONGEST
        and query.shape[3] == value.shape[3]
    )


def _by_blocks(query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
    scaling = scaling or query.shape[-1] ** -0.5
    if torch.compiler.is_compiling():
        return causal_attention_op(query, key, value, scaling)
    with torch.autocast("cpu", enabled=False):  # otherwise softmax would run in float32
        return causal_attention(query, key, value, scaling=scaling)


def _attend(query: Tensor, key: Tensor, value: Tensor, *, dropout: float, scaling: float | None) -> Tensor:
    """Causal attention where the last keys are the queries' own."""
    if _is_for_blocks(query, key, value, dropout):
        return _by_blocks(query, key, value, scaling)
    shared = query.shape[1] // key.shape[1]  # torch's kernels for such masks want equally many heads
    key, value = (states.repeat_interleave(shared, dim=1) for states in (key, value))
    with outside_of_counting():
        bias = causal_lower_right(query.shape[2], key.shape[2])
    return F.scaled_dot_product_attention(query, key, value, bias, dropout_p=dropout, scale=scaling)


def _after_a_prefix(
    query: Float[Tensor, "1 heads all width"],
    key: Float[Tensor, "1 key_heads all width"],
    value: Float[Tensor, "1 key_heads all width"],
    prefix: int,
    tokens: int,
    **options: Any,
) -> Float[Tensor, "1 heads all width"]:
    """Attention of a prefix and of rows of `tokens` tokens behind it, which share its keys and values."""
    first = _attend(query[:, :, :prefix], key[:, :, :prefix], value[:, :, :prefix], **options)
    rows = [
        states[0, :, prefix:]
        .reshape(states.shape[1], -1, tokens, states.shape[3])
        .transpose(0, 1)  # (rows, heads, tokens, width)
        for states in (query, key, value)
    ]
    keys, values = (
        torch.cat([states[:, :, :prefix].expand(len(own), -1, -1, -1), own], dim=2)
        for states, own in ((key, rows[1]), (value, rows[2]))
    )
    rest = _attend(rows[0], keys, values, **options).transpose(0, 1).flatten(1, 2)[None]
    return torch.cat([first, rest], dim=2)


AttentionInterface.register("auto", automatic_attention)
AttentionMaskInterface.register("auto", sdpa_mask)  # None for a causal model without padding

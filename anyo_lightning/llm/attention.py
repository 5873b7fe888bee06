"""Causal attention for the CPU: in bfloat16 three times as fast as torch's flash kernel, forward and backward.

Attention is `softmax(q kᵀ / √d + mask) v`. The queries are cut into blocks, and each block is multiplied only with the
keys it may see, so that up to half of the products are left out (37% at 512 tokens, none within one block); heads that
share their keys and values share one product. In bfloat16 these are matrix products at the CPU's full speed. (16, 512)
tokens, 9 heads of 64, one EPYC core with AVX512-BF16: 41 + 85 ms, against 131 + 244 ms of
`scaled_dot_product_attention`. Scores are rounded to bfloat16 before the softmax, as in transformers' `eager`. In
float32 it is faster for long rows (on a core of AVX2: 86% of torch's time at 1000 tokens, level at 300, a tenth slower
at 60), and keeps four times as much for the backward pass.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

BLOCK = 128  # queries in a block: 64 is as fast, 256 slower
LONGEST = 1024  # tokens; probabilities are kept for the backward pass, which is memory quadratic in the length


def causal_attention(
    query: Float[Tensor, "batch heads tokens width"],
    key: Float[Tensor, "batch key_heads tokens width"],
    value: Float[Tensor, "batch key_heads tokens width"],
    *,
    scaling: float,
) -> Float[Tensor, "batch heads tokens width"]:
    """Each token attends to itself and to earlier ones; `heads` is a multiple of `key_heads`."""
    batch, heads, tokens, width = query.shape
    groups = batch * key.shape[1]
    shared = heads // key.shape[1]
    query = (query * scaling).reshape(groups, shared, tokens, width)
    key = key.reshape(groups, tokens, width).transpose(1, 2)  # (groups, width, tokens)
    value = value.reshape(groups, tokens, width)
    block = min(BLOCK, tokens)
    mask = torch.full((block, block), float("-inf"), dtype=query.dtype, device=query.device).triu(1)
    outputs = []
    for start in range(0, tokens, block):
        end = min(start + block, tokens)
        size = end - start
        scores = torch.bmm(query[:, :, start:end].reshape(groups, shared * size, width), key[:, :, :end])
        scores = scores.view(groups, shared, size, end)
        scores[..., start:] += mask[:size, :size]
        weights = torch.softmax(scores, dim=-1).view(groups, shared * size, end)
        outputs.append(torch.bmm(weights, value[:, :end]).view(groups, shared, size, width))
    return torch.cat(outputs, dim=2).view(batch, heads, tokens, width)


def automatic_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """`causal_attention` on a CPU where there is no mask, transformers' `sdpa` elsewhere."""
    causal = getattr(module, "is_causal", False) if is_causal is None else is_causal
    blocked = (
        query.device.type == "cpu"
        and query.dtype in (torch.bfloat16, torch.float32)
        and query.dtype == key.dtype == value.dtype
        and causal
        and attention_mask is None
        and dropout == 0.0
        and query.shape[2] == key.shape[2] <= LONGEST
        and query.shape[3] == value.shape[3]
        and options.get("position_bias") is None
    )
    if not blocked:
        output, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **options
        )
        return output, None
    with torch.autocast("cpu", enabled=False):  # otherwise softmax would run in float32
        states = causal_attention(query, key, value, scaling=scaling or query.shape[-1] ** -0.5)
    return states.transpose(1, 2).contiguous(), None


AttentionInterface.register("auto", automatic_attention)
AttentionMaskInterface.register("auto", sdpa_mask)  # None for a causal model without padding

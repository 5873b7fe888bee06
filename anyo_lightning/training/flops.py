"""FLOPs of training: torch's counter, told of some kernels that it does not know.

A product of an (m, n) with an (n, k) matrix is 2·m·n·k FLOPs; the rest (softmax, norms, the optimizer) is left out, as
is usual. Attention by torch's kernels is counted as if every token saw every other, as torch counts it; by ours
(`llm/blocked_attention.py`, on a CPU), as the products that it makes, down to half of these.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

with suppress(ImportError):  # registers the kernel of the full softmax; a torch before 2.13 has none
    import torch.nn.modules.linear_cross_entropy

Shape = Sequence[int]
# The first is not counted by torch; at the others, which are GPUs', it fails where heads of queries share keys.
ATTENTION = tuple(
    f"_scaled_dot_product_{kernel}_attention{where}"
    for kernel, where in (("flash", "_for_cpu"), ("flash", ""), ("efficient", ""), ("cudnn", ""))
)


def flop_counter() -> FlopCounterMode:
    """Torch's counter, which also sees attention on a CPU, the full softmax by chunks, 4-bit weights and LoRA.

    Without these it misses 4·t² d of the forward and 10·t² d of the backward pass for t tokens of width d in each
    layer, and 6·T·N·d for T targets among N items: a third of SASRec's training. It also misses the product with 4-bit
    weights in the forward pass (the backward pass makes an ordinary one), and products that are added in place.
    """
    known: dict[tuple[Any, str], Callable[..., int]] = {
        **{(torch.ops.aten, kernel): _attention_flop for kernel in ATTENTION},
        **{(torch.ops.aten, f"{kernel}_backward"): _attention_backward_flop for kernel in ATTENTION},
        (torch.ops.aten, "_efficient_attention_forward"): _efficient_flop,
        (torch.ops.aten, "_efficient_attention_backward"): _efficient_backward_flop,
        (torch.ops.aten, "addmm_"): _added_product_flop,
        (torch.ops.bitsandbytes, "gemm_4bit"): _four_bit_flop,
        (torch.ops.torch_nn, "_linear_cross_entropy_batch_chunked"): _chunked_cross_entropy_flop,
    }
    # Where a later version has renamed one (torch's are private), the count is too low and nothing breaks.
    mapping = {getattr(space, name): flops for (space, name), flops in known.items() if hasattr(space, name)}
    return FlopCounterMode(display=False, custom_mapping=mapping)


def _attention_flop(query: Shape, key: Shape, value: Shape, *args: Any, **kwargs: Any) -> int:
    """Scores and sums of values, by heads of queries: those of keys may be fewer."""
    rows, heads, queries, width = query
    return 2 * rows * heads * queries * key[2] * (width + value[3])


def _attention_backward_flop(gradient: Shape, query: Shape, key: Shape, value: Shape, *args: Any, **kwargs: Any) -> int:
    """The scores again, and two gradients of each product."""
    rows, heads, queries, width = query
    return 2 * rows * heads * queries * key[2] * (3 * width + 2 * value[3])


def _efficient_flop(query: Shape, key: Shape, value: Shape, *args: Any, **kwargs: Any) -> int:
    """Of the kernel behind a mask of torch's `causal_lower_right`: heads are the last but one dimension."""
    return _attention_flop(*(_heads_first(shape) for shape in (query, key, value)))


def _efficient_backward_flop(gradient: Shape, query: Shape, key: Shape, value: Shape, *args: Any, **kwargs: Any) -> int:
    return _attention_backward_flop(*(_heads_first(shape) for shape in (gradient, query, key, value)))


def _heads_first(shape: Shape) -> Shape:
    rows, tokens, heads, width = shape
    return rows, heads, tokens, width


def _added_product_flop(added_to: Shape, first: Shape, second: Shape, *args: Any, **kwargs: Any) -> int:
    return 2 * first[0] * first[1] * second[1]


def _four_bit_flop(states: Shape, packed: Shape, shape: Shape, *args: Any, **kwargs: Any) -> int:
    """A product with weights of this shape; dequantising them is left out, as all that is element by element."""
    return 2 * math.prod(states) * shape[0]


def _chunked_cross_entropy_flop(
    states: Shape,
    vectors: Shape,
    target: Shape,
    bias: Any,
    weight: Any,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    batch_chunk_size: int,
    acc_policy: str,
    acc_dtype: Any,
    allow_retain_graph: bool,
    compute_input_grad: bool,
    compute_linear_weight_grad: bool,
    *args: Any,
    **kwargs: Any,
) -> int:
    """The logits, and the gradients of states and vectors, which the kernel works out at once with the loss."""
    (rows, dim), (items, _) = states, vectors
    return 2 * rows * items * dim * (1 + compute_input_grad + compute_linear_weight_grad)

"""FLOPs of training: torch's counter, told of two kernels that it does not know.

A product of an (m, n) with an (n, k) matrix is 2·m·n·k FLOPs; the rest (softmax, norms, the optimizer) is left out, as
is usual. Attention by torch's kernels is counted as if every token saw every other, as torch counts it; by ours
(`llm/blocked_attention.py`, on a CPU), as the products that it makes, down to half of these.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn.modules import linear_cross_entropy as _registers_the_op  # noqa: F401
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

Shape = Sequence[int]


def flop_counter() -> FlopCounterMode:
    """Torch's counter, which also sees attention on a CPU and the full softmax by chunks.

    Without these two it misses 4·t² d of the forward and 10·t² d of the backward pass for t tokens of width d in each
    layer, and 6·T·N·d for T targets among N items: a third of SASRec's training.
    """
    known: dict[tuple[Any, str], Callable[..., int]] = {
        (torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu"): _attention_flop,
        (torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward"): _attention_backward_flop,
        (torch.ops.torch_nn, "_linear_cross_entropy_batch_chunked"): _chunked_cross_entropy_flop,
    }
    # Private names of torch: where a later version has renamed one, the count is too low and nothing breaks.
    mapping = {getattr(space, name): flops for (space, name), flops in known.items() if hasattr(space, name)}
    return FlopCounterMode(display=False, custom_mapping=mapping)


def _attention_flop(query: Shape, key: Shape, value: Shape, *args: Any, **kwargs: Any) -> int:
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]


def _attention_backward_flop(gradient: Shape, query: Shape, key: Shape, value: Shape, *args: Any, **kwargs: Any) -> int:
    return int(sdpa_backward_flop_count(gradient, query, key, value))  # type: ignore[no-untyped-call]


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

"""The only collectives: what several processes tell each other. With one process each returns what it was given."""

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Float, Shaped
from torch import Tensor

T = TypeVar("T")


def world_size() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this process."""
    return dist.get_rank() if world_size() > 1 else 0


def barrier() -> None:
    """Wait for all processes."""
    if world_size() > 1:
        dist.barrier()


def take_from_first(tensor: Tensor) -> None:
    """Replace a tensor, in place, by that of the first process."""
    if world_size() > 1:
        dist.broadcast(tensor, 0)


def sum_over_ranks(value: float, device: torch.device | str = "cpu") -> float:
    """The sum of a number over all processes, in float64.

    Args:
        value: This process's number.
        device: Where the backend reduces: a GPU for NCCL.
    """
    return value if world_size() == 1 else float(total_of(value, device))


def total_of(value: float, device: torch.device | str = "cpu") -> Float[Tensor, ""]:
    """What `sum_over_ranks` does, but the sum stays on the device: the process does not wait for it.

    Args:
        value: This process's number.
        device: Where the backend reduces: a GPU for NCCL.
    """
    total = torch.full((), value, dtype=torch.float64, device=device)
    if world_size() > 1:
        dist.all_reduce(total)
    return total


def mean_over_ranks(values: Float[Tensor, " values"]) -> Float[Tensor, " values"]:
    """The mean over processes of each value; no process waits for it."""
    if world_size() == 1:
        return values
    total = values.clone()
    dist.all_reduce(total)
    return total / world_size()


def rows_before(count: int, device: torch.device | str = "cpu") -> int:
    """Where this process's rows begin among those that `gather_rows` gives.

    Args:
        count: The number of this process's rows.
        device: Where the backend communicates: a GPU for NCCL.
    """
    if world_size() == 1:
        return 0
    counts = gather_rows(torch.tensor([count], device=device))
    return int(counts[: rank()].sum())


def as_many(parts: Sequence[T], device: torch.device | str = "cpu") -> list[T]:
    """These parts, the last one again and again until every process has equally many.

    For passes through a model whose weights are shared out: all processes take part in each of them.

    Args:
        parts: At least one.
        device: Where the backend communicates: a GPU for NCCL.
    """
    most = int(gather_rows(torch.tensor([len(parts)], device=device)).max())
    return [*parts, *[parts[-1]] * (most - len(parts))]


def gather_rows(rows: Shaped[Tensor, "rows ..."], *, with_gradient: bool = False) -> Shaped[Tensor, "all_rows ..."]:
    """The rows of all processes, rank by rank; each may have any number of them.

    Args:
        rows: This process's rows; of one dtype and trailing shape on all. Sparse ones (COO, two dimensions) stay so.
        with_gradient: Whether gradients flow back to the processes that the rows came from, each the sum over all
            processes' losses: with a loss that is each process's own share of a sum, and DDP's mean times the number
            of processes, every parameter gets the gradient that one process would have computed.

    Returns:
        On every process the same rows.
    """
    if world_size() == 1:
        return rows
    if rows.is_sparse:
        return _gather_sparse(rows.coalesce())
    count = torch.tensor([len(rows)], device=rows.device)
    counts = [torch.zeros_like(count) for _ in range(world_size())]
    dist.all_gather(counts, count)
    sizes = [int(c) for c in counts]
    if not with_gradient:
        return _gather(rows.detach(), sizes)
    gathered: Tensor = _GatherWithGradient.apply(rows, sizes)  # type: ignore[no-untyped-call]
    return gathered


def _gather(rows: Tensor, sizes: list[int]) -> Tensor:
    """Padded to the largest, since collectives need equal shapes."""
    padded = rows.new_zeros(max(sizes), *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def _gather_sparse(rows: Tensor) -> Tensor:
    """Entry by entry, each at its row among those of all processes."""
    count, width = rows.shape
    own = torch.tensor([[rows_before(count, rows.device)], [0]], device=rows.device)
    indices, values = gather_rows((rows.indices() + own).t()).t(), gather_rows(rows.values())
    total = int(sum_over_ranks(count, rows.device))
    return torch.sparse_coo_tensor(indices, values, (total, width), check_invariants=True).coalesce()


class _GatherWithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, sizes: list[int]) -> Tensor:
        ctx.sizes = sizes
        return _gather(rows, sizes)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None]:
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total)
        own: Tensor = total.split(ctx.sizes)[rank()]
        return own, None

"""Scores of queries over the whole catalogue, and what one pass over them says: mid-ranks and the best items.

Vectors are dense, or sparse where most of their entries are zero, as those of a floor that counts are.

On the CPU a row is compared and counted while it lies in the cache, by numpy, and of its scores only those are sorted
that can be among the best: torch's own operators take ten times as long (`benchmarks/evaluation_speed.py`). On other
devices they do both, and only ranks and lists are copied.
"""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy import sparse
from torch import Tensor
from torch.nn import functional as F

from anyo_lightning.data.splits import MISSING
from anyo_lightning.errors import InputError

FEWEST = 4  # rows of a product: of fewer, MKL rounds equal items differently, and they would not tie
TILE = 256  # scores whose maximum says whether any of them can be among the best


class Scorer:
    """Scores = queries · vectorsᵀ in full float32, whatever precision the training uses.

    Where both are sparse, products are summed in float64, so that the order of summation decides no tie.

    Args:
        queries: One per row, dense on any device, or sparse (COO).
        vectors: Of all items, dense, or sparse (COO) where the queries are. Scores of dense ones are on their device,
            those of sparse queries on the CPU.
        rows: Most rows that are asked for at a time.
    """

    def __init__(
        self, queries: Float[Tensor, "rows dim"], vectors: Float[Tensor, "catalogue dim"], *, rows: int
    ) -> None:
        assert queries.is_sparse or not vectors.is_sparse, "Expected sparse queries for sparse vectors, got dense ones"
        self._queries: Any = queries
        self._vectors: Any = vectors.float()
        if queries.is_sparse:
            self._queries = as_scipy(queries)
            self._vectors = as_scipy(vectors).T.tocsr() if vectors.is_sparse else self._vectors.T.cpu().numpy()
        device = "cpu" if queries.is_sparse else vectors.device
        self._scores = torch.empty(rows, len(vectors), device=device)  # one allocation for all blocks

    def __call__(self, span: slice) -> Float[Tensor, "span catalogue"]:
        """The scores of some rows, which the next call overwrites."""
        queries, scores = self._queries[span], self._scores[: span.stop - span.start]
        if isinstance(queries, sparse.csr_array):
            found: Any = queries @ self._vectors
            if isinstance(found, sparse.csr_array):
                found.astype(np.float32).toarray(out=scores.numpy())
            else:
                scores.numpy()[:] = found
            return scores
        if 0 < len(queries) < FEWEST:
            queries = torch.cat([queries, queries[-1:].expand(FEWEST - len(queries), -1)])
            scores = scores.new_empty(FEWEST, scores.shape[1])
        precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            with torch.autocast(scores.device.type, enabled=False):
                torch.mm(queries.float().to(scores.device), self._vectors.T, out=scores)
        finally:
            torch.set_float32_matmul_precision(precision)
        return scores[: span.stop - span.start]


def as_scipy(matrix: Float[Tensor, "rows columns"]) -> sparse.csr_array:
    """The same rows in float64, compressed."""
    matrix = matrix.to_sparse().coalesce().cpu()
    indices: tuple[np.ndarray, np.ndarray] = tuple(matrix.indices().numpy())
    return sparse.csr_array((matrix.values().double().numpy(), indices), shape=(matrix.shape[0], matrix.shape[1]))


def as_torch(matrix: sparse.csr_array) -> Float[Tensor, "rows columns"]:
    """The same matrix in float32, as torch's sparse COO."""
    entries = matrix.tocoo()
    indices = torch.from_numpy(np.stack(entries.coords).astype(np.int64))
    values = torch.from_numpy(entries.data.astype(np.float32))
    return torch.sparse_coo_tensor(indices, values, entries.shape, check_invariants=True).coalesce()


def dense_rows(queries: Float[Tensor, "rows dim"], span: slice) -> Float[np.ndarray, "span dim"]:
    """Some rows of dense or sparse queries, in float32, as FAISS takes them."""
    if queries.is_sparse:
        return queries.index_select(0, torch.arange(span.start, span.stop)).to_dense().float().numpy()
    return queries[span].float().cpu().numpy()


def check_finite(what: str, vectors: Float[Tensor, "rows dim"], names: np.ndarray) -> None:
    """Refuse vectors with NaN or infinity, which would give every item the same rank.

    Args:
        what: `item` or `query`, for the sentence.
        vectors: Dense, or sparse (COO).
        names: (rows,) whose they are.

    Raises:
        InputError: Some are not finite.
    """
    if vectors.is_sparse:
        vectors = vectors.coalesce()
        broken = sorted(set(vectors.indices()[0][~vectors.values().isfinite()].tolist()))
    else:
        broken = (~vectors.isfinite().all(dim=1)).nonzero().flatten().tolist()
    if broken:
        raise InputError(
            f"Expected finite {what} vectors, got {len(broken)} of {len(vectors)} with NaN or infinity "
            f"(the first for {names[broken[0]]!r}): training has diverged, a lower learning rate may help"
        )


def at_unit_length(vectors: Float[Tensor, "rows dim"]) -> Float[Tensor, "rows dim"]:
    """Each row divided by its length, so that inner products are cosines; rows of zeros stay. Dense or sparse."""
    if not vectors.is_sparse:
        return F.normalize(vectors, dim=1)
    vectors = vectors.coalesce()
    rows, values = vectors.indices()[0], vectors.values()
    lengths = values.new_zeros(len(vectors)).index_add(0, rows, values.square()).sqrt().clamp(min=1e-30)
    return torch.sparse_coo_tensor(
        vectors.indices(), values / lengths[rows], vectors.shape, is_coalesced=True, check_invariants=True
    )


def mask(
    scores: Float[Tensor, "rows catalogue"], histories: list[np.ndarray], target: Int[Tensor, "rows"]
) -> Float[Tensor, "rows catalogue"]:
    """Minus infinity, in place, for the items of each row's history except for the target."""
    wanted = scores.gather(1, target[:, None])
    rows = np.repeat(np.arange(len(histories)), [len(items) for items in histories])
    items = np.concatenate(histories).astype(np.int64)
    scores[torch.from_numpy(rows).to(scores.device), torch.from_numpy(items).to(scores.device)] = -torch.inf
    return scores.scatter_(1, target[:, None], wanted)


def mid_ranks(scores: Float[Tensor, "rows catalogue"], target: Int[Tensor, "rows"]) -> Float[Tensor, "rows"]:
    """Rank of each row's target: 1 + (items that score higher) + (other items that score the same) / 2.

    Args:
        scores: Score of every item of the catalogue, any sign; minus infinity for one that does not compete, such as
            the items of the history. The target's is finite.
        target: Index of the target.

    Returns:
        Ranks in float64 on the CPU, from 1 on; with ties they may end in .5.

    Example:
        >>> mid_ranks(torch.tensor([[-1.0, -2.0, -1.0, -5.0]]), torch.tensor([0]))
        tensor([1.5000], dtype=torch.float64)
    """
    wanted = scores.gather(1, target[:, None])
    if scores.device.type == "cpu":
        halves = torch.from_numpy(_higher_twice_and_tied(scores.numpy(), wanted.numpy()))
    else:
        halves = _counted_on_device(scores, wanted)
    return 1 + (halves.cpu().double() - 1) / 2  # a target ties with itself


def best_items(
    scores: Float[Tensor, "rows catalogue"], k: int
) -> tuple[Int[np.ndarray, "rows k"], Float[np.ndarray, "rows k"]]:
    """The k best items of each row, the highest score first and, of items that tie, the smallest number first.

    Args:
        scores: Minus infinity for an item that does not compete.
        k: At most the size of the catalogue.

    Returns:
        Items and scores; where fewer than k items compete, a list ends in -1 with a score of minus infinity.
    """
    if scores.device.type == "cpu":
        items, values = _best_of_rows(scores.numpy(), k)
    else:
        items, values = _best_on_device(scores, k)
    return np.where(values == -np.inf, MISSING, items), values


def _higher_twice_and_tied(scores: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """For each row 2 · (scores above the wanted one) + (scores equal to it)."""
    found, halves = np.empty(scores.shape[1], dtype=bool), np.empty(len(scores), dtype=np.int64)
    for row, (own, score) in enumerate(zip(scores, wanted[:, 0], strict=True)):
        halves[row] = np.count_nonzero(np.greater(own, score, out=found))
        halves[row] += np.count_nonzero(np.greater_equal(own, score, out=found))
    return halves


def _best_of_rows(scores: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The best of each row, by a bound that at least k scores reach: the k-th largest of the maxima of tiles."""
    rows, size = scores.shape
    width = min(TILE, max(1, size // (4 * k)))
    maxima = np.maximum.reduceat(scores, np.arange(0, size, width), axis=1)
    bounds = np.partition(maxima, -k, axis=1)[:, -k]
    items, values = np.empty((rows, k), dtype=np.int64), np.empty((rows, k), dtype=scores.dtype)
    for row, (own, bound) in enumerate(zip(scores, bounds, strict=True)):
        found = np.flatnonzero(own > bound)
        if len(found) < k:
            found = np.concatenate([found, np.flatnonzero(own == bound)[: k - len(found)]])
        items[row] = found[np.argsort(-own[found], kind="stable")[:k]]
        values[row] = own[items[row]]
    return items, values


def _counted_on_device(scores: Tensor, wanted: Tensor) -> Tensor:
    """`_higher_twice_and_tied` by torch, in int64: Apple's MPS has no float64."""
    return (scores > wanted).sum(1) + (scores >= wanted).sum(1)


def _best_on_device(scores: Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
    """`_best_of_rows` by torch, except for rows where topk chooses among items that tie for the last place."""
    more = scores.topk(min(k + 1, scores.shape[1]), dim=1)
    by_number, order = more.indices[:, :k].sort(dim=1)
    best, order = more.values[:, :k].gather(1, order).sort(dim=1, descending=True, stable=True)
    items, values = by_number.gather(1, order).cpu().numpy(), best.cpu().numpy()
    chance = (more.values[:, k - 1 : k] == more.values[:, k:]).any(dim=1).nonzero()[:, 0]
    if len(chance):
        rows = chance.cpu().numpy()
        items[rows], values[rows] = _best_of_rows(scores[chance].cpu().numpy(), k)
    return items, values

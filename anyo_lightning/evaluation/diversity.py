"""How unlike each other the items of a list are, by their vectors, dense or sparse."""

from typing import Any

import numpy as np
from jaxtyping import Float, Int
from scipy import sparse
from torch import Tensor

LISTS_AT_ONCE = 8192


def intra_list_diversity(
    top_items: Int[np.ndarray, "lists k"], vectors: Float[Tensor, "catalogue dim"]
) -> Float[np.ndarray, "lists"]:
    """Mean cosine distance of all pairs of items in each list, between 0 and 2; ids of -1 are left out.

    It is Σ_{i≠j} (1 − cos(v_i, v_j)) / (n (n − 1)) over the n items of a list, by Σ_{i≠j} cos = |Σ u_i|² − Σ |u_i|² for
    vectors u of unit length. A vector of zeros has distance 1 to all others, and a list without a pair has 0.

    The distance is that of the model's own space: of two models the one with the more diverse lists need not have the
    higher figure, and a counted baseline's vectors say little (popularity's all point the same way).

    Args:
        top_items: Items of the lists.
        vectors: Of all items, on any device; sparse ones as COO.

    Reference:
        Ziegler et al., "Improving recommendation lists through topic diversification", WWW 2005; Zhang and Hurley,
        "Avoiding monotony", RecSys 2008 (the mean over pairs).
    """
    units = _unit_rows(vectors)
    lengths = _square_sums(units)
    found = np.zeros(len(top_items))
    for start in range(0, len(top_items), LISTS_AT_ONCE):
        block = top_items[start : start + LISTS_AT_ONCE]
        row, place = np.nonzero(block >= 0)
        item = block[row, place]
        members = sparse.csr_array((np.ones(len(item)), (row, item)), shape=(len(block), len(lengths)))
        same = _square_sums(members @ units) - members @ lengths
        count = (block >= 0).sum(axis=1)
        pairs = count * (count - 1)
        found[start : start + LISTS_AT_ONCE] = np.where(pairs > 0, 1 - same / np.maximum(pairs, 1), 0.0)
    return found


def _unit_rows(vectors: Tensor) -> "np.ndarray | sparse.csr_array":
    """The vectors in float64, each divided by its length."""
    vectors = vectors.detach().cpu().double()
    if not vectors.is_sparse:
        dense = vectors.numpy()
        lengths = np.linalg.norm(dense, axis=1, keepdims=True)
        return np.asarray(dense / np.where(lengths > 0, lengths, 1))
    vectors = vectors.coalesce()
    (row, column), values = vectors.indices().numpy(), vectors.values().numpy()
    items, width = vectors.shape
    lengths = np.sqrt(np.bincount(row, weights=values**2, minlength=items))
    return sparse.csr_array((values / np.where(lengths > 0, lengths, 1)[row], (row, column)), shape=(items, width))


def _square_sums(rows: Any) -> np.ndarray:
    """Sum of the squares of each row of an array, dense or sparse: `*` is by element for both."""
    return np.asarray((rows * rows).sum(axis=1)).ravel()

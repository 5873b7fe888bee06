"""The best items of queries among those that may be listed."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from anyo_lightning.errors import InputError
from anyo_lightning.evaluation.index import ItemIndex
from anyo_lightning.evaluation.ranking import block_rows
from anyo_lightning.evaluation.scores import Scorer, best_items, dense_rows


def best_lists(
    queries: Float[Tensor, "rows dim"],
    vectors: Float[Tensor, "items dim"],
    k: int,
    excluded: Sequence[Int[np.ndarray, "_"]],
    listable: Bool[np.ndarray, " items"],
    *,
    index: ItemIndex | None = None,
) -> tuple[Int[np.ndarray, "rows k"], Float[np.ndarray, "rows k"]]:
    """The best items of each query that may be listed and are not excluded, as `best_items` gives them.

    Args:
        queries: Dense, or sparse for a floor that counts.
        vectors: Of the items, dense or sparse as the queries are.
        k: Length of the lists; there are no longer ones than all items.
        excluded: For each query, the numbers of items that its list leaves out.
        listable: (items,) True where an item may be listed at all.
        index: Searched instead of all scores.

    Returns:
        Numbers of items, the best first, `MISSING` where there are no more; and their scores.
    """
    size, length, never = len(vectors), min(k, len(vectors)), np.flatnonzero(~listable)
    found = [np.zeros((0, length), dtype=np.int64)]
    found_scores = [np.zeros((0, length), dtype=np.float32)]
    rows = block_rows(size)
    scorer = None if index else Scorer(queries, vectors, rows=min(rows, len(excluded)))
    for start in range(0, len(excluded), rows):
        span = slice(start, min(start + rows, len(excluded)))
        if scorer is None:
            assert index is not None
            hidden = [np.union1d(items, never) for items in excluded[span]]
            items, values = index.search(dense_rows(queries, span), length, hidden)
        else:
            scores = scorer(span)
            scores[:, torch.from_numpy(never).to(scores.device)] = -torch.inf
            places = np.repeat(np.arange(span.stop - start), [len(items) for items in excluded[span]])
            hidden_items = np.concatenate(excluded[span])
            scores[torch.from_numpy(places), torch.from_numpy(hidden_items)] = -torch.inf
            items, values = best_items(scores, length)
        found.append(items)
        found_scores.append(values)
    return np.concatenate(found), np.concatenate(found_scores)


def check_length(k: int) -> None:
    """Refuse lists of no items.

    Args:
        k: Length of the lists.

    Raises:
        InputError: It is not positive.
    """
    if k < 1:
        raise InputError(f"Expected k to be positive, got {k}")

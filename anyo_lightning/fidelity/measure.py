"""Index fidelity: what an approximate index loses against exact search, and what it saves, on one run's queries."""

import dataclasses
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int

from anyo_lightning.data.splits import Queries, Split
from anyo_lightning.evaluation.evaluation import Evaluation
from anyo_lightning.evaluation.index import ItemIndex, as_found
from anyo_lightning.evaluation.ranking import block_rows, excluded_items, rank

LEAST_SEARCHES, LEAST_SECONDS = 3, 1.0  # all queries are searched so often, and at least so long: small sets are fast


@dataclass(frozen=True)
class Fidelity:
    """One index; recall and NDCG are means over users, as the evaluator works them out.

    Attributes:
        factory: FAISS factory string, with search parameters.
        recall: Share of the exact list of k that the index finds, in any order; of items that tie any will do.
        ndcg: NDCG@k of the lists that the index gives.
        ndcg_change: The same minus that of the exact lists.
        build_seconds: Training and filling.
        size: Bytes of the index as FAISS writes it to a file.
        queries_per_second: FAISS's own search for k items and as many more as the history is long.
        warnings: What FAISS said of too few vectors to train on.
    """

    factory: str
    recall: float
    ndcg: float
    ndcg_change: float
    build_seconds: float
    size: int
    queries_per_second: float
    warnings: tuple[str, ...]


def measure(
    factories: Sequence[str],
    *,
    split: Split,
    queries: Queries,
    rows: Int[np.ndarray, "rows"],
    query_vectors: Float[np.ndarray, "rows dim"],
    vectors: Float[np.ndarray, "catalogue dim"],
    k: int,
    mask_history: bool,
) -> Iterator[Fidelity]:
    """Build each index and search all rows, in the blocks of the evaluator and without the items of their histories.

    Args:
        factories: FAISS factory strings, search parameters after a colon.
        split: The split that the rows are of.
        queries: The rows of one stage.
        rows: Numbers of distinct rows, ascending.
        query_vectors: One query vector per row.
        vectors: All item vectors.
        k: Length of the lists.
        mask_history: Whether the items of a history are left out.

    Raises:
        InputError: A factory string is unknown to FAISS or does not fit the vectors.
    """
    target = queries.target[rows].astype(np.int64)
    history: Callable[[int], np.ndarray] | None = queries.history if mask_history else None
    excluded = None if history is None else excluded_items(rows, target, history)
    exact = rank(
        rows,
        torch.from_numpy(query_vectors),
        torch.from_numpy(vectors),
        target,
        index=ItemIndex(vectors),
        k=k,
        history=history,
    )
    for factory in factories:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            index = ItemIndex(vectors, factory=factory)
        items, scores = _search(index, query_vectors, k, excluded)
        of_found = np.stack([vectors[top] @ query for top, query in zip(items, query_vectors, strict=True)])
        exact_items = as_found(exact.top_items, exact.top_scores, items, of_found)
        found = dataclasses.replace(exact, top_items=items, top_scores=scores, exact_top_items=exact_items)
        means = Evaluation(split, queries, rows, found, [k], exact_index=False).means("")
        change = -means[f"index_ndcg_cost@{k}"]
        yield Fidelity(
            factory=factory,
            recall=means[f"index_recall@{k}"],
            ndcg=means[f"ndcg@{k}"] + change,
            ndcg_change=change + 0.0,  # no minus before zero
            build_seconds=index.build_seconds,
            size=index.size,
            queries_per_second=index.queries_per_second,
            warnings=tuple(str(warning.message) for warning in caught),
        )


def _search(
    index: ItemIndex, query_vectors: np.ndarray, k: int, excluded: list[np.ndarray] | None
) -> tuple[np.ndarray, np.ndarray]:
    """The lists of all rows, searched again and again until the index's speed is known."""
    k = min(k, index.catalogue_size)
    size = block_rows(index.catalogue_size)
    started, searches = time.perf_counter(), 0
    while searches < LEAST_SEARCHES or time.perf_counter() - started < LEAST_SECONDS:
        blocks = [
            index.search(query_vectors[start : start + size], k, excluded and excluded[start : start + size])
            for start in range(0, len(query_vectors), size)
        ]
        searches += 1
    items, scores = zip(*blocks, strict=True)
    return np.concatenate(items), np.concatenate(scores)

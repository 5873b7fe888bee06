"""Exact ranks and top lists of query vectors over a catalogue, in fixed blocks.

Rows are cut into blocks by their number alone, and each block meets the whole catalogue in one matrix of scores, from
which come the target's score, everyone else's, and the best items. The same row therefore has the same neighbours in
the same matrix product whatever the batch size or the number of processes, and figures are bit-identical. Several
processes take whole blocks, and each gets what all have found.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Float, Int
from rich import get_console
from rich.errors import LiveError
from rich.progress import Progress
from torch import Tensor

from anyo_lightning import distributed
from anyo_lightning.evaluation.index import ItemIndex, as_found
from anyo_lightning.evaluation.scores import Scorer, best_items, dense_rows, mask, mid_ranks

BLOCK_ROWS = 256
BLOCK_SCORES = 2**26  # 256 MiB in float32


@dataclass(frozen=True, eq=False)
class Ranking:
    """What was ranked: one entry per row, in the order of the rows that were given."""

    ranks: Float[np.ndarray, "rows"]
    top_items: Int[np.ndarray, "rows k"]  # of the index; -1 where a list ends early
    top_scores: Float[np.ndarray, "rows k"]
    exact_top_items: Int[np.ndarray, "rows k"]  # of those that tie the found ones; top_items where the index is exact


def block_rows(catalogue_size: int) -> int:
    """Rows of a block: 256, or fewer where the catalogue is so large that the scores would pass 256 MiB."""
    return max(1, min(BLOCK_ROWS, BLOCK_SCORES // catalogue_size))


def distinct_rows(
    rows: Int[np.ndarray, "rows"], user: Int[np.ndarray, "queries"], target: Int[np.ndarray, "queries"]
) -> Int[np.ndarray, "distinct"]:
    """Where each (user, target) stands first, in ascending order of its row: samplers may repeat rows, users targets.

    Args:
        rows: Numbers of rows, in any order.
        user: The user of each row of the stage.
        target: The target of each row of the stage.
    """
    numbers, first = np.unique(rows, return_index=True)
    pair = user[numbers].astype(np.int64) * (int(target.max(initial=0)) + 1) + target[numbers]
    kept: np.ndarray = first[np.sort(np.unique(pair, return_index=True)[1])]
    return kept


def excluded_items(
    rows: Int[np.ndarray, "rows"], target: Int[np.ndarray, "rows"], history: Callable[[int], np.ndarray]
) -> list[np.ndarray]:
    """What each row is not recommended: the items of its history, except for the target itself."""
    seen = (np.unique(history(int(row))) for row in rows)
    return [items[items != wanted] for items, wanted in zip(seen, target, strict=True)]


def rank(
    rows: Int[np.ndarray, "rows"],
    queries: Float[Tensor, "rows dim"],
    vectors: Float[Tensor, "catalogue dim"],
    target: Int[np.ndarray, "rows"],
    *,
    index: ItemIndex | None,
    k: int,
    history: Callable[[int], np.ndarray] | None,
    device: torch.device | None = None,
) -> Ranking:
    """Rank each row's target among all items and list the k best.

    One pass over the scores gives both; only an index that is not exact is searched as well.

    Args:
        rows: Numbers of the rows, ascending; they decide the blocks.
        queries: One query vector per row, on any device; sparse (COO) ones are scored on the CPU.
        vectors: All item vectors; the scores are computed on their device, in float32. Sparse (COO) where the queries
            are.
        target: Each row's target.
        index: The index of the same vectors; None lists what the scores say, as for an exact one.
        k: Length of the lists.
        history: Gives the items of a row's history, which then neither compete nor are recommended, except for the
            target itself; None masks nothing.
        device: Where several processes communicate; by default that of the vectors.

    Returns:
        Ranks, lists of the index, and exact lists. An exact index's lists are read from the scores, with the smallest
        number first of items that tie.
    """
    catalogue_size = len(vectors)
    k = min(k, catalogue_size)
    parts: list[Ranking] = [_nothing(k)]
    numbers = rows // block_rows(catalogue_size)
    starts = [0, *(1 + np.flatnonzero(np.diff(numbers))), len(rows)]
    spans = [slice(int(start), int(end)) for start, end in pairwise(starts) if end > start]
    own = spans[distributed.rank() :: distributed.world_size()]
    scores_of = Scorer(queries, vectors, rows=max((span.stop - span.start for span in own), default=0))
    for span in with_progress(own, "ranking"):
        scores = scores_of(span)
        block_target = torch.from_numpy(target[span].astype(np.int64)).to(scores.device)
        if history is not None:
            mask(scores, [history(int(row)) for row in rows[span]], block_target)
        ranks = mid_ranks(scores, block_target).numpy()
        top_items, top_scores = best_items(scores, k)
        if index is None or index.exact:
            parts.append(Ranking(ranks, top_items, top_scores, top_items))
            continue
        excluded = None if history is None else excluded_items(rows[span], target[span], history)
        found, found_scores = index.search(dense_rows(queries, span), k, excluded)
        of_found = scores.gather(1, torch.from_numpy(found).clamp(min=0).to(scores.device)).cpu().numpy()
        parts.append(Ranking(ranks, found, found_scores, as_found(top_items, top_scores, found, of_found)))
    ranked = np.concatenate([np.arange(0), *(np.arange(span.start, span.stop) for span in own)])
    return Ranking(
        **{
            field.name: _gathered(
                np.concatenate([getattr(part, field.name) for part in parts]), ranked, device or vectors.device
            )
            for field in fields(Ranking)
        }
    )


def _nothing(k: int) -> Ranking:
    """The ranking of no rows: a process may have none."""
    lists = np.zeros((0, k), dtype=np.int64)
    return Ranking(np.zeros(0), lists, np.zeros((0, k), dtype=np.float32), lists)


def _gathered(values: np.ndarray, ranked: np.ndarray, device: torch.device) -> np.ndarray:
    """The values of all processes' rows, in the order of the rows."""
    if distributed.world_size() == 1:
        return values
    everyone, order = (
        distributed.gather_rows(torch.from_numpy(array).to(device)).cpu().numpy() for array in (values, ranked)
    )
    return everyone[np.argsort(order, kind="stable")]


def list_ranks(lists: Int[np.ndarray, "rows k"], target: Int[np.ndarray, "rows"]) -> Float[np.ndarray, "rows"]:
    """Place of each row's target in its list, from 1 on; infinite where the list lacks it."""
    found = lists == target[:, None]
    return np.where(found.any(axis=1), 1.0 + found.argmax(axis=1), np.inf)


def with_progress(spans: list[slice], description: str) -> Iterator[slice]:
    """The spans one after another, with a bar that appears once they have taken a second."""
    started = time.perf_counter()
    progress = Progress(console=get_console(), transient=True)
    shown = False
    task = progress.add_task(description, total=len(spans))
    try:
        for done, span in enumerate(spans):
            if not shown and time.perf_counter() - started > 1:
                try:
                    progress.start()
                except LiveError:  # rich before 14.1 allows one bar at a time, and the trainer's is there
                    started = float("inf")
                else:
                    shown = True
            progress.update(task, completed=done)
            yield span
    finally:
        if shown:
            progress.stop()

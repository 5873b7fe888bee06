"""Transitions from item to item, counted, and the choice of how to count them by validation.

All is sparse: scores of histories over the catalogue are ranked without writing out their zeros.
"""

import itertools
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from jaxtyping import Float, Int
from scipy import sparse

from anyo_lightning.data.splits import Queries, Split
from anyo_lightning.evaluation.metrics import ndcg

TUNED_ROWS = 1024  # that are scored at a time


@dataclass(frozen=True)
class Transitions:
    """How a Markov floor counts and asks.

    Args:
        window: Transitions from an item to each of the next `window` items, weighted 1 / gap.
        counts: `raw`, or `log1p` of each weighted count.
        power: Each row is divided by its sum to this power: 1 gives probabilities, 0 leaves counts.
        recent: Number of latest items of the history that ask.
        decay: The k-th latest item (k = 0, 1, …) asks with weight decay^k.
    """

    window: int = 5
    counts: Literal["raw", "log1p"] = "raw"
    power: float = 1.0
    recent: int = 10
    decay: float = 0.7


USUAL = Transitions()


def transition_matrix(split: Split, transitions: Transitions) -> sparse.csr_array:
    """(catalogue, catalogue) weighted, transformed and normalised counts of transitions in the training sequences."""
    size = split.catalogue_size
    eligible, user = split.stages == 0, split.user_of_interaction
    gaps = range(1, min(transitions.window, len(eligible) - 1) + 1)
    pairs = [np.flatnonzero(eligible[:-gap] & eligible[gap:] & (user[:-gap] == user[gap:])) for gap in gaps]
    sources, following = (
        np.concatenate(
            [split.items[:0], *(split.items[found + shift * gap] for gap, found in zip(gaps, pairs, strict=True))]
        )
        for shift in (0, 1)
    )
    weights = np.repeat([1 / gap for gap in gaps], [len(found) for found in pairs])
    matrix = sparse.coo_array((weights, (sources, following)), shape=(size, size)).tocsr()  # sums what occurs twice
    if transitions.counts == "log1p":
        matrix.data = np.log1p(matrix.data)
    sums = np.maximum(matrix.sum(axis=1), 1e-12) ** transitions.power
    matrix.data = (matrix.data / np.repeat(sums, np.diff(matrix.indptr))).astype(np.float32)
    return matrix


CHOICES = {
    "window": (1, 3, 5, 10),
    "counts": ("raw", "log1p"),
    "power": (0.0, 0.5, 1.0),
    "decay": (0.5, 0.7, 0.8, 0.9),
}


def best_transitions(split: Split, queries: Queries, *, masked: bool) -> Transitions:
    """The choice with the highest NDCG@10, the first one in a tie.

    Args:
        split: Whose training is counted.
        queries: The validation's.
        masked: Whether the items of histories do not compete.
    """
    size, recent = split.catalogue_size, 20
    asking = {decay: _recent_of_rows(queries, size, recent, float(decay)) for decay in CHOICES["decay"]}
    seen = _seen_of_rows(queries, size) if masked else None
    best, best_value = USUAL, -1.0
    for window, counts, power in itertools.product(CHOICES["window"], CHOICES["counts"], CHOICES["power"]):
        base = Transitions(window=int(window), counts=counts, power=float(power), recent=recent)  # type: ignore[arg-type]
        matrix = transition_matrix(split, base)
        for decay in CHOICES["decay"]:
            ranks = sparse_mid_ranks(asking[decay], matrix, queries.target, seen)
            value = float(ndcg(ranks, queries.user, 10).mean())
            if value > best_value:
                best, best_value = replace(base, decay=float(decay)), value
    return best


def sparse_mid_ranks(
    asking: sparse.csr_array, matrix: sparse.csr_array, target: Int[np.ndarray, "rows"], seen: sparse.csr_array | None
) -> Float[np.ndarray, "rows"]:
    """`mid_ranks` of the scores `asking @ matrix`, none of them below zero, without writing out the zeros.

    Args:
        asking: (rows, catalogue), not negative.
        matrix: (catalogue, catalogue), not negative.
        target: Each row's target.
        seen: (rows, catalogue), 1 where an item does not compete, which a target always does; None lets all compete.
    """
    ranks = np.empty(len(target))
    for start in range(0, len(target), TUNED_ROWS):
        part = slice(start, start + TUNED_ROWS)
        wanted_items = target[part]
        scores = (asking[part] @ matrix).astype(np.float32)
        wanted = scores[np.arange(len(wanted_items)), wanted_items]
        competing = np.full(len(wanted), matrix.shape[1])
        if seen is not None:
            scores = scores - scores.multiply(seen[part])
            competing -= np.diff(seen[part].indptr)
        row = np.repeat(np.arange(len(wanted)), np.diff(scores.indptr))
        higher, same = (
            np.bincount(row[found], minlength=len(wanted))
            for found in (scores.data > wanted[row], scores.data == wanted[row])
        )
        same = np.where(wanted > 0, same, competing - higher)
        ranks[part] = 1 + higher + (same - 1) / 2  # a target ties with itself
    return ranks


def _recent_of_rows(queries: Queries, size: int, recent: int, decay: float) -> sparse.csr_array:
    """What `RecentItems` makes of each row's history."""
    places = queries.history_end[:, None] - 1 - np.arange(recent)
    row, back = np.nonzero(places >= queries.history_start[:, None])
    weights = np.float32(decay) ** back.astype(np.float32)
    items = queries.items[places[row, back]]
    return sparse.coo_array((weights, (row, items)), shape=(len(queries), size)).tocsr()


def _seen_of_rows(queries: Queries, size: int) -> sparse.csr_array:
    """1 at each item of a row's history, except for its target."""
    row = np.repeat(np.arange(len(queries)), queries.history_lengths)
    items = np.concatenate([queries.items[:0], *(queries.history(row) for row in range(len(queries)))])
    kept = items != queries.target[row]
    pairs = np.unique(row[kept] * size + items[kept])
    return sparse.csr_array(
        (np.ones(len(pairs), dtype=np.float32), (pairs // size, pairs % size)), (len(queries), size)
    )

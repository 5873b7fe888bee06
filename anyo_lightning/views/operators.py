"""Views of a history: the classic operators, pure functions on its item ids.

Each returns new arrays and never writes into its argument, which may be a span of the stored interactions, and each
keeps at least one item. Histories have at least one item. `write.py` has the views that an LLM writes.

No view of the history before a target says what the target is: substitutes are drawn from all but it.
"""

import numpy as np
from jaxtyping import Bool, Float, Int


def crop(items: Int[np.ndarray, " items"], *, share: float, random: np.random.Generator) -> Int[np.ndarray, " cropped"]:
    """A contiguous part of floor(share · L) items, from a random start.

    Args:
        items: The history, oldest first.
        share: η, what is kept.
        random: Source of randomness.

    Reference: CL4SRec (arXiv 2010.14395), item crop.
    """
    kept = max(_count(share, items), 1)
    start = random.integers(len(items) - kept + 1)
    return items[start : start + kept].copy()


def mask(items: Int[np.ndarray, " items"], *, share: float, random: np.random.Generator) -> Bool[np.ndarray, " items"]:
    """True at floor(share · L) random positions: items to hide from the encoder. This is not padding: they stay.

    Args:
        items: The history, oldest first.
        share: γ, what is hidden.
        random: Source of randomness.

    Reference: CL4SRec (arXiv 2010.14395), item mask.
    """
    hidden = np.zeros(len(items), dtype=bool)
    hidden[_positions(min(_count(share, items), len(items) - 1), items, random)] = True
    return hidden


def reorder(
    items: Int[np.ndarray, " items"], *, share: float, random: np.random.Generator
) -> Int[np.ndarray, " items"]:
    """The same items with a contiguous part of floor(share · L) of them shuffled.

    Args:
        items: The history, oldest first.
        share: β, what is shuffled.
        random: Source of randomness.

    Reference: CL4SRec (arXiv 2010.14395), item reorder.
    """
    shuffled = _count(share, items)
    start = random.integers(len(items) - shuffled + 1)
    view = items.copy()
    view[start : start + shuffled] = random.permutation(view[start : start + shuffled])
    return view


def substitute(
    items: Int[np.ndarray, " items"],
    *,
    share: float,
    similar: Int[np.ndarray, "catalogue neighbours"],
    target: int,
    random: np.random.Generator,
) -> Int[np.ndarray, " items"]:
    """The history with floor(share · L) random items each replaced by a random one of its most similar items.

    Args:
        items: The history, oldest first.
        share: ρ, what is replaced.
        similar: The most similar items of each item.
        target: The item that follows the history, which replaces none; an item that is similar to it alone stays.
        random: Source of randomness.

    Reference: CoSeRec (arXiv 2108.06479), substitute; there the target may be drawn, too.
    """
    return _replaced(items, _positions(_count(share, items), items, random), similar, target, random)


def substitute_before_last(
    items: Int[np.ndarray, " items"],
    *,
    chance: float,
    similar: Int[np.ndarray, "catalogue neighbours"],
    target: int,
    random: np.random.Generator,
) -> Int[np.ndarray, " items"]:
    """The history with each item but the last replaced, at a chance, by a random one of its most similar items.

    The last item says most about the next one, and a history of one item stays as it is.

    Args:
        items: The history, oldest first.
        chance: Of each item but the last.
        similar: The most similar items of each item.
        target: The item that follows the history, which replaces none; an item that is similar to it alone stays.
        random: Source of randomness.

    Reference: SRA-CL (arXiv 2503.04162), intra-user views; there the last item may be replaced, too, and the target
    may be drawn.
    """
    return _replaced(items, np.flatnonzero(random.random(len(items) - 1) < chance), similar, target, random)


def importance(
    items: Int[np.ndarray, " items"], *, share: float, scores: Float[np.ndarray, " items"]
) -> Int[np.ndarray, " kept"]:
    """The history without its floor(share · L) least important items; among equals the older one goes first.

    Args:
        items: The history, oldest first.
        share: What is dropped.
        scores: The importance of each item of the history.
    """
    dropped = min(_count(share, items), len(items) - 1)
    return items[np.sort(np.argsort(scores, kind="stable")[dropped:])]


def _count(share: float, items: np.ndarray) -> int:
    """Floor(share · L), safe from products such as .29 · 100 that lie just below their integer."""
    return int(share * len(items) + 1e-9)


def _replaced(
    items: np.ndarray, positions: np.ndarray, similar: np.ndarray, target: int, random: np.random.Generator
) -> np.ndarray:
    view, choices = items.copy(), similar[items[positions]]
    allowed = choices != target
    counts = allowed.sum(1)
    drawn = random.integers(np.maximum(counts, 1))
    place = (allowed.cumsum(1) > drawn[:, None]).argmax(1)  # of the allowed ones the one with the number drawn
    view[positions] = np.where(counts > 0, choices[np.arange(len(place)), place], items[positions])
    return view


def _positions(count: int, items: np.ndarray, random: np.random.Generator) -> np.ndarray:
    return random.choice(len(items), size=count, replace=False)

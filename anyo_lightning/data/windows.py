"""Windows: which slice of a history is read at once, and which of its boundaries are supervised there.

Every training target is supervised exactly once an epoch, and items are only ever dropped whole, oldest first.
"""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from anyo_lightning.data.splits import Queries, Split

Supervision = Literal["all", "last"]


@dataclass(frozen=True)
class Windows:
    """Slices of users' training sequences: inputs `start … end`, supervised from `supervised` to `end` (exclusive)."""

    user: np.ndarray  # (windows,) int64
    start: np.ndarray  # (windows,) int64, positions in split.items
    end: np.ndarray
    supervised: np.ndarray
    length: np.ndarray  # (windows,) tokens, or items without text

    def __len__(self) -> int:
        return len(self.user)


def training_windows(
    split: Split,
    item_lengths: np.ndarray,
    *,
    max_items: int,
    max_length: int,
    supervision: Supervision,
    overlap: float = 0.5,
    random: np.random.Generator | None = None,
) -> Windows:
    """Cut training sequences into windows in which each target is supervised exactly once.

    With `supervision="all"` a sequence longer than a window is cut into windows that overlap; a boundary that an
    earlier window has supervised is context only. With `"last"` each prefix is a window of its own with one
    target, its last: the recipe of E4SRec's code, RecBole and others, at about n/2 times the tokens.

    Args:
        split: The split; only interactions of stage 0 are used.
        item_lengths: (catalogue,) tokens of each item, or ones.
        max_items: Most items a window.
        max_length: Most tokens a window, in units of `item_lengths`.
        supervision: "all" or "last".
        overlap: Share of a window's items that the next one reads again, as context.
        random: Cut the first window of a longer sequence at a random place, so that contexts differ between epochs.

    Returns:
        The windows, by user and position.
    """
    rows: list[tuple[int, int, int, int]] = []
    training_ends = _training_ends(split)
    positions = np.concatenate([[0], np.cumsum(item_lengths[split.items], dtype=np.int64)])

    def longest(start: int, last: int) -> int:
        """End of the longest window from `start` that reads no input after `last`."""
        fits = int(np.searchsorted(positions, positions[start] + max_length, side="right")) - 1
        return max(min(fits, start + max_items, last), start + 1)

    for user in range(split.users):
        first, last = int(split.offsets[user]), int(training_ends[user]) - 1  # the last item is a target only
        if last <= first:
            continue
        if supervision == "last":
            for end in range(first + 1, last + 1):
                start = latest_start(positions, end, first, max_items=max_items, max_length=max_length)
                rows.append((user, start, end, end - 1))
            continue
        start, end = first, longest(first, last)
        if random is not None and end < last:
            end = int(random.integers(first + 1, end + 1))
        rows.append((user, start, end, start))
        while end < last:
            supervised = end
            start = end - int(overlap * (end - start))
            while (end := longest(start, last)) <= supervised:
                start += 1
            rows.append((user, start, end, supervised))
    columns = np.array(rows, dtype=np.int64).reshape(-1, 4).T
    users, starts, ends, supervisions = columns
    return Windows(users, starts, ends, supervisions, positions[ends] - positions[starts])


def with_shuffled_ties(split: Split, random: np.random.Generator) -> Split:
    """The same split with each user's training items of one timestamp in random order.

    Nobody knows in which order they came: file order is one guess, and a model that trains on it alone learns it.
    """
    user, time = split.user_of_interaction, split.timestamps
    starts = np.concatenate([[True], (user[1:] != user[:-1]) | (time[1:] != time[:-1]) | (split.stages[1:] > 0)])
    order = np.lexsort((random.random(len(starts)), np.cumsum(starts)))
    return replace(split, items=split.items[order])


def latest_start(positions: np.ndarray, end: int, first: int, *, max_items: int, max_length: int) -> int:
    """Start of the latest whole items before `end` that fit: the oldest are dropped."""
    fits = int(np.searchsorted(positions, positions[end] - max_length, side="left"))
    return min(max(fits, end - max_items, first), end - 1)


def _training_ends(split: Split) -> np.ndarray:
    """(users,) the position after each user's last training interaction."""
    counts = np.add.reduceat((split.stages == 0).astype(np.int64), split.offsets[:-1])
    return np.asarray(split.offsets[:-1] + counts)


def query_windows(
    queries: Queries, item_lengths: np.ndarray, *, max_items: int, max_length: int
) -> tuple[np.ndarray, np.ndarray]:
    """For each row of `queries`: start and end of the latest whole items that fit, as positions in `queries.items`."""
    positions = np.concatenate([[0], np.cumsum(item_lengths[queries.items], dtype=np.int64)])
    ends = queries.history_end.astype(np.int64)
    fits = np.searchsorted(positions, positions[ends] - max_length, side="left")
    starts = np.minimum(np.maximum.reduce([fits, ends - max_items, queries.history_start]), ends - 1)
    return starts, ends

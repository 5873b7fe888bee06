"""From a split to batches: item token store, windows, token-budget batches, collate.

Items are tokenised once. A history becomes tokens by gathering spans of a flat array, so no tokenizer runs in the
loader. Every training target is supervised exactly once an epoch, and items are only ever dropped whole, oldest first.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from anyo_lightning.data.splits import Queries, Split
from anyo_lightning.data.tokens import ItemTokenStore

Supervision = Literal["all", "last"]


@dataclass(frozen=True)
class HistoryBatch:
    """A batch of histories, right-padded. There is no padding id: padding is a mask.

    `target_ids[b, i]` is the item that follows `item_ids[b, i]`; it is supervised where `target_mask` is set. In an
    evaluation batch `target_mask` marks each history's last item, whose state is the query.
    """

    user: Int[Tensor, " batch"]
    row: Int[Tensor, " batch"]  # index of the training window, or of the row in Queries
    item_ids: Int[Tensor, "batch items"]
    item_mask: Bool[Tensor, "batch items"]
    target_ids: Int[Tensor, "batch items"]
    target_mask: Bool[Tensor, "batch items"]
    token_ids: Int[Tensor, "batch tokens"] | None = None  # where a text encoder asks for them
    boundaries: Int[Tensor, "batch items"] | None = None  # token position of each item's separator, 0 at padding
    token_count: int = 0  # real tokens (or items, without text), for the cost ledger

    def to(self, device: torch.device | str) -> "HistoryBatch":
        """The same batch on a device."""
        return self._mapped(lambda tensor: tensor.to(device))

    def pin_memory(self) -> "HistoryBatch":
        """The same batch in pinned memory (DataLoader calls this)."""
        return self._mapped(Tensor.pin_memory)

    def _mapped(self, change: Callable[[Tensor], Tensor]) -> "HistoryBatch":
        tensors = {f.name: change(v) for f in fields(self) if isinstance(v := getattr(self, f.name), Tensor)}
        return replace(self, **tensors)  # type: ignore[arg-type]

    @property
    def targets(self) -> Int[Tensor, " targets"]:
        """The supervised targets, in the order of the encoder's states."""
        return self.target_ids[self.target_mask]


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


class HistoryDataset(Dataset[HistoryBatch]):
    """Whole batches by list of rows: `dataset[[3, 1]]` is a `HistoryBatch` of rows 3 and 1.

    Args:
        items: Interactions' items, flat.
        user: (rows,) user of each row.
        start: (rows,) first input, a position in `items`.
        end: (rows,) after the last input.
        supervised: (rows,) first position whose state is asked for.
        target: (rows,) the target of the last position; of all others it is the next item.
        tokens: Token store, where a text encoder asks for tokens.
    """

    def __init__(
        self,
        items: np.ndarray,
        *,
        user: np.ndarray,
        start: np.ndarray,
        end: np.ndarray,
        supervised: np.ndarray,
        target: np.ndarray,
        tokens: ItemTokenStore | None,
    ) -> None:
        self.items, self.user, self.start, self.end = items, user, start, end
        self.supervised, self.target, self.tokens = supervised, target, tokens

    @classmethod
    def training(cls, split: Split, windows: Windows, tokens: ItemTokenStore | None) -> "HistoryDataset":
        """The training windows of a split."""
        return cls(
            split.items,
            user=windows.user,
            start=windows.start,
            end=windows.end,
            supervised=windows.supervised,
            target=split.items[windows.end],
            tokens=tokens,
        )

    @classmethod
    def evaluation(
        cls, queries: Queries, bounds: tuple[np.ndarray, np.ndarray], tokens: ItemTokenStore | None
    ) -> "HistoryDataset":
        """The queries of a stage; only each history's last state is asked for."""
        start, end = bounds
        return cls(
            queries.items,
            user=queries.user,
            start=start,
            end=end,
            supervised=end - 1,
            target=queries.target,
            tokens=tokens,
        )

    def __len__(self) -> int:
        return len(self.user)

    def __getitem__(self, rows: Sequence[int]) -> HistoryBatch:
        chosen = np.asarray(rows, dtype=np.int64)
        starts, ends = self.start[chosen], self.end[chosen]
        counts = ends - starts
        mask = np.arange(counts.max()) < counts[:, None]
        items = np.zeros(mask.shape, dtype=np.int64)
        targets = np.zeros(mask.shape, dtype=np.int64)
        supervised = np.zeros(mask.shape, dtype=bool)
        for i, (row, start, end) in enumerate(zip(chosen, starts, ends, strict=True)):
            items[i, : end - start] = self.items[start:end]
            targets[i, : end - start - 1] = self.items[start + 1 : end]
            targets[i, end - start - 1] = self.target[row]
            supervised[i, self.supervised[row] - start : end - start] = True
        batch = HistoryBatch(
            user=torch.from_numpy(self.user[chosen]),
            row=torch.from_numpy(chosen),
            item_ids=torch.from_numpy(items),
            item_mask=torch.from_numpy(mask),
            target_ids=torch.from_numpy(targets),
            target_mask=torch.from_numpy(supervised),
            token_count=int(counts.sum()),
        )
        return batch if self.tokens is None else with_tokens(batch, self.tokens)


def with_tokens(batch: HistoryBatch, tokens: ItemTokenStore) -> HistoryBatch:
    """The same batch with `token_ids` and `boundaries`, gathered from the items' token spans."""
    mask, items = batch.item_mask.numpy(), batch.item_ids.numpy()
    lengths = np.where(mask, tokens.lengths[items], 0)
    ends = np.cumsum(lengths, axis=1)
    token_ids = np.full((len(items), int(ends[:, -1].max())), tokens.separator, dtype=np.int64)
    for i, row in enumerate(items):
        history = tokens.gather(row[mask[i]])
        token_ids[i, : len(history)] = history
    return replace(
        batch,
        token_ids=torch.from_numpy(token_ids),
        boundaries=torch.from_numpy(np.where(mask, ends - 1, 0)),
        token_count=int(ends[:, -1].sum()),
    )


class TokenBudgetBatches(Sampler[list[int]]):
    """Batches of rows of like length, of at most `budget` padded tokens each, shuffled by seed and epoch.

    The batches depend on nothing but lengths, seed, epoch and the number of processes: every process cuts the same
    list and takes each `world_size`-th batch. All epochs and all ranks have the same number of batches.

    Args:
        lengths: (rows,) tokens, or items without text.
        budget: Most padded tokens a batch. A row longer than the budget is a batch of its own.
        seed: Seed of the shuffle; None keeps one fixed order, by length (evaluation).
        rank: This process.
        world_size: Number of processes.
    """

    JITTER = 0.03  # how far, as a share of a row's length, the shuffle may move it among rows of other lengths

    def __init__(
        self, lengths: np.ndarray, *, budget: int, seed: int | None, rank: int = 0, world_size: int = 1
    ) -> None:
        self.lengths, self.seed = np.asarray(lengths), seed
        self.rank, self.world_size = rank, world_size
        self.epoch = 0
        self.skip = 0
        self.cuts = self._cut(budget / (1 + self.JITTER) if seed is not None else budget)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch's shuffle (Lightning calls this)."""
        self.epoch = epoch

    def resume(self, *, epoch: int, batches: int) -> None:
        """Go on within an epoch: the next iteration leaves out this rank's first `batches` batches."""
        self.epoch, self.skip = epoch, batches

    def batches(self) -> list[np.ndarray]:
        """All batches of the epoch, of all ranks, in order; none when there are no rows."""
        if not len(self.lengths):
            return []
        if self.seed is None:
            return np.split(np.argsort(self.lengths, kind="stable"), self.cuts)
        # The p-th smallest jittered length is at most 1 + JITTER times the p-th smallest length, so that batches
        # cut where the sorted lengths fill budget / (1 + JITTER) never exceed the budget, whatever the shuffle.
        random = np.random.default_rng([self.seed, self.epoch])
        jittered = self.lengths * (1 + self.JITTER * random.random(len(self.lengths)))
        cut = np.split(np.argsort(jittered, kind="stable"), self.cuts)
        return [cut[i] for i in random.permutation(len(cut))]

    def padding_share(self) -> float:
        """The share of padded positions that hold no token, over an epoch."""
        padded = sum(int(self.lengths[rows].max()) * len(rows) for rows in self.batches())
        return 1 - float(self.lengths.sum()) / padded

    def _cut(self, budget: float) -> np.ndarray:
        """Where to cut the sorted rows, so that the number of batches is a multiple of the number of processes."""
        lengths = np.sort(self.lengths, kind="stable")
        cuts, begin = [0], 0
        while begin < len(lengths):
            most = lengths[begin : begin + int(budget // max(lengths[begin], 1)) + 1]  # padded size = last * count
            begin += max(int(np.searchsorted(most * np.arange(1, len(most) + 1), budget, side="right")), 1)
            cuts.append(begin)
        while len(cuts) % self.world_size != 1 % self.world_size and max(np.diff(cuts)) > 1:
            largest = int(np.argmax(np.diff(cuts)))
            cuts.insert(largest + 1, (cuts[largest] + cuts[largest + 1]) // 2)
        return np.array(cuts[1:-1], dtype=np.int64)

    def __iter__(self) -> Iterator[list[int]]:
        skip, self.skip = self.skip, 0
        for rows in self.batches()[self.rank :: self.world_size][skip:]:
            yield rows.tolist()

    def __len__(self) -> int:
        count = len(self.cuts) + 1 if len(self.lengths) else 0
        return len(range(self.rank, count, self.world_size))

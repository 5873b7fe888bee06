"""From windows to batches: collate, and token-budget batches.

Items are tokenised once. A history becomes tokens by gathering spans of a flat array, so no tokenizer runs in the
loader.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Int, Int64
from torch import Tensor
from torch.utils.data import Dataset

from anyo_lightning.data.splits import Queries, Split
from anyo_lightning.data.tokens import ItemTokenStore
from anyo_lightning.data.windows import Windows


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
    hidden: Bool[Tensor, "batch items"] | None = None  # items whose identity a view hides: no text, no vector
    start: Int[Tensor, " batch"] | None = None  # position of each row's first item in the split's interactions
    token_count: int = 0  # real tokens (or items, without text) with each row's prompts, for the cost ledger
    row_tokens: int = 0  # tokens that are read of each row beside its items: prompts and response markers
    host: "HistoryBatch | None" = field(default=None, init=False, repr=False, compare=False)  # `on_cpu`, once moved

    def to(self, device: torch.device | str) -> "HistoryBatch":
        """The same batch on a device, which does not wait for the copy."""
        moved = self._mapped(lambda tensor: tensor.to(device, non_blocking=True))
        object.__setattr__(moved, "host", self.on_cpu)  # not through replace(): what it changes is another batch
        return moved

    def pin_memory(self) -> "HistoryBatch":
        """The same batch in pinned memory (DataLoader calls this)."""
        return self._mapped(Tensor.pin_memory)

    def _mapped(self, change: Callable[[Tensor], Tensor]) -> "HistoryBatch":
        tensors = {f.name: change(v) for f in fields(self) if isinstance(v := getattr(self, f.name), Tensor)}
        return replace(self, **tensors)  # type: ignore[arg-type]

    @property
    def on_cpu(self) -> "HistoryBatch":
        """The batch that was moved to a device, of which the CPU may ask without waiting for the device."""
        return self if self.host is None else self.host

    @cached_property
    def target_places(self) -> tuple[Int[Tensor, " targets"], Int[Tensor, " targets"]]:
        """Row and column of each supervised boundary, in the order of the encoder's states."""
        return self._places(self.on_cpu.target_mask)

    @cached_property
    def item_places(self) -> tuple[Int[Tensor, " all_items"], Int[Tensor, " all_items"]]:
        """Row and column of each item."""
        return self._places(self.on_cpu.item_mask)

    def _places(self, mask: Bool[Tensor, "batch items"]) -> tuple[Tensor, Tensor]:
        """Found by numpy: asked for the places of a mask on a GPU, torch waits until the GPU knows how many."""
        rows, columns = (torch.from_numpy(places) for places in np.nonzero(mask.cpu().numpy()))
        device = self.user.device
        return rows.to(device, non_blocking=True), columns.to(device, non_blocking=True)

    @property
    def targets(self) -> Int[Tensor, " targets"]:
        """The supervised targets, in the order of the encoder's states."""
        return self.target_ids[self.target_places]

    @property
    def target_positions(self) -> Int[Tensor, " targets"]:
        """Where each supervised target lies among the split's interactions; of training windows, not of any history."""
        assert self.start is not None
        rows, columns = self.target_places
        return self.start[rows] + columns + 1

    @property
    def last_states(self) -> Int[Tensor, " batch"]:
        """For each history, the row of its last supervised boundary among the encoder's states."""
        return self.target_mask.sum(1).cumsum(0) - 1

    @property
    def lengths(self) -> np.ndarray:
        """(batch,) tokens of each row (items, without text), prompts counted."""
        here = self.on_cpu
        read = here.item_mask.sum(1) if here.boundaries is None else here.boundaries.amax(1) + 1
        return np.asarray(read.cpu()) + self.row_tokens

    def of_rows(self, rows: np.ndarray) -> "HistoryBatch":
        """Some rows of this batch, on the CPU, padded no further than to the longest of them; there may be none."""
        chosen = self.on_cpu._mapped(lambda tensor: tensor.cpu()[torch.from_numpy(rows)])
        items = chosen.item_mask.numpy().sum(1).max(initial=1)
        tokens = 1 if chosen.boundaries is None else chosen.boundaries.numpy().max(initial=0) + 1
        narrow = chosen._mapped(lambda tensor: tensor[:, :items] if tensor.ndim == 2 else tensor)
        if chosen.token_ids is not None:
            narrow = replace(narrow, token_ids=chosen.token_ids[:, :tokens])
        return replace(narrow, token_count=int(self.lengths[rows].sum()))

    def places_after(self, parts: Sequence[np.ndarray]) -> Int[Tensor, " targets"]:
        """Where the state of each supervised boundary is among those of `of_rows` of each part, on the CPU.

        Args:
            parts: Rows of this batch, each row in one of them.
        """
        counts = np.asarray(self.on_cpu.target_mask.sum(1).cpu())
        starts = np.cumsum(counts) - counts
        order = [np.arange(starts[row], starts[row] + counts[row]) for rows in parts for row in rows]
        return torch.from_numpy(np.argsort(np.concatenate([np.empty(0, dtype=np.int64), *order])))

    def histories(self) -> list[np.ndarray]:
        """The items of each history up to its last supervised boundary, which is always its last item: copies."""
        items, mask = self.on_cpu.item_ids.cpu().numpy(), self.on_cpu.item_mask.cpu().numpy()
        return [row[kept] for row, kept in zip(items, mask, strict=True)]


class HistoryDataset(Dataset[HistoryBatch]):
    """Whole batches by list of rows: `dataset[[3, 1]]` is a `HistoryBatch` of rows 3 and 1, `dataset[[]]` an empty one.

    Args:
        items: Interactions' items, flat.
        user: (rows,) user of each row.
        start: (rows,) first input, a position in `items`.
        end: (rows,) after the last input.
        supervised: (rows,) first position whose state is asked for.
        target: (rows,) the target of the last position; of all others it is the next item.
        tokens: Token store, where a text encoder asks for tokens.
        row_tokens: Tokens that are read of each row beside its items.
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
        row_tokens: int = 0,
    ) -> None:
        self.items, self.user, self.start, self.end = items, user, start, end
        self.supervised, self.target = supervised, target
        self.tokens, self.row_tokens = tokens, row_tokens

    @classmethod
    def training(
        cls, split: Split, windows: Windows, tokens: ItemTokenStore | None, row_tokens: int = 0
    ) -> "HistoryDataset":
        """The training windows of a split."""
        return cls(
            split.items,
            user=windows.user,
            start=windows.start,
            end=windows.end,
            supervised=windows.supervised,
            target=split.items[windows.end],
            tokens=tokens,
            row_tokens=row_tokens,
        )

    @classmethod
    def evaluation(
        cls,
        queries: Queries,
        bounds: tuple[np.ndarray, np.ndarray],
        tokens: ItemTokenStore | None,
        row_tokens: int = 0,
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
            row_tokens=row_tokens,
        )

    def __len__(self) -> int:
        return len(self.user)

    @property
    def lengths(self) -> Int64[np.ndarray, " rows"]:
        """Tokens of each row (items, without text), prompts counted."""
        if self.tokens is None:
            return self.end - self.start + self.row_tokens
        positions = np.concatenate([[0], np.cumsum(self.tokens.lengths[self.items], dtype=np.int64)])
        return np.asarray(positions[self.end] - positions[self.start] + self.row_tokens)

    def __getitem__(self, rows: Sequence[int]) -> HistoryBatch:
        chosen = np.asarray(rows, dtype=np.int64)
        if not len(chosen):  # this process has no share of a step
            return self[[0]].of_rows(chosen)
        spans = list(zip(self.start[chosen], self.end[chosen], strict=True))
        histories = [self.items[start:end] for start, end in spans]
        batch = collate(histories, tokens=self.tokens, row_tokens=self.row_tokens)
        targets, supervised = np.zeros(batch.item_ids.shape, dtype=np.int64), np.zeros(batch.item_ids.shape, dtype=bool)
        for i, (row, (start, end)) in enumerate(zip(chosen, spans, strict=True)):
            targets[i, : end - start - 1] = self.items[start + 1 : end]
            targets[i, end - start - 1] = self.target[row]
            supervised[i, self.supervised[row] - start : end - start] = True
        return replace(
            batch,
            user=torch.from_numpy(self.user[chosen]),
            row=torch.from_numpy(chosen),
            target_ids=torch.from_numpy(targets),
            target_mask=torch.from_numpy(supervised),
            start=torch.from_numpy(self.start[chosen]),
        )


def collate(
    histories: Sequence[np.ndarray],
    *,
    tokens: ItemTokenStore | None,
    row_tokens: int = 0,
    hidden: Sequence[np.ndarray] | None = None,
    spans: Sequence[Sequence[np.ndarray]] | None = None,
) -> HistoryBatch:
    """Histories as a batch that asks for each one's last state; users, rows and targets are zero.

    Args:
        histories: Item ids of each history, oldest first, at least one.
        tokens: Token store, where a text encoder asks for tokens.
        row_tokens: Tokens that are read of each row beside its items.
        hidden: For each history, True at the items whose identity is hidden from the encoder.
        spans: For each history, the tokens that are read instead of each item's own, separator included.
    """
    counts = np.array([len(items) for items in histories])
    mask = np.arange(counts.max()) < counts[:, None]
    ids = np.zeros(mask.shape, dtype=np.int64)
    ids[mask] = np.concatenate(histories)
    hides = None
    if hidden is not None:
        hides = np.zeros(mask.shape, dtype=bool)
        hides[mask] = np.concatenate(hidden)
    nothing = torch.zeros(len(counts), dtype=torch.long)
    batch = HistoryBatch(
        user=nothing,
        row=nothing,
        item_ids=torch.from_numpy(ids),
        item_mask=torch.from_numpy(mask),
        target_ids=torch.zeros(mask.shape, dtype=torch.long),
        target_mask=torch.from_numpy(np.arange(mask.shape[1]) == counts[:, None] - 1),
        hidden=None if hides is None else torch.from_numpy(hides),
        token_count=int(counts.sum()) + row_tokens * len(counts),
        row_tokens=row_tokens,
    )
    if tokens is None:
        return batch
    hidden = [np.zeros(count, dtype=bool) for count in counts] if hidden is None else hidden
    spans = spans or [
        [tokens.hidden if hide else tokens.span(item) for item, hide in zip(items, hides_items, strict=True)]
        for items, hides_items in zip(histories, hidden, strict=True)
    ]
    return with_spans(batch, spans, separator=tokens.separator)


def with_spans(batch: HistoryBatch, spans: Sequence[Sequence[np.ndarray]], *, separator: int) -> HistoryBatch:
    """The same batch with `token_ids` and `boundaries`: the tokens of each history's items, one after another.

    Args:
        batch: Without tokens.
        spans: For each history, the tokens of each of its items, which end in the separator.
        separator: Fills the padding.
    """
    mask = batch.item_mask.numpy()
    lengths = np.zeros(mask.shape, dtype=np.int64)
    lengths[mask] = [len(span) for history in spans for span in history]
    ends = np.cumsum(lengths, axis=1)
    totals = ends[:, -1]
    token_ids = np.full((len(spans), int(totals.max())), separator, dtype=np.int64)
    token_ids[np.arange(token_ids.shape[1]) < totals[:, None]] = np.concatenate(
        [s for spans_of in spans for s in spans_of]
    )
    return replace(
        batch,
        token_ids=torch.from_numpy(token_ids),
        boundaries=torch.from_numpy(np.where(mask, ends - 1, 0)),
        token_count=int(totals.sum()) + batch.row_tokens * len(totals),
    )

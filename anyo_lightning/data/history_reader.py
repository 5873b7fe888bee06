"""How much of a history is read, and as what: modules ask for it by two protocols, `HistoryReader` makes it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np

from anyo_lightning.data.batches import HistoryBatch, HistoryDataset, collate
from anyo_lightning.data.splits import Queries, Split
from anyo_lightning.data.tokens import ItemTokenStore
from anyo_lightning.data.windows import Supervision, latest_start, query_windows, training_windows

if TYPE_CHECKING:
    from anyo_lightning.data.datamodule import RecDataModule


@runtime_checkable
class ReadsTokens(Protocol):
    """A module whose histories may be read as text."""

    def item_tokens(self, data: "RecDataModule") -> ItemTokenStore | None:
        """The tokens of each item, as `LLM.item_tokens` makes them; None where histories are not read as text."""
        ...


@runtime_checkable
class ReadsPrompts(Protocol):
    """A module that reads more of a history than its items."""

    def row_tokens(self, data: "RecDataModule") -> int:
        """Tokens of prompts and response markers that are read with each history: they count in a batch's budget."""
        ...


@dataclass(frozen=True)
class HistoryReader:
    """Makes what is read of histories: the latest whole items that fit.

    Attributes:
        item_lengths: (catalogue,) tokens of each item; ones where histories are not read as text.
        max_items: Most items of a history that are read.
        max_length: Most tokens, in units of `item_lengths`.
        tokens: Those of the items, where histories are read as text.
        row_tokens: Tokens that are read of each history beside its items.
    """

    item_lengths: np.ndarray
    max_items: int
    max_length: int
    tokens: ItemTokenStore | None
    row_tokens: int

    def training(
        self, split: Split, *, supervision: Supervision, overlap: float, random: np.random.Generator | None = None
    ) -> HistoryDataset:
        """The training windows of a split, as `training_windows` cuts them."""
        windows = training_windows(
            split,
            self.item_lengths,
            max_items=self.max_items,
            max_length=self.max_length,
            supervision=supervision,
            overlap=overlap,
            random=random,
        )
        return HistoryDataset.training(split, windows, self.tokens, self.row_tokens)

    def evaluation(self, queries: Queries) -> HistoryDataset:
        """The histories of a stage's queries."""
        bounds = query_windows(queries, self.item_lengths, max_items=self.max_items, max_length=self.max_length)
        return HistoryDataset.evaluation(queries, bounds, self.tokens, self.row_tokens)

    def collate(
        self,
        histories: Sequence[np.ndarray],
        *,
        hidden: Sequence[np.ndarray] | None = None,
        spans: Sequence[Sequence[np.ndarray]] | None = None,
    ) -> HistoryBatch:
        """Any histories as a batch; the arguments are those of `RecDataModule.collate`."""
        own = self.item_lengths
        lengths = [own[items] for items in histories] if spans is None else [list(map(len, of)) for of in spans]
        starts = [
            latest_start(np.cumsum([0, *sizes]), len(sizes), 0, max_items=self.max_items, max_length=self.max_length)
            for sizes in lengths
        ]
        return collate(
            [items[start:] for items, start in zip(histories, starts, strict=True)],
            tokens=self.tokens,
            row_tokens=self.row_tokens,
            hidden=None if hidden is None else [kept[start:] for kept, start in zip(hidden, starts, strict=True)],
            spans=None if spans is None else [of[start:] for of, start in zip(spans, starts, strict=True)],
        )

    def longest(self, split: Split) -> int:
        """The most tokens (items, where no text is read) of a history of a split."""
        positions = np.concatenate([[0], np.cumsum(self.item_lengths[split.items], dtype=np.int64)])
        ends = np.arange(1, len(split.items) + 1)
        starts = np.maximum(np.repeat(split.offsets[:-1], np.diff(split.offsets)), ends - self.max_items)
        return min(int((positions[ends] - positions[starts]).max()), self.max_length)

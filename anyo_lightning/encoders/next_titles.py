"""Collaborative fine-tuning's rows: a history's texts, and behind it that of the item that follows its last one."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from anyo_lightning.data.batches import HistoryBatch
from anyo_lightning.data.tokens import ItemTokenStore, padded


@dataclass(frozen=True)
class NextTitles:
    """Histories as text encoders read them, each with its last target's text; right-padded.

    Attributes:
        token_ids: The rows.
        rows: The row of each supervised token: those of the supervised targets' texts, separators included.
        columns: The column whose state predicts it: that of the token before.
        targets: The supervised tokens themselves.
    """

    token_ids: Int[Tensor, "rows tokens"]
    rows: Int[Tensor, " supervised"]
    columns: Int[Tensor, " supervised"]
    targets: Int[Tensor, " supervised"]

    @classmethod
    def of(cls, batch: HistoryBatch, tokens: ItemTokenStore) -> "NextTitles":
        """The rows of a batch, on the CPU.

        Args:
            batch: Histories and their targets; a history's last boundary is supervised. At least one history.
            tokens: What histories read of each item.
        """
        here = batch.on_cpu
        arrays = (here.item_ids, here.item_mask.sum(1), here.target_ids, here.target_mask)
        texts, supervised = [], []
        for items, count, targets, mask in zip(*(array.cpu().numpy() for array in arrays), strict=True):
            spans = [tokens.span(item) for item in (*items[:count], targets[count - 1])]
            texts.append(np.concatenate(spans))
            supervised.append(np.repeat([False, *mask[:count]], [len(span) for span in spans]))
        token_ids, _ = padded(texts, tokens.separator)
        rows = np.repeat(np.arange(len(texts)), [int(row.sum()) for row in supervised])
        columns = torch.from_numpy(np.concatenate([row.nonzero()[0] for row in supervised]))
        places = torch.from_numpy(rows)
        return cls(token_ids, places, columns - 1, token_ids[places, columns])

    def to(self, device: torch.device) -> "NextTitles":
        """The same rows on a device."""
        return NextTitles(*(tensor.to(device, non_blocking=True) for tensor in vars(self).values()))

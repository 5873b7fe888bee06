"""A DataLoader that resumes in the middle of an epoch."""

from collections.abc import Callable
from typing import Any

import numpy as np
from torch.utils.data import DataLoader

from anyo_lightning.data.batches import HistoryBatch, HistoryDataset
from anyo_lightning.data.sampler import TokenBudgetBatches
from anyo_lightning.errors import InputError


class ResumableLoader(DataLoader[HistoryBatch]):
    """Yields whole batches, and says in a checkpoint how many of the epoch's have been trained on.

    Lightning saves `state_dict` with its loops and gives it back before the first batch of a resumed run. What counts
    are the batches that training has consumed, not those that workers have prefetched.

    Args:
        dataset: Gives a batch for a list of rows.
        batches: The epoch's lists of rows.
        consumed: The number of batches of this epoch that this process has trained on.
        options: What else `DataLoader` takes.
    """

    dataset: HistoryDataset

    def __init__(
        self, dataset: HistoryDataset, batches: TokenBudgetBatches, *, consumed: Callable[[], int], **options: Any
    ) -> None:
        super().__init__(dataset, batch_size=None, sampler=batches, **options)
        self.batches, self.consumed = batches, consumed

    def largest_share(self) -> HistoryBatch:
        """Of this process's shares of the epoch's steps, the one with the most padded tokens."""
        shares = [rows for rows in self.batches.batches() if len(rows)]
        lengths = self.dataset.lengths  # the sampler's own may all be the same
        sizes = [len(rows) * lengths[rows].max() for rows in shares]
        return self.dataset[shares[int(np.argmax(sizes))].tolist() if shares else []]

    def state_dict(self) -> dict[str, Any]:
        """Where in which epoch, and in which batches."""
        return {"epoch": self.batches.epoch, "consumed": self.consumed(), "batches": self.batches.signature}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the batches that were consumed, if the epoch is the same; a next one starts at its beginning.

        The number of processes may be another: a batch is a step of all of them.

        Raises:
            InputError: In the middle of an epoch with other options, whose batches are others: targets would be left
                out, or trained twice.
        """
        if state["epoch"] != self.batches.epoch:
            return
        if state["batches"] != self.batches.signature:
            raise InputError(
                "Expected the same batches to resume in the middle of an epoch, got others: give data.batch_tokens and "
                "what else decides them as before, or another --run"
            )
        self.batches.resume(state["consumed"])

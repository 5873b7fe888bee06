"""`anyo predict --teach K`: a run's list at every training boundary, for a `Student`."""

from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from anyo_lightning.data.batches import HistoryBatch
from anyo_lightning.data.datamodule import RecDataModule
from anyo_lightning.data.lessons import Lessons, training_boundaries, write_lessons
from anyo_lightning.data.splits import Split
from anyo_lightning.errors import InputError
from anyo_lightning.evaluation.callback import RetrievalMetrics
from anyo_lightning.evaluation.index import dense_for_index
from anyo_lightning.models.base import RetrievalModule
from anyo_lightning.runs import RunFolder

BLOCK_SCORES = 2**25  # 128 MiB of scores at a time


def teach(
    trainer: Trainer, model: RetrievalModule, data: RecDataModule, run: RunFolder, *, k: int, options: dict[str, Any]
) -> None:
    """Write the lists at all training boundaries, and all item vectors, to the run's teacher.safetensors.

    Args:
        trainer: On one process.
        model: The teacher.
        data: Its data.
        run: Its run folder.
        k: Length of the lists.
        options: What else the Trainer's `predict` takes.

    Raises:
        InputError: There is more than one process, or not all boundaries are read.
    """
    if trainer.world_size > 1:
        raise InputError(f"Expected trainer.devices 1 with --teach, got {trainer.world_size} processes")
    data.prepare_data()
    metrics = next(c for c in trainer.callbacks if isinstance(c, RetrievalMetrics))  # type: ignore[attr-defined]
    teaching = Teaching(data.split, k=k, history_masked=metrics.masks_history(data.split))
    trainer.callbacks.append(teaching)  # type: ignore[attr-defined]
    data.predict_dataloader = data.boundaries_dataloader  # type: ignore[method-assign]
    trainer.predict(model, return_predictions=False, **options)
    if (read := int(teaching.read.sum())) < len(teaching.read):
        raise InputError(
            f"Expected --teach without trainer.limit_predict_batches, got {read} of {len(teaching.read)} boundaries"
        )
    write_lessons(run.teacher_file, teaching.lessons, split=data.split)


class Teaching(Callback):
    """Ranks the training items at each boundary of `RecDataModule.boundaries_dataloader`, in a prediction.

    Args:
        split: The split.
        k: Length of the lists.
        history_masked: Whether lists are without the items that the user has had up to the boundary, as in a test.

    Attributes:
        lessons: What was found; there at the end.
        read: (boundaries,) which boundaries were.
    """

    lessons: Lessons

    def __init__(self, split: Split, *, k: int, history_masked: bool) -> None:
        self.split, self.history_masked = split, history_masked
        boundaries = training_boundaries(split)
        self.number = np.full(len(split.items), -1)
        self.number[boundaries] = np.arange(len(boundaries))
        self.untrained = torch.from_numpy(split.training_counts() == 0)
        self.read = np.zeros(len(boundaries), dtype=bool)
        k = min(k, split.catalogue_size)
        self.items = torch.full((len(boundaries), k), -1, dtype=torch.int32)
        self.scores = torch.full((len(boundaries), k), -torch.inf)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Encode the catalogue."""
        assert isinstance(pl_module, RetrievalModule)
        self.vectors = torch.from_numpy(dense_for_index(pl_module.encode_catalogue().float())).to(pl_module.device)

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: HistoryBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Rank at a batch's boundaries, as many at a time as memory holds."""
        here = batch.on_cpu
        assert here.start is not None
        rows, columns = here.target_places
        positions = (here.start[rows] + columns).numpy()
        states = outputs["query"].to_dense()
        size = max(1, BLOCK_SCORES // len(self.vectors))
        for start in range(0, len(positions), size):
            self._rank(states[start : start + size], positions[start : start + size])

    def _rank(self, states: Tensor, positions: np.ndarray) -> None:
        scores = states @ self.vectors.T
        scores[:, self.untrained.to(scores.device)] = -torch.inf
        if self.history_masked:
            user = np.searchsorted(self.split.offsets, positions, side="right") - 1
            had = [self.split.items[self.split.offsets[u] : p + 1] for u, p in zip(user, positions, strict=True)]
            row = np.repeat(np.arange(len(positions)), list(map(len, had)))
            places = (torch.from_numpy(part).to(scores.device) for part in (row, np.concatenate(had).astype(np.int64)))
            scores[tuple(places)] = -torch.inf
        top = scores.topk(self.items.shape[1], dim=1)
        self.read[self.number[positions]] = True
        number = torch.from_numpy(self.number[positions])
        self.items[number] = top.indices.masked_fill(top.values == -torch.inf, -1).int().cpu()
        self.scores[number] = top.values.cpu()

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gather what was found."""
        self.lessons = Lessons(self.items, self.scores, self.vectors.cpu())

"""When a run's checkpoints are written: the best epoch, the last one, and steps in between."""

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from anyo_lightning.internals import training_continues
from anyo_lightning.runs import RunFolder


class BestCheckpoint(ModelCheckpoint):
    """Keeps the best epoch's weights in the run folder's best.ckpt, wherever the folder is now.

    Lightning's own forgets its best score when the folder has been moved, copied or mounted elsewhere.

    Args:
        run: Run folder.
        monitor: The metric that decides.
        mode: Whether its `max` or its `min` is the best.
    """

    def __init__(self, run: RunFolder, *, monitor: str, mode: str) -> None:
        super().__init__(
            dirpath=run.checkpoints,
            filename=run.best_checkpoint.stem,
            monitor=monitor,
            mode=mode,
            save_top_k=1,
            enable_version_counter=False,
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the scores over, and the folder as it is called now."""
        best = str(Path(str(self.dirpath)) / f"{self.filename}{self.FILE_EXTENSION}")
        score = state_dict["best_model_score"]
        moved: dict[str, Any] = {
            "dirpath": self.dirpath,
            "best_model_path": "",
            "kth_best_model_path": "",
            "best_k_models": {},
        }
        if score is not None:
            moved |= {"best_model_path": best, "kth_best_model_path": best, "best_k_models": {best: score}}
        super().load_state_dict({**state_dict, **moved})


class LastCheckpoint(ModelCheckpoint):
    """Saves at the end of each epoch, validated or not: what a run resumes from.

    Args:
        run: Run folder.
    """

    def __init__(self, run: RunFolder) -> None:
        super().__init__(save_on_train_epoch_end=True, **_last(run))


class StepCheckpoint(ModelCheckpoint):
    """Saves every n steps, but not before a validation.

    A run that is killed in the validation that follows would resume without it (Lightning takes it for done), and could
    miss its best epoch.

    Args:
        run: Run folder.
        every: n.
    """

    def __init__(self, run: RunFolder, *, every: int) -> None:
        super().__init__(every_n_train_steps=every, **_last(run))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save, where training continues."""
        if training_continues(trainer):
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)


def _last(run: RunFolder) -> dict[str, Any]:
    return {"dirpath": run.checkpoints, "filename": run.last_checkpoint.stem, "enable_version_counter": False}

"""What a command says at its end: how training went, the run's figures, and where they are."""

import sys

from lightning.pytorch import Trainer

from anyo_lightning.compare.table import compare
from anyo_lightning.runs import RunFolder
from anyo_lightning.training.checkpointing import BestCheckpoint


def say_training(trainer: Trainer, run: RunFolder) -> None:
    """The epochs, why they were not more, and the figure of the epoch that is tested."""
    if not trainer.is_global_zero or not run.best_checkpoint.is_file():
        return
    early = ", stopped early" if any(callback.stopped_epoch for callback in trainer.early_stopping_callbacks) else ""
    (best,) = (callback for callback in trainer.checkpoint_callbacks if isinstance(callback, BestCheckpoint))
    if best.best_model_score is not None:
        early += f"; the test is of the one with the best {best.monitor}, {best.best_model_score:.4f}"
    print(f"Trained {trainer.current_epoch} epochs{early}.")


def say_interrupted(run: RunFolder) -> None:
    """How to go on after Ctrl-C."""
    kept = run.last_checkpoint
    said = f"anyo fit --run {run.path} goes on from {kept}" if kept.is_file() else f"{run.path} has no checkpoint yet"
    print(f"Interrupted: {said}", file=sys.stderr)


def say_figures(trainer: Trainer, results: RunFolder, *, tested: bool) -> None:
    """The table that `anyo compare` makes of the run alone, if it was tested, and the folder."""
    if not trainer.is_global_zero:
        return
    if tested:
        compare([results.path])
        print(f"More figures: {results.metrics_file}")
    print(f"Run folder: {results.path}")

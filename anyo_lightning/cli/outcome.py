"""What a command says at its end: how training went, the run's figures, and where they are."""

import shlex
import sys

from lightning.pytorch import Trainer

from anyo_lightning.compare.table import compare
from anyo_lightning.runs import RunFolder
from anyo_lightning.training.checkpointing import BestCheckpoint
from anyo_lightning.training.guards import Guards


def say_training(trainer: Trainer) -> None:
    """The steps and epochs so far, and what validation said of the best; nothing where no step was taken."""
    (guards,) = (callback for callback in trainer.callbacks if isinstance(callback, Guards))  # type: ignore[attr-defined]
    if not trainer.is_global_zero or guards.first_step in (None, trainer.global_step):
        return
    epochs = trainer.fit_loop.epoch_progress.current.ready
    said = f"Trained {trainer.global_step:,} steps over {epochs} epoch{'s' if epochs != 1 else ''}"
    if any(callback.stopped_epoch for callback in trainer.early_stopping_callbacks):
        said += ", stopped early"
    (best,) = (callback for callback in trainer.checkpoint_callbacks if isinstance(callback, BestCheckpoint))
    if best.best_model_score is not None:
        said += f"; best {best.monitor}: {best.best_model_score:.4f}"
    print(said)


def say_interrupted(run: RunFolder) -> None:
    """How to go on after Ctrl-C."""
    kept = run.last_checkpoint
    command = shlex.join(["anyo", "fit", "--run", str(run.path)])
    said = f"{command} goes on from {kept}" if kept.is_file() else f"{run.path} has no checkpoint yet"
    print(f"Interrupted: {said}", file=sys.stderr)


def say_figures(trainer: Trainer, results: RunFolder, *, tested: bool) -> None:
    """The table that `anyo compare` makes of the run alone, if it was tested, and the folder."""
    if not trainer.is_global_zero:
        return
    if tested:
        compare([results.path])
        print(f"More figures: {results.metrics_file}")
    print(f"Run folder: {results.path}")

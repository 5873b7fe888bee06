"""What stops a run in time, with a sentence, and loses nothing: divergence, memory, pre-emption, early stopping."""

import math
import signal
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor

from anyo_lightning import distributed
from anyo_lightning.data.batches import HistoryBatch
from anyo_lightning.errors import InputError
from anyo_lightning.hardware import is_out_of_memory
from anyo_lightning.internals import training_continues
from anyo_lightning.runs import RunFolder


class Guards(Callback):
    """Watches training.

    - A loss that is not finite ends the run before the optimizer sees it; the checkpoints stay as they are.
    - Running out of memory names the option to turn, with the tokens of the batch and the most that have fitted.
    - SIGTERM (a pre-empted node) saves `last.ckpt` after the step at hand, whichever process it reaches, and all exit.
      Lightning's own handler starts a collective wherever the signal finds a process: two that get it at different
      places wait for each other forever. Ours takes a note, and after each step all ask whether anyone has one. A
      step and the validation that follows it are one: resumed in between, Lightning would leave the validation out,
      and resumed within it, it would be one of fewer users.
    - A run that early stopping has ended does not train another epoch when it is started again.

    Args:
        run: Where checkpoints are.
    """

    def __init__(self, run: RunFolder) -> None:
        self.run = run
        self.batch: HistoryBatch | None = None
        self.loss: Tensor | None = None
        self.fitted = 0  # padded tokens of the largest batch that went through
        self.terminated = False
        self.first_step: int | None = None  # of this fit; None where there is nothing left to train

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen for SIGTERM (Lightning gives its handlers back at the end); stop where early stopping has before."""
        self.first_step = trainer.global_step
        signal.signal(signal.SIGTERM, self._note_sigterm)
        stopping = [callback for callback in trainer.callbacks if isinstance(callback, EarlyStopping)]  # type: ignore[attr-defined]
        if any(callback.wait_count >= max(callback.patience, 1) for callback in stopping):
            trainer.should_stop = True
        self.on_train_epoch_start(trainer, pl_module)  # which Lightning passes over where it resumes within an epoch

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validate the last epoch, whatever `trainer.check_val_every_n_epoch` says: it may be the best one.

        Where it is null, validations are counted in steps, and stay so.
        """
        last = trainer.max_epochs is not None and trainer.current_epoch == trainer.max_epochs - 1
        if last and trainer.check_val_every_n_epoch is not None:
            trainer.check_val_every_n_epoch = 1

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Remember what is being trained on."""
        self.batch = batch

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Remember what has fitted; stop when any process has got SIGTERM.

        Raises:
            SIGTERMException: On all processes after the same step.
        """
        self.fitted = max(self.fitted, padded_tokens(batch))
        if training_continues(trainer) and distributed.sum_over_ranks(self.terminated, pl_module.device):
            raise SIGTERMException

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the test out when SIGTERM has come with the last step or its validation: all is saved already.

        Raises:
            SystemExit: On all processes.
        """
        if distributed.sum_over_ranks(self.terminated, pl_module.device):
            raise SystemExit

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let SIGTERM end the final test at once: Lightning's handler would wait for others, and there is no state.

        `fit --run` on the folder tests again.
        """
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Keep the loss: it is looked at when a GPU has been given the backward pass, too."""
        self.loss = loss.detach()

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Refuse a loss that is not finite, before a weight is changed.

        Raises:
            InputError: Naming step, batch and users.
        """
        assert self.loss is not None
        loss = float(self.loss)
        if math.isfinite(loss):
            return
        assert self.batch is not None
        rows = np.unique(self.batch.on_cpu.user.cpu().numpy())
        users = trainer.datamodule.split.user_ids[rows]  # type: ignore[attr-defined]
        shown = ", ".join(map(str, users[:5])) + (f" and {len(users) - 5} others" if len(users) > 5 else "")
        batch = trainer.fit_loop.epoch_loop.batch_idx + 1
        raise InputError(
            f"Training has diverged: the loss is {loss} in step {trainer.global_step + 1} (epoch "
            f"{trainer.current_epoch}, batch {batch}, users {shown}). Lower the learning rate; the last good "
            f"checkpoint is in {self.run.checkpoints}"
        )

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save when the node is taken away; say which option to turn when memory runs out.

        Raises:
            InputError: In the place of an out-of-memory error.
        """
        if isinstance(exception, SIGTERMException):
            trainer.save_checkpoint(self.run.last_checkpoint, weights_only=False)
        if self.batch is not None and is_out_of_memory(exception):
            now = padded_tokens(self.batch)
            fits = f"a step of {self.fitted} has fitted" if self.fitted else f"half may fit: {max(now // 2, 1)}"
            raise InputError(
                f"Out of memory at {now} padded tokens in {len(self.batch.user)} histories: set "
                f"data.micro_batch_tokens to less ({fits}), which changes no step, or lower data.max_items or "
                "data.max_tokens, or set model.encoders.backbone.gradient_checkpointing (and "
                "model.encoders.item_backbone.gradient_checkpointing where there is an item_backbone)"
            ) from exception

    def _note_sigterm(self, *_: Any) -> None:
        self.terminated = True


def padded_tokens(batch: HistoryBatch) -> int:
    """The size of a batch with its padding and prompts: tokens, or items where no text is read."""
    return (batch.item_ids if batch.token_ids is None else batch.token_ids).numel() + batch.row_tokens * len(batch.user)

"""The cost ledger: what training took, as it goes, in curves.csv.

The last row says what the run has cost so far, so that a later `anyo test --run` reports the training's cost too.
"""

import time
from typing import Any

import polars as pl
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.flop_counter import FlopCounterMode

from anyo_lightning import distributed
from anyo_lightning.hardware import peak_memory_gib
from anyo_lightning.models.base import RetrievalModule
from anyo_lightning.runs import RunFolder
from anyo_lightning.training.flops import flop_counter


class CostLedger(Callback):
    """Writes curves.csv: step, epoch, targets, tokens, seconds, FLOPs, memory and every logged metric.

    A row is added at each validation and each `every` steps. Seconds are those of training, validation left out;
    a resumed run adds to those before it; peak memory is the highest of all its processes one after another.

    FLOPs are counted in a sample S of the steps, each `every`-th from the first on, and scaled by tokens:

        FLOPs = tokens · Σ_{s in S} FLOPs_s / Σ_{s in S} tokens_s,

    forward and backward pass of everything that a step multiplies (`flop_counter`). What an epoch computes before its
    first step and after its last one (a bank's states, mined negatives) is counted as a whole and added. Counting all
    steps would take time of its own; batches hold about as many tokens each, so that the sample is within a few per
    cent of that.

    Args:
        run: Where curves.csv is.
        every: Steps between rows, and between steps whose FLOPs are counted.
    """

    def __init__(self, run: RunFolder, *, every: int = 50) -> None:
        self.run, self.every = run, every
        self.rows: list[dict[str, Any]] = []
        self.seconds = 0.0
        self.counted = {"flops": 0.0, "tokens": 0.0}  # in the sample, on this process
        self.beside = 0.0  # FLOPs between steps, on this process
        self.peak_memory_gib = 0.0
        self.epoch, self._noted = 0, 0
        self._device: torch.device | str = "cpu"
        self._running_since: float | None = None
        self._counter: FlopCounterMode | None = None
        self._tokens_before = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        curves = self.run.read_curves() if trainer.ckpt_path is not None else None
        if curves is not None:
            self.rows = curves.filter(pl.col("step") <= trainer.global_step).to_dicts()
        self._running_since, self._device = time.perf_counter(), pl_module.device

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the epoch (when training ends, the Trainer already counts the next one); count until its first step."""
        self._stop_counting_beside()
        self.epoch = trainer.current_epoch
        self._start_counting()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count what the module computes at the end of its epoch."""
        self._start_counting()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Count the FLOPs of each `every`-th step, and of the first after a checkpoint that knows of none."""
        self._stop_counting_beside()
        if trainer.global_step % self.every == 0 or not self.counted["tokens"]:
            self._tokens_before = _module(pl_module).seen.tokens
            self._start_counting()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add a row now and then."""
        if self._counter is not None:
            self.counted["flops"] += self._stop_counting()
            self.counted["tokens"] += _module(pl_module).seen.tokens - self._tokens_before
        if trainer.global_step % self.every == 0 and trainer.global_step != self._noted:
            self._noted = trainer.global_step
            self._add(trainer, pl_module, "train/")
            self._write(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        self._pause()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add a row, write the file and start the clock again."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._add(trainer, pl_module, "")
            self._write(trainer)
            self._running_since = time.perf_counter()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the last row."""
        self._stop_counting_beside()
        self._pause()
        self._add(trainer, pl_module, "train/")
        self._write(trainer)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run continues from."""
        counting = 0.0 if self._counter is None else self._counter.get_total_flops()
        beside = distributed.sum_over_ranks(self.beside + counting, self._device)
        state = {"seconds": self._elapsed(), "counted": dict(self.counted), "peak_memory_gib": self._peak()}
        return state | {"beside": beside, "epoch": self.epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        self.seconds, self.epoch = state_dict["seconds"], state_dict.get("epoch", 0)  # earlier ones have none
        self.beside = state_dict["beside"] if distributed.rank() == 0 else 0.0
        self.counted, self.peak_memory_gib = dict(state_dict["counted"]), state_dict["peak_memory_gib"]

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stop counting: what follows in this process is not training."""
        self._stop_counting_beside()

    def _start_counting(self) -> None:
        self._stop_counting_beside()
        self._counter = flop_counter()
        self._counter.__enter__()  # type: ignore[no-untyped-call]

    def _stop_counting(self) -> float:
        assert self._counter is not None
        self._counter.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        flops, self._counter = self._counter.get_total_flops(), None
        return flops

    def _stop_counting_beside(self) -> None:
        if self._counter is not None:
            self.beside += self._stop_counting()

    def _elapsed(self) -> float:
        return self.seconds + (time.perf_counter() - self._running_since if self._running_since is not None else 0.0)

    def _peak(self) -> float:
        return max(self.peak_memory_gib, peak_memory_gib())

    def _pause(self) -> None:
        self.seconds, self._running_since = self._elapsed(), None

    def _add(self, trainer: Trainer, module: LightningModule, start: str) -> None:
        """Add a row with the metrics whose names start so; one row per step."""
        cost, beside = _module(module).seen_by_all(), distributed.sum_over_ranks(self.beside, module.device)
        row = {
            "step": trainer.global_step,
            "epoch": self.epoch,
            "targets": cost["targets"],
            "tokens": cost["tokens"],
            "seconds": round(self._elapsed(), 3),
            "flops": cost["tokens"] * self.counted["flops"] / max(self.counted["tokens"], 1) + beside,
            "peak_memory_gib": round(self._peak(), 3),
            **{name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith(start)},
        }
        if self.rows and self.rows[-1]["step"] == row["step"]:
            row = {**self.rows.pop(), **row}
        self.rows.append(row)

    def _write(self, trainer: Trainer) -> None:
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self.run.write_curves(pl.from_dicts(self.rows, infer_schema_length=None))


def _module(module: LightningModule) -> RetrievalModule:
    assert isinstance(module, RetrievalModule)
    return module

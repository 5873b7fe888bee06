"""The cost ledger: what training took, as it goes, in curves.csv.

The last row says what the run has cost so far, so that a later `anyo test --run` reports the training's cost too.
"""

import resource
import time
from typing import Any

import polars as pl
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.flop_counter import FlopCounterMode

from anyo_lightning.models.base import RetrievalModule
from anyo_lightning.runs import RunFolder


class CostLedger(Callback):
    """Writes curves.csv: step, epoch, targets, tokens, seconds, FLOPs, memory and every logged metric.

    A row is added at each validation and each `every` steps. Seconds are those of training, validation left out;
    they go on where a resumed run stopped. FLOPs are the first step's, as torch's FLOP counter sees them, scaled by
    tokens: an estimate that leaves out that attention grows with the square of a row's length (and, on a CPU, the
    attention products of torch's own kernel, which the counter does not see).

    Args:
        every: Steps between rows.
    """

    def __init__(self, every: int = 50) -> None:
        self.every = every
        self.rows: list[dict[str, Any]] = []
        self.seconds = 0.0
        self.flops_per_token = 0.0
        self._running_since: float | None = None
        self._counter: FlopCounterMode | None = None
        self._tokens_before = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        file = RunFolder(trainer.default_root_dir).curves_file
        if trainer.ckpt_path is not None and file.is_file():
            self.rows = pl.read_csv(file).filter(pl.col("step") <= trainer.global_step).to_dicts()
        self._running_since = time.perf_counter()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Count the first step's FLOPs."""
        if not self.flops_per_token:
            self._tokens_before = _module(pl_module).seen["tokens"]
            self._counter = FlopCounterMode(display=False)
            self._counter.__enter__()  # type: ignore[no-untyped-call]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add a row now and then."""
        if self._counter is not None:
            self._counter.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            tokens = _module(pl_module).seen["tokens"] - self._tokens_before
            self.flops_per_token = self._counter.get_total_flops() / max(tokens, 1)
            self._counter = None
        if trainer.global_step % self.every == 0:
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
        self._pause()
        self._add(trainer, pl_module, "train/")
        self._write(trainer)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run goes on from."""
        return {"seconds": self._elapsed(), "flops_per_token": self.flops_per_token}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.seconds, self.flops_per_token = state_dict["seconds"], state_dict["flops_per_token"]

    def _elapsed(self) -> float:
        return self.seconds + (time.perf_counter() - self._running_since if self._running_since is not None else 0.0)

    def _pause(self) -> None:
        self.seconds, self._running_since = self._elapsed(), None

    def _add(self, trainer: Trainer, module: LightningModule, start: str) -> None:
        """Add a row with the metrics whose names start so; one row a step."""
        cost = _module(module).seen_by_all()
        row = {
            "step": trainer.global_step,
            "epoch": trainer.current_epoch,
            "targets": cost["targets"],
            "tokens": cost["tokens"],
            "seconds": round(self._elapsed(), 3),
            "flops": self.flops_per_token * cost["tokens"],
            "peak_memory_gib": round(peak_memory_gib(), 3),
            **{name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith(start)},
        }
        if self.rows and self.rows[-1]["step"] == row["step"]:
            row = {**self.rows.pop(), **row}
        self.rows.append(row)

    def _write(self, trainer: Trainer) -> None:
        if trainer.is_global_zero:
            RunFolder(trainer.default_root_dir).write_curves(pl.from_dicts(self.rows, infer_schema_length=None))


def _module(module: LightningModule) -> RetrievalModule:
    assert isinstance(module, RetrievalModule)
    return module


def peak_memory_gib() -> float:
    """The most memory that was in use, in GiB: the GPU's where there is one, else the process's."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

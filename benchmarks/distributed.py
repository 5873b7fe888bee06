"""Bytes sent per step, time in collectives and speed of every variant on 1 and 2 processes, one thread each, on gloo.

    python benchmarks/distributed.py [--variants e4srec llara ...] [--steps 3]

Each variant trains a few steps by its own configuration on ML-100K (the LLM's first 3 layers, small batches). Speed is
that of `--steps` steps after a first one; then as many again run under torch's profiler, which sees each collective
where the backend runs it, DDP's included, with its tensor. Bytes that a process sends in a ring of n follow:

    all-reduce 2 (n - 1) / n · tensor      all-gather (n - 1) · own part      broadcast (n - 1) / n · tensor

(as a mean over processes). Bytes are exact, whatever else the machine does; times are not. Steps are given the
same tokens per process, so two processes do twice the work per step: the ideal ratio of targets/s is 2. Time in
collectives includes waiting for the other process, and may overlap with the backward pass.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.profiler import ProfilerActivity, profile

from anyo_lightning import distributed
from anyo_lightning.cli.main import main as anyo

CONFIGS = Path(__file__).parents[1] / "configs"
TOKENS = 1000  # of a step, per process
VARIANTS: dict[str, tuple[str, ...]] = {
    "sasrec": (),
    "anyo": (),
    "e4srec": (),
    "e4srec, sharded": ("--model.encoders.backbone.sharded=true",),
    "cllmrec": ("--model.views=[original, importance]", "--model.anchors=32"),  # needs nothing that an LLM has written
    "sracl": (),
    "llara": (),
    "llara_pretrain": (),
}
SIZES = {"float": 4, "double": 8, "long int": 8, "long": 8, "c10::BFloat16": 2, "unsigned char": 1, "bool": 1}
STEPS, RESULT = "ANYO_BENCHMARK_STEPS", "ANYO_BENCHMARK_RESULT"


class Ledger(Callback):
    """Times some steps, profiles as many, writes what was seen and ends the run."""

    def __init__(self) -> None:
        self.steps = int(os.environ[STEPS])
        self.seconds, self.targets = 0.0, 0.0
        self.profiler = profile(activities=[ProfilerActivity.CPU], record_shapes=True)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """The first step warms up; a step begins where the one before it ended."""
        if trainer.global_step == 1:
            distributed.barrier()
            self.seconds, self.targets = -time.perf_counter(), -pl_module.seen_by_all()["targets"]
        elif trainer.global_step == 1 + self.steps:
            distributed.barrier()
            self.seconds += time.perf_counter()
            self.targets += pl_module.seen_by_all()["targets"]
            self.profiler.start()
        elif trainer.global_step == 1 + 2 * self.steps:
            self.profiler.stop()
            if trainer.is_global_zero:
                Path(os.environ[RESULT]).write_text(json.dumps(self.found(trainer)))
            raise SystemExit

    def found(self, trainer: Trainer) -> dict[str, Any]:
        """Seconds and targets of the timed steps, and by kind of collective number, bytes and milliseconds per step."""
        kinds: dict[str, dict[str, float]] = {}
        for event in self.profiler.events() or []:
            if event.name.startswith("gloo:"):
                name = "all_gather" if "all_gather" in event.name else event.name.removeprefix("gloo:")
                kind = kinds.setdefault(name, {"number": 0, "bytes": 0, "ms": 0})
                pairs = zip(event.input_shapes, event.input_dtypes, strict=False)
                kind["bytes"] += sum(math.prod(shape) * SIZES[dtype] for shape, dtype in pairs if shape) / self.steps
                kind["number"] += 1 / self.steps
                kind["ms"] += event.time_range.elapsed_us() / 1000 / self.steps
        trained = sum(weight.numel() for weight in trainer.lightning_module.parameters() if weight.requires_grad)
        return {"seconds": self.seconds / self.steps, "targets": self.targets, "trained": trained, "kinds": kinds}


def measure(name: str, processes: int, steps: int) -> dict[str, Any]:
    """Run one variant in processes of its own."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        words = [
            *("fit", f"--config={CONFIGS / name.partition(',')[0]}.yaml", f"--run={folder}/run", "--final_test=false"),
            *("--trainer.accelerator=cpu", f"--trainer.devices={processes}", "--trainer.max_epochs=100"),
            *("--trainer.logger=false", "--trainer.enable_progress_bar=false", "--trainer.callbacks+=__main__.Ledger"),
            *(f"--data.batch_tokens={TOKENS * processes}", *VARIANTS[name]),
        ]
        own = {"OMP_NUM_THREADS": "1", STEPS: str(steps), RESULT: str(result)}
        done = subprocess.run(
            [sys.executable, __file__, *words], env={**os.environ, **own}, capture_output=True, text=True
        )
        if not result.is_file():
            sys.exit(f"{name} on {processes} processes:\n{done.stdout}{done.stderr}")
        found: dict[str, Any] = json.loads(result.read_text())
        return found


def sent(kind: str, size: float, processes: int) -> float:
    """Bytes that a process sends in a ring, as a mean over processes."""
    shares = {"all_reduce": 2 * (processes - 1) / processes, "all_gather": processes - 1}
    return size * shares.get(kind, (processes - 1) / processes)


def main() -> None:
    """Print one row per variant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--steps", type=int, default=3)
    options = parser.parse_args()
    print(
        "| variant | trained | KB sent per step: all-reduce | all-gather, broadcast | collectives | ms in them |",
        end="",
    )
    print(" ms per step, 1 → 2 processes | targets/s, 1 → 2 | ratio |\n|---|--:|--:|--:|--:|--:|--:|--:|--:|")
    for name in options.variants:
        one, two = (measure(name, processes, options.steps) for processes in (1, 2))
        kinds = two["kinds"]
        size = {kind: sent(kind, seen["bytes"], 2) / 1000 for kind, seen in kinds.items()}
        reduced = size.pop("all_reduce", 0.0)
        number, waited = (sum(seen[part] for seen in kinds.values()) for part in ("number", "ms"))
        speeds = [run["targets"] / options.steps / run["seconds"] for run in (one, two)]
        print(
            f"| {name} | {two['trained']:,} | {reduced:,.1f} | {sum(size.values()):,.1f} "
            f"| {number:.0f} | {waited:,.0f} | {one['seconds'] * 1000:,.0f} → {two['seconds'] * 1000:,.0f} "
            f"| {speeds[0]:,.0f} → {speeds[1]:,.0f} | {speeds[1] / speeds[0]:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    if sys.argv[1:2] == ["fit"]:  # this script in one of its own processes
        anyo()
    else:
        main()

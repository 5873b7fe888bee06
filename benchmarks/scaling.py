"""How time and memory grow with history length, depth, catalogue and users: four sizes each, and a fitted exponent.

    python benchmarks/scaling.py [--only NAME ...]             # about 6 minutes on one quiet core
    python benchmarks/scaling.py --only split --interactions 100000000     # one split, at most --memory GiB

Each measurement is a process of its own with one thread, so that its peak memory is its own; memory is the peak above
what the process held before. An exponent is the slope of log time (or memory) over log size: 1 is linear. Its residual
is the root mean square of what the line misses, in per cent. Writes the tables into scaling.md, between its markers.
"""

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

PAGE = Path(__file__).parent / "scaling.md"
START, END = "<!-- measured: made by `python benchmarks/scaling.py`, do not edit -->", "<!-- end of measured -->"
DIM = 128


class Meter:
    """Seconds and memory of what runs inside, in the process that it runs in."""

    def __init__(self, repeats: int = 1) -> None:
        self.repeats = repeats

    def __call__(self, job: Callable[[], object]) -> dict[str, float]:
        """The quickest of some runs; the memory of all."""
        before, times = resident_gib(), []
        for _ in range(self.repeats):
            started = time.perf_counter()
            job()
            times.append(time.perf_counter() - started)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB
        return {"seconds": min(times), "gib": peak - before}


def resident_gib() -> float:
    """What this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**30


def lora_step(*, layers: int, length: int, rows: int) -> dict[str, float]:
    """A step of LoRA in SmolLM2's shape, random weights, the processor's fastest precision."""
    import gpu_models as models

    config = models.SHAPES["SmolLM2-135M"]()
    config.num_hidden_layers = layers
    with tempfile.TemporaryDirectory() as folder:
        module = models.Ours(models.save_model(config, Path(folder)))
        step = models.trainer_step(module.train())
    step(models.random_batch(rows * 16, 16, config.vocab_size))  # AdamW's state and the libraries' own
    batch = models.random_batch(rows * length, length, config.vocab_size)
    return Meter(repeats=2)(lambda: step(batch))


def full_softmax(items: int, states: int = 2048) -> dict[str, float]:
    """Forward and backward pass; what is above the item vectors and their gradient."""
    import torch

    from anyo_lightning import losses

    vectors = torch.randn(items, DIM, requires_grad=True)
    rows = torch.randn(states, DIM, requires_grad=True)
    targets = torch.randint(items, (states,))
    found = Meter()(lambda: losses.full_softmax(rows, vectors, targets).backward())
    return found | {"gib": found["gib"] - vectors.numel() * 4 / 2**30}


def evaluation(users: int, items: int) -> dict[str, float]:
    """Ranks and lists of 10, 50 items of each history masked."""
    import torch

    from anyo_lightning.evaluation.index import ItemIndex
    from anyo_lightning.evaluation.ranking import rank

    random = np.random.default_rng(0)
    vectors, queries = torch.randn(items, DIM), torch.randn(users, DIM)
    target, seen = random.integers(0, items, users), random.integers(0, items, (users, 50))
    index = ItemIndex(vectors.numpy())
    return Meter()(
        lambda: rank(np.arange(users), queries, vectors, target, index=index, k=10, history=seen.__getitem__)
    )


def split(interactions: int) -> dict[str, float]:
    """From a folder of Parquet files with string ids to a split; writing them is another process's work."""
    from anyo_lightning.data.sources import Columns, read_files
    from anyo_lightning.data.splits import make_split

    with tempfile.TemporaryDirectory() as folder:
        writer = Path(__file__).with_name("data_split.py")
        subprocess.run([sys.executable, writer, "--write", folder, "--interactions", str(interactions)], check=True)

        def read_and_split() -> None:
            files = Path(folder) / "interactions", Path(folder) / "items.parquet"
            found = make_split(read_files(*files, columns=Columns()))
            print(f"{found.interactions:,} interactions, {found.users:,} users", file=sys.stderr)

        return Meter()(read_and_split)


# What grows, the sizes, and the measurement of one size.
SWEEPS: dict[str, tuple[str, tuple[int, ...], Callable[[int], dict[str, float]]]] = {
    "history": (
        "history length, tokens: a LoRA step on 4 histories, 2 layers",
        (128, 256, 512, 1024),
        lambda size: lora_step(layers=2, length=size, rows=4),
    ),
    "depth": (
        "depth, layers: a LoRA step on 4 histories of 256 tokens",
        (1, 2, 4, 8),
        lambda size: lora_step(layers=size, length=256, rows=4),
    ),
    "softmax": (
        "catalogue, items: full softmax, 2,048 states, forward and backward; memory above vectors and gradient",
        (125_000, 250_000, 500_000, 1_000_000),
        full_softmax,
    ),
    "catalogue": (
        "catalogue, items: evaluation of 512 users",
        (12_500, 25_000, 50_000, 100_000),
        lambda size: evaluation(512, size),
    ),
    "users": (
        "users: evaluation over 25,000 items",
        (512, 1024, 2048, 4096),
        lambda size: evaluation(size, 25_000),
    ),
    "split": (
        "interactions (20 per user, 100,000 items): from Parquet to a split",
        (1_250_000, 2_500_000, 5_000_000, 10_000_000),
        split,
    ),
}


def measured(name: str, size: int, memory_gib: float) -> dict[str, float]:
    """One measurement in a process of its own."""
    words = [sys.executable, __file__, "--only", name, "--measure", str(size), "--memory", str(memory_gib)]
    root = str(Path(__file__).parents[1])
    own = {"OMP_NUM_THREADS": "1", "POLARS_MAX_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    done = subprocess.run(words, env={**os.environ, **own, "PYTHONPATH": path}, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{name} at {size:,} failed")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    print(f"{name} {size:,}: {found['seconds']:.2f} s, {found['gib']:.3f} GiB", file=sys.stderr, flush=True)
    return found


def exponent(sizes: list[int], values: list[float]) -> str:
    """The slope of log value over log size, and the root mean square of what is left, in per cent."""
    x, y = np.log(sizes), np.log(np.maximum(values, 1e-4))
    slope, level = np.polyfit(x, y, 1)
    return f"{slope:.2f} (±{100 * math.sqrt(np.mean((y - slope * x - level) ** 2)):.0f}%)"


def table(what: str, sizes: list[int], found: list[dict[str, float]]) -> list[str]:
    """Sizes as columns; time, memory and their exponents."""
    lines = [
        f"| {what} | {' | '.join(f'{size:,}' for size in sizes)} | exponent |",
        "|---|" + "--:|" * (len(sizes) + 1),
    ]
    for name, unit in (("seconds", "seconds"), ("gib", "GiB")):
        values = [one[name] for one in found]
        lines.append(f"| {unit} | {' | '.join(f'{value:.3g}' for value in values)} | {exponent(sizes, values)} |")
    return [*lines, ""]


def stop_above(limit_gib: float) -> None:
    """End this process when it holds more."""

    def watch() -> None:
        while resident_gib() < limit_gib:
            time.sleep(0.2)
        print(f"stopped: holds more than {limit_gib} GiB", file=sys.stderr, flush=True)
        os._exit(3)

    threading.Thread(target=watch, daemon=True).start()


def main() -> None:
    """Measure, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SWEEPS, default=list(SWEEPS))
    parser.add_argument("--interactions", type=int, help="of one split, instead of a sweep")
    parser.add_argument("--memory", type=float, default=15, help="GiB at which a measurement is stopped")
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)  # one of its own processes
    options = parser.parse_args()
    if options.measure is not None:
        stop_above(options.memory)
        print(json.dumps(SWEEPS[options.only[0]][2](options.measure)))
        return
    if options.interactions is not None:
        measured("split", options.interactions, options.memory)
        return
    lines: list[str] = []
    for name in options.only:
        what, sizes, _ = SWEEPS[name]
        lines += table(what, list(sizes), [measured(name, size, options.memory) for size in sizes])
    print("\n".join(lines))
    if options.only == list(SWEEPS):
        page: Any = PAGE.read_text()
        before, after = page.partition(START)[0], page.partition(END)[2]
        PAGE.write_text("\n".join([before + START, "", *lines, f"Measured on {machine()}.", "", END]) + after)


def machine() -> str:
    """The processor and the day."""
    from anyo_lightning.environment import environment

    found = environment()
    hardware, versions = found["hardware"], found["versions"]
    return (
        f"one core of {hardware['cpu']} ({hardware['dtype']}), torch {versions['torch']}, polars {versions['polars']}, "
        f"{time.strftime('%Y-%m-%d')}"
    )


if __name__ == "__main__":
    main()

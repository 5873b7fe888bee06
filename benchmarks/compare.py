"""Seconds and peak memory of `anyo compare` with many large runs.

    python benchmarks/compare.py [--runs N] [--users N] [--seeds N] [--format rich]

Writes synthetic run folders (string ids, one target per user, lists of ten, files in the same order as the evaluator
writes them) into a temporary folder and compares them in a process of its own, so that the memory is that of the job
alone.
"""

import argparse
import contextlib
import io
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import polars as pl
import torch

from anyo_lightning.compare.table import compare
from anyo_lightning.evaluation.intervals import bootstrap_means
from anyo_lightning.evaluation.metrics import user_metrics
from anyo_lightning.runs import RunFolder

ITEMS = 50_000


def write_synthetic(folder: Path, runs: int, users: int, seeds: int) -> None:
    """Write run folders of variants that get better little by little."""
    random = np.random.default_rng(0)
    ids = np.array([f"B{item:09d}" for item in range(ITEMS)])
    target, counts = random.integers(0, ITEMS, users), random.zipf(1.5, ITEMS).clip(max=10_000)
    ease = random.uniform(0, np.log(5000), users)
    bands = {"head": 0.4, "middle": 0.4, "tail": 0.2}
    shared = pl.DataFrame(
        {
            "user_id": [f"A{user:09d}USER" for user in range(users)],
            "target_item_id": ids[target],
            "top_item_ids": ids[random.integers(0, ITEMS, (users, 10))].tolist(),
            "history_item_ids": ids[random.integers(0, ITEMS, (users, 20))].tolist(),
            "history_length": random.integers(3, 300, users),
            "target_count": counts[target],
            "target_tied": random.random(users) < 0.3,
        }
    )
    catalogue = pl.DataFrame({"item_id": ids, "text": [f"Title of {item}" for item in ids]})
    for number in range(runs):
        ranks = np.exp(np.abs(ease - 0.005 * (number // seeds) + random.normal(0, 0.5, users))).round()
        values = user_metrics(torch.from_numpy(ranks), torch.arange(users), [10])
        low, high = bootstrap_means(np.stack([value.numpy() for value in values.values()], axis=1))
        ends = zip(values.items(), low, high, strict=True)
        run = RunFolder.new(folder, f"variant_{number // seeds}")
        run.write_catalogue(catalogue)
        run.write_predictions(shared.with_columns(rank=ranks))
        run.write_metrics(
            {
                "variant": f"variant_{number // seeds}",
                "seed": number % seeds,
                "split": {
                    "name": "synthetic",
                    "strategy": "leave_one_out",
                    "ties": "file_order",
                    "fingerprint": "0" * 16,
                    "counts": {"users": users, "items": ITEMS},
                },
                "protocol": {"cutoffs": [10], "history_masked": True, "index": "Flat", "rows": users},
                "metrics": {
                    f"test/{name}": {"value": float(value.mean()), "low": float(a), "high": float(b)}
                    for (name, value), a, b in ends
                },
                "slices": {"target popularity": {name: {"rows": round(s * users)} for name, s in bands.items()}},
                "cost": {"train_seconds": 60.0 * (number + 1), "trainable_parameters": 1000},
                "environment": {},
            }
        )


def main() -> None:
    """Write the runs, then compare them in a fresh process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--users", type=int, default=100_000)
    parser.add_argument("--seeds", type=int, default=1, help="runs per variant")
    parser.add_argument("--format", default="rich")
    parser.add_argument("--folder", type=Path, help="compare the runs of this folder instead of writing any")
    options = parser.parse_args()
    if options.folder:
        start_s = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()) as written:
            compare([options.folder], baseline="variant_0", format=options.format)
        seconds = time.perf_counter() - start_s
        peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB
        size_mb = len(written.getvalue()) / 1e6
        print(f"{options.format}: {seconds:.1f} s, peak {peak_gib:.2f} GiB, {size_mb:.1f} MB written")
        return
    with tempfile.TemporaryDirectory() as folder:
        print(f"Writing {options.runs} runs of {options.users:,} users ...", file=sys.stderr)
        write_synthetic(Path(folder), options.runs, options.users, options.seeds)
        for form in options.format.split(","):
            subprocess.run([sys.executable, __file__, "--folder", folder, "--format", form], check=True)


if __name__ == "__main__":
    main()

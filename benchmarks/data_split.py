"""Seconds and peak memory from 10 million interactions in Parquet to a split.

    python benchmarks/data_split.py [--interactions N]

Writes synthetic tables (string ids, item popularity as 1/rank, tied timestamps; Parquet files of five million rows)
into a temporary folder, and reads and splits them in a process of its own, so that the memory is that of the job alone.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import polars as pl

from anyo_lightning.data.sources import Columns, read_files
from anyo_lightning.data.splits import make_split

PART_ROWS = 5_000_000


def write_synthetic(folder: Path, interactions: int) -> None:
    """Write `interactions/*.parquet`, a few million rows each, and `items.parquet`."""
    random = np.random.default_rng(0)
    users, items = interactions // 20, 100_000
    shares = np.cumsum(1 / np.arange(1, items + 1))
    (folder / "interactions").mkdir()
    for part, start in enumerate(range(0, interactions, PART_ROWS)):
        rows = min(PART_ROWS, interactions - start)
        table = pl.DataFrame(
            {
                "user_id": random.integers(0, users, rows),
                "item_id": np.searchsorted(shares, random.random(rows) * shares[-1]),
                "timestamp": random.integers(1_500_000_000, 1_500_100_000, rows) * 1000,
            }
        )
        table = table.with_columns(
            pl.format("A{}USER", pl.col("user_id").cast(pl.String).str.zfill(9)).alias("user_id"), _item_ids()
        )
        table.write_parquet(folder / "interactions" / f"part-{part:03d}.parquet")
    catalogue = pl.DataFrame({"item_id": np.arange(items)}).with_columns(_item_ids())
    catalogue.with_columns(title=pl.format("Title of {}", "item_id")).write_parquet(folder / "items.parquet")


def _item_ids() -> pl.Expr:
    return pl.format("B{}", pl.col("item_id").cast(pl.String).str.zfill(9)).alias("item_id")


def split(folder: Path) -> None:
    """Read and split, and print what it took."""
    start_s = time.perf_counter()
    source = read_files(folder / "interactions", folder / "items.parquet", columns=Columns())
    read_s = time.perf_counter() - start_s
    result = make_split(source)
    all_s = time.perf_counter() - start_s
    queries_s = -time.perf_counter()
    rows = len(result.queries("test"))
    queries_s += time.perf_counter()
    peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB
    print(
        f"{source.interactions.height:,} read, {result.interactions:,} kept, {result.users:,} users, "
        f"{result.catalogue_size:,} items: read {read_s:.1f} s, read and split {all_s:.1f} s, "
        f"{rows:,} test queries {queries_s:.1f} s, peak {peak_gib:.2f} GiB"
    )


def main() -> None:
    """Write the tables, then split them in a fresh process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--interactions", type=int, default=10_000_000)
    parser.add_argument("--folder", type=Path, help="split the tables of this folder instead of writing any")
    parser.add_argument("--write", type=Path, help="write the tables into this folder, and split nothing")
    options = parser.parse_args()
    if options.write:
        write_synthetic(options.write, options.interactions)
        return
    if options.folder:
        split(options.folder)
        return
    with tempfile.TemporaryDirectory() as folder:
        print(f"Writing {options.interactions:,} interactions ...", file=sys.stderr)
        write_synthetic(Path(folder), options.interactions)
        subprocess.run([sys.executable, __file__, "--folder", folder], check=True)


if __name__ == "__main__":
    main()

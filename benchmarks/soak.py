"""Does a process that trains, validates and tests again and again grow? Memory, open files and temporary files.

python benchmarks/soak.py [--cycles 200]: SASRec under the debug overlay on a small data set of loops, in one process.
Prints one row for every tenth of the cycles, and fails where the last half of them grew by more than a hundredth in
memory, or at all in open or temporary files.
"""

import argparse
import contextlib
import gc
import io
import os
import sys
import tempfile
from pathlib import Path

from anyo_lightning.cli.main import main as anyo

CONFIGS = Path(__file__).parents[1] / "configs"


def resident_mib() -> float:
    """Memory of this process, in MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def measure(folder: Path) -> tuple[float, int, int]:
    """Memory in MiB, open files, and files in the folder for temporary ones."""
    gc.collect()
    return resident_mib(), len(os.listdir("/proc/self/fd")), sum(1 for _ in folder.rglob("*"))


def write_data(folder: Path) -> tuple[Path, Path]:
    """Two CSV files: 60 users who go around a catalogue of 40 items."""
    rows = [f"u{user},m{(user + step) % 40},{step}" for user in range(60) for step in range(12)]
    (folder / "interactions.csv").write_text("\n".join(["user_id,item_id,timestamp", *rows]) + "\n")
    items = [f"m{item},Movie {item}" for item in range(40)]
    (folder / "items.csv").write_text("\n".join(["item_id,title", *items]) + "\n")
    return folder / "interactions.csv", folder / "items.csv"


def cycle(interactions: Path, items: Path, run: Path) -> None:
    """Train, validate and test a new run."""
    words = [f"--config={CONFIGS / 'sasrec.yaml'}", f"--config={CONFIGS / 'overlays' / 'debug.yaml'}"]
    words += [f"--data.interactions={interactions}", f"--data.items={items}", "--trainer.enable_progress_bar=false"]
    with contextlib.redirect_stdout(io.StringIO()):
        anyo(["fit", *words, f"--run={run}"])
        anyo(["validate", f"--run={run}", "--trainer.enable_progress_bar=false"])
        anyo(["test", f"--run={run}", "--trainer.enable_progress_bar=false"])


def main() -> None:
    """Run the cycles; exit status 1 where something grows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cycles", type=int, default=200)
    cycles = parser.parse_args().cycles
    with tempfile.TemporaryDirectory() as data, tempfile.TemporaryDirectory() as temporary:
        tempfile.tempdir = temporary  # all that is forgotten is found here
        interactions, items = write_data(Path(data))
        measured = []
        print("cycle  memory, MiB  open files  temporary files")
        for number in range(1, cycles + 1):
            cycle(interactions, items, Path(data) / f"run{number}")
            measured.append(measure(Path(temporary)))
            if number % max(cycles // 10, 1) == 0:
                memory, files, left = measured[-1]
                print(f"{number:5d}  {memory:11.1f}  {files:10d}  {left:15d}", flush=True)
        tempfile.tempdir = None
    half, end = measured[len(measured) // 2 - 1], measured[-1]
    grown = end[0] > 1.01 * half[0] or end[1] > half[1] or end[2] > half[2]
    print("grows" if grown else "does not grow")
    sys.exit(grown)


if __name__ == "__main__":
    main()

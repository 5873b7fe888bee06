"""What the peers share: the split that `anyo data --output` wrote, as pandas, and the lists that `anyo compare` reads.

Runs in each peer's own environment, which has pandas and not this project.
"""

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

LENGTH = 100  # of a list


@dataclass(frozen=True)
class Split:
    """Interactions with user_id, item_id and `position`, which grows along a user's history and hides no tie."""

    folder: Path
    train: pd.DataFrame
    validation: pd.DataFrame
    test_users: list[int]

    @property
    def known(self) -> pd.DataFrame:
        """The histories of the test: train, then validation."""
        return pd.concat([self.train, self.validation], ignore_index=True)


def read_split(folder: Path) -> Split:
    """Read a leave-one-out split whose ids are integers."""
    parts = {stage: pd.read_csv(folder / f"{stage}.csv") for stage in ("train", "validation")}
    together = pd.concat(parts, ignore_index=False)
    together["position"] = together.groupby("user_id").cumcount()
    qrels = pd.read_csv(folder / "test.qrels", sep=" ", header=None)
    return Split(folder, together.loc["train"], together.loc["validation"], qrels[0].tolist())


def write_lists(lists: pd.DataFrame, file: Path) -> None:
    """Write user_id, item_id and score for `anyo compare --foreign`."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lists[["user_id", "item_id", "score"]].to_csv(file, index=False)
    print(f"{file}: {lists['user_id'].nunique():,} users, {time.process_time() / 60:.1f} minutes of CPU")


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that all peers have; the widths are those of configs/sasrec.yaml."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    options.add_argument("split", type=Path, help="folder of anyo data --output")
    options.add_argument("lists", type=Path, help="CSV to write")
    options.add_argument("--width", type=int, default=64)
    options.add_argument("--heads", type=int, default=2)
    options.add_argument("--length", type=int, default=100, help="items of a history that are read")
    options.add_argument("--epochs", type=int, default=60, help="at most")
    options.add_argument("--patience", type=int, default=10, help="validations without a better one")
    options.add_argument("--every", type=int, default=2, help="epochs between validations")
    options.add_argument("--seed", type=int, default=0)
    return options

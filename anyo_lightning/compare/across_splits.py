"""`anyo compare --across_splits true`: how far figures move when the ties of the split are drawn again.

Nobody knows the order of interactions at one timestamp, and each order is another split: other test items, other
training items. A row is a variant trained on several such splits. Users are not paired, since their targets differ, so
that there is no test here: a difference between variants that is small beside these deviations depends on the order.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Group
from rich.text import Text

from anyo_lightning.compare.columns import Column, Style, number, title
from anyo_lightning.compare.costs import NONE
from anyo_lightning.compare.render import markdown_table, rich_table
from anyo_lightning.compare.variants import Variant, read_splits
from anyo_lightning.errors import InputError

NOTE = "Mean, standard deviation and range over splits whose ties were drawn again; a split's seeds are averaged first."


@dataclass(frozen=True)
class Spread:
    """One variant's figures on several splits."""

    variant: str
    figures: dict[str, list[float]]  # for each metric one value per split


def spreads(paths: Sequence[Path], metrics: Sequence[str]) -> list[Spread]:
    """Each variant's figures by split, the highest mean of the first metric first.

    Args:
        paths: Run folders, or folders that hold them: the newest tested one of each variant, seed, settings and split.
        metrics: Names as in metrics.json.

    Raises:
        InputError: A folder does not exist or holds no tested run, runs differ in more than ties and seeds, or a metric
            is unknown.
    """
    rows = [_spread(variant, metrics) for variant in read_splits(paths)]
    return sorted(rows, key=lambda row: -float(np.mean(row.figures[metrics[0]])))


def spread_columns(rows: Sequence[Spread]) -> list[Column]:
    """One line per variant."""
    plain: list[Style] = ["plain"] * len(rows)
    first = next(iter(rows[0].figures))
    columns = [
        Column("variant", [row.variant for row in rows], plain),
        Column("splits", [str(len(row.figures[first])) for row in rows], plain),
    ]
    for metric in rows[0].figures:
        values = [row.figures[metric] for row in rows]
        deviations = [number(float(np.std(of, ddof=1)), 3) if len(of) > 1 else NONE for of in values]
        ranges = [f"{number(min(of), 3)} to {number(max(of), 3)}" for of in values]
        columns.append(Column(title(metric), [number(float(np.mean(of)), 3) for of in values], plain))
        columns += [Column("sd", deviations, plain), Column("range", ranges, plain)]
    return columns


def spread_as_rich(rows: Sequence[Spread]) -> Group:
    """For the terminal."""
    return Group(rich_table(spread_columns(rows)), "", Text(NOTE, "dim"))


def spread_as_markdown(rows: Sequence[Spread]) -> str:
    """For a page."""
    return "\n".join([*markdown_table(spread_columns(rows)), "", NOTE]) + "\n"


def _spread(variant: Variant, metrics: Sequence[str]) -> Spread:
    figures: dict[str, list[float]] = {}
    for metric in metrics:
        by_split = defaultdict(list)
        for run in variant.runs:
            if metric not in run.content["metrics"]:
                there = ", ".join(run.content["metrics"])
                raise InputError(f"Expected metrics to be among {there}; got {metric!r}, which {run.folder.path} lacks")
            by_split[run.content["split"]["fingerprint"]].append(run.content["metrics"][metric]["value"])
        figures[metric] = [float(np.mean(of_seeds)) for of_seeds in by_split.values()]
    return Spread(variant.label, figures)

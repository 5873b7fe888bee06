"""The figures of several tested runs, read from their folders, checked to be comparable, paired with a baseline.

Runs of different splits or protocols are refused: their figures do not mean the same.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

from anyo_lightning.compare.stats import Difference, paired_difference
from anyo_lightning.errors import InputError
from anyo_lightning.evaluation.intervals import bootstrap_means
from anyo_lightning.evaluation.metrics import user_metrics
from anyo_lightning.runs import RunFolder, find_runs


@dataclass(frozen=True)
class Cell:
    """One figure of one run."""

    value: float
    low: float | None
    high: float | None
    difference: Difference | None  # to the baseline; None without one, for the baseline itself and for list metrics


@dataclass(frozen=True)
class Line:
    """One run of the table."""

    variant: str
    seed: int | None
    folder: Path
    is_baseline: bool
    cells: dict[str, Cell]
    cost: dict[str, Any]


@dataclass(frozen=True)
class Results:
    """A table without its form; lines are in order of the first metric, the highest first."""

    metrics: tuple[str, ...]
    lines: tuple[Line, ...]
    baseline: str | None
    split: dict[str, Any]
    protocol: dict[str, Any]
    passed_over: tuple[Path, ...]


@dataclass(frozen=True, eq=False)
class _Run:
    folder: RunFolder
    content: dict[str, Any]
    label: str


def load_results(paths: Sequence[Path], *, metrics: Sequence[str], baseline: str | None = None) -> Results:
    """Read runs and work out what the table says.

    Args:
        paths: Run folders, or folders that hold them: then the newest tested version of each variant counts.
        metrics: Names as in metrics.json. Rank metrics at any k are worked out from the predictions if need be.
        baseline: Variant or folder that the others are compared with.

    Returns:
        The figures with intervals and differences.

    Raises:
        InputError: A folder does not exist or holds no tested run, runs differ in split or protocol, a metric is
            unknown, or the baseline is not exactly one of the runs.
    """
    runs, passed_over = _read(paths)
    _check_one(runs, "split", lambda run: _split_name(run.content["split"]))
    _check_one(runs, "protocol", lambda run: _protocol_name(run.content["protocol"]))
    base = None if baseline is None else _find_baseline(runs, baseline)
    base_ranks = None if base is None else _ranks(base)
    lines = []
    for run in runs:
        ranks = _ranks(run) if base is not None and run is not base else None
        if base is not None and base_ranks is not None and ranks is not None:
            _check_same_rows(run, ranks, base, base_ranks)
        cells = {name: _cell(run, name, ranks, base_ranks) for name in metrics}
        seed, cost = run.content["seed"], run.content["cost"]
        lines.append(Line(run.label, seed, run.folder.path, run is base, cells, cost))
    lines.sort(key=lambda line: -line.cells[metrics[0]].value)
    return Results(
        metrics=tuple(metrics),
        lines=tuple(lines),
        baseline=None if base is None else base.label,
        split=runs[0].content["split"],
        protocol=runs[0].content["protocol"],
        passed_over=tuple(passed_over),
    )


def _read(paths: Sequence[Path]) -> tuple[list[_Run], list[Path]]:
    """The tested runs that the paths stand for, each once and with a label of its own, and those passed over."""
    found: dict[Path, RunFolder] = {}
    passed_over: dict[Path, RunFolder] = {}
    for path in paths:
        tested, others = find_runs(path)
        found |= {run.path.resolve(): run for run in tested}
        passed_over |= {run.path.resolve(): run for run in others}
    if not found:
        where = ", ".join(str(path) for path in paths) or "nothing"
        raise InputError(f"Expected runs to name at least one tested run (a folder with metrics.json), got {where}")
    contents = [(run, run.read_metrics()) for run in found.values()]
    names = [(content["variant"], content["seed"]) for _, content in contents]
    runs = []
    for (run, content), name in zip(contents, names, strict=True):
        alone = names.count(name) == 1
        runs.append(_Run(run, content, name[0] if alone else f"{name[0]} ({run.path.resolve().name})"))
    return runs, [run.path for run in passed_over.values()]


def _check_one(runs: Sequence[_Run], what: str, name_of: Callable[[_Run], str]) -> None:
    """Refuse runs that differ in what `name_of` says."""
    groups: dict[str, list[str]] = {}
    for run in runs:
        groups.setdefault(name_of(run), []).append(str(run.folder.path))
    if len(groups) > 1:
        found = "; ".join(f"{name}: {', '.join(folders)}" for name, folders in groups.items())
        raise InputError(f"Expected runs of one {what}, got {len(groups)}. {found}")


def _split_name(split: dict[str, Any]) -> str:
    return f"{split['name']} {split['strategy']} ties {split['ties']} fingerprint {split['fingerprint']}"


def _protocol_name(protocol: dict[str, Any]) -> str:
    """What decides the figures: not the cutoffs, nor the index, since ranks are exact."""
    return f"history {'masked' if protocol['history_masked'] else 'not masked'}, {protocol['rows']} rows"


def _find_baseline(runs: Sequence[_Run], baseline: str) -> _Run:
    folder = Path(baseline).resolve()
    named = [run for run in runs if baseline in (run.label, run.content["variant"])]
    named = named or [run for run in runs if run.folder.path.resolve() == folder]
    if len(named) != 1:
        there = ", ".join(run.label for run in runs) if not named else ", ".join(str(run.folder.path) for run in named)
        hint = "the runs are" if not named else "give the folder of one of"
        raise InputError(
            f"Expected baseline to name one of the runs, got {baseline!r}, which names {len(named)}; {hint} {there}"
        )
    return named[0]


def _ranks(run: _Run) -> pl.DataFrame:
    """Users, targets and ranks of a run, in an order that does not depend on the run."""
    columns = ["user_id", "target_item_id", "rank"]
    return run.folder.read_predictions(columns).sort("user_id", "target_item_id")


def _check_same_rows(run: _Run, ranks: pl.DataFrame, base: _Run, base_ranks: pl.DataFrame) -> None:
    keys = ["user_id", "target_item_id"]
    if not ranks.select(keys).equals(base_ranks.select(keys)):
        raise InputError(
            f"Expected the predictions of {run.folder.path} and of the baseline {base.folder.path} to be of the same "
            f"users and targets, got {len(ranks)} and {len(base_ranks)} rows that differ"
        )


def _cell(run: _Run, name: str, ranks: pl.DataFrame | None, base_ranks: pl.DataFrame | None) -> Cell:
    stored = run.content["metrics"].get(name)
    if stored is None:
        values = _by_user(_ranks(run), name)
        if values is None:
            there = ", ".join(run.content["metrics"])
            raise InputError(f"Expected metrics to be among {there}; got {name!r}, which {run.folder.path} lacks")
        low, high = bootstrap_means(values[:, None])[:, 0]
        stored = {"value": float(values.mean()), "low": float(low), "high": float(high)}
    difference = None
    if ranks is not None and base_ranks is not None:
        values, base_values = _by_user(ranks, name), _by_user(base_ranks, name)
        if values is not None and base_values is not None:
            difference = paired_difference(values, base_values)
    return Cell(stored["value"], stored["low"], stored["high"], difference)


def _by_user(ranks: pl.DataFrame, name: str) -> np.ndarray | None:
    """A rank metric of each user, users in order of their ids; None where ranks do not give the metric."""
    metric, _, cutoff = name.removeprefix("test/").partition("@")
    if not name.startswith("test/") or metric not in ("hr", "recall", "ndcg", "mrr") or not cutoff.isdigit():
        return None
    user = torch.from_numpy(ranks["user_id"].rank("dense").cast(pl.Int64).to_numpy(writable=True))
    values = user_metrics(torch.from_numpy(ranks["rank"].to_numpy(writable=True)), user, [int(cutoff)])
    return values[f"{metric}@{cutoff}"].numpy()

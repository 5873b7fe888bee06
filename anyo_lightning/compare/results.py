"""What a comparison says, without its form: one line per variant, with intervals, differences, slices and cost."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from anyo_lightning.compare.costs import DEFAULT_COSTS
from anyo_lightning.compare.foreign import read_foreign
from anyo_lightning.compare.rows import FUNCTIONS, SharedRows, is_rank_metric
from anyo_lightning.compare.slice_table import Slice, slice_table
from anyo_lightning.compare.stats import Difference, differences_to
from anyo_lightning.compare.variants import TestedRun, Variant, find_variant, read_variants
from anyo_lightning.errors import InputError
from anyo_lightning.evaluation.intervals import bootstrap_means

HIGHER_IS_BETTER = ("hr", "recall", "ndcg", "mrr", "precision", "map", "serendipity", "coverage", "index_recall")


@dataclass(frozen=True)
class Cell:
    """One figure of one variant: the mean over its seeds."""

    value: float
    low: float | None  # 95% interval over users, of the mean over seeds
    high: float | None
    deviation: float | None  # standard deviation over seeds; None with one seed
    by_seed: tuple[float, ...]
    difference: Difference | None  # to the baseline; None without one, for the baseline itself and for list metrics
    to_best: Difference | None  # to the best variant; None for it and for list metrics
    best: bool

    @property
    def near_best(self) -> bool:
        """Whether the test cannot tell the variant from the best one."""
        return self.to_best is not None and not self.to_best.clear


@dataclass(frozen=True)
class Line:
    """One variant of the table."""

    variant: str
    seeds: tuple[int | None, ...]
    folders: tuple[Path, ...]
    is_baseline: bool
    index: str  # that gives the lists; ranks are exact whatever it is
    cells: dict[str, Cell]  # without those of `left_out`
    cost: dict[str, Any]  # means over seeds
    left_out: dict[str, str]  # metrics that another system's lists cannot show, and why
    list_length: int | None  # of such lists
    note: str


@dataclass(frozen=True)
class Results:
    """A table without its form; lines are in order of the first metric, the highest first."""

    metrics: tuple[str, ...]
    lines: tuple[Line, ...]
    baseline: str | None
    split: dict[str, Any]
    protocol: dict[str, Any]
    slices: tuple[Slice, ...]
    passed_over: tuple[Path, ...]
    costs: tuple[str, ...] = DEFAULT_COSTS  # columns of the ledger


@dataclass(frozen=True, eq=False)
class Comparison:
    """The results and what they were worked out from: the report shows both."""

    results: Results
    variants: tuple[Variant, ...]  # in the order of the lines
    shared: SharedRows


def load_results(
    paths: Sequence[Path],
    *,
    metrics: Sequence[str],
    baseline: str | None = None,
    foreign: Sequence[str] = (),
    slices: bool = True,
    costs: Sequence[str] = DEFAULT_COSTS,
) -> Comparison:
    """Read runs and work out what the table says.

    Args:
        paths: Run folders, or folders that hold them: see `read_variants`.
        metrics: Names as in metrics.json. Rank metrics at any k are worked out from the predictions if need be.
        baseline: Variant or folder that the others are compared with.
        foreign: Lists of other systems, `NAME=FILE` each, as `read_foreign` takes them.
        slices: Whether to work out slices, too.
        costs: Columns of the ledger.

    Returns:
        The figures with intervals, differences and slices.

    Raises:
        InputError: A folder does not exist or holds no tested run, runs differ in split, protocol, users or targets, a
            metric is unknown, the baseline is not exactly one of the rows, or lists are not of the runs' split.
    """
    variants, passed_over = read_variants(paths)
    _check_metrics(variants, metrics)
    if foreign:
        variants += read_foreign(foreign, variants, metrics)
    base = None if baseline is None else find_variant(variants, baseline)
    shared = SharedRows.read(variants)
    position = None if base is None else variants.index(base)
    columns = {metric: _column(variants, shared, metric, position) for metric in metrics}
    order = sorted(range(len(variants)), key=lambda row: _place(columns[metrics[0]][row]))
    variants = [variants[row] for row in order]
    shared = dataclasses.replace(shared, ranks=tuple(shared.ranks[row] for row in order))
    lines = tuple(
        Line(
            variant=variant.label,
            seeds=tuple(run.seed for run in variant.runs),
            folders=tuple(run.folder.path for run in variant.runs),
            is_baseline=variant is base,
            index=variant.runs[0].content["protocol"]["index"],
            cells={metric: cell for metric in metrics if (cell := columns[metric][row]) is not None},
            cost=_mean_cost(variant.runs),
            left_out=dict(variant.left_out),
            list_length=variant.list_length,
            note=variant.note,
        )
        for variant, row in zip(variants, order, strict=True)
    )
    rank_metrics = [metric for metric in metrics if is_rank_metric(metric)]
    content = variants[0].runs[0].content
    results = Results(
        metrics=tuple(metrics),
        lines=lines,
        baseline=None if base is None else base.label,
        split=content["split"],
        protocol={name: value for name, value in content["protocol"].items() if name != "weights"},  # of one run
        slices=slice_table(variants, shared, rank_metrics, base) if slices and rank_metrics else (),
        passed_over=tuple(passed_over),
        costs=tuple(costs),
    )
    return Comparison(results, tuple(variants), shared)


def is_higher_better(metric: str) -> bool:
    """Whether a table may call the highest figure the best: not so for popularity or Gini."""
    return metric.split("/")[-1].split("@")[0] in HIGHER_IS_BETTER


def _check_metrics(variants: Sequence[Variant], metrics: Sequence[str]) -> None:
    for run in (run for variant in variants for run in variant.runs):
        for metric in metrics:
            if metric not in run.content["metrics"] and not is_rank_metric(metric):
                raise InputError(
                    f"Expected metrics to be among {', '.join(run.content['metrics'])}, or one of "
                    f"{', '.join(FUNCTIONS)} at another k; got {metric!r}, which {run.folder.path} lacks"
                )


def _place(cell: Cell | None) -> float:
    """Where a line stands: the highest first, those without a figure last."""
    return np.inf if cell is None else -cell.value


def _column(variants: Sequence[Variant], shared: SharedRows, metric: str, base: int | None) -> list[Cell | None]:
    """One column of the table, over the variants that can show the metric."""
    shown = [row for row, variant in enumerate(variants) if metric not in variant.left_out]
    own = dataclasses.replace(shared, ranks=tuple(shared.ranks[row] for row in shown))
    cells = _cells([variants[row] for row in shown], own, metric, shown.index(base) if base in shown else None)
    found = dict(zip(shown, cells, strict=True))
    return [found.get(row) for row in range(len(variants))]


def _cells(variants: Sequence[Variant], shared: SharedRows, metric: str, base: int | None) -> list[Cell]:
    """One column of the table."""
    values, low, high = None, None, None
    if is_rank_metric(metric):
        by_seed = [shared.by_seed(row, metric) for row in range(len(variants))]
        values = shared.values(metric)
        low, high = bootstrap_means(values)
    else:
        by_seed = [[run.content["metrics"][metric]["value"] for run in variant.runs] for variant in variants]
    means = [float(np.mean(of_seeds)) for of_seeds in by_seed]
    best = int(np.argmax(means)) if is_higher_better(metric) and len(variants) > 1 else None
    none: list[Difference | None] = [None] * len(variants)
    differences, to_best = (none if values is None else differences_to(values, row) for row in (base, best))
    cells = []
    for row, variant in enumerate(variants):
        ends = (None, None) if low is None or high is None else (float(low[row]), float(high[row]))
        stored = variant.runs[0].content["metrics"].get(metric)
        if len(variant.runs) == 1 and stored is not None:  # also those of list lengths and popularity
            ends = stored["low"], stored["high"]
        cells.append(
            Cell(
                value=means[row],
                low=ends[0],
                high=ends[1],
                deviation=float(np.std(by_seed[row], ddof=1)) if len(by_seed[row]) > 1 else None,
                by_seed=tuple(by_seed[row]),
                difference=differences[row],
                to_best=to_best[row],
                best=best is not None and means[row] == means[best],
            )
        )
    return cells


def _mean_cost(runs: Sequence[TestedRun]) -> dict[str, Any]:
    """Means over seeds of what all of them measured."""
    costs = [run.content["cost"] for run in runs]
    if len(costs) == 1:
        return dict(costs[0])
    names = [name for name in costs[0] if all(isinstance(cost.get(name), int | float) for cost in costs)]
    means = {name: float(np.mean([cost[name] for cost in costs])) for name in names}
    return {name: int(mean) if mean.is_integer() else mean for name, mean in means.items()}

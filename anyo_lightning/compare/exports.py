"""A table's forms for programs, in full precision: JSON with everything, CSV with one line per figure."""

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import polars as pl

from anyo_lightning.compare.costs import COSTS
from anyo_lightning.compare.results import Results
from anyo_lightning.compare.stats import Difference

KEYS = tuple(cost.key for cost in COSTS.values())  # of the ledger; a run that lacks one has a null or an empty cell


def as_json(results: Results) -> str:
    """Everything, seeds and slices included."""
    rows: list[dict[str, Any]] = []
    for line in results.lines:
        entry = dataclasses.asdict(line) | {"folders": [folder.as_posix() for folder in line.folders]}
        entry["metrics"] = entry.pop("cells")
        entry["cost"] = dict.fromkeys(KEYS) | entry["cost"]
        rows.append(entry)
    content = {
        "split": results.split,
        "protocol": results.protocol,
        "baseline": results.baseline,
        "rows": rows,
        "slices": [_slice(results, number) for number in range(len(results.slices))],
    }
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def as_csv(results: Results) -> str:
    """Long form: the whole test set first (`slice_group` and `slice` are empty), then slices."""
    table = pl.DataFrame(list(_lines(results)), infer_schema_length=None)
    return table.write_csv()


def _slice(results: Results, number: int) -> dict[str, Any]:
    part = results.slices[number]
    names = [line.variant for line in results.lines]
    figures = {
        metric: {name: dataclasses.asdict(figure) for name, figure in zip(names, of_metric, strict=True) if figure}
        for metric, of_metric in part.metrics.items()
    }
    return {"group": part.group, "name": part.name, "rows": part.rows, "users": part.users, "metrics": figures}


def _lines(results: Results) -> Iterator[dict[str, Any]]:
    for line in results.lines:
        for metric, cell in line.cells.items():
            yield {
                "variant": line.variant,
                "seeds": " ".join(str(seed) for seed in line.seeds if seed is not None),
                "metric": metric,
                "slice_group": None,
                "slice": None,
                "rows": results.protocol["rows"],
                "value": cell.value,
                "low": cell.low,
                "high": cell.high,
                "deviation_over_seeds": cell.deviation,
                "best": cell.best,
                "near_best": cell.near_best,
                "is_baseline": line.is_baseline,
                "index": line.index,
                "list_length": line.list_length,
                **_difference(cell.difference),
                **{key: line.cost.get(key) for key in KEYS},
            }
    for part in results.slices:
        for metric, figures in part.metrics.items():
            for line, figure in zip(results.lines, figures, strict=True):
                if figure is None:
                    continue
                yield {
                    "variant": line.variant,
                    "seeds": " ".join(str(seed) for seed in line.seeds if seed is not None),
                    "metric": metric,
                    "slice_group": part.group,
                    "slice": part.name,
                    "rows": part.rows,
                    "value": figure.value,
                    "low": figure.low,
                    "high": figure.high,
                    **_difference(figure.difference),
                }


def _difference(difference: Difference | None) -> dict[str, float | None]:
    """Columns of a difference to the baseline, empty without one."""
    names = [field.name for field in dataclasses.fields(Difference)]
    columns = ["difference" if name == "value" else f"difference_{name}" for name in names]
    return {column: getattr(difference, name, None) for column, name in zip(columns, names, strict=True)}

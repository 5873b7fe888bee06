"""`anyo compare --format html`: one file with a table that sorts, plots and a case browser; it needs no network.

What the page shows is worked out here; report.html and its scripts draw it.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl

from anyo_lightning.compare.columns import about, approximate_lists, as_p, decimals_of, notes, number, title
from anyo_lightning.compare.costs import COSTS, cost_notes
from anyo_lightning.compare.page import fill_page
from anyo_lightning.compare.results import Cell, Comparison, is_higher_better
from anyo_lightning.compare.rows import KEYS, SharedRows, in_order, is_rank_metric
from anyo_lightning.compare.variants import TestedRun, Variant
from anyo_lightning.probes.display import MEMORY_NOTE, PROBE_NOTE, memory_columns, probe_columns

SCRIPTS = ("compare/report_shared.js", "compare/report_page.js", "compare/report_plots.js", "compare/report_cases.js")
LARGEST_CURVE = 400  # points; longer curves are thinned
CASES = 1000
LARGEST_CASE_LISTS = 2_000_000  # items in all lists together
LIST_LENGTH = 10
HISTORY_LENGTH = 50
TEXT_LENGTH = 160
CURVE_AXES = ("step", "tokens", "seconds")


def as_html(comparison: Comparison) -> str:
    """The whole page as one text."""
    return fill_page("anyo compare", "compare/report.html", SCRIPTS, _content(comparison))


def _content(comparison: Comparison) -> dict[str, Any]:
    """What the page shows, in the order of the table's lines."""
    results, shared = comparison.results, comparison.shared
    measured = [name for name, cost in COSTS.items() if any(cost.value(line.cost) for line in results.lines)]
    rank_metrics = [metric for metric in results.metrics if is_rank_metric(metric)]
    slices = [
        {
            "group": part.group,
            "name": part.name,
            "users": part.users,
            "metrics": {
                metric: [[figure.value, figure.low, figure.high] if figure else None for figure in figures]
                for metric, figures in part.metrics.items()
            },
        }
        for part in results.slices
    ]
    return {
        "about": about(results),
        "notes": notes(results),
        "baseline": results.baseline,
        "metrics": [{"name": metric, "title": title(metric)} for metric in results.metrics],
        "rankMetrics": rank_metrics,
        "costs": [{"name": name, "axis": COSTS[name].axis, "inTable": name in results.costs} for name in measured],
        "costNotes": cost_notes(measured) if measured else "",
        "variants": [_variant(comparison, row) for row in range(len(results.lines))],
        "slices": slices,
        "pairs": {metric: _pairs(shared, metric) for metric in rank_metrics},
        "cases": _cases(comparison),
        "probes": _probes(comparison),
    }


def _variant(comparison: Comparison, row: int) -> dict[str, Any]:
    """One line of the table with everything that plots need."""
    line, variant = comparison.results.lines[row], comparison.variants[row]
    return {
        "label": line.variant,
        "seeds": len(line.seeds),
        "baseline": line.is_baseline,
        "cells": {m: _cell(cell, m, comparison) for m, cell in line.cells.items()},
        "cost": {name: cost.value(line.cost) for name, cost in COSTS.items()},
        "shown": {name: cost.shown(line.cost) for name, cost in COSTS.items()},
        "curves": [_curves(run) for run in variant.runs],
    }


def _cell(cell: Cell, metric: str, comparison: Comparison) -> dict[str, Any]:
    """Figures in full for sorting and plots, and as the table shows them."""
    decimals = decimals_of([line.cells.get(metric) for line in comparison.results.lines])
    difference = cell.difference
    return {
        "value": cell.value,
        "low": cell.low,
        "high": cell.high,
        "text": number(cell.value, decimals),
        "half": None if cell.low is None or cell.high is None else number((cell.high - cell.low) / 2, decimals),
        "deviation": None if cell.deviation is None else number(cell.deviation, decimals),
        "best": cell.best,
        "nearBest": cell.near_best,
        "higherIsBetter": is_higher_better(metric),
        "difference": None
        if difference is None
        else {
            "value": difference.value,
            "text": ("" if difference.value < 0 else "+") + number(difference.value, decimals),
            "half": number((difference.high - difference.low) / 2, decimals),
            "p": difference.p_holm,
            "pText": as_p(difference.p_holm),
            "effect": number(difference.effect_size, 2),
            "clear": difference.clear,
        },
    }


def _curves(run: TestedRun) -> dict[str, Any]:
    """For each logged figure its points: step, tokens, seconds, value."""
    table = run.folder.read_curves()
    points: dict[str, Any] = {}
    if table is not None:
        axes = [axis for axis in CURVE_AXES if axis in table.columns]
        names = [n for n in table.columns if n == "train/loss" or (n.startswith("val/") and n != "val/seconds")]
        for name in names:
            kept = table.select(*axes, name).drop_nulls(name)
            kept = kept.gather_every(max(1, math.ceil(kept.height / LARGEST_CURVE)))
            columns = {axis: kept[axis].to_list() for axis in axes}
            values = [float(f"{value:.5g}") if math.isfinite(value) else None for value in kept[name].to_list()]
            points[name] = columns | {"value": values}
    return {"seed": run.seed, "points": points}


def _pairs(shared: SharedRows, metric: str) -> dict[str, Any]:
    """For each ordered pair of variants: users for whom the first is higher, and the mean difference with ± its half.

    Half of the interval is 1.96 standard errors of the paired difference, from Σ(a − b)² = Σa² + Σb² − 2Σab.
    """
    values = shared.values(metric)
    users = len(values)
    mean, products = values.mean(axis=0), values.T @ values / users
    squares = np.diag(products)
    difference = mean[:, None] - mean[None, :]
    variance = np.clip(squares[:, None] + squares[None, :] - 2 * products - difference**2, 0, None)
    columns = [np.ascontiguousarray(column) for column in values.T]
    wins = [[int(np.sum(one > other + 1e-12)) for other in columns] for one in columns]
    half = 1.96 * np.sqrt(variance / max(1, users - 1))
    return {"users": users, "wins": wins, "difference": difference.round(6).tolist(), "half": half.round(6).tolist()}


def _cases(comparison: Comparison) -> dict[str, Any]:
    """Test rows with history, target and each variant's list, as positions in one table of texts."""
    shared, variants = comparison.shared, comparison.variants
    count = min(CASES, max(1, LARGEST_CASE_LISTS // (len(variants) * LIST_LENGTH)), shared.keys.height)
    chosen = np.sort(np.random.default_rng(0).choice(shared.keys.height, count, replace=False))
    keys = shared.keys[chosen]
    facts = ["history_item_ids", "history_length", "target_count", "target_tied"]
    rows = _predictions(variants[0], keys, facts)
    catalogue = _fullest_catalogue(variants)
    texts = dict(zip(*(catalogue[name].to_list() for name in ("item_id", "text")), strict=True))
    items: dict[str, int] = {}

    def place(item: str) -> int:
        return items.setdefault(item, len(items))

    lists = [
        [
            [place(item) for item in of[:LIST_LENGTH]]
            for of in _predictions(variant, keys, ["top_item_ids"])["top_item_ids"].to_list()
        ]
        for variant in variants
    ]
    cases = []
    for number_, (row, fact) in enumerate(zip(chosen, rows.iter_rows(named=True), strict=True)):
        history = fact["history_item_ids"]
        cases.append(
            {
                "user": fact["user_id"],
                "target": place(fact["target_item_id"]),
                "history": [place(item) for item in reversed(history[-HISTORY_LENGTH:])],
                "historyLength": len(history),
                "targetCount": fact["target_count"],
                "tied": fact["target_tied"],
                "lists": [of[number_] for of in lists],
                "ranks": [float(of[0][row]) if np.isfinite(of[0][row]) else None for of in shared.ranks],
            }
        )
    whole = shared.keys.height
    note = f"A random sample of {count:,} of the {whole:,} test rows." if count < whole else f"All {whole:,} test rows."
    if any(len(variant.runs) > 1 for variant in variants):
        note += " Lists are of each variant's first seed."
    note = " ".join([note, *approximate_lists(comparison.results)])
    return {"note": note, "items": [_shortened(texts.get(item) or item) for item in items], "rows": cases}


def _probes(comparison: Comparison) -> dict[str, Any]:
    """Tables of what `anyo test --probe` found, of each variant's first seed that has been probed."""
    probed = [
        (variant.label, found[0])
        for variant in comparison.variants
        if (found := [content for run in variant.runs if (content := _own_probes(run)) is not None])
    ]
    asked = [(label, content) for label, content in probed if not isinstance(content["memory"], str)]
    tables = []
    for caption, columns_of, runs in (
        (PROBE_NOTE, probe_columns, probed),
        (f"The bare LLM, before any training. {MEMORY_NOTE}", memory_columns, asked),
    ):
        rows = []
        for label, content in runs:
            columns = columns_of(content)
            headers = ["variant", *(column.header.strip() for column in columns)]
            cells = zip(*(column.texts for column in columns), strict=True)
            rows += [["" if line else label, *of_line] for line, of_line in enumerate(cells)]
        if rows:
            tables.append({"note": caption, "headers": headers, "rows": rows})
    return {"tables": tables}


def _own_probes(run: TestedRun) -> dict[str, Any] | None:
    """A run's probes.json, unless it is of another split than its figures: a floor may have been tested again."""
    content = run.folder.read_probes()
    return content if content is not None and content["split"] == run.content["split"]["fingerprint"] else None


def _predictions(variant: Variant, keys: pl.DataFrame, columns: list[str]) -> pl.DataFrame:
    """Some columns of the first seed's predictions, for some rows and in their order."""
    return in_order(variant.runs[0].folder.read_predictions([*KEYS, *columns]), keys)


def _fullest_catalogue(variants: Sequence[Variant]) -> pl.DataFrame:
    """The catalogue of the variant with most text: runs of the same split may read titles or titles and more."""
    catalogues = (variant.runs[0].folder.read_catalogue() for variant in variants)
    return max(catalogues, key=lambda catalogue: int(catalogue["text"].str.len_chars().sum() or 0))


def _shortened(text: str) -> str:
    return text if len(text) <= TEXT_LENGTH else text[: TEXT_LENGTH - 1] + "…"

"""A table's forms: for a terminal (rich), for a README (Markdown), for a program (JSON)."""

import dataclasses
import json
from dataclasses import dataclass
from typing import Any, Literal

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from anyo_lightning.compare.results import Cell, Results

HIGHER_IS_BETTER = ("hr", "recall", "ndcg", "mrr", "coverage", "index_recall")
FINE_INTERVAL = 0.002  # below it, a third decimal hides what the interval can tell apart
NONE = "-"

Style = Literal["plain", "best", "higher", "lower", "faint"]
RICH_STYLES: dict[Style, str] = {"plain": "", "best": "bold", "higher": "green", "lower": "red", "faint": "dim"}


@dataclass(frozen=True)
class _Column:
    header: str
    texts: list[str]
    styles: list[Style]


def as_rich(results: Results, *, width: int) -> Group:
    """A table for the terminal, with what was compared above it and how to read it below.

    Args:
        results: What to show.
        width: Of the terminal; where a table of one line a run is wider, intervals go below their figures.
    """
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0))
    columns = _columns(results)
    if sum(2 + max(map(len, [column.header, *column.texts])) for column in columns) > width:
        columns = [
            dataclasses.replace(column, texts=[text.replace(" ±", "\n±") for text in column.texts])
            for column in columns
        ]
    for position, column in enumerate(columns):
        table.add_column(column.header, justify="right" if position else "left", no_wrap=True)
    for row in range(len(results.lines)):
        table.add_row(*(Text(column.texts[row], RICH_STYLES[column.styles[row]]) for column in columns))
    about, notes = Text(_about(results), "dim"), Text("\n".join(_notes(results)), "dim")
    return Group(about, "", table, "", notes)


def as_markdown(results: Results) -> str:
    """A GitHub table whose source is aligned too."""
    columns = []
    for position, column in enumerate(_columns(results)):
        cells = [text.strip() for text in column.texts]
        cells = [f"**{text}**" if style == "best" else text for text, style in zip(cells, column.styles, strict=True)]
        header = column.header.strip()
        width = max(3, len(header), *map(len, cells))
        rule = "-" * (width - 1) + ":" if position else "-" * width
        texts = [header, rule, *cells]
        columns.append([text.rjust(width) if position else text.ljust(width) for text in texts])
    lines = ["| " + " | ".join(row) + " |" for row in zip(*columns, strict=True)]
    return "\n".join([_about(results), "", *lines, "", " ".join(_notes(results))]) + "\n"


def as_json(results: Results) -> str:
    """Everything in full precision."""
    runs: list[dict[str, Any]] = []
    for line in results.lines:
        entry = dataclasses.asdict(line) | {"folder": line.folder.as_posix()}
        entry["metrics"] = entry.pop("cells")
        runs.append(entry)
    content = {"split": results.split, "protocol": results.protocol, "baseline": results.baseline, "runs": runs}
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def _columns(results: Results) -> list[_Column]:
    """All columns as text, the same for every form."""
    lines = results.lines
    plain: list[Style] = ["plain"] * len(lines)
    columns = [
        _Column("variant", [line.variant for line in lines], plain),
        _Column("seed", [NONE if line.seed is None else str(line.seed) for line in lines], plain),
    ]
    for name in results.metrics:
        cells = [line.cells[name] for line in lines]
        columns.append(_values(_title(name), cells, name.split("/")[-1].split("@")[0] in HIGHER_IS_BETTER))
        if any(cell.difference is not None for cell in cells):
            columns.append(_differences(cells, [line.is_baseline for line in lines]))
    minutes = [_minutes(line.cost.get("train_seconds")) for line in lines]
    parameters = [_count(line.cost.get("trainable_parameters")) for line in lines]
    return [*columns, _Column("minutes", minutes, plain), _Column("trained", parameters, plain)]


def _values(header: str, cells: list[Cell], best_is_highest: bool) -> _Column:
    decimals = _decimals(cells)
    best = _number(max(cell.value for cell in cells), decimals)
    texts, styles = [], list[Style]()
    for cell in cells:
        value = _number(cell.value, decimals)
        texts.append(value + _half(cell.low, cell.high, decimals))
        styles.append("best" if best_is_highest and len(cells) > 1 and value == best else "plain")
    return _Column(header, texts, styles)


def _differences(cells: list[Cell], is_baseline: list[bool]) -> _Column:
    """Paired differences; a star where the interval leaves out zero, so that no colour is needed to see it."""
    decimals = _decimals(cells)
    texts, styles = [], list[Style]()
    for cell, baseline in zip(cells, is_baseline, strict=True):
        difference = cell.difference
        if difference is None:
            texts.append("base " if baseline else NONE)
            styles.append("faint")
            continue
        value = _number(difference.value, decimals)
        sign = "" if value.startswith("-") else "+"
        half = _half(difference.low, difference.high, decimals)
        texts.append(f"{sign}{value}{half}{'*' if difference.clear else ' '}")
        styles.append(("higher" if difference.value > 0 else "lower") if difference.clear else "plain")
    return _Column("vs base ", texts, styles)


def _decimals(cells: list[Cell]) -> int:
    """Three decimals, four where intervals are so narrow that the fourth means something, one for counts."""
    if max(abs(cell.value) for cell in cells) >= 10:
        return 1
    halves = [(cell.high - cell.low) / 2 for cell in cells if cell.high is not None and cell.low is not None]
    return 4 if halves and min(halves) < FINE_INTERVAL else 3


def _number(value: float, decimals: int) -> str:
    """`.118`, `-.004`, `1.000`, `27.4`."""
    text = f"{value:.{decimals}f}"
    return text.replace("0.", ".", 1) if text.startswith(("0.", "-0.")) else text


def _half(low: float | None, high: float | None, decimals: int) -> str:
    """Half of an interval, with a sign before it."""
    return "" if low is None or high is None else f" ±{_number((high - low) / 2, decimals)}"


def _title(metric: str) -> str:
    """`HR@10` for `test/hr@10`."""
    name, at, cutoff = metric.removeprefix("test/").partition("@")
    return (name.upper() if name in ("hr", "ndcg", "mrr") else name.capitalize()) + at + cutoff


def _minutes(seconds: float | None) -> str:
    return NONE if seconds is None else f"{seconds / 60:.1f}"


def _count(count: int | None) -> str:
    """`12`, `1.3K`, `2.4M`, `7.0B`."""
    if count is None:
        return NONE
    for power, letter in ((9, "B"), (6, "M"), (3, "K")):
        if count >= 10**power:
            return f"{count / 10**power:.1f}{letter}"
    return str(count)


def _about(results: Results) -> str:
    """What was compared, in one line."""
    split, protocol = results.split, results.protocol
    counts = split["counts"]
    return (
        f"{split['name']}, {split['strategy'].replace('_', '-')}, ties by {split['ties'].replace('_', ' ')}: "
        f"{counts['users']:,} users, {counts['items']:,} items, {protocol['rows']:,} test rows, "
        f"full ranking, history {'masked' if protocol['history_masked'] else 'not masked'} "
        f"(split {split['fingerprint']})"
    )


def _notes(results: Results) -> list[str]:
    """How to read the table."""
    notes = ["± is half of the 95% bootstrap interval over users; bold is the highest."]
    if results.baseline is not None:
        notes.append(f"vs base: difference to {results.baseline}, paired by user; * its interval leaves out zero.")
    return [*notes, "minutes: of training; trained: number of trained parameters."]

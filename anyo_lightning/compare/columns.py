"""A table's columns as text and style, the same for the terminal, Markdown and LaTeX; and the sentences around it."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from anyo_lightning.compare.costs import COSTS, NONE, cost_notes
from anyo_lightning.compare.results import Cell, Results, is_higher_better
from anyo_lightning.compare.rows import is_rank_metric
from anyo_lightning.compare.stats import Difference

EXACT_INDEX = "Flat"
FINE_INTERVAL = 0.002  # below it, a third decimal hides what the interval can tell apart

Style = Literal["plain", "best", "higher", "lower", "faint"]


@dataclass(frozen=True)
class Column:
    """A header, and a text and a style for each line; what may go where there is no room for it is `optional`."""

    header: str
    texts: list[str]
    styles: list[Style]
    optional: bool = False


def table_columns(results: Results) -> list[Column]:
    """All columns as text."""
    lines = results.lines
    plain: list[Style] = ["plain"] * len(lines)
    columns = [
        Column("variant", [line.variant for line in lines], plain),
        Column("seeds", [NONE if line.seeds == (None,) else str(len(line.seeds)) for line in lines], plain),
    ]
    for name in results.metrics:
        cells = [line.cells.get(name) for line in lines]
        columns.append(_values(title(name), cells, is_higher_better(name)))
        if any(cell and cell.deviation is not None for cell in cells):
            columns.append(_deviations(cells))
        if any(cell and cell.difference is not None for cell in cells):
            differences = [cell.difference if cell else None for cell in cells]
            columns += _differences(differences, [line.is_baseline for line in lines], decimals_of(cells))
    return columns + [Column(name, [COSTS[name].shown(line.cost) for line in lines], plain) for name in results.costs]


def slice_columns(results: Results) -> list[Column]:
    """One line per slice and variant, one column per metric; a slice is named in its first line."""
    entries = [(part, line, row) for part in results.slices for row, line in enumerate(results.lines)]
    plain: list[Style] = ["plain"] * len(entries)
    columns = [
        Column("slice", ["" if row else f"{part.group}: {part.name}" for part, _, row in entries], plain),
        Column("users", ["" if row else f"{part.users:,}" for part, _, row in entries], plain),
        Column("variant", [line.variant for _, line, _ in entries], plain),
    ]
    for metric in results.slices[0].metrics if results.slices else ():
        figures = [part.metrics[metric][row] for part, _, row in entries]
        decimals = decimals_of([line.cells.get(metric) for line in results.lines])
        texts = [number(f.value, decimals) + half_of_interval(f.low, f.high, decimals) if f else NONE for f in figures]
        best = [max(figure.value for figure in part.metrics[metric] if figure) for part, _, _ in entries]
        styles: list[Style] = [
            "best" if f and f.value == b > 0 else "plain" for f, b in zip(figures, best, strict=True)
        ]
        columns.append(Column(title(metric), texts, styles))
        if results.baseline is not None:
            differences = [figure.difference if figure else None for figure in figures]
            columns += _differences(differences, [line.is_baseline for _, line, _ in entries], decimals)
    return columns


def about(results: Results) -> str:
    """What was compared, in one line."""
    split, protocol = results.split, results.protocol
    counts = split["counts"]
    return (
        f"{split['name']}, {split['strategy'].replace('_', '-')}, ties by {split['ties'].replace('_', ' ')}: "
        f"{counts['users']:,} users, {counts['items']:,} items, {protocol['rows']:,} test rows, "
        f"full ranking, history {'masked' if protocol['history_masked'] else 'not masked'} "
        f"(split {split['fingerprint']})"
    )


def notes(results: Results) -> list[str]:
    """How to read the table."""
    found = ["± is half of the 95% bootstrap interval over users."]
    cells = [cell for line in results.lines for cell in line.cells.values()]
    if any(cell.deviation is not None for cell in cells):
        found.append(
            "Figures are means over seeds, sd their standard deviation; tests average a user over seeds first."
        )
    if any(cell.best for cell in cells):
        found.append("Bold is the highest, † not significantly below it.")
    if results.baseline is not None:
        found.append(
            f"vs base: difference to {results.baseline}, paired by user; * significant; p, and Cohen's d of it."
        )
    if any(cell.best for cell in cells) or results.baseline is not None:
        each = ", in each slice by itself" if results.slices else ""
        found.append(f"Tests: sign-flip permutation, Holm-corrected over the rows{each}, 5%.")
    if not all(map(is_rank_metric, results.metrics)):
        found += approximate_lists(results)
    if any(metric.startswith("test/ild@") for metric in results.metrics):
        found.append("ILD is in each row's own item vectors: do not compare it between rows.")
    found += foreign_lists(results)
    return [*found, cost_notes(results.costs)] if results.costs else found


def approximate_lists(results: Results) -> list[str]:
    """A sentence for each approximate index that gives lists."""
    variants = defaultdict(list)
    for line in results.lines:
        variants[line.index].append(line.variant)
    return [
        f"Lists, and so coverage, Gini and popularity, of {', '.join(names)} are of an approximate index: {index}."
        for index, names in variants.items()
        if index != EXACT_INDEX
    ]


def foreign_lists(results: Results) -> list[str]:
    """What to know of each row of another system, and what it cannot show."""
    found = []
    for line in results.lines:
        found += [line.note] if line.note else []
        reasons: dict[str, list[str]] = {}
        for metric, reason in line.left_out.items():
            reasons.setdefault(reason, []).append(title(metric))
        found += [f"{line.variant} without {', '.join(names)}: {reason}." for reason, names in reasons.items()]
    return found


def number(value: float, decimals: int) -> str:
    """`.118`, `-.004`, `1.000`, `27.4`."""
    text = f"{round(value, decimals) + 0.0:.{decimals}f}"  # + 0.0: no minus before zero
    return text.replace("0.", ".", 1) if text.startswith(("0.", "-0.")) else text


def half_of_interval(low: float | None, high: float | None, decimals: int) -> str:
    """Half of an interval, with a sign before it."""
    return "" if low is None or high is None else f" ±{number((high - low) / 2, decimals)}"


def as_change(value: float, low: float, high: float, decimals: int, *, clear: bool) -> str:
    """`-.063 ±.012*`: a star where it is significant."""
    text = number(value, decimals)
    sign = "" if text.startswith("-") else "+"
    return f"{sign}{text}{half_of_interval(low, high, decimals)}{'*' if clear else ' '}"


def title(metric: str) -> str:
    """`HR@10` for `test/hr@10`."""
    name, at, cutoff = metric.removeprefix("test/").removeprefix("val/").partition("@")
    return (name.upper() if name in ("hr", "ndcg", "mrr", "map", "ild") else name.capitalize()) + at + cutoff


def as_p(p: float) -> str:
    """`.032`, `<.001`."""
    return "<.001" if p < 0.001 else number(p, 3)


def decimals_of(column: list[Cell | None]) -> int:
    """Three decimals, four where intervals are so narrow that the fourth means something, one for counts."""
    cells = [cell for cell in column if cell]
    if max(abs(cell.value) for cell in cells) >= 10:
        return 1
    halves = [(cell.high - cell.low) / 2 for cell in cells if cell.high is not None and cell.low is not None]
    return 4 if halves and min(halves) < FINE_INTERVAL else 3


def _values(header: str, cells: list[Cell | None], has_best: bool) -> Column:
    decimals = decimals_of(cells)
    marked = has_best and any(cell and cell.near_best for cell in cells)
    texts = []
    for cell in cells:
        if cell is None:
            texts.append(NONE)
            continue
        mark = ("†" if cell.near_best else " ") if marked else ""
        texts.append(number(cell.value, decimals) + mark + half_of_interval(cell.low, cell.high, decimals))
    return Column(header, texts, ["best" if cell and cell.best else "plain" for cell in cells])


def _deviations(cells: list[Cell | None]) -> Column:
    decimals = decimals_of(cells)
    deviations = [cell.deviation if cell else None for cell in cells]
    texts = [NONE if deviation is None else number(deviation, decimals) for deviation in deviations]
    return Column("sd", texts, ["plain"] * len(cells))


def _differences(differences: Sequence[Difference | None], is_baseline: Sequence[bool], decimals: int) -> list[Column]:
    """Paired differences with a star where they are significant, so that no colour is needed; p and effect size."""
    texts, tests, styles = [], [], list[Style]()
    for difference, baseline in zip(differences, is_baseline, strict=True):
        if difference is None:
            texts.append("base " if baseline else NONE)
            tests.append("")
            styles.append("faint")
            continue
        texts.append(as_change(difference.value, difference.low, difference.high, decimals, clear=difference.clear))
        tests.append(f"{as_p(difference.p_holm)} ({number(difference.effect_size, 2)})")
        styles.append(("higher" if difference.value > 0 else "lower") if difference.clear else "plain")
    return [Column("vs base ", texts, styles), Column("p (d)", tests, ["plain"] * len(tests), optional=True)]

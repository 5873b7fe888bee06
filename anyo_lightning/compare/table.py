"""`anyo compare`: tested runs side by side, each figure with its interval and its paired difference to a baseline."""

import sys
from pathlib import Path
from typing import Literal

from rich.console import Console

from anyo_lightning.compare.across_splits import spread_as_markdown, spread_as_rich, spreads
from anyo_lightning.compare.costs import choose_costs
from anyo_lightning.compare.exports import as_csv, as_json
from anyo_lightning.compare.render import WIDTH_OF_A_FILE, Format, as_latex, as_markdown, as_plain, as_rich, write_out
from anyo_lightning.compare.report import as_html
from anyo_lightning.compare.results import Comparison, load_results
from anyo_lightning.errors import InputError
from anyo_lightning.runs import RunFolder

ALWAYS_SLICED = ("csv", "json", "html")


def compare(
    runs: list[Path],
    *,
    baseline: str | None = None,
    foreign: list[str] | None = None,
    format: Literal[Format, "html"] = "rich",  # noqa: A002
    metrics: list[str] | str | None = None,
    columns: list[str] | str | None = None,
    slices: bool = False,
    across_splits: bool = False,
    output: Path | None = None,
) -> None:
    """Put tested runs into one table, the best first; runs that differ in their seed only are one row.

    Args:
        runs: Run folders, or folders of runs (`runs`): then the newest tested version of each variant, seed and
            settings below.
        baseline: The row that the others are compared with, user by user: its name, run folder or class of models.
        foreign: Top-k lists of other systems for the same split, `NAME=FILE` each: CSV, Parquet or JSON lines with
            user, item, and score or rank, or a TREC run. Each name is a row, ranked and tested like the runs; a target
            that is not in a list counts as not found, and metrics beyond the lists are left out.
        format: `rich` for the terminal, `markdown` for a README, `latex` (booktabs) for a paper, `csv` and `json` with
            everything in full precision, `html` for one page with plots and cases that needs no network.
        metrics: Figures to show, a name or a list of names, by default `[hr@10,ndcg@10]`; the first decides the order.
        columns: What of the cost ledger the table shows, by default `[minutes,trained]`: a list of minutes, tokens,
            targets, pflop, ndcg/pflop, memory, trained, checkpoint, catalogue, index, queries/s and views, or `all`; a
            note below the table says what each is. csv, json and html have all of it anyway.
        slices: Whether a table of slices follows (by popularity and ties of the target, length of the history and of
            the item's text, where all runs agree which row is in which); csv, json and html have them anyway.
        across_splits: Instead, each variant's mean, deviation and range over splits that differ in the draw of their
            ties (`--data.ties shuffle --data.ties_seed N`); as `rich` or `markdown`, without a baseline.
        output: File to write instead of the terminal.

    Raises:
        InputError: A folder does not exist or holds no tested run, the runs differ in split, protocol or users, a
            metric or column is unknown, the baseline is not exactly one of the rows, foreign lists are not of the runs'
            split, or a page would go to a terminal.
    """
    if output is not None and output.is_dir():
        raise InputError(f"Expected output to be a file, got the folder {output}")
    if format == "html" and output is None and sys.stdout.isatty():
        raise InputError("Expected output to name a file for the HTML page, got none: a terminal cannot show it")
    metrics = [metrics] if isinstance(metrics, str) else metrics or ["test/hr@10", "test/ndcg@10"]
    metrics = [name if "/" in name else f"test/{name}" for name in metrics]
    if across_splits:
        if baseline is not None or slices or foreign or format not in ("rich", "markdown"):
            raise InputError(
                "Expected across_splits without baseline, slices and foreign, with format rich or markdown, "
                f"got baseline {baseline}, slices {slices}, foreign {foreign}, format {format}"
            )
        rows = spreads(runs, metrics)
        write_out(spread_as_markdown(rows) if format == "markdown" else as_plain(spread_as_rich(rows)), output)
        return
    comparison = load_results(
        runs,
        metrics=metrics,
        baseline=baseline,
        foreign=foreign or (),
        slices=slices or format in ALWAYS_SLICED,
        costs=choose_costs(columns),
    )
    for folder in comparison.results.passed_over:
        reason = "it has no metrics.json, so it has not been tested yet"
        if RunFolder(folder).finished:
            reason = "a newer version is of another split"
        print(f"Passed over {folder}: {reason}", file=sys.stderr)
    if output is None and format == "rich" and sys.stdout.isatty():
        console = Console()
        console.print(as_rich(comparison.results, width=console.width))
    else:
        write_out(_as_text(comparison, format), output)


def _as_text(comparison: Comparison, format: Literal[Format, "html"]) -> str:  # noqa: A002
    """The table in one of its forms, as wide as it needs to be."""
    results = comparison.results
    texts = {"markdown": as_markdown, "latex": as_latex, "csv": as_csv, "json": as_json}
    if format == "html":
        return as_html(comparison)
    if format in texts:
        return texts[format](results)
    return as_plain(as_rich(results, width=WIDTH_OF_A_FILE))

"""Top lists for the terminal and as files."""

from collections.abc import Callable
from pathlib import Path

import polars as pl
from rich import box
from rich.table import Table
from rich.text import Text

from anyo_lightning.disk import renamed_to
from anyo_lightning.errors import InputError

WRITERS: dict[str, Callable[[pl.DataFrame, Path], None]] = {
    ".parquet": lambda lists, path: lists.write_parquet(path),
    ".jsonl": lambda lists, path: lists.write_ndjson(path),
    ".csv": lambda lists, path: lists.write_csv(path),
}


def check_output(path: Path) -> None:
    """Refuse, before anything is computed, a file that cannot be written or is there already.

    Args:
        path: The file.

    Raises:
        InputError: It is there, or it ends in something else than a form that can be written.
    """
    if path.suffix.lower() not in WRITERS:
        raise InputError(f"Expected --output to end in {', '.join(WRITERS)}, got {path}")
    if path.exists():
        raise InputError(f"Expected --output to name a file that does not exist, got {path}")


def write_lists(lists: pl.DataFrame, path: Path) -> None:
    """Write the file, whole or not at all.

    Args:
        lists: One line per list and place.
        path: As `check_output` takes it.
    """
    with renamed_to(path) as temporary:
        WRITERS[path.suffix.lower()](lists, temporary)


def list_table(lists: pl.DataFrame, *, name: str) -> Table:
    """One history's lists, a column for each run.

    Args:
        lists: Its lines of all runs, with `run`, `rank`, `item_id`, `title` and `score`.
        name: Whose they are, above the table.
    """
    table = Table(
        box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, title=name, title_justify="left", title_style="bold"
    )
    runs = lists["run"].unique(maintain_order=True).to_list()
    table.add_column("", justify="right")
    for run in runs:
        for header in [run] if len(runs) > 1 else ["title", "item_id"]:
            table.add_column(header)
        table.add_column("score", justify="right", style="dim")
    cells = {(row["run"], row["rank"]): row for row in lists.iter_rows(named=True)}
    for rank in range(1, int(lists["rank"].to_numpy().max(initial=0)) + 1):
        line = [Text(str(rank))]
        for run in runs:
            row = cells.get((run, rank), {"title": "", "item_id": "", "score": None})
            line += [Text(row["title"])] if len(runs) > 1 else [Text(row["title"]), Text(row["item_id"])]
            line.append(Text("" if row["score"] is None else f"{row['score']:.3f}"))
        table.add_row(*line)
    return table

"""`anyo index`: approximate indexes against exact search, on a finished run's queries."""

import re
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import track

from anyo_lightning.cli.restore import restore
from anyo_lightning.compare.render import Format, write_out
from anyo_lightning.data.splits import Stage
from anyo_lightning.errors import InputError
from anyo_lightning.fidelity.index_page import as_page
from anyo_lightning.fidelity.index_table import FidelityTable, as_rich, as_text
from anyo_lightning.fidelity.measure import measure
from anyo_lightning.runs import RunFolder

FACTORIES = ("Flat", "SQ8", "HNSW32", "IVF64,Flat:nprobe=1", "IVF64,Flat:nprobe=4", "IVF64,Flat:nprobe=16")


def measure_indexes(
    run: Path,
    *,
    factories: list[str] | None = None,
    stage: Stage = "test",
    k: int = 10,
    format: Format = "rich",  # noqa: A002
    output: Path | None = None,
    plot: Path | None = None,
) -> None:
    """Say what approximate indexes lose against exact search on a finished run's queries, and what they save.

    Args:
        run: Run folder; its best checkpoint gives states and vectors, as in `anyo test`.
        factories: FAISS factory strings, search parameters after a colon: `IVF64,Flat:nprobe=8`, `HNSW32:efSearch=64`;
            None takes those of `FACTORIES` that do not have more cells than there are items.
        stage: Whose queries are searched.
        k: Length of the lists, and the cutoff of recall and NDCG.
        format: `rich` for the terminal, `markdown`, `latex`, `csv` or `json`.
        output: File for the table instead of the terminal.
        plot: File for a page with recall against queries per second; by default index_fidelity.html in the run folder.

    Raises:
        InputError: The run cannot be restored, k is not positive, or a factory string is unknown to FAISS or does not
            fit the run's vectors.
    """
    if k < 1:
        raise InputError(f"Expected k to be positive, got {k}")
    found = restore(run, stage=stage)
    items, dim = found.vectors.shape
    if factories is None:
        factories = _fitting(items)
    indexes = measure(
        factories,
        split=found.split,
        queries=found.queries,
        rows=found.rows,
        query_vectors=found.query_vectors,
        vectors=found.vectors,
        k=k,
        mask_history=found.history_masked,
    )
    bar = track(indexes, "Measuring indexes", len(factories), console=Console(stderr=True), transient=True)
    table = FidelityTable(
        variant=RunFolder(run).variant,
        stage=stage,
        rows=len(found.rows),
        items=items,
        dim=dim,
        history_masked=found.history_masked,
        k=k,
        indexes=tuple(bar),
    )
    plot = RunFolder(run).index_page_file if plot is None else plot
    write_out(as_page(table), plot)
    if output is None and format == "rich" and sys.stdout.isatty():
        console = Console()
        console.print(as_rich(table, width=console.width))
    else:
        write_out(as_text(table, format), output)
    print(f"Plot: {plot}", file=sys.stderr)


def _fitting(items: int) -> list[str]:
    """Those of `FACTORIES` whose cells so many items can fill; the others are named on stderr."""
    cells = {factory: int(match[1]) if (match := re.match(r"IVF(\d+)", factory)) else 0 for factory in FACTORIES}
    left_out = [factory for factory in FACTORIES if cells[factory] > items]
    if left_out:
        print(f"Left out {' '.join(left_out)}: more cells than the {items} items", file=sys.stderr)
    return [factory for factory in FACTORIES if factory not in left_out]

"""Index fidelity as a table: terminal, Markdown, LaTeX, CSV, JSON."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass

import faiss
import polars as pl
from rich.console import Group
from rich.text import Text

from anyo_lightning.compare.columns import Column, Style, number
from anyo_lightning.compare.costs import as_figures
from anyo_lightning.compare.render import WIDTH_OF_A_FILE, Format, as_plain, latex_table, markdown_table, rich_table
from anyo_lightning.fidelity.measure import Fidelity


@dataclass(frozen=True)
class FidelityTable:
    """The indexes of one run side by side.

    Attributes:
        variant: The run.
        stage: Whose queries were searched.
        rows: How many.
        items: Size of the catalogue.
        dim: Width of its vectors.
        history_masked: Whether the items of histories are left out.
        k: Length of the lists.
        indexes: One line each.
    """

    variant: str
    stage: str
    rows: int
    items: int
    dim: int
    history_masked: bool
    k: int
    indexes: tuple[Fidelity, ...]

    @property
    def about(self) -> str:
        """What was searched, in one line."""
        masked = "masked" if self.history_masked else "not masked"
        return (
            f"{self.variant}: {self.rows:,} {self.stage} queries among {self.items:,} items of width {self.dim}, inner "
            f"product, history {masked}"
        )

    @property
    def notes(self) -> list[str]:
        """How to read the table."""
        threads = faiss.omp_get_max_threads()
        return [
            f"recall@{self.k}: share of the exact list that the index finds; vs exact: change in NDCG@{self.k}.",
            "build: seconds; MB: of the index in a file; queries/s: FAISS's search for lists as long as the history "
            f"mask needs, {threads} thread{'s' if threads > 1 else ''}, encoding apart.",
            *dict.fromkeys(f"{warning}." for index in self.indexes for warning in index.warnings),
        ]


def as_text(table: FidelityTable, format: Format) -> str:  # noqa: A002
    """The table in one of its forms."""
    if format == "json":
        content = dataclasses.asdict(table) | {"threads": faiss.omp_get_max_threads()}
        return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    if format == "csv":
        rows = [dataclasses.asdict(index) | {"warnings": " ".join(index.warnings)} for index in table.indexes]
        return pl.DataFrame(rows).with_columns(pl.lit(table.variant).alias("variant"), k=table.k).write_csv()
    columns = fidelity_columns(table)
    if format == "markdown":
        return "\n".join([table.about, "", *markdown_table(columns), "", " ".join(table.notes)]) + "\n"
    if format == "latex":
        return "\n".join([f"% {table.about}", r"% \usepackage{booktabs}", *latex_table(columns)]) + "\n"
    return as_plain(as_rich(table, width=WIDTH_OF_A_FILE))


def as_rich(table: FidelityTable, *, width: int) -> Group:
    """The table for a terminal, with what was searched above it and how to read it below."""
    notes = Text("\n".join(table.notes), "dim")
    return Group(Text(table.about, "dim"), "", rich_table(fidelity_columns(table), width), "", notes)


def fidelity_columns(table: FidelityTable) -> list[Column]:
    """All columns as text."""
    indexes = table.indexes
    plain: list[Style] = ["plain"] * len(indexes)

    def column(header: str, texts: Sequence[str]) -> Column:
        return Column(header, list(texts), plain)

    return [
        column("factory", [index.factory for index in indexes]),
        column(f"recall@{table.k}", [number(index.recall, 3) for index in indexes]),
        column(f"NDCG@{table.k}", [number(index.ndcg, 4) for index in indexes]),
        column("vs exact", [_signed(index.ndcg_change) for index in indexes]),
        column("build", [as_figures(index.build_seconds) for index in indexes]),
        column("MB", [as_figures(index.size / 1e6) for index in indexes]),
        column("queries/s", [as_figures(index.queries_per_second) for index in indexes]),
    ]


def _signed(change: float) -> str:
    text = number(change, 4)
    return text if text.startswith("-") or not round(change, 4) else f"+{text}"

"""A table's forms for people: for a terminal (rich), for a README (Markdown), for a paper (LaTeX with booktabs)."""

import dataclasses
import io
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from anyo_lightning.compare.columns import Column, Style, about, notes, slice_columns, table_columns
from anyo_lightning.compare.results import Results
from anyo_lightning.disk import renamed_to

Format = Literal["rich", "markdown", "latex", "csv", "json"]  # of every table
RICH_STYLES: dict[Style, str] = {"plain": "", "best": "bold", "higher": "green", "lower": "red", "faint": "dim"}
LEFT = ("variant", "slice", "probe", "question", "factory")  # headers of columns of names
WIDTH_OF_A_FILE = 200
SIGN = re.compile(r"(?<![\w.)-])([+-])(?=\.?\d)")
LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "<": r"$<$",
    ">": r"$>$",
    "±": r"$\pm$",
    "†": r"$^{\dagger}$",
    "*": r"$^{*}$",
}


def as_rich(results: Results, *, width: int) -> Group:
    """A table for the terminal, with what was compared above it and how to read it below.

    Args:
        results: What to show; slices, where they were worked out, in a table of their own.
        width: Of the terminal; where a table of one line per run is wider, intervals go below their figures, and where
            that is wider still, p and d are left out.
    """
    parts: list[RenderableType] = [Text(about(results), "dim"), "", rich_table(table_columns(results), width), ""]
    if results.slices:
        parts += [rich_table(slice_columns(results), width), ""]
    return Group(*parts, Text("\n".join(notes(results)), "dim"))


def as_markdown(results: Results) -> str:
    """GitHub tables whose source is aligned too."""
    parts = [about(results), "", *markdown_table(table_columns(results)), ""]
    if results.slices:
        parts += [*markdown_table(slice_columns(results)), ""]
    return "\n".join([*parts, " ".join(notes(results))]) + "\n"


def as_latex(results: Results) -> str:
    r"""Tables for a paper's `\input`; the preamble needs `\usepackage{booktabs}`."""
    parts = [f"% {about(results)}", r"% \usepackage{booktabs}", *latex_table(table_columns(results))]
    if results.slices:
        parts += ["", r"\bigskip", *latex_table(slice_columns(results))]
    return "\n".join([*parts, "", r"\par\smallskip{\footnotesize " + _latex(" ".join(notes(results))) + "}"]) + "\n"


def as_plain(renderable: RenderableType) -> str:
    """What the terminal would show, as wide as it needs to be."""
    console = Console(file=io.StringIO(), width=WIDTH_OF_A_FILE)
    with console.capture() as capture:
        console.print(renderable)
    return "".join(line.rstrip() + "\n" for line in capture.get().splitlines())


def write_out(text: str, output: Path | None) -> None:
    """Write to a file, or to the terminal where none is named."""
    if output is None:
        sys.stdout.write(text)
        return
    with renamed_to(output) as temporary:
        temporary.write_text(text, encoding="utf-8")


def rich_table(columns: Sequence[Column], width: int = sys.maxsize) -> Table:
    """Columns as a table that fits the width, if that can be."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0))
    if _width(columns) > width:
        columns = [
            dataclasses.replace(column, texts=[t.replace(" ±", "\n±").replace(" (", "\n(") for t in column.texts])
            if column.header not in LEFT
            else column
            for column in columns
        ]
    if _width(columns) > width:
        columns = [column for column in columns if not column.optional]
    for position, column in enumerate(columns):
        left = column.header in LEFT
        table.add_column(column.header, justify="left" if left else "right", no_wrap=position != 0)
    for row in range(len(columns[0].texts)):
        table.add_row(*(Text(column.texts[row], RICH_STYLES[column.styles[row]]) for column in columns))
    return table


def _width(columns: Sequence[Column]) -> int:
    """Of the columns, two blanks between them."""
    longest = [
        max(len(line) for text in [column.header, *column.texts] for line in text.split("\n")) for column in columns
    ]
    return sum(longest) + 2 * (len(columns) - 1)


def markdown_table(columns: Sequence[Column]) -> list[str]:
    """Columns as the lines of a GitHub table."""
    aligned = []
    for column in columns:
        left = column.header in LEFT
        cells = [text.strip().replace("|", r"\|") for text in column.texts]
        cells = [f"**{text}**" if style == "best" else text for text, style in zip(cells, column.styles, strict=True)]
        header = column.header.strip()
        width = max(3, len(header), *map(len, cells))
        rule = "-" * width if left else "-" * (width - 1) + ":"
        texts = [header, rule, *cells]
        aligned.append([text.ljust(width) if left else text.rjust(width) for text in texts])
    return ["| " + " | ".join(row) + " |" for row in zip(*aligned, strict=True)]


def latex_table(columns: Sequence[Column]) -> list[str]:
    """The lines of a booktabs table."""
    alignment = "".join("l" if column.header in LEFT else "r" for column in columns)
    texts = [[_latex(text.strip()) for text in column.texts] for column in columns]
    bold = [
        [rf"\textbf{{{text}}}" if style == "best" else text for text, style in zip(of, column.styles, strict=True)]
        for of, column in zip(texts, columns, strict=True)
    ]
    rows = [" & ".join(row) + r" \\" for row in zip(*bold, strict=True)]
    header = " & ".join(_latex(column.header.strip()) for column in columns) + r" \\"
    begin = rf"\begin{{tabular}}{{{alignment}}}"
    return [begin, r"\toprule", header, r"\midrule", *rows, r"\bottomrule", r"\end{tabular}"]


def _latex(text: str) -> str:
    """The text with every character that LaTeX reads as a command escaped, and signs of numbers as signs."""
    escaped = "".join(LATEX.get(character, character) for character in text)
    return SIGN.sub(r"$\1$", escaped)

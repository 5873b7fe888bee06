"""Delimited text (CSV, TSV, and what data sets come in): no row is ever lost without a word.

Every line is counted first. Where no quote is in the file each line is a row, and all have as many fields. Quotes are
read by the rules of RFC 4180 (a quoted field may hold separators and line ends), and only where every row adds up.
Tab-separated files often know no quoting: there, lines that add up by themselves are rows, and a stray quote is text.
"""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

import polars as pl
from polars.exceptions import NoDataError

from anyo_lightning.data.files import Content, check_columns, content, not_empty, open_binary, reading
from anyo_lightning.errors import InputError

WHOLE_LINE = "\x01"  # a separator that no text holds


def read_delimited(
    path: Path,
    *,
    separator: str,
    columns: Sequence[str] | None = None,
    required: Sequence[str] = (),
    optional: Sequence[str] | None = None,
    quotes: bool = False,
    encoding: str = "utf8",
) -> pl.DataFrame:
    """Read delimited text as strings; blank lines are left out.

    Args:
        path: The file, plain, gzip or zip.
        separator: One or more characters between the fields.
        columns: The columns' names where the file has no header. After a separator of several characters the last
            column keeps further ones.
        required: Columns that must be there; when all are numbers, the file has no header and they are positions.
        optional: Further columns to read where they are there; `None` reads every column.
        quotes: Whether a field may be quoted.
        encoding: `utf8`, or what Python calls the file's encoding.

    Returns:
        One row per line or quoted record, every column a string.

    Raises:
        InputError: When the file is missing, empty, truncated, malformed, not in `encoding`, lacks a column, or has a
            row with fewer or more fields than the others; the sentence has the line's number.
    """
    assert len(separator) == 1 or columns is not None
    with reading(path):
        _, source = content(path)
        if encoding != "utf8":
            with open_binary(source) as file:
                source = io.BytesIO(file.read().decode(encoding).encode())
        lines = _scan(source, ["line"], WHOLE_LINE)
        line = pl.col("line")
        found = lines.select(
            fields=line.str.count_matches(separator, literal=True) + 1, quote=line.str.contains('"', literal=True)
        ).collect()
        fields = found["fields"]  # null for a blank line
        if fields.null_count() == len(fields):
            raise NoDataError
        start = fields.is_not_null().arg_max() or 0
        positions = bool(required) and all(name.isdecimal() for name in required)
        if columns is not None:
            names = list(columns)
        else:
            first = lines.slice(start, 1).collect().item()
            names = next(csv.reader([first], delimiter=separator)) if quotes else first.split(separator)
            names = [str(place) if positions else name.strip() or str(place) for place, name in enumerate(names)]
            if repeated := sorted({name for name in names if names.count(name) > 1}):
                raise InputError(f"Expected each column once in {path}, got {', '.join(repeated)} repeatedly")
        check_columns(names, required, path)
        wanted = [name for name in names if optional is None or name in {*required, *optional}]
        has_header = columns is None and not positions
        width = len(names)
        uneven = ((fields < width) if len(separator) > 1 else (fields != width)).fill_null(False)
        if quotes and found["quote"].any():
            kept = [names.index(name) for name in wanted]
            rows, problem = _quoted(source, separator, width, kept, path, across_lines=uneven.any())
            if not problem:
                values = zip(*rows[has_header:], strict=True)
                return not_empty(pl.DataFrame(dict(zip(wanted, values, strict=False))), path)
            if uneven.any() or separator != "\t":
                raise InputError(problem)
        if uneven.any():
            number = uneven.arg_max() or 0
            raise InputError(f"Expected {_count(width)} in line {number + 1} of {path}, got {fields[number]}")
        if len(separator) > 1:
            split = lines.collect().to_series().str.splitn(separator, width)
            table = split.struct.rename_fields(names).struct.unnest()[start:]
        else:  # from the first line with fields: it tells polars how many there are
            table = _scan(source, names, separator, skip=start).select(wanted).collect()
    if fields.null_count():
        table = table.filter(fields[start:].is_not_null())
    return not_empty(table[has_header:], path)


def _scan(source: Content, names: Sequence[str], separator: str, *, skip: int = 0) -> pl.LazyFrame:
    """The lines as rows of strings, blank ones as nulls."""
    return pl.scan_csv(
        source,
        separator=separator,
        has_header=False,
        skip_lines=skip,  # `skip_rows` of polars 1 also skips the header after blank lines
        schema=dict.fromkeys(names, pl.String),
        quote_char=None,
        glob=False,
    )


def _quoted(
    source: Content, separator: str, width: int, kept: list[int], path: Path, *, across_lines: bool
) -> tuple[list[tuple[str, ...]], str]:
    """These fields of all records, header included, by RFC 4180; or what is wrong with one."""
    rows: list[tuple[str, ...]] = []
    with io.TextIOWrapper(open_binary(source), encoding="utf-8-sig", newline="") as text:
        reader = csv.reader(text, delimiter=separator, strict=True)
        line = 1
        try:
            for row in reader:
                if row and len(row) != width:
                    return [], f"Expected {_count(width)} in line {line} of {path}, got {len(row)}"
                if row:
                    rows.append(tuple([row[place] for place in kept]))
                if reader.line_num > line and not across_lines:
                    return [], f"Expected the quote in line {line} of {path} to close there, got one that swallows rows"
                line = reader.line_num + 1
        except csv.Error as error:
            return [], f"Expected well-formed quotes in line {line} of {path}, got: {error}"
    return rows, ""


def _count(fields: int) -> str:
    return "1 field" if fields == 1 else f"{fields} fields"

"""JSON: one object per line, an array of them, or Python dictionaries, one per line, as some data sets have."""

import ast
import codecs
import io
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import polars as pl
from polars.exceptions import NoDataError

from anyo_lightning.data.files import Content, check_columns, content, first_line, not_empty, open_binary, reading
from anyo_lightning.errors import InputError


def read_json(path: Path, *, required: Sequence[str], optional: Sequence[str] | None = None) -> pl.DataFrame:
    """Read objects with the types that they have.

    Args:
        path: The file, plain, gzip or zip.
        required: Fields that must be there.
        optional: Further fields to read where they are there; `None` reads every field.

    Returns:
        One row per object.

    Raises:
        InputError: When the file is missing, empty, truncated, not UTF-8 or malformed, or lacks a required field.
    """
    with reading(path):
        _, source = content(path)
        start = first_line(source)
        if _is_literal(start):
            rows = [_chosen(row, required, optional) for row in _literals(source, path)]
            frame = pl.LazyFrame(rows, infer_schema_length=None, strict=False)
        elif start.startswith("["):
            with open_binary(source) as file:
                frame = pl.read_json(file.read(), infer_schema_length=None).lazy()
        else:
            frame = pl.scan_ndjson(_for_polars(source), infer_schema_length=None)
        if not (names := frame.collect_schema().names()):
            raise NoDataError
        check_columns(names, required, path)
        table = frame.select(n for n in names if optional is None or n in {*required, *optional}).collect()
    return not_empty(table, path)


def read_json_lines(path: Path, *, required: Sequence[str], optional: Sequence[str] = ()) -> pl.DataFrame:
    """Read named fields of JSON lines as strings, whatever else the lines hold and however their types vary.

    Args:
        path: The file, plain or gzip.
        required: Fields that at least one line must have.
        optional: Further fields; one that a line lacks is null there.

    Returns:
        One row per line; a list or an object is its JSON text.

    Raises:
        InputError: When the file is missing, empty, truncated, not UTF-8 or malformed, or no line has a required field.
    """
    fields = [*required, *optional]
    schema = dict.fromkeys(fields, pl.String)
    with reading(path):
        if _is_literal(first_line(path)):
            rows = ([_json_text(row.get(name)) for name in fields] for row in _literals(path, path))
            table = pl.DataFrame(list(rows), schema=schema, orient="row")
        else:
            table = pl.scan_ndjson(_for_polars(path), schema=schema).collect()
    not_empty(table, path)
    if any(table[name].null_count() == table.height for name in required):
        check_columns(read_json(path, required=()).columns, required, path)
    return table


def _for_polars(source: Content) -> Content:
    """The bytes themselves where polars takes a path for a pattern, or stumbles over a mark of byte order."""
    with open_binary(source) as file:
        marked = file.read(3) == codecs.BOM_UTF8
        if not marked and not set("*?[") & set(str(source)):
            return source
        file.seek(0)
        return io.BytesIO(file.read().removeprefix(codecs.BOM_UTF8))


def _is_literal(line: str) -> bool:
    return re.match(r"""\{\s*(u["']|')""", line) is not None


def _literals(source: Content, path: Path) -> Iterator[dict[str, Any]]:
    with open_binary(source) as file:
        for number, line in enumerate(file, 1):
            if text := line.decode("utf8").strip():
                try:
                    row = ast.literal_eval(text)
                except (SyntaxError, ValueError, RecursionError, MemoryError):
                    row = None
                if not isinstance(row, dict):
                    raise InputError(f"Expected a dictionary in line {number} of {path}, got {text[:40]!r}")
                yield row


def _chosen(row: dict[str, Any], required: Sequence[str], optional: Sequence[str] | None) -> dict[str, Any]:
    return row if optional is None else {name: row[name] for name in (*required, *optional) if name in row}


def _json_text(value: object) -> str | None:
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False, default=str)

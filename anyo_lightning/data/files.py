"""Read one table from CSV, TSV, Parquet or JSON lines, and say in one sentence what is wrong with a file.

Tables are scanned lazily, so that only the named columns are parsed; gzip is recognised by its content. Text columns
stay text: `tables.py` decides what a number is.
"""

import codecs
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import polars as pl
from polars.exceptions import NoDataError, PolarsError
from rich.console import Console

from anyo_lightning.errors import InputError

FORMATS = "csv, tsv, parquet or jsonl"
LARGE_FILE_BYTES = 20_000_000  # about a second of reading


def read_table(path: Path, *, required: Sequence[str], optional: Sequence[str] | None = None) -> pl.DataFrame:
    """Read a table by the ending of its name (`.csv`, `.tsv`, `.parquet`, `.jsonl`, each but Parquet also `.gz`).

    Args:
        path: The file.
        required: Columns that must be there.
        optional: Further columns to read where they are there; `None` reads every column.

    Returns:
        The columns in the file's order, rows in the file's order.

    Raises:
        InputError: When the file is missing, empty, truncated, not UTF-8, malformed, or lacks a required column.
    """
    with reading(path):
        frame = _scan(path)
        names = frame.collect_schema().names()
        check_columns(names, required, path)
        if optional is not None:
            wanted = {*required, *optional}
            frame = frame.select(name for name in names if name in wanted)
        table = frame.collect()
    return not_empty(table, path)


def read_json_lines(path: Path, *, required: Sequence[str], optional: Sequence[str] = ()) -> pl.DataFrame:
    """Read named fields of JSON lines as strings, whatever else the lines hold and however their types vary.

    Args:
        path: The file, plain or gzip.
        required: Fields that at least one line must have.
        optional: Further fields; one that a line lacks is null there.

    Returns:
        One row a line; a list is the JSON text of the list.

    Raises:
        InputError: When the file is missing, empty, truncated, not UTF-8 or malformed, or no line has a required field.
    """
    with reading(path):
        table = pl.scan_ndjson(path, schema=dict.fromkeys((*required, *optional), pl.String)).collect()
    not_empty(table, path)
    if any(table[name].null_count() == table.height for name in required):
        with reading(path):
            names = pl.scan_ndjson(path).collect_schema().names()
        check_columns(names, required, path)
    return table


def read_delimited(
    path: Path, *, separator: str, columns: Sequence[str] | None = None, encoding: str = "utf8"
) -> pl.DataFrame:
    """Read unquoted delimited text as strings.

    Args:
        path: The file.
        separator: One or more characters between the fields.
        columns: The columns' names where the file has no header. After a separator of several characters the last
            column keeps further ones.
        encoding: `utf8`, or what Python calls the file's encoding.

    Returns:
        One row a line, every column a string.

    Raises:
        InputError: When the file is missing, empty, truncated, malformed, not in `encoding`, or has other fields.
    """
    assert len(separator) == 1 or columns is not None
    with reading(path):
        table = pl.read_csv(
            path,
            separator=separator if len(separator) == 1 else "\x01",  # \x01: the whole line in one column
            has_header=columns is None,
            quote_char=None,
            infer_schema=False,
            encoding=encoding,
        )
    not_empty(table, path)
    if columns is None:
        return table
    if len(separator) > 1:
        fields = table.to_series().str.splitn(separator, len(columns))
        return fields.struct.rename_fields(list(columns)).struct.unnest()
    if table.width != len(columns):
        raise InputError(f"Expected {len(columns)} fields a line in {path}, got {table.width}")
    return table.rename(dict(zip(table.columns, columns, strict=True)))


def check_columns(names: Sequence[str], required: Sequence[str], path: Path | str) -> None:
    """Refuse a table without the required columns.

    Args:
        names: The columns that are there.
        required: The columns that must be there.
        path: What to call the table.

    Raises:
        InputError: When a column is missing; the sentence lists those that are there.
    """
    if missing := [name for name in required if name not in names]:
        raise InputError(f"Expected column {', '.join(missing)} in {path}, got the columns {', '.join(names)}")


def not_empty(table: pl.DataFrame, path: Path | str) -> pl.DataFrame:
    """Return the table, or refuse one without rows.

    Args:
        table: Any table.
        path: What to call the table.

    Returns:
        `table`.

    Raises:
        InputError: When it has no row.
    """
    if table.is_empty():
        raise InputError(f"Expected rows in {path}, got an empty table")
    return table


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Show what is being read when it is large, and explain what is wrong with it as `explaining` does.

    Args:
        path: The file.

    Raises:
        InputError: When the file is missing, empty, truncated, in another encoding or malformed.
    """
    with explaining(path):
        size = path.stat().st_size
        console = Console(stderr=True, quiet=size < LARGE_FILE_BYTES)
        with console.status(f"Reading {path.name} ({size / 1e6:.0f} MB)"):
            yield


@contextmanager
def explaining(path: Path) -> Iterator[None]:
    """Turn what Python and polars say about a bad file into one sentence.

    Args:
        path: The file.

    Raises:
        InputError: When the file is missing, empty, truncated, in another encoding or malformed.
    """
    if not path.is_file():
        raise InputError(f"Expected a file at {path}, got {'a folder' if path.is_dir() else 'nothing there'}")
    if path.stat().st_size == 0:
        raise InputError(f"Expected rows in {path}, got an empty file")
    with path.open("rb") as file:
        if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            raise InputError(f"Expected UTF-8 text in {path}, got UTF-16")
    try:
        yield
    except NoDataError:
        raise InputError(f"Expected rows in {path}, got an empty file") from None
    except UnicodeDecodeError:
        raise InputError(f"Expected UTF-8 text in {path}, got other bytes") from None
    except EOFError:
        raise InputError(f"Expected a complete file at {path}, got a truncated one") from None
    except (PolarsError, OSError, zlib.error) as error:
        reason = " ".join(str(error).split())
        if "empty reader" in reason:  # what polars calls a gzip file of no lines
            raise InputError(f"Expected rows in {path}, got an empty file") from None
        if "end of file" in reason:
            raise InputError(f"Expected a complete file at {path}, got a truncated one") from None
        if "utf-8" in reason.lower() or "utf8" in reason.lower():
            raise InputError(f"Expected UTF-8 text in {path}, got other bytes") from None
        raise InputError(f"Expected a readable, well-formed file at {path}, got: {reason[:200]}") from None


def _scan(path: Path) -> pl.LazyFrame:
    match path.name.removesuffix(".gz").rpartition(".")[2].lower():
        case "csv":
            return pl.scan_csv(path, infer_schema=False)
        case "tsv" | "txt":
            return pl.scan_csv(path, infer_schema=False, separator="\t")
        case "jsonl" | "ndjson" | "json":
            return pl.scan_ndjson(path, infer_schema_length=None)
        case "parquet":
            return pl.scan_parquet(path)
        case ending:
            raise InputError(f"Expected {path} to end in {FORMATS}, got {ending!r}")

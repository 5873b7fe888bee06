"""Read one table from CSV, TSV, JSON or Parquet, by the ending of its name.

Only the named columns are kept. Text columns stay text: `schema.py` decides what a number is.
"""

from collections.abc import Sequence
from pathlib import Path

import polars as pl

from anyo_lightning.data.delimited import read_delimited
from anyo_lightning.data.files import check_columns, content, explaining, not_empty, parquet_files, reading
from anyo_lightning.data.json_lines import read_json
from anyo_lightning.errors import InputError

FORMATS = "csv, tsv, parquet, jsonl or json"
SEPARATORS = {"csv": ",", "tsv": "\t", "txt": "\t"}


def read_table(
    path: Path, *, required: Sequence[str], optional: Sequence[str] | None = None, separator: str | None = None
) -> pl.DataFrame:
    """Read a table.

    Args:
        path: A file that ends in `.csv`, `.tsv`, `.txt`, `.jsonl`, `.ndjson`, `.json` (each also in `.gz`), in
            `.parquet`, or in `.zip` with one of these in it; or a folder of Parquet files.
        required: Columns that must be there; in delimited text without a header their positions, from 0.
        optional: Further columns to read where they are there; `None` reads every column.
        separator: Between the fields of delimited text, whose name may then have any other ending.

    Returns:
        The columns in the file's order, rows in the file's order.

    Raises:
        InputError: When the file is missing, empty, truncated, not UTF-8, malformed, or lacks a required column.
    """
    if separator is not None and (len(separator.encode()) != 1 or separator.isalnum() or separator in '"\r\n\x01'):
        raise InputError(f"Expected data.columns.separator to be one character such as ';', got {separator!r}")
    with explaining(path):
        name, source = content(path)
    ending = "parquet" if path.is_dir() else name.rpartition(".")[2].lower()
    if ending in ("jsonl", "ndjson", "json"):
        return read_json(path, required=required, optional=optional)
    if separator := (None if ending == "parquet" else separator) or SEPARATORS.get(ending):
        return read_delimited(path, separator=separator, required=required, optional=optional, quotes=True)
    if ending != "parquet":
        raise InputError(f"Expected {path} to end in {FORMATS}, got {ending!r}")
    with reading(path):
        frame = pl.scan_parquet(parquet_files(path) if path.is_dir() else source, glob=False)
        names = frame.collect_schema().names()
        check_columns(names, required, path)
        table = frame.select(n for n in names if optional is None or n in {*required, *optional}).collect()
    return not_empty(table, path)

"""What a file holds, plain, gzip or zip, and what is wrong with it in one sentence."""

import codecs
import csv
import gzip
import io
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, cast

import polars as pl
from polars.exceptions import NoDataError, PolarsError
from rich.console import Console

from anyo_lightning.errors import InputError

LARGE_FILE_BYTES = 20_000_000  # about a second of reading

GZIP = b"\x1f\x8b"
Content = Path | io.BytesIO


class MissingColumnError(InputError):
    """A table without columns that must be there; whoever knows the options for their names may add to the sentence."""

    def __init__(self, missing: Sequence[str], names: Sequence[str], path: Path | str) -> None:
        super().__init__(f"Expected column {', '.join(missing)} in {path}, got the columns {', '.join(names)}")
        self.missing, self.names = list(missing), list(names)


def content(path: Path) -> tuple[str, Content]:
    """The name of a file without `.gz`, and where its bytes are; for a zip archive those of the one file in it.

    Args:
        path: The file.

    Raises:
        InputError: When a zip archive holds no file or several.
    """
    if path.suffix.lower() != ".zip":
        return path.name.removesuffix(".gz"), path
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if not name.endswith("/") and not name.startswith("__MACOSX/")]
        if len(names) != 1:
            raise InputError(f"Expected one file in {path}, got {', '.join(names[:8]) or 'none'}")
        return names[0].removesuffix(".gz"), io.BytesIO(archive.read(names[0]))


def open_binary(source: Content) -> IO[bytes]:
    """Open a file or its bytes; gzip is recognised by its content.

    Args:
        source: What `content` gave.
    """
    if isinstance(source, io.BytesIO):
        raw = source.getvalue()
        return io.BytesIO(gzip.decompress(raw) if raw.startswith(GZIP) else raw)
    with source.open("rb") as file:
        zipped = file.read(2) == GZIP
    return cast(IO[bytes], gzip.open(source)) if zipped else source.open("rb")


def first_line(source: Content) -> str:
    """The first line that is not blank.

    Args:
        source: What `content` gave.

    Raises:
        NoDataError: When there is none; `explaining` turns it into a sentence.
    """
    with open_binary(source) as file:
        lines = (line.decode("utf-8-sig", errors="replace").strip() for line in file)
        if found := next(filter(None, lines), ""):
            return found
    raise NoDataError


def check_columns(names: Sequence[str], required: Sequence[str], path: Path | str) -> None:
    """Refuse a table without the required columns.

    Args:
        names: The columns that are there.
        required: The columns that must be there.
        path: What to call the table.

    Raises:
        MissingColumnError: When a column is missing; the sentence lists those that are there.
    """
    if missing := [name for name in required if name not in names]:
        raise MissingColumnError(missing, names, path)


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
        path: The file, or a folder of Parquet files.

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
        path: The file, or a folder of Parquet files.

    Raises:
        InputError: When the file is missing, empty, truncated, in another encoding or malformed.
    """
    if path.is_dir():
        if not parquet_files(path):
            raise InputError(f"Expected a file or a folder of .parquet files at {path}, got another folder")
    elif not path.is_file():
        raise InputError(f"Expected a file at {path}, got nothing there")
    elif path.stat().st_size == 0:
        raise InputError(f"Expected rows in {path}, got an empty file")
    try:
        if path.is_file():
            with path.open("rb") as file:
                if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
                    raise InputError(f"Expected UTF-8 text in {path}, got UTF-16")
        yield
    except NoDataError:
        raise InputError(f"Expected rows in {path}, got an empty file") from None
    except UnicodeDecodeError:
        raise InputError(f"Expected UTF-8 text in {path}, got other bytes") from None
    except EOFError:
        raise InputError(f"Expected a complete file at {path}, got a truncated one") from None
    except (
        PolarsError,
        OSError,
        zlib.error,
        zipfile.BadZipFile,
        csv.Error,
        RuntimeError,
    ) as error:  # a password is a RuntimeError
        reason = " ".join(str(error).split())
        if "empty reader" in reason:  # what polars calls a gzip file of no lines
            raise InputError(f"Expected rows in {path}, got an empty file") from None
        if "end of file" in reason:
            raise InputError(f"Expected a complete file at {path}, got a truncated one") from None
        if "utf-8" in reason.lower() or "utf8" in reason.lower():
            raise InputError(f"Expected UTF-8 text in {path}, got other bytes") from None
        raise InputError(f"Expected a readable, well-formed file at {path}, got: {reason[:200]}") from None


def parquet_files(folder: Path) -> list[Path]:
    """The Parquet files below a folder in the order of their names, except those of a writer's own (`_…`, `.…`).

    Args:
        folder: The folder.

    Raises:
        InputError: There are Parquet files and others, whose rows would be left out.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(("_", ".")))
    found = [path for path in files if path.suffix.lower() == ".parquet"]
    if others := [path for path in files if path not in found and found]:
        raise InputError(f"Expected Parquet files alone in {folder}, got {others[0].name}")
    return found

"""Named data sets and the user's own files: the way in.

A name or a folder goes to `load_source`, single files with named columns to `read_files`.
"""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from anyo_lightning.data.amazon import read_amazon
from anyo_lightning.data.files import MissingColumnError
from anyo_lightning.data.readers import read_movielens, read_recbole
from anyo_lightning.data.schema import Columns, Source, make_source
from anyo_lightning.data.tables import read_table
from anyo_lightning.disk import cache_folder, file_sha256, set_aside
from anyo_lightning.errors import InputError
from anyo_lightning.fetch import fetch

__all__ = ["Columns", "Source", "load_source", "read_files"]

NAMES = ("ml-100k", "ml-1m")
ML_100K_WHEEL_SHA256 = "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407"
ML_100K_SHA256 = {
    "ml-100k.inter": "4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff",
    "ml-100k.item": "51d7cdf777ce5c0f5b32c1d947a4a81fe07d75e78abbe761e0cd4d0756064532",
}
ML_1M = "https://files.grouplens.org/datasets/movielens/ml-1m.zip"
ML_1M_SHA256 = "a6898adb50b9ca05aa231689da44c217cb524e7ebd39d264c56e2832f2c54e20"
SEPARATOR_NAMES = {";": "';'", "\t": "$'\\t'", ",": "','", "|": "'|'"}  # as a shell reads them
GROUPLENS_TERMS = (
    "MovieLens is GroupLens's (University of Minnesota): research use only, no commercial use, no redistribution "
    "without permission; https://files.grouplens.org/datasets/movielens/{name}-README.txt"
)


def load_source(source: str | Path) -> Source:
    """Read a data set by its name, or from a folder in a published form.

    Args:
        source: `ml-100k` (fetched once by pip, 2 MB), `ml-1m` (from GroupLens, 6 MB), or a folder with RecBole's atomic
            files (`*.inter`, `*.item`), a MovieLens data set (100K, 1M, latest, 10M, 20M, 25M, 32M), or Amazon reviews
            with their metadata (2014, 2018, 2023). A name comes before a folder called so: write that as `./ml-100k`.

    Returns:
        The data set, unfiltered.

    Raises:
        InputError: When there is no such name or folder, the folder holds none of these forms, or a file is bad.
    """
    if source == "ml-100k":
        ml_100k = read_recbole(_fetch_ml_100k(), name="ml-100k")
        assert ml_100k is not None
        return ml_100k
    if source == "ml-1m":
        ml_1m = read_movielens(_fetch_ml_1m())
        assert ml_1m is not None
        return ml_1m
    folder = Path(source).expanduser()
    if folder.is_dir():
        return _read_folder(folder.resolve())
    found = "a file (give files as interactions and items)" if folder.is_file() else f"{str(source)!r}"
    raise InputError(f"Expected source to be one of {', '.join(NAMES)} or a folder, got {found}")


def read_files(interactions: Path, items: Path | None, *, columns: Columns) -> Source:
    """Read delimited text, Parquet or JSON, plain, gzip or zip, with the user's names of columns.

    Args:
        interactions: File with one interaction per row.
        items: File with one item per row, any further columns being its text; `None` for a catalogue without text.
        columns: The names of the columns.

    Returns:
        The data, unfiltered, named after the interactions' file.

    Raises:
        InputError: When a file is bad, a column is missing, or the content fails a check of `make_source`.
    """
    named = {name: getattr(columns, name) for name in ("user", "item", "timestamp", "rating", "split")}
    of_log = {f"data.columns.{name}": column for name, column in named.items() if column is not None}
    item, separator = columns.catalogue_item or columns.item, columns.separator
    interactions, items = interactions.expanduser(), items and items.expanduser()
    with _naming_options(of_log):
        log = read_table(interactions, required=list(of_log.values()), optional=(), separator=separator)
    catalogue = None
    if items is not None:
        with _naming_options({"data.columns.catalogue_item": item}):
            catalogue = read_table(items, required=[item], separator=separator)
    return make_source(
        interactions.name.partition(".")[0],
        log,
        catalogue,
        columns=columns,
        paths=(interactions, items),
    )


@contextmanager
def _naming_options(options: Mapping[str, str]) -> Iterator[None]:
    """Where columns are missing, say which option helps.

    Args:
        options: The columns that must be there, by the options that name them.
    """
    try:
        yield
    except MissingColumnError as error:
        raise InputError(f"{error}: {_advice(error, options)}") from None


def _advice(error: MissingColumnError, options: Mapping[str, str]) -> str:
    header = error.names[0] if len(error.names) == 1 else ""
    if found := next((name for name in SEPARATOR_NAMES if name in header), None):
        return f"data.columns.separator {SEPARATOR_NAMES[found]} would part them; it holds for both files"
    if any(map(str.isdecimal, error.names)) and not all(map(str.isdecimal, options.values())):
        positions = ", ".join(f"{option} {place}" for place, option in enumerate(options))
        return f"where there is no header, give positions from 0, such as {positions}"
    missing = [option for option, column in options.items() if column in error.missing]
    others = [name for name in error.names if name not in options.values()]
    name = f" {others[0]}" if len(missing) == len(others) == 1 else ""
    null = "; data.columns.timestamp null takes the order of the file" if "data.columns.timestamp" in missing else ""
    return f"name it with {' and '.join(missing)}{name}{null}"


def _read_folder(folder: Path) -> Source:
    for reader in (read_recbole, read_movielens, read_amazon):
        if (source := reader(folder)) is not None:
            return source
    names = sorted(path.name for path in folder.iterdir())
    raise InputError(
        f"Expected RecBole, MovieLens or Amazon files in {folder}, got {', '.join(names[:8]) or 'an empty folder'}"
    )


def _fetch_ml_100k() -> Path:
    """The folder with ML-100K's atomic files; one that was damaged is put aside, not deleted, and fetched again."""
    folder = cache_folder() / "data" / "ml-100k"
    if folder.exists() and not _is_intact(folder):
        set_aside(folder)
    if not folder.exists():
        fetch(
            "recbole==1.2.1",
            sha256=ML_100K_WHEEL_SHA256,
            members="recbole/dataset_example/ml-100k/*",
            folder=folder,
        )
        print(GROUPLENS_TERMS.format(name="ml-100k"), file=sys.stderr)
    return folder


def _fetch_ml_1m() -> Path:
    """The folder with ML-1M's files."""
    folder = cache_folder() / "data" / "ml-1m"
    if not folder.exists():
        fetch(ML_1M, sha256=ML_1M_SHA256, members="*/*.dat", folder=folder)
        print(GROUPLENS_TERMS.format(name="ml-1m"), file=sys.stderr)
    return folder


def _is_intact(folder: Path) -> bool:
    return all(
        (folder / name).is_file() and file_sha256(folder / name) == sha256 for name, sha256 in ML_100K_SHA256.items()
    )

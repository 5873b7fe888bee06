"""Named data sets and the user's own files: the way in.

A name or a folder goes to `load_source`, single files with named columns to `read_files`.
"""

import sys
from pathlib import Path

from anyo_lightning.data.amazon import read_amazon
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
    named = (columns.user, columns.item, columns.timestamp, columns.rating, columns.split)
    required = [name for name in named if name is not None]
    item, separator = columns.catalogue_item or columns.item, columns.separator
    interactions, items = interactions.expanduser(), items and items.expanduser()
    return make_source(
        interactions.name.partition(".")[0],
        read_table(interactions, required=required, optional=(), separator=separator),
        read_table(items, required=[item], separator=separator) if items is not None else None,
        columns=columns,
        paths=(interactions, items),
    )


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

"""Folders in a published form: RecBole's atomic files and MovieLens (all sizes); Amazon's are in `amazon.py`.

Each reader gives `None` for a folder that is not of its form.
"""

from pathlib import Path

import polars as pl

from anyo_lightning.data.delimited import read_delimited
from anyo_lightning.data.files import check_columns, explaining
from anyo_lightning.data.schema import Columns, Source, make_source
from anyo_lightning.data.tables import read_table
from anyo_lightning.errors import InputError

GENRES = (  # the flags of 100K's `u.item`, after "unknown"
    *("Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama", "Fantasy"),
    *("Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western"),
)


def read_recbole(folder: Path, *, name: str | None = None) -> Source | None:
    """Read RecBole's atomic files: tab-separated, with `name:type` in the header.

    Benchmark files (`name.train.inter`, `name.valid.inter`, `name.test.inter`) become one table with a split column.

    Args:
        folder: Folder with one `*.inter` file, or the three benchmark files, and one `*.item` file.
        name: The data set's name; by default the folder's.

    Returns:
        The data set, or `None` when the folder holds no `*.inter` file.

    Raises:
        InputError: When the files are not one data set, or a file is bad.
    """
    paths = sorted(folder.glob("*.inter"))
    if not paths:
        return None
    stages = [path.name.removesuffix(".inter").rpartition(".")[2] for path in paths]
    benchmark = sorted(stages) == ["test", "train", "valid"]
    if len(paths) > 1 and not benchmark:
        raise InputError(f"Expected one .inter file in {folder}, got {', '.join(path.name for path in paths)}")
    tables = [_atomic(path, ("user_id", "item_id", "timestamp")) for path in paths]
    if benchmark:
        tables = [table.with_columns(split=pl.lit(stage)) for table, stage in zip(tables, stages, strict=True)]
    items = sorted(folder.glob("*.item"))
    if len(items) != 1:
        raise InputError(f"Expected one .item file in {folder}, got {', '.join(p.name for p in items) or 'none'}")
    interactions = pl.concat(tables)
    return make_source(
        name or folder.name,
        interactions,
        _atomic(items[0], ("item_id",)),
        columns=Columns(
            rating="rating" if "rating" in interactions.columns else None, split="split" if benchmark else None
        ),
        paths=(paths[0], items[0]),
    )


def _atomic(path: Path, required: tuple[str, ...]) -> pl.DataFrame:
    table = read_delimited(path, separator="\t")
    table = table.rename(lambda name: name.partition(":")[0])
    check_columns(table.columns, required, path)
    return table


def read_movielens(folder: Path) -> Source | None:
    """Read GroupLens's folders: 100K (`u.data`), 1M and 10M (`ratings.dat`), latest, 20M, 25M and 32M (`ratings.csv`).

    Args:
        folder: The unpacked archive.

    Returns:
        The data set with `title`, `year` and `genres`, or `None` when the folder is none of these.

    Raises:
        InputError: When a file is bad or the file with the movies is missing.
    """
    names = ["userId", "movieId", "rating", "timestamp"]
    if (path := folder / "u.data").is_file():
        items_path = folder / "u.item"
        interactions = read_delimited(path, separator="\t", columns=names)
        flags = read_delimited(
            items_path,
            separator="|",
            columns=["movieId", "title", "date", "video", "url", "unknown", *GENRES],
            encoding="latin-1",
        )
        genres = pl.concat_str(
            (pl.when(pl.col(name) == "1").then(pl.lit(name)) for name in GENRES), separator="|", ignore_nulls=True
        )
        items = flags.select("movieId", "title", genres.alias("genres"))
    elif (path := folder / "ratings.dat").is_file():
        items_path = folder / "movies.dat"
        interactions = read_delimited(path, separator="::", columns=names)
        items = read_delimited(
            items_path, separator="::", columns=["movieId", "title", "genres"], encoding=_encoding(items_path)
        )
    elif (path := folder / "ratings.csv").is_file() and (items_path := folder / "movies.csv").is_file():
        interactions = read_table(path, required=names, optional=())
        items = read_table(items_path, required=["movieId", "title", "genres"], optional=())
    else:
        return None
    year = r"\s*\((\d{4})(?:[-\u2013]\d{0,4})?\)\s*$"
    items = items.select(
        "movieId",
        pl.col("title").str.replace(year, ""),
        pl.col("title").str.extract(year).alias("year"),
        pl.col("genres").str.replace_all("|", ", ", literal=True).replace("(no genres listed)", ""),
    )
    columns = Columns(user="userId", item="movieId", rating="rating")
    return make_source(folder.name, interactions, items, columns=columns, paths=(path, items_path))


def _encoding(path: Path) -> str:
    """ML-1M's movies are Latin-1, ML-10M's are UTF-8."""
    with explaining(path):
        try:
            path.read_text(encoding="utf8")
        except UnicodeDecodeError:
            return "latin-1"
    return "utf8"

"""Amazon reviews with their metadata, one category a folder: JSON lines of 2014, 2018 and 2023."""

import ast
import gzip
import json
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import polars as pl
import rich.progress
from rich.console import Console

from anyo_lightning.data.files import explaining, not_empty, read_json_lines
from anyo_lightning.data.schema import Columns, Source, first_few, make_source
from anyo_lightning.errors import InputError

UNTIL_2018 = Columns(user="reviewerID", item="asin", timestamp="unixReviewTime", rating="overall")
SINCE_2023 = Columns(user="user_id", item="parent_asin", timestamp="timestamp", rating="rating")

# our name: the published names, of which a file has one
TEXTS = {
    "title": ("title",),
    "brand": ("brand", "store"),
    "price": ("price",),
    "categories": ("categories", "category"),
    "description": ("description",),
}
ENTITIES = {"&amp;": "&", "&quot;": '"', "&#39;": "'", "&lt;": "<", "&gt;": ">", "&nbsp;": " "}


def read_amazon(folder: Path) -> Source | None:
    """Read the reviews and metadata of one category, plain or gzip.

    The published metadata repeat some items (the first one counts) and lack others (they are kept, without text).
    Both are counted in a warning.

    Args:
        folder: Folder with one `meta_*.json*` file and one other `*.json*` file with the reviews.

    Returns:
        The data set with `title`, `brand`, `price`, `categories` and `description`, or `None` when the folder has no
        `meta_*.json*` file.

    Raises:
        InputError: When there is not one file with reviews and one with metadata, or a file is bad.
    """
    files = sorted(path for path in folder.iterdir() if re.search(r"\.jsonl?(\.gz)?$", path.name))
    metadata = [path for path in files if path.name.startswith("meta_")]
    reviews = [path for path in files if path not in metadata]
    if not metadata:
        return None
    if len(metadata) != 1 or len(reviews) != 1:
        raise InputError(
            f"Expected one file with reviews and one meta_ file in {folder}, got {', '.join(p.name for p in files)}"
        )
    path, items_path = reviews[0], metadata[0]
    columns = UNTIL_2018 if '"reviewerID"' in _first_line(path) else SINCE_2023
    wanted = [columns.user, columns.item, columns.timestamp, str(columns.rating)]
    interactions = read_json_lines(path, required=wanted)
    items = _metadata(items_path, columns.item)
    items = _one_row_each(items, interactions[columns.item].unique(maintain_order=True), columns.item, items_path)
    return make_source(folder.name, interactions, items, columns=columns, paths=(path, items_path))


def _metadata(path: Path, item: str) -> pl.DataFrame:
    fields = [name for names in TEXTS.values() for name in names]
    if _first_line(path).lstrip().startswith("{'"):
        table = pl.DataFrame(
            list(_literals(path, [item, *fields])), schema=dict.fromkeys([item, *fields], pl.String), orient="row"
        )
        not_empty(table, path)
    else:
        table = read_json_lines(path, required=[item], optional=fields)
    texts = (pl.coalesce(_plain(pl.col(name)) for name in names).alias(ours) for ours, names in TEXTS.items())
    return table.select(item, *texts)


def _plain(text: pl.Expr) -> pl.Expr:
    """Join the strings of a JSON list with commas, each once; leave any other text as it is."""
    strings = text.str.extract_all(r'"(?:[^"\\]|\\.)+"')
    joined = strings.list.eval(pl.element().str.slice(1).str.head(-1)).list.unique(maintain_order=True).list.join(", ")
    plain = pl.when(text.str.starts_with("[")).then(joined.str.replace_all(r'\\(["\\/])', "$1")).otherwise(text)
    return plain.str.replace_many(ENTITIES)


def _one_row_each(items: pl.DataFrame, wanted: pl.Series, item: str, path: Path) -> pl.DataFrame:
    """The rows of the items that have reviews, the first of each, and empty rows for items that are not there."""
    items = items.join(wanted.to_frame(item), on=item, how="semi", maintain_order="left")
    unique = items.unique(item, keep="first", maintain_order=True)
    if repeated := items.height - unique.height:
        warnings.warn(f"{repeated} rows of {path.name} repeat an item: the first row counts.", stacklevel=4)
    lacking = wanted.to_frame(item).join(unique, on=item, how="anti", maintain_order="left")
    if lacking.height:
        warnings.warn(
            f"{path.name} lacks {lacking.height} of {len(wanted)} items with reviews ({first_few(lacking[item])}): "
            "they are kept, without text.",
            stacklevel=4,
        )
    return pl.concat([unique, lacking], how="diagonal")


def _first_line(path: Path) -> str:
    with explaining(path), path.open("rb") as raw:
        return next(_lines(raw, path), b"").decode("utf8", errors="replace")


def _literals(path: Path, fields: list[str]) -> Iterator[tuple[str | None, ...]]:
    """The named fields of lines that are Python dictionaries, as 2014's metadata are."""
    description = f"Reading {path.name}"
    with explaining(path), rich.progress.open(path, "rb", description=description, console=Console(stderr=True)) as raw:
        for number, line in enumerate(_lines(raw, path), 1):
            text = line.decode("utf8")
            try:
                row = ast.literal_eval(text)
            except (SyntaxError, ValueError):
                row = None
            if not isinstance(row, dict):
                raise InputError(f"Expected a dictionary in line {number} of {path}, got {text[:40]!r}")
            yield tuple(_string(row.get(name)) for name in fields)


def _lines(raw: IO[bytes], path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        is_gzip = file.read(2) == b"\x1f\x8b"
    return iter(gzip.GzipFile(fileobj=raw) if is_gzip else raw)


def _string(value: object) -> str | None:
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False)

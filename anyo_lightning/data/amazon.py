"""Amazon reviews with their metadata, one folder per category: JSON lines of 2014, 2018 and 2023."""

import html
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl

from anyo_lightning.data.files import explaining, first_line
from anyo_lightning.data.json_lines import read_json_lines
from anyo_lightning.data.schema import Columns, Source, make_source
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
    "features": ("features", "feature"),
    "details": ("details",),
}
LISTS = ("categories", "description", "features", "details")  # JSON text, or in some releases plain text
TAGS = re.compile(
    r"</?(?:a|b|big|blockquote|br|center|div|em|font|h[1-6]|hr|i|img|li|ol|p|small|span|strong|sub|sup|table|tbody|td"
    r"|th|tr|u|ul)\b[^<>]*>",
    re.IGNORECASE,
)


def read_amazon(folder: Path) -> Source | None:
    """Read the reviews and metadata of one category, plain or gzip.

    The published metadata repeat some items (the first one counts) and lack others (they are kept, without text).
    Both are counted in a warning. HTML in texts is read as what it shows.

    Args:
        folder: Folder with one `meta_*.json*` file and one other `*.json*` file with the reviews.

    Returns:
        The data set with `title`, `brand`, `price`, `categories`, `description`, `features` and `details`, or `None`
        when the folder has no `meta_*.json*` file.

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
    with explaining(path):
        columns = UNTIL_2018 if '"reviewerID"' in first_line(path) else SINCE_2023
    wanted = [columns.user, columns.item, str(columns.timestamp), str(columns.rating)]
    interactions = read_json_lines(path, required=wanted)
    items = read_json_lines(
        items_path, required=[columns.item], optional=[name for names in TEXTS.values() for name in names]
    )
    items = items.join(interactions, on=columns.item, how="semi", maintain_order="left") if items.height else items
    texts = (_plain(items, ours, names) for ours, names in TEXTS.items())
    return make_source(
        folder.name, interactions, items.select(columns.item, *texts), columns=columns, paths=(path, items_path)
    )


def _plain(items: pl.DataFrame, ours: str, names: tuple[str, ...]) -> pl.Series:
    values = items.select(pl.coalesce(names)).to_series()
    read = (_joined(value) if ours in LISTS and value else value for value in values)
    return pl.Series(ours, [value and _without_html(value) for value in read], dtype=pl.String)


def _joined(text: str) -> str:
    """The strings of a JSON list, however deep, and `key: value` of an object, each once; any other text as it is."""
    if not text.startswith(("[", "{")):
        return text
    try:
        return ", ".join(dict.fromkeys(_strings(json.loads(text))))
    except ValueError:
        return text


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, list):
        for part in value:
            yield from _strings(part)
    elif isinstance(value, dict):
        for name, part in value.items():
            if joined := ", ".join(_strings(part)):
                yield f"{name}: {joined}"
    elif value is not None and value != "":
        yield str(value)


def _without_html(text: str) -> str:
    """What a browser shows: entities as characters, also those that were escaped twice, and no tags."""
    for _ in range(2):
        if "&" in text:
            text = re.sub(r"&#?\w+;", lambda entity: html.unescape(entity[0]), text)
    return TAGS.sub(" ", text) if "<" in text else text

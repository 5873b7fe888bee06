"""What users give in files: histories, lists of item ids, and new items."""

from collections.abc import Sequence
from pathlib import Path

import polars as pl

from anyo_lightning.data.schema import first_few
from anyo_lightning.data.tables import read_table
from anyo_lightning.data.values import identifiers, is_text, text
from anyo_lightning.errors import InputError


def read_histories(
    path: Path, *, user_column: str = "user_id", item_column: str = "item_id"
) -> tuple[list[str], list[list[str]]]:
    """Histories from CSV, TSV, Parquet or JSON: a line per interaction in the order of time, or a list per line.

    Args:
        path: The file.
        user_column: Column with the user; of lines that are interactions, those of one user are a history.
        item_column: Column with the item's id, or with the list of a history's ids, oldest first.

    Returns:
        The user and the item ids of each history, in the order of the file.

    Raises:
        InputError: The file cannot be read, lacks a column or an id, or a history is empty.
    """
    table = read_table(path, required=[user_column, item_column], optional=())
    users = identifiers(table[user_column], path)
    lists = table[item_column]
    if not isinstance(lists.dtype, pl.List):
        rows = pl.DataFrame([users.alias("user"), identifiers(lists, path).alias("items")])
        found = rows.group_by("user", maintain_order=True).agg("items")
        return found["user"].to_list(), found["items"].to_list()
    lengths = lists.list.len().fill_null(0)
    if empty := int((lengths == 0).sum()):
        raise InputError(
            f"Expected at least one item in each history of {path}, got {empty} of {len(lists)} without "
            f"({first_few(users.filter(lengths == 0))})"
        )
    rows = lists.to_frame().with_row_index("row").explode(item_column)
    rows = pl.DataFrame([rows["row"], identifiers(rows[item_column], path).alias("items")])
    return users.to_list(), rows.group_by("row", maintain_order=True).agg("items")["items"].to_list()


def read_ids(path: Path, *, item_column: str = "item_id") -> list[str]:
    """The item ids in a column of a file, each once.

    Args:
        path: The file.
        item_column: The column.

    Raises:
        InputError: The file cannot be read, or lacks the column or an id.
    """
    table = read_table(path, required=[item_column], optional=())
    return identifiers(table[item_column], path).unique(maintain_order=True).to_list()


def read_items(path: Path, *, item_column: str = "item_id") -> pl.DataFrame:
    """New items with all their columns of text, as `Recommender.add_items` takes them.

    Args:
        path: The file.
        item_column: Column with the item's id.

    Raises:
        InputError: The file cannot be read, or lacks the column or an id.
    """
    table = read_table(path, required=[item_column])
    texts = [text(column) for column in table.drop(item_column, "item_id", strict=False) if is_text(column)]
    return pl.DataFrame([identifiers(table[item_column], path).alias("item_id"), *texts])


def known_only(histories: Sequence[Sequence[str]], known: set[str]) -> tuple[list[list[str]], list[str]]:
    """Histories without the items that a catalogue lacks, and those items.

    Args:
        histories: Item ids.
        known: The catalogue's.
    """
    missing = [item for items in histories for item in items if item not in known]
    return [[item for item in items if item in known] for items in histories], list(dict.fromkeys(missing))

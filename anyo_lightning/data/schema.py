"""The two tables that every reader gives, interactions and catalogue, and the checks they must pass."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import polars as pl

from anyo_lightning.data.files import not_empty
from anyo_lightning.data.item_texts import check_template, default_template
from anyo_lightning.data.values import identifiers, is_text, moments, numbers, text
from anyo_lightning.errors import InputError


@dataclass(frozen=True)
class Columns:
    """The names of the columns in the user's own files; in delimited files without a header their positions, from 0.

    Args:
        user: Column with the user.
        item: Column with the item, in both files.
        catalogue_item: Column with the item in the catalogue's file, where it has another name there.
        timestamp: Column with a number that grows with time, or with ISO dates; null takes the order of the file.
        rating: Column with the rating, if there is one to filter by.
        split: Column that says train, validation or test, for the split strategy `column`.
        separator: Character between the fields of delimited files; by default a comma in .csv, a tab in .tsv and .txt.
    """

    user: str = "user_id"
    item: str = "item_id"
    catalogue_item: str | None = None
    timestamp: str | None = "timestamp"
    rating: str | None = None
    split: str | None = None
    separator: str | None = None

    @classmethod
    def of(cls, columns: "Columns | Mapping[str, str | int | None]") -> "Columns":
        """The same of a mapping, whose positions may be numbers.

        Raises:
            InputError: It is neither, or names what no file has.
        """
        if isinstance(columns, cls):
            return columns
        known = [field.name for field in fields(cls)]
        if not isinstance(columns, Mapping):
            raise InputError(f"Expected columns to be a dictionary with {', '.join(known)}, got {columns!r}")
        if unknown := [name for name in columns if name not in known]:
            raise InputError(f"Expected columns to be among {', '.join(known)}, got {unknown[0]!r}")
        return cls(**{name: None if column is None else str(column) for name, column in columns.items()})  # type: ignore[arg-type]


@dataclass(frozen=True, eq=False)
class Source:
    """What was read, before any filtering.

    Args:
        name: The data set's name.
        interactions: `user_id`, `item_id` (strings), `timestamp` (Int64 or Float64) and, where given, `rating`
            (Float64) and `split` (string); rows in file order.
        items: `item_id` and the text columns as given (strings); rows in file order, item ids unique.
        template: How an item's text is made from the columns of `items`, unless the user says otherwise.
        timed: Whether the timestamps are the data's own; otherwise they are the rows' numbers in the file.
    """

    name: str
    interactions: pl.DataFrame
    items: pl.DataFrame
    template: str
    timed: bool = True


def make_source(
    name: str,
    interactions: pl.DataFrame,
    items: pl.DataFrame | None,
    *,
    columns: Columns,
    paths: tuple[Path, Path | None],
    template: str | None = None,
) -> Source:
    """Bring the tables of a reader into the form of `Source` and check them.

    Args:
        name: The data set's name.
        interactions: A table with the named columns.
        items: A table with the named item column and text columns: the first row of an item counts, and items that
            it lacks get a row without text, both counted in a warning. `None` when there is no catalogue file: then
            the catalogue is the items of the interactions, in order of first appearance, without text.
        columns: The names in the tables.
        paths: What to call the two tables in errors.
        template: The item text's template; by default title, year and genres as far as they are there.

    Returns:
        The checked source.

    Raises:
        InputError: When a user, item, rating or split is missing or a list, an id is a floating-point number that
            stands for several, the catalogue has none of the items, or a timestamp or rating is not a finite number.
    """
    path, items_path = paths
    ids = [
        identifiers(interactions[columns.user], path).alias("user_id"),
        identifiers(interactions[columns.item], path).alias("item_id"),
    ]
    if columns.timestamp is None:
        when = pl.int_range(interactions.height, eager=True)
    else:
        when = moments(interactions[columns.timestamp], path)
    table = pl.DataFrame([*ids, when.alias("timestamp")])
    if columns.rating is not None:
        table = table.with_columns(numbers(interactions[columns.rating], path).cast(pl.Float64).alias("rating"))
    if columns.split is not None:
        table = table.with_columns(identifiers(interactions[columns.split], path).alias("split"))
    catalogue = table.select(pl.col("item_id").unique(maintain_order=True))
    if items is not None:
        assert items_path is not None
        own = _catalogue(not_empty(items, items_path), columns.catalogue_item or columns.item, items_path)
        catalogue = _one_row_each(own, catalogue, items_path)
    if template is None:
        template = default_template(catalogue.columns[1:])
    elif catalogue.width > 1:
        check_template(template, catalogue.columns)
    return Source(
        name=name, interactions=table, items=catalogue, template=template, timed=columns.timestamp is not None
    )


def _catalogue(items: pl.DataFrame, item: str, path: Path) -> pl.DataFrame:
    texts = [text(column) for column in items.drop(item, "item_id", strict=False) if is_text(column)]
    return pl.DataFrame([identifiers(items[item], path).alias("item_id"), *texts])


def _one_row_each(items: pl.DataFrame, wanted: pl.DataFrame, path: Path) -> pl.DataFrame:
    """The first row of each item, and rows without text for the items of the interactions that are not there."""
    unique = items.unique("item_id", keep="first", maintain_order=True)
    if repeated := items.height - unique.height:
        warnings.warn(f"{repeated} rows of {path.name} repeat an item: the first row counts.", stacklevel=4)
    lacking = wanted.join(unique, on="item_id", how="anti", maintain_order="left")
    if lacking.height == wanted.height:
        raise InputError(
            f"Expected items of the interactions ({first_few(wanted['item_id'])}) in {path}, "
            f"got others ({first_few(unique['item_id'])})"
        )
    if lacking.height:
        warnings.warn(
            f"{path.name} lacks {lacking.height} of {wanted.height} items of the interactions "
            f"({first_few(lacking['item_id'])}): they are kept, without text.",
            stacklevel=4,
        )
    return pl.concat([unique, lacking], how="diagonal")


def first_few(values: pl.Series) -> str:
    """The first three values of a series, for an error's sentence."""
    return ", ".join(str(value) for value in values.head(3)) + (", …" if len(values) > 3 else "")

"""The two tables that every reader gives, interactions and catalogue, and the checks they must pass."""

from dataclasses import dataclass
from pathlib import Path

import polars as pl

from anyo_lightning.data.files import not_empty
from anyo_lightning.data.item_texts import check_template, default_template
from anyo_lightning.errors import InputError


@dataclass(frozen=True)
class Columns:
    """The names of the columns in the user's own files.

    Args:
        user: Column with the user.
        item: Column with the item, in both files.
        timestamp: Column with a number that grows with time.
        rating: Column with the rating, if there is one to filter by.
        split: Column that says train, validation or test, for the split strategy `column`.
    """

    user: str = "user_id"
    item: str = "item_id"
    timestamp: str = "timestamp"
    rating: str | None = None
    split: str | None = None


@dataclass(frozen=True, eq=False)
class Source:
    """What was read, before any filtering.

    Args:
        name: The data set's name.
        interactions: `user_id`, `item_id` (strings), `timestamp` (Int64 or Float64) and, where given, `rating`
            (Float64) and `split` (string); rows in file order.
        items: `item_id` and the text columns as given (strings); rows in file order, item ids unique.
        template: How an item's text is made from the columns of `items`, unless the user says otherwise.
    """

    name: str
    interactions: pl.DataFrame
    items: pl.DataFrame
    template: str


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
        items: A table with the named item column and text columns; `None` when there is no catalogue file: then the
            catalogue is the items of the interactions, in order of first appearance, without text.
        columns: The names in the tables.
        paths: What to call the two tables in errors.
        template: The item text's template; by default title, year and genres as far as they are there.

    Returns:
        The checked source.

    Raises:
        InputError: When a user, item, rating or split is missing or a list, an item id is twice in the catalogue, or
            a timestamp or rating is not a finite number.
    """
    path, items_path = paths
    table = pl.DataFrame(
        [
            _identifiers(interactions[columns.user], path).alias("user_id"),
            _identifiers(interactions[columns.item], path).alias("item_id"),
            _numbers(interactions[columns.timestamp], path).alias("timestamp"),
        ]
    )
    if columns.rating is not None:
        table = table.with_columns(_numbers(interactions[columns.rating], path).cast(pl.Float64).alias("rating"))
    if columns.split is not None:
        table = table.with_columns(_identifiers(interactions[columns.split], path).alias("split"))
    if items is None:
        catalogue = table.select(pl.col("item_id").unique(maintain_order=True))
    else:
        assert items_path is not None
        catalogue = _catalogue(not_empty(items, items_path), columns.item, items_path)
    if template is None:
        template = default_template(catalogue.columns[1:])
    elif catalogue.width > 1:
        check_template(template, catalogue.columns)
    return Source(name=name, interactions=table, items=catalogue, template=template)


def _catalogue(items: pl.DataFrame, item: str, path: Path) -> pl.DataFrame:
    identifiers = _identifiers(items[item], path).alias("item_id")
    if identifiers.n_unique() < len(identifiers):
        repeated = identifiers.filter(identifiers.is_duplicated()).unique(maintain_order=True)
        raise InputError(
            f"Expected each item once in {path}, got {len(repeated)} item ids repeatedly: {first_few(repeated)}"
        )
    texts = [_text(column) for column in items.drop(item, "item_id", strict=False) if _is_text(column)]
    return pl.DataFrame([identifiers, *texts])


def first_few(values: pl.Series) -> str:
    """The first three values of a series, for an error's sentence."""
    return ", ".join(str(value) for value in values.head(3)) + (", …" if len(values) > 3 else "")


def _identifiers(column: pl.Series, path: Path) -> pl.Series:
    _refuse_nested(column, path)
    if column.dtype.is_float():
        column = column.fill_nan(None)
        if (column == column.floor()).all():
            column = column.cast(pl.Int64)  # integers with a gap come as floats from pandas
    text = column.cast(pl.String)
    empty = text.is_null() | (text == "")
    if empty.any():
        raise InputError(f"Expected a value of {column.name} in each row of {path}, got none in {_row(empty)}")
    return text


def _numbers(column: pl.Series, path: Path) -> pl.Series:
    """Int64 where every value is an integer, else Float64; dates become seconds since 1970."""
    _refuse_nested(column, path)
    if column.dtype == pl.Date or isinstance(column.dtype, pl.Datetime):
        numbers = column.cast(pl.Datetime("us")).to_physical() / 1e6
    elif column.dtype.is_integer():
        numbers = column.cast(pl.Int64)
    elif column.dtype.is_numeric():
        numbers = column.cast(pl.Float64)
    else:
        text = column.cast(pl.String, strict=False)
        numbers = text.cast(pl.Int64, strict=False)
        if numbers.null_count():
            numbers = text.cast(pl.Float64, strict=False)
    bad = numbers.is_null()
    if numbers.dtype == pl.Float64:
        bad |= ~numbers.is_finite().fill_null(False)
    if bad.any():
        value = column[bad.arg_max() or 0]
        raise InputError(f"Expected a number as {column.name} in {path}, got {value!r} in {_row(bad)}")
    return numbers


def _refuse_nested(column: pl.Series, path: Path) -> None:
    if column.dtype.is_nested():
        raise InputError(f"Expected one value a row as {column.name} in {path}, got {column.dtype}")


def _row(bad: pl.Series) -> str:
    return f"row {(bad.arg_max() or 0) + 1} ({bad.sum()} such rows)"


def _is_text(column: pl.Series) -> bool:
    """Whether the column holds strings, numbers or dates, or lists of them."""
    kind = column.dtype.inner if isinstance(column.dtype, pl.List) else column.dtype
    return not kind.is_nested() and kind not in (pl.Binary, pl.Object, pl.Null)


def _text(column: pl.Series) -> pl.Series:
    if column.dtype.is_float() and (column.drop_nulls() == column.drop_nulls().floor()).all():
        column = column.cast(pl.Int64, strict=False)  # a year with gaps comes as 1995.0 from pandas
    if isinstance(column.dtype, pl.List):
        return column.cast(pl.List(pl.String)).list.drop_nulls().list.join(", ")
    return column.cast(pl.String)

"""What a column's values are: ids, moments, numbers or text. A value that would become another one is refused."""

from pathlib import Path
from typing import Literal

import polars as pl

from anyo_lightning.errors import InputError

DATE = r"^\s*\d{4}-\d\d-\d\d"
FINE_DATE = r"\.\d{7}"  # finer than a microsecond
WHOLE = r"^-?\d+\.0$"


def identifiers(column: pl.Series, path: Path) -> pl.Series:
    """Ids as strings; whole floating-point numbers, which integers with gaps become in pandas, lose their `.0`.

    Args:
        column: The values.
        path: What to call their table.

    Raises:
        InputError: When one is missing, nested, of a kind that has no text, or a floating-point number so large that
            several integers become it.
    """
    _refuse_kind(column, path)
    if column.dtype.is_float():
        column = column.fill_nan(None)
        large = (column.abs() >= (2**24 if column.dtype == pl.Float32 else 2**53)).fill_null(False)
        if large.any():
            raise InputError(
                f"Expected {column.name} in {path} as integers or text, got floating-point numbers too large to tell "
                f"ids apart: {column[large.arg_max() or 0]!r} in {_row(large)}"
            )
    ids = text(column)
    empty = ids.is_null() | (ids == "")
    if empty.any():
        raise InputError(f"Expected a value of {column.name} in each row of {path}, got none in {_row(empty)}")
    return ids


def moments(column: pl.Series, path: Path) -> pl.Series:
    """Numbers as `numbers` gives them; dates, also as ISO text, become seconds since 1970.

    Where one is finer than a microsecond, they become integer nanoseconds: seconds would make ties of them.

    Args:
        column: The values.
        path: What to call their table.

    Raises:
        InputError: When one is neither a finite number nor a date.
    """
    dates = column
    if column.dtype == pl.String and (iso := column.str.contains(DATE)).sum() * 2 > len(column):
        unit: Literal["ns", "us"] = "ns" if column.str.contains(FINE_DATE).any() else "us"
        plain = pl.select(pl.when(iso).then(column.str.strip_chars())).to_series()
        dates = plain.str.to_datetime(time_unit=unit, time_zone="UTC", strict=False)
        _refuse_bad(column, dates.is_null(), "an ISO date", path)
        if unit == "ns":  # whose range ends in 1677 and 2262, where it begins again
            coarse = plain.str.to_datetime(time_unit="us", time_zone="UTC", strict=False)
            far = (coarse.dt.timestamp("us") - dates.dt.timestamp("us")).abs() > 1
            _refuse_bad(column, far, "a date between 1677 and 2262, beside some finer than a microsecond", path)
    if dates.dtype == pl.Date:
        dates = dates.cast(pl.Datetime("us"))
    if not dates.dtype.is_temporal() or dates.dtype == pl.Time:
        return numbers(column, path)
    _refuse_bad(column, dates.is_null(), "a date", path)
    physical, scale = dates.to_physical(), {"ms": 1e3, "us": 1e6, "ns": 1e9}[dates.dtype.time_unit]  # type: ignore[attr-defined]
    return physical if scale == 1e9 and (physical % 1000 != 0).any() else physical / scale


def numbers(column: pl.Series, path: Path) -> pl.Series:
    """Int64 where every value is an integer, otherwise Float64.

    Args:
        column: The values.
        path: What to call their table.

    Raises:
        InputError: When one is not a finite number, or several become one floating-point number.
    """
    _refuse_kind(column, path)
    if column.dtype.is_integer():
        found = column.cast(pl.Int64, strict=False)
    elif column.dtype.is_float():
        found = column.cast(pl.Float64)
    else:
        plain = column.cast(pl.String).str.strip_chars()
        found = plain.cast(pl.Int64, strict=False)
        if found.null_count():
            found = plain.cast(pl.Float64, strict=False)
            digits = plain.str.len_chars().max()
            if isinstance(digits, int) and digits > 16 and found.n_unique() < plain.n_unique():
                raise InputError(
                    f"Expected numbers of at most 15 digits as {column.name} in {path}, got longer ones that become "
                    "equal; write them as integers"
                )
    bad = found.is_null()
    if found.dtype == pl.Float64:
        bad |= ~found.is_finite().fill_null(False)
    _refuse_bad(column, bad, "a number", path)
    return found


def is_text(column: pl.Series) -> bool:
    """Whether the column holds strings, numbers or dates, or lists of them.

    Args:
        column: Any column.
    """
    kind = column.dtype.inner if isinstance(column.dtype, pl.List) else column.dtype
    return not kind.is_nested() and kind not in (pl.Binary, pl.Object, pl.Null, pl.Duration)


def text(column: pl.Series) -> pl.Series:
    """The values as strings: a year that was read as 1995.0 is 1995, a list is joined with commas.

    Args:
        column: A column for which `is_text` holds.
    """
    if isinstance(column.dtype, pl.List):
        return column.cast(pl.List(pl.String)).list.drop_nulls().list.join(", ")
    present = column.drop_nulls()
    if column.dtype.is_float() and (present == present.floor()).all():
        column = column.cast(pl.Int64, strict=False)
    strings = column.cast(pl.String)
    filled = strings.filter(strings != "")
    if column.dtype == pl.String and len(filled) and filled[0].endswith(".0") and filled.str.contains(WHOLE).all():
        strings = strings.str.strip_suffix(".0")
    return strings


def _refuse_kind(column: pl.Series, path: Path) -> None:
    if column.dtype.is_nested():
        raise InputError(f"Expected one value per row as {column.name} in {path}, got {column.dtype}")
    if column.dtype in (pl.Binary, pl.Object, pl.Duration):
        raise InputError(f"Expected text or numbers as {column.name} in {path}, got {column.dtype}")


def _refuse_bad(column: pl.Series, bad: pl.Series, expected: str, path: Path) -> None:
    if bad.any():
        value = column[bad.arg_max() or 0]
        raise InputError(f"Expected {expected} as {column.name} in {path}, got {value!r} in {_row(bad)}")


def _row(bad: pl.Series) -> str:
    return f"row {(bad.arg_max() or 0) + 1} ({bad.sum()} such rows)"

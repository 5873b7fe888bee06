"""Item texts from a template over any columns: `"{title} ({year}), {genres}"`.

An empty field takes the words and punctuation around it with it, also the brackets when nothing else is in them:
without a year the text is `"Toy Story, Comedy"`, without genres `"Toy Story (1995)"`.
"""

import re
import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import polars as pl

from anyo_lightning.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor  # comparisons read texts, too, and do without torch

BRACKETS = {"(": ")", "[": "]"}
TITLES = ("title", "movie_title", "item_title", "name", "item_name")
SEPARATORS = " ,;:.|/-\u2013\u2014"
YEARS = ("year", "release_year", "movie_year")
GENRES = ("genres", "genre", "class", "categories", "category")


@dataclass(frozen=True, eq=False)
class TrainedTexts:
    """The texts of the catalogue that a model was trained on, and the vectors that it has of them, (texts, width)."""

    texts: list[str]
    vectors: "Tensor | None"


def item_texts(items: pl.DataFrame, template: str) -> list[str]:
    """The text of each item.

    Args:
        items: The catalogue: any columns that can be cast to strings; null and blank fields are empty.
        template: Text with `{column}` in it; square and round brackets are dropped with all they hold.

    Returns:
        One text per row, white space collapsed; empty where all of the template's fields are empty.

    Raises:
        InputError: When the template is malformed, has no field or names a column that is not there.
    """
    check_template(template, items.columns)
    names = sorted(_fields(template))
    if not names:  # a catalogue without text columns
        return [""] * items.height
    clean = items.select(
        pl.col(name).cast(pl.String).fill_null("").str.replace_all(r"\s+", " ").str.strip_chars() for name in names
    )
    parts = _parse(template)
    text = pl.lit("")
    for row in clean.select(pl.all() != "").unique().iter_rows():  # at most 2^fields patterns of empty fields
        full = {name for name, is_full in zip(names, row, strict=True) if is_full}
        pieces = _render(parts, full)
        expressions = [pl.col(piece.name) if isinstance(piece, _Field) else pl.lit(piece) for piece in pieces]
        here = pl.all_horizontal((pl.col(name) != "") == (name in full) for name in names)
        text = pl.when(here).then(pl.concat_str(expressions) if expressions else pl.lit("")).otherwise(text)
    return clean.select(text.str.strip_chars().alias("text"))["text"].to_list()


def title_texts(items: pl.DataFrame, template: str) -> list[str]:
    """The title of each item: its text by the first field of the template alone.

    Args:
        items: As in `item_texts`.
        template: As in `item_texts`.

    Returns:
        One title per row; empty where the field is, or where the template has none.
    """
    title = next((field for _, field, _, _ in string.Formatter().parse(template) if field), None)
    return item_texts(items, "" if title is None else f"{{{title}}}")


def default_template(columns: Sequence[str]) -> str:
    """Title, year and genres as far as there are such columns, otherwise all columns, separated by commas.

    Args:
        columns: The text columns of a catalogue.

    Returns:
        A template; empty when there are no columns.
    """
    known = {re.sub(r"[\s-]+", "_", name.strip().lower()): name for name in reversed(columns)}
    found = [next((known[name] for name in names if name in known), None) for names in (TITLES, YEARS, GENRES)]
    title, year, genres = found
    if title is None:
        return ", ".join(f"{{{name}}}" for name in columns)
    return f"{{{title}}}" + (f" ({{{year}}})" if year else "") + (f", {{{genres}}}" if genres else "")


def check_template(template: str, columns: Sequence[str]) -> None:
    """Refuse a template that the catalogue cannot fill.

    Args:
        template: The template.
        columns: The catalogue's columns.

    Raises:
        InputError: When the template is malformed, has no field or names a column that is not there.
    """
    if template and not _fields(template):
        raise InputError(f"Expected a {{column}} in the item text template, got {template!r}")
    if missing := sorted(_fields(template) - set(columns)):
        raise InputError(
            f"Expected the item text template to use columns of the catalogue ({', '.join(columns)}), "
            f"got {', '.join(missing)}"
        )


@dataclass(frozen=True)
class _Field:
    name: str


@dataclass
class _Group:
    """Literals (strings), fields and bracketed groups, in order."""

    opening: str
    parts: "list[str | _Field | _Group]"


def _fields(template: str) -> set[str]:
    try:
        parsed = list(string.Formatter().parse(template))
    except ValueError as error:
        raise InputError(
            f"Expected an item text template such as '{{title}} ({{year}})', got {template!r}: {error}"
        ) from None
    for _, name, form, conversion in parsed:
        if name == "" or form or conversion:
            raise InputError(f"Expected plain {{column}} fields in the item text template, got {template!r}")
    return {name for _, name, _, _ in parsed if name is not None}


def _parse(template: str) -> _Group:
    stack = [_Group("", [])]
    for literal, name, _, _ in string.Formatter().parse(template):
        for piece in re.split(r"([()\[\]])", literal):
            if piece in BRACKETS:
                stack.append(_Group(piece, []))
            elif len(stack) > 1 and piece == BRACKETS[stack[-1].opening]:
                closed = stack.pop()
                stack[-1].parts.append(closed)
            elif piece:
                stack[-1].parts.append(piece)
        if name is not None:
            stack[-1].parts.append(_Field(name))
    while len(stack) > 1:  # never closed: an ordinary character
        open_group = stack.pop()
        stack[-1].parts += [open_group.opening, *open_group.parts]
    return stack[0]


def _render(group: _Group, full: set[str]) -> list[str | _Field]:
    """The pieces that remain when only the fields in `full` have a value; nothing when none of the group's has."""
    pieces: list[str | _Field] = []
    literal = ""
    has_value = dropped = False
    for part in group.parts:
        if isinstance(part, str):
            literal += part
            continue
        inner = _render(part, full) if isinstance(part, _Group) else [part] if part.name in full else []
        if inner:
            pieces += [literal if has_value or not dropped else literal.lstrip(SEPARATORS), *inner]
            has_value = True
        else:
            dropped = True
        literal = ""
    if not has_value and (dropped or not group.opening):
        return []
    closing = BRACKETS.get(group.opening, "")
    return [piece for piece in (group.opening, *pieces, literal, closing) if piece]

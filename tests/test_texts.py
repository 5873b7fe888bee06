"""Item texts from templates: empty fields leave nothing behind, values stay as they are."""

import re
from collections.abc import Callable

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anyo_lightning.data.item_texts import default_template, item_texts
from anyo_lightning.errors import InputError

ITEMS = pl.DataFrame({"item_id": ["i1", "i2"], "title": ["a", "b"], "year": ["1995", None]})
WORDS = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), max_size=8)


def refused(expected: str, call: Callable[[], object]) -> None:
    """Assert that the call ends in one line that holds the expected words."""
    with pytest.raises(InputError, match=expected) as caught:
        call()
    assert "\n" not in str(caught.value)


TEMPLATES = {
    "{title} ({year}), {genres}": ["T (9), G", "T, G", "T (9)", "T", "(9), G", "G", ""],
    "Title: {title}. Year: {year}. Genres: {genres}": ["Title: T. Year: 9. Genres: G", "Title: T. Genres: G"],
    "({year}) {title} [{genres}, {title}]!": ["(9) T [G, T]!", "T [G, T]!", "(9) T [T]!", "T [T]!"],
    "{title}: {{{genres}}}": ["T: {G}", "T: {G}", "T}"],
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_template_with_empty_fields(template: str) -> None:
    """Empty fields leave no stray brackets, commas or labels."""
    title = ["T", "T", " T ", "T", None, "", " "]
    year = ["9", None, "9", "", "9", "", None]
    genres = ["G", "G", None, " ", "G", "G", None]
    items = pl.DataFrame({"item_id": list("abcdefg"), "title": title, "year": year, "genres": genres})
    expected = TEMPLATES[template]
    assert item_texts(items, template)[: len(expected)] == expected


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(WORDS, WORDS, WORDS), min_size=1, max_size=6))
def test_template_keeps_the_values(rows: list[tuple[str, str, str]]) -> None:
    """Every value is in its text, and where all are empty, so is the text."""
    items = pl.DataFrame(rows, schema=["title", "year", "genres"], orient="row")
    for row, text in zip(rows, item_texts(items, "{title} ({year}), {genres}"), strict=True):
        squeezed = [re.sub(r"\s+", " ", value).strip() for value in row]
        assert all(value in text for value in squeezed)
        assert bool(text) == any(squeezed)


def test_bad_templates() -> None:
    """A missing column lists those there; malformed templates are refused."""
    refused(r"catalogue \(item_id, title, year\), got genre", lambda: item_texts(ITEMS, "{title} {genre}"))
    for template in ("{title", "{title!r}", "{title:>3}", "{}", "no field"):
        refused("template", lambda template=template: item_texts(ITEMS, template))


@pytest.mark.parametrize(
    ("columns", "template"),
    [
        (["genres", "title", "year"], "{title} ({year}), {genres}"),
        (["movie_title", "release_year", "class"], "{movie_title} ({release_year}), {class}"),
        (["name", "price", "category"], "{name}, {category}"),
        (["Title", "Release Year", "Genres"], "{Title} ({Release Year}), {Genres}"),
        (["brand", "colour"], "{brand}, {colour}"),
        ([], ""),
    ],
)
def test_default_template(columns: list[str], template: str) -> None:
    """Title, year and genres by their usual names in any case, otherwise every column."""
    assert default_template(columns) == template

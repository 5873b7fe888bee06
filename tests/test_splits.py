"""Splits: what is filtered, in which order, and what each interaction is for."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anyo_lightning.data.sources import Source, load_source
from anyo_lightning.data.splits import Split, make_split
from anyo_lightning.errors import InputError

Row = tuple[str, str, float]


def make_source(rows: list[Row], **columns: list[Any]) -> Source:
    """A source with these (user, item, timestamp) rows and a title for every item."""
    interactions = pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row").with_columns(
        **{name: pl.Series(values) for name, values in columns.items()}
    )
    ids = sorted(interactions["item_id"].unique(), reverse=True)
    items = pl.DataFrame({"item_id": ids, "title": [f"title of {name}" for name in ids]})
    return Source(name="toy", interactions=interactions, items=items, template="{title}")


def sequence(split: Split, user: str) -> list[str]:
    """The items of a user, oldest first."""
    (row,) = np.flatnonzero(split.user_ids == user)
    return list(split.item_ids[split.items[split.offsets[row] : split.offsets[row + 1]]])


def rows_of(split: Split, stage: Any) -> list[tuple[str, list[str], str]]:
    """The (user, history, target) rows of a stage."""
    queries = split.queries(stage)
    return [
        (split.user_ids[queries.user[row]], list(split.item_ids[queries.history(row)]), split.item_ids[target])
        for row, target in enumerate(queries.target)
    ]


def refused(expected: str, call: Callable[[], object]) -> None:
    """Assert that the call ends in one line that holds the expected words."""
    with pytest.raises(InputError, match=expected) as caught:
        call()
    assert "\n" not in str(caught.value)


TOY = [
    *[("u", "c", 3), ("v", "a", 1), ("u", "a", 1), ("u", "b", 2), ("u", "d", 4)],
    *[("v", "d", 2), ("w", "a", 9), ("w", "b", 9), ("w", "c", 8)],
]


def test_leave_one_out_by_hand() -> None:
    """Last item test, the one before validation; a user with two items is for training only."""
    split = make_split(make_source(TOY), k_core=0)
    assert split.user_ids.tolist() == ["u", "v", "w"]  # by first appearance
    assert split.item_ids.tolist() == ["d", "c", "b", "a"]  # as in the catalogue
    assert split.item_texts[0] == "title of d"
    assert sequence(split, "u") == ["a", "b", "c", "d"]
    assert sequence(split, "w") == ["c", "a", "b"]
    assert split.stages.tolist() == [0, 0, 1, 2, 0, 0, 0, 1, 2]
    assert rows_of(split, "validation") == [("u", ["a", "b"], "c"), ("w", ["c"], "a")]
    assert rows_of(split, "test") == [("u", ["a", "b", "c"], "d"), ("w", ["c", "a"], "b")]
    assert split.queries("test").tied.tolist() == [False, True]
    assert split.training_counts().tolist() == [1, 1, 1, 2]
    assert split.item_ids[split.training_history(0)].tolist() == ["a", "b"]
    assert split.counts == {
        "users": 3,
        "items": 4,
        "interactions": 9,
        "training_interactions": 5,
        "validation_targets": 2,
        "test_targets": 2,
        "validation_targets_without_history": 0,
        "test_targets_without_history": 0,
        "tied_interactions": 2,
        "items_without_training": 0,
    }


def test_global_time_by_hand() -> None:
    """Two points in time for all; a user without earlier items gives no row, and cold items stay."""
    split = make_split(make_source(TOY), k_core=0, strategy="global_time", times=(3.0, 8.0))
    assert rows_of(split, "validation") == [("u", ["a", "b"], "c"), ("u", ["a", "b"], "d")]
    assert rows_of(split, "test") == []
    assert split.queries("test").without_history == 3  # w came after the split
    assert split.counts["items_without_training"] == 1  # c
    by_quantile = make_split(make_source(TOY), k_core=0, strategy="global_time", quantiles=(0.6, 0.9))
    assert by_quantile.stages.tolist() == [0, 0, 0, 1, 0, 0, 1, 2, 2]  # tied moments are never torn apart


def test_ratio_by_hand() -> None:
    """The last shares of each user's history, at least one item each."""
    rows: list[Row] = [("u", f"i{n:02}", n) for n in range(20)] + [("v", f"i{n:02}", n) for n in range(3)]
    split = make_split(make_source(rows), k_core=0, strategy="ratio", ratios=(0.1, 0.25))
    assert split.stages.tolist() == [*[0] * 13, *[1] * 2, *[2] * 5, 0, 1, 2]
    assert [len(history) for _, history, _ in rows_of(split, "test")] == [15] * 5 + [2]


def test_column_by_hand() -> None:
    """The user's own split; stages that contradict time are ordered by stage, with a warning."""
    names = ["valid", "train", "train", "train", "test", "test", " Train", "val", "test"]
    split = make_split(make_source(TOY[:6], split=names[:6]), k_core=0, strategy="column")
    assert rows_of(split, "test") == [("u", ["a", "b", "c"], "d"), ("v", ["a"], "d")]
    with pytest.warns(UserWarning, match="earlier stages for 1 users"):
        split = make_split(make_source(TOY, split=names), k_core=0, strategy="column")
    assert sequence(split, "w") == ["a", "b", "c"]  # c came first, but is the test item
    refused("train, validation or test in the split column, got fold1", lambda: _column(["fold1"] * 9))
    refused("columns.split to name a column", lambda: make_split(make_source(TOY), strategy="column", k_core=0))
    refused("interactions for validation, got none", lambda: _column(["train"] * 8 + ["test"]))


def _column(names: list[str]) -> Split:
    return make_split(make_source(TOY, split=names), k_core=0, strategy="column")


def test_ties() -> None:
    """Each policy orders equal timestamps its way; the shuffle is the seed's."""
    rows: list[Row] = [("u", item, 1.0) for item in "dbeac"] + [("u", "f", 0.0)]
    source = make_source(rows)
    assert sequence(make_split(source, k_core=0), "u") == list("fdbeac")
    assert sequence(make_split(source, k_core=0, ties="item_id"), "u") == list("fabcde")
    shuffled = [sequence(make_split(source, k_core=0, ties="shuffle", ties_seed=seed), "u") for seed in (0, 0, 1)]
    assert shuffled[0] == shuffled[1] != shuffled[2]
    assert all(order[0] == "f" and sorted(order) == list("abcdef") for order in shuffled)
    assert make_split(source, k_core=0).tied.tolist() == [False] + [True] * 5


def test_duplicates() -> None:
    """Rows that are equal in all columns: all, the first or the last; an item had twice at two times is none."""
    rows: list[Row] = [("u", "a", 1.0), ("u", "b", 1.0), ("u", "a", 1.0), ("u", "a", 2.0), ("v", "a", 1.0)]
    source = make_source(rows)
    orders = {"keep": list("abaa"), "first": list("aba"), "last": list("baa")}
    for duplicates, order in orders.items():
        split = make_split(source, k_core=0, duplicates=duplicates)  # type: ignore[arg-type]
        assert sequence(split, "u") == order
    rated = make_source(rows, rating=[1.0, 1.0, 2.0, 1.0, 1.0])
    assert sequence(make_split(rated, k_core=0, duplicates="first"), "u") == list("abaa")
    refused("data.duplicates keep, first or last, got 'none'", lambda: make_split(source, duplicates="none"))  # type: ignore[arg-type]


def test_the_order_of_the_file_is_in_the_fingerprint() -> None:
    """Rows' numbers are not moments: another fingerprint, no split by time, and duplicates without them."""
    rows: list[Row] = [("u", "a", 0), ("u", "b", 1), ("u", "a", 2), ("u", "c", 3), ("v", "a", 4)]
    timed = make_source(rows)
    source = replace(timed, timed=False)
    assert make_split(source, k_core=0).fingerprint != make_split(timed, k_core=0).fingerprint
    assert sequence(make_split(source, k_core=0, duplicates="first"), "u") == list("abc")
    expected = "data.columns.timestamp for data.strategy global_time, got null"
    refused(expected, lambda: make_split(source, k_core=0, strategy="global_time"))


def test_rating_threshold() -> None:
    """Only interactions rated high enough are kept; without ratings this is refused."""
    source = make_source(TOY, rating=[5.0, 5, 5, 5, 1, 5, 5, 5, 5])
    split = make_split(source, k_core=0, rating_threshold=2.0)
    assert sequence(split, "u") == ["a", "b", "c"]
    refused("data.columns.rating for .* 2.0", lambda: make_split(make_source(TOY), rating_threshold=2.0))


def test_options_out_of_range_and_too_little_data() -> None:
    """Each option is named with what was expected and found."""
    source = make_source(TOY)
    sentence = "at least 3 interactions to be left with data.k_core 5, got 0 of 9: data.k_core 0 keeps all$"
    refused(sentence, lambda: make_split(source))
    rated = make_source(TOY, rating=[5.0] * 9)
    sentence = "with data.k_core 0 and data.rating_threshold 6, got 0 of 9$"
    refused(sentence, lambda: make_split(rated, k_core=0, rating_threshold=6))
    refused("k_core to be 0 or more, got -1", lambda: make_split(source, k_core=-1))
    for ratios in ((0.5, 0.5), (0.0, 0.1)):
        refused("data.ratios to be positive", lambda r=ratios: make_split(source, k_core=0, strategy="ratio", ratios=r))
    for options in ({"times": (8.0, 3.0)}, {"quantiles": (0.9, 0.8)}):
        refused(
            "data.times to start validation before test|data.quantiles to increase",
            lambda o=options: make_split(source, k_core=0, strategy="global_time", **o),
        )
    pairs: list[Row] = [(user, item, 0.0) for user in "uv" for item in "ab"]
    refused("leave interactions for validation, got none", lambda: make_split(make_source(pairs), k_core=0))


def test_catalogue_without_some_items() -> None:
    """Items that only the interactions have are counted and named."""
    source = make_source(TOY)
    short = Source(name="toy", interactions=source.interactions, items=source.items[2:], template="{title}")
    refused("2 items that it lacks: c, d", lambda: make_split(short, k_core=0))


def test_items_without_text_are_named_in_a_warning() -> None:
    """Their id stands in the text's place."""
    source = make_source(TOY)
    items = source.items.with_columns(title=pl.Series(["", "t", None, "t"]))
    with pytest.warns(UserWarning, match=r"2 of 4 items have no text \(d, b\)"):
        split = make_split(
            Source(name="t", interactions=source.interactions, items=items, template="{title}"), k_core=0
        )
    assert split.item_texts == ["item d", "t", "item b", "t"]


def test_fingerprint_changes_with_any_part_and_nothing_else() -> None:
    """The same parts give the same fingerprint; texts and names are not parts."""
    source = make_source(TOY, rating=[5.0] * 9)
    base: dict[str, Any] = {"k_core": 0}
    changes: list[dict[str, Any]] = [
        {},
        {"k_core": 1},
        {"duplicates": "first"},
        {"duplicates": "last"},
        {"rating_threshold": 1.0},
        {"ties": "item_id"},
        {"ties": "shuffle"},
        {"ties": "shuffle", "ties_seed": 1},
        {"strategy": "ratio"},
        {"strategy": "ratio", "ratios": (0.2, 0.1)},
        {"strategy": "global_time", "times": (3.0, 8.0)},
        {"strategy": "global_time", "times": (3.0, 9.0)},
    ]
    prints = [make_split(source, **(base | change)).fingerprint for change in changes]
    renamed: list[Row] = [("U" if user == "u" else user, item, moment) for user, item, moment in TOY]
    for rows in (TOY[1:], [*TOY[:-1], ("w", "c", 9)], renamed):
        prints += [make_split(make_source(rows), k_core=0).fingerprint]
    assert len(set(prints)) == len(prints)
    assert all(len(name) == 16 for name in prints)
    other_words = Source(name="x", interactions=source.interactions, items=source.items, template="A {title}")
    assert make_split(other_words, k_core=0).fingerprint == prints[0]


LETTERS = st.sampled_from("abcdefg")
INTERACTIONS = st.lists(st.tuples(LETTERS, LETTERS, st.integers(0, 9).map(float)), min_size=1, max_size=60)


@settings(max_examples=150, deadline=None)
@given(
    rows=INTERACTIONS,
    k_core=st.integers(0, 4),
    strategy=st.sampled_from(["leave_one_out", "ratio", "global_time"]),
    ties=st.sampled_from(["file_order", "item_id", "shuffle"]),
)
def test_what_holds_for_every_split(rows: list[Row], k_core: int, strategy: Any, ties: Any) -> None:
    """Chronology, stages, k-core, queries and counts, for any interactions."""
    try:
        split = make_split(make_source(rows), k_core=k_core, strategy=strategy, ties=ties)
    except InputError:
        return
    users = split.user_of_interaction
    inside = np.diff(users) == 0
    assert (np.diff(split.timestamps)[inside] >= 0).all()
    assert (np.diff(split.stages)[inside] >= 0).all()
    assert np.bincount(users).min() >= max(k_core, 1)
    assert np.bincount(split.items).min() >= max(k_core, 1)
    assert len(np.unique(split.items)) == split.catalogue_size
    kept = Counter(zip(split.user_ids[users], split.item_ids[split.items], split.timestamps, strict=True))
    assert not kept - Counter(rows)
    moments = Counter((user, moment) for user, _, moment in kept.elements())
    expected = [moments[key] > 1 for key in zip(split.user_ids[users], split.timestamps, strict=True)]
    assert split.tied.tolist() == expected
    assert split.training_counts().sum() == (split.stages == 0).sum()
    for stage, number in (("validation", 1), ("test", 2)):
        queries = split.queries(stage)  # type: ignore[arg-type]
        assert len(queries) + queries.without_history == (split.stages == number).sum()
        for row in range(len(queries)):
            mine = users == queries.user[row]
            assert queries.history(row).tolist() == split.items[mine & (split.stages < number)].tolist()
            assert queries.target[row] in split.items[mine & (split.stages == number)]
    for user in range(split.users):
        mine = (users == user) & (split.stages == 0)
        assert split.training_history(user).tolist() == split.items[mine].tolist()


@settings(max_examples=100, deadline=None)
@given(rows=INTERACTIONS, k_core=st.integers(1, 4))
def test_k_core_is_the_largest_one(rows: list[Row], k_core: int) -> None:
    """Dropping one poor user or item at a time ends in the same interactions."""
    left = list(rows)
    while poor := [
        value
        for place in (0, 1)
        for value, count in Counter((place, row[place]) for row in left).items()
        if count < k_core
    ]:
        place, value = poor[0]
        left = [row for row in left if row[place] != value]
    try:
        split = make_split(make_source(rows), k_core=k_core, strategy="ratio")
    except InputError:
        return
    kept = zip(split.user_ids[split.user_of_interaction], split.item_ids[split.items], split.timestamps, strict=True)
    assert Counter(kept) == Counter(left)


@pytest.mark.data
def test_ml_100k() -> None:
    """The figures that papers.md states, and a fingerprint that no release may change unnoticed."""
    source = load_source("ml-100k")
    split = make_split(source)
    assert (split.users, split.catalogue_size, split.interactions) == (943, 1349, 99287)
    test = split.queries("test")
    assert len(test) == 943
    assert test.tied.mean() == pytest.approx(0.44, abs=0.005)
    assert not any(test.target[row] in test.history(row) for row in range(len(test)))
    assert split.fingerprint == "7ee3706e9f053c3d"
    assert make_split(source, ties="item_id").fingerprint != split.fingerprint

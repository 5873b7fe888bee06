"""The figures that `anyo data` prints, and the tables that it writes."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from anyo_lightning.data.sources import Columns, Source, read_files
from anyo_lightning.data.splits import Split, make_split
from anyo_lightning.data.summary import print_summary, summarise, write_parquet

ROWS = [("u", "a", 1), ("u", "b", 2), ("v", "c", 5), ("u", "c", 2), ("v", "a", 4), ("v", "b", 6), ("v", "a", 7)]


@pytest.fixture
def source() -> Source:
    """Two users; item b has no text, item d is in no interaction."""
    interactions = pl.DataFrame(ROWS, schema=["user_id", "item_id", "timestamp"], orient="row")
    items = pl.DataFrame({"item_id": list("abcd"), "title": ["A", None, "C, [bold]C", "D"]})
    return Source(name="toy", interactions=interactions, items=items, template="{title}")


@pytest.fixture
def split(source: Source) -> Split:
    """Everything kept; the items are a, b, c."""
    with pytest.warns(UserWarning, match="1 of 3 items have no text"):
        return make_split(source, k_core=0)


def test_summary_by_hand(source: Source, split: Split) -> None:
    """Each figure of a toy split; a history of v's a, c, b with 3, 1, 2 tokens and a budget of 3 fits two items."""
    summary = summarise(split, source, lambda texts: np.array([3, 2, 1])[: len(texts)], token_budget=3)
    assert summary["read"]["items"] == 4
    assert summary["kept"] == {"users": 2, "items": 3, "interactions": 7}
    assert summary["split"]["fingerprint"] == split.fingerprint
    assert summary["items per user"]["mean"] == 3.5
    assert summary["ties"]["interactions with a tie"] == "2 (28.6%)"
    assert summary["ties"]["users whose last two are tied"] == "1 (50.0%)"
    assert summary["ties"]["repeated interactions"] == 1
    assert summary["texts"] == {"items with text": 2, "items without text": 1, "first item": "A"}
    assert summary["tokens per item"]["median"] == 2
    fit = summary["token budget"]
    # u's history before test: a, b (3 + 2 tokens: one fits); v's: a, c, b (the last two fit)
    assert fit["items that fit, mean"] == 1.5
    assert fit["histories that fit whole"] == "0 (0.0%)"
    assert fit["interactions that fit"] == "60.0%"


def test_print_summary(source: Source, split: Split, capsys: pytest.CaptureFixture[str]) -> None:
    """Every section and the fingerprint are shown, and text is never taken for markup."""
    summary = summarise(split, source)
    summary["texts"]["first item"] = "[bold]C"
    print_summary(summary)
    printed = capsys.readouterr().out
    assert all(section in printed for section in summary)
    assert split.fingerprint in printed
    assert "[bold]C" in printed


def test_written_tables_give_the_same_split(split: Split, tmp_path: Path) -> None:
    """Reading back gives the same arrays, texts and fingerprint, and the split column the same stages."""
    folder = tmp_path / "new" / "folder"
    write_parquet(split, folder)
    assert sorted(path.name for path in folder.iterdir()) == ["interactions.parquet", "items.parquet"]
    again = read_files(folder / "interactions.parquet", folder / "items.parquet", columns=Columns(split="split"))
    with pytest.warns(UserWarning, match="1 of 3 items have no text"):
        same = make_split(again, k_core=0)
    with pytest.warns(UserWarning, match="1 of 3 items have no text"):
        by_column = make_split(again, k_core=0, strategy="column")
    assert same.fingerprint == split.fingerprint
    assert same.item_texts == split.item_texts
    assert (by_column.stages == split.stages).all()
    assert (by_column.items == split.items).all()

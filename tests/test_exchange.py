"""What `anyo data --output` writes for other libraries."""

import json
from pathlib import Path

import ir_measures
import numpy as np
import polars as pl
import pytest
from helpers import Anyo, MakeData

from anyo_lightning.data.exchange import write_split
from anyo_lightning.data.splits import Split
from anyo_lightning.data.strategies import Strategy

FILES = [
    "README.txt",
    "interactions.parquet",
    "items.parquet",
    "split.json",
    "test.csv",
    "test.qrels",
    "train.csv",
    "validation.csv",
    "validation.qrels",
]


@pytest.mark.parametrize("strategy", ["leave_one_out", "global_time"])
def test_the_files_are_the_split(make_data: MakeData, tmp_path: Path, strategy: Strategy) -> None:
    """Histories made of the CSV files are those that are ranked, and qrels are the ranked pairs, each once."""
    split = make_data(strategy=strategy).split
    write_split(split, tmp_path / "new" / "folder")
    folder = tmp_path / "new" / "folder"
    assert sorted(path.name for path in folder.iterdir()) == FILES
    tables = {stage: pl.read_csv(folder / f"{stage}.csv") for stage in ("train", "validation", "test")}
    assert sum(table.height for table in tables.values()) == split.interactions
    assert json.loads((folder / "split.json").read_text())["fingerprint"] == split.fingerprint
    assert split.fingerprint in (folder / "README.txt").read_text()
    for stage, earlier in (("validation", ["train"]), ("test", ["train", "validation"])):
        history = pl.concat([tables[name] for name in earlier])
        queries = split.queries(stage)  # type: ignore[arg-type]
        wanted = {(split.user_ids[u], split.item_ids[i]) for u, i in zip(queries.user, queries.target, strict=True)}
        qrels = [
            (qrel.query_id, qrel.doc_id, qrel.relevance)
            for qrel in ir_measures.read_trec_qrels(str(folder / f"{stage}.qrels"))
        ]
        assert len(qrels) == len(set(qrels)) == len(wanted) > 0
        assert {(user, item) for user, item, _ in qrels} == wanted
        assert {relevance for *_, relevance in qrels} == {1}
        assert {user for user, _ in wanted} <= set(tables[stage]["user_id"])
        for row in range(0, len(queries), 7):
            own = history.filter(user_id=split.user_ids[queries.user[row]])["item_id"].to_list()
            assert own == split.item_ids[queries.history(row)].tolist()


def renamed(split: Split, user: str, item: str) -> Split:
    """The same split with other ids."""
    users = np.array([user.format(number) for number in range(split.users)], dtype=object)
    items = np.array([item.format(number) for number in range(split.catalogue_size)], dtype=object)
    return Split(**{**split.__dict__, "user_ids": users, "item_ids": items})


def test_ids_with_quotes_and_blanks(make_data: MakeData, tmp_path: Path) -> None:
    """CSV quotes them. TREC's files cannot, so that there are none where an id has a blank, not even older ones."""
    split = make_data().split
    write_split(renamed(split, 'u"{},', "007{}"), tmp_path)
    assert (tmp_path / "test.qrels").read_text().splitlines()[0].split(" ")[0] == 'u"0,'
    assert pl.read_csv(tmp_path / "train.csv", infer_schema=False)["user_id"][0] == 'u"0,'
    assert pl.read_csv(tmp_path / "train.csv", infer_schema=False)["item_id"][0].startswith("007")
    write_split(renamed(split, "u{}", "a movie {}"), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [name for name in FILES if "qrels" not in name]
    assert "Not written here, since an id has a blank." in (tmp_path / "README.txt").read_text()


def test_the_command_writes_them(anyo: Anyo, tiny_data: tuple[Path, Path], tiny_llm: str, tmp_path: Path) -> None:
    """And says how a list is made: here histories are repeated, so that they are not masked."""
    files = [f"--interactions={tiny_data[0]}", f"--items={tiny_data[1]}", f"--tokenizer={tiny_llm}"]
    anyo("data", *files, f"--output={tmp_path / 'split'}")
    assert sorted(path.name for path in (tmp_path / "split").iterdir()) == FILES
    text = (tmp_path / "split" / "README.txt").read_text()
    assert "do not mask histories: leave their items in, since some targets are among them.\n\n    anyo compare" in text
    assert max(map(len, text.splitlines())) <= 120

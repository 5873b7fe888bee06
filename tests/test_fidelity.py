"""Index fidelity: figures against plain numpy, the run restored as its test had it, what is printed and refused."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from helpers import CONFIGS, Anyo, MakeData, refused

from anyo_lightning.cli.main import main
from anyo_lightning.cli.restore import restore
from anyo_lightning.evaluation.index import ItemIndex
from anyo_lightning.evaluation.ranking import rank
from anyo_lightning.fidelity import measure as fidelity
from anyo_lightning.fidelity.index_page import as_page
from anyo_lightning.fidelity.index_table import FidelityTable, as_text
from anyo_lightning.fidelity.measure import Fidelity, measure
from anyo_lightning.runs import RunFolder


@pytest.fixture(autouse=True)
def search_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Speed is nothing that a test looks at."""
    monkeypatch.setattr(fidelity, "LEAST_SEARCHES", 1)
    monkeypatch.setattr(fidelity, "LEAST_SECONDS", 0.0)


@pytest.fixture
def fit(anyo: Anyo, small: list[str], small_llm: list[str], tmp_path: Path) -> Callable[[str], Path]:
    """Train a configuration for a step on the tiny data; returns its folder."""

    def train(name: str) -> Path:
        options = [*small, *(small_llm if name.startswith("e4srec") else [])]
        anyo("fit", f"--config={CONFIGS / name}.yaml", *options, f"--run={tmp_path / name}")
        return tmp_path / name

    return train


def test_figures_are_those_of_plain_numpy(make_data: MakeData) -> None:
    """Recall and NDCG of the lists that the index gives, by hand; vectors of unequal length, so cosines differ."""
    data = make_data()
    queries, random = data.queries("test"), np.random.default_rng(0)
    rows = np.arange(len(queries))
    vectors = (random.normal(size=(16, 6)) * np.geomspace(0.1, 10, 16)[:, None]).astype(np.float32)
    query_vectors = random.normal(size=(len(rows), 6)).astype(np.float32)
    settings: dict[str, Any] = {"split": data.split, "queries": queries, "rows": rows, "k": 3, "mask_history": True}
    settings |= {"query_vectors": query_vectors, "vectors": vectors}
    with pytest.warns(UserWarning, match="clustering"):
        index = ItemIndex(vectors, factory="IVF4,Flat")
    found = list(measure(["Flat", "IVF4,Flat", "IVF4,Flat:nprobe=4"], **settings))
    recalls, changes = [], []
    for row in rows:
        target = int(queries.target[row])
        seen = np.setdiff1d(queries.history(int(row)), target)
        scores = vectors @ query_vectors[row]
        scores[seen] = -np.inf
        best = [item for item in np.argsort(-scores)[:3].tolist() if item not in seen]
        given = [item for item in index.search(query_vectors[row : row + 1], 3, [seen])[0][0].tolist() if item >= 0]
        recalls.append(len(set(best) & set(given)) / len(best))
        gains = [1 / np.log2(2 + of.index(target)) if target in of else 0 for of in (given, best)]
        changes.append(gains[0] - gains[1])
    assert found[1].recall == pytest.approx(np.mean(recalls))
    assert found[1].ndcg_change == pytest.approx(np.mean(changes))
    assert found[1].recall < 1
    for exact in (found[0], found[2]):
        assert (exact.recall, exact.ndcg_change) == (1, 0)
        assert exact.ndcg == pytest.approx(found[1].ndcg - found[1].ndcg_change)
    assert found[0].warnings == ()
    assert found[1].warnings == (
        "IVF4,Flat: clustering 16 points to 4 centroids: please provide at least 156 training points",
    )
    assert found[1].size > found[0].size > vectors.nbytes


def test_a_complete_search_loses_nothing_where_items_tie(make_data: MakeData) -> None:
    """Four items of each vector, as of one text: another order among them is no loss of recall or NDCG."""
    data = make_data()
    random, queries = np.random.default_rng(0), data.queries("test")
    vectors = np.tile(random.normal(size=(4, 6)), (4, 1)).astype(np.float32)
    (found,) = measure(
        ["HNSW8:efSearch=64"],
        split=data.split,
        queries=queries,
        rows=np.arange(len(queries)),
        query_vectors=random.normal(size=(len(queries), 6)).astype(np.float32),
        vectors=vectors,
        k=3,
        mask_history=False,
    )
    assert (found.recall, found.ndcg_change) == (1, 0)


@pytest.mark.parametrize("name", ["sasrec", "e4srec_hybrid", "popularity"])
def test_a_run_is_restored_as_its_test_had_it(name: str, fit: Callable[[str], Path], tmp_path: Path) -> None:
    """Exact lists and scores are bit-identical to those in predictions.parquet, and no file of the run is touched."""
    run = RunFolder(fit(name))
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    found = restore(run.path)
    assert not found.history_masked  # targets of the tiny data set repeat items of their own histories
    again = rank(
        found.rows,
        torch.from_numpy(found.query_vectors),
        torch.from_numpy(found.vectors),
        found.queries.target[found.rows],
        index=None,
        k=16,
        history=None,
    )
    predictions = run.read_predictions()
    assert predictions["user_id"].to_list() == found.split.user_ids[found.queries.user[found.rows]].tolist()
    for row, (listed, scored) in enumerate(predictions.select("top_item_ids", "top_scores").iter_rows()):
        assert again.top_scores[row][: len(scored)].tolist() == scored
        assert found.split.item_ids[again.top_items[row][: len(listed)]].tolist() == listed
    assert before == {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    assert len(restore(run.path, stage="validation").rows) == 40


@pytest.mark.parametrize("name", ["popularity", "markov"])
def test_a_floor_that_was_only_tested_is_restored(name: str, anyo: Anyo, small: list[str], tmp_path: Path) -> None:
    """Options of `anyo test` alone, such as --verbose, are not in the configuration that `anyo index` reads."""
    run = RunFolder(tmp_path / name)
    anyo("test", f"--config={CONFIGS / f'{name}.yaml'}", *small, f"--run={run.path}")
    assert "\nverbose" not in run.config_file.read_text()
    assert f"{name}: 40 test queries" in anyo("index", "--run", run.path, "--factories", "Flat")


def test_the_command_prints_a_table_and_writes_a_page(anyo: Anyo, fit: Callable[[str], Path], tmp_path: Path) -> None:
    """Exact search has the NDCG of metrics.json; every form holds every index."""
    run = RunFolder(fit("sasrec"))
    ndcg = run.read_metrics()["metrics"]["test/ndcg@10"]["value"]
    factories = ["Flat", "IVF4,Flat:nprobe=2", "HNSW8"]
    out = anyo("index", "--run", run.path, "--factories", *factories, "--format", "json")
    content = json.loads(out)
    assert [index["factory"] for index in content["indexes"]] == factories
    assert content["indexes"][0]["ndcg"] == pytest.approx(ndcg, abs=1e-12)
    assert content["indexes"][0]["recall"] == 1
    assert "IVF4,Flat:nprobe=2" in run.index_page_file.read_text()
    plot = tmp_path / "plots" / "index.html"
    out = anyo(
        "index", f"--run={run.path}", "--factories", "Flat", "SQ8", "--k=5", "--stage=validation", f"--plot={plot}"
    )
    assert plot.is_file()
    assert "sasrec: 40 validation queries among 16 items of width 64, inner product, history not masked" in out
    assert [line.split()[0] for line in out.splitlines() if line.startswith(("Flat", "SQ8"))] == ["Flat", "SQ8"]
    assert "recall@5" in out


def test_defaults_that_do_not_fit_the_catalogue_are_left_out(
    fit: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """16 items cannot fill 64 cells: the other indexes are measured, and a line says so."""
    run = fit("sasrec")
    main(["index", f"--run={run}", "--format=json"])
    captured = capsys.readouterr()
    assert [index["factory"] for index in json.loads(captured.out)["indexes"]] == ["Flat", "SQ8", "HNSW32"]
    assert (
        "Left out IVF64,Flat:nprobe=1 IVF64,Flat:nprobe=4 IVF64,Flat:nprobe=16: more cells than the 16" in captured.err
    )


def test_mistakes_are_one_sentence(
    anyo: Anyo, fit: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A string that FAISS does not know, cells for more items than there are, no run, a typo: exit code 2, no page."""
    run = RunFolder(fit("sasrec"))
    cases = {
        "got 'Flaat'": ["--run", run.path, "--factories", "Flat", "Flaat"],
        "fits 16 vectors of width 64": ["--run", run.path, "--factories", "IVF64,Flat"],
        "got 'IVF4,Flat:nprobes=3'": ["--run", run.path, "--factories", "IVF4,Flat:nprobes=3"],
        "Expected k to be positive": ["--run", run.path, "--k", "0"],
        "has no config.yaml": ["--run", tmp_path / "nothing", "--factories", "Flat"],
        "stage": ["--run", run.path, "--stage", "train"],
    }
    for words, arguments in cases.items():
        assert words in refused(capsys, anyo, "index", *arguments)
    assert not run.index_page_file.exists()
    assert not (tmp_path / "nothing").exists()


def made_up() -> FidelityTable:
    """A table with a name that would like to be HTML."""
    index = Fidelity("Flat", 1.0, 0.125, 0.0, 0.0003, 345_389, 13_319.2, ())
    rough = Fidelity(
        "IVF64,Flat:nprobe=2", 0.649, 0.113, -0.012, 0.0134, 373_171, 51_763.0, ("IVF64,Flat: few points",)
    )
    return FidelityTable("<b>sasrec</b>", "test", 943, 1349, 64, True, 10, (index, rough))


def test_every_form_says_the_same() -> None:
    """Markdown is aligned, CSV and JSON are in full, LaTeX is escaped, the page's data cannot end its script."""
    table = made_up()
    lines = [line for line in as_text(table, "markdown").splitlines() if line.startswith("|")]
    assert len({len(line) for line in lines}) == 1
    assert [cell.strip() for cell in lines[3].split("|")[1:-1]] == [
        "IVF64,Flat:nprobe=2",
        ".649",
        ".1130",
        "-.0120",
        "0.0134",
        "0.373",
        "51,763",
    ]
    assert "IVF64,Flat: few points." in as_text(table, "rich")
    csv = pl.read_csv(io.StringIO(as_text(table, "csv")))
    assert csv["queries_per_second"].to_list() == [13_319.2, 51_763.0]
    assert csv["variant"].unique().to_list() == ["<b>sasrec</b>"]
    assert json.loads(as_text(table, "json"))["indexes"][1]["size"] == 373_171
    assert r"\begin{tabular}{lrrrrrr}" in as_text(table, "latex")
    assert "<b>" not in as_page(table)

"""Precision, MAP, novelty, diversity and serendipity: against ir-measures (trec_eval), and by their definitions."""

import itertools
from pathlib import Path
from typing import Any

import ir_measures
import numpy as np
import pytest
import torch
from helpers import CONFIGS, QUIET, Anyo, MakeData, refused
from ir_measures import AP, RR, P, R, Success, nDCG
from lightning.pytorch import Trainer
from test_callback import Rows, Table, leave_one_out, logged, many_rows

from anyo_lightning import Popularity
from anyo_lightning.compare.results import load_results
from anyo_lightning.data.splits import Split
from anyo_lightning.errors import InputError
from anyo_lightning.evaluation.callback import RetrievalMetrics
from anyo_lightning.evaluation.diversity import intra_list_diversity
from anyo_lightning.evaluation.metrics import (
    EXTRA,
    average_precision,
    novelty,
    popularity_ranks,
    precision,
    user_metrics,
)
from anyo_lightning.evaluation.scores import mask, mid_ranks
from anyo_lightning.runs import RunFolder

MEASURES = {"precision": P, "map": AP, "ndcg": nDCG, "mrr": RR, "recall": R, "hr": Success}


@pytest.mark.parametrize("k", [1, 5, 10, 40])
def test_rank_metrics_are_those_of_trec_eval(k: int) -> None:
    """Users with 1 to 12 targets among 40 items; trec_eval's AP divides by all targets where ours does by min(n, k)."""
    random = np.random.default_rng(k)
    rows = [(user, rank) for user in range(60) for rank in random.choice(40, 1 + user % 12, replace=False) + 1]
    user, ranks = np.array([row[0] for row in rows]), np.array([row[1] for row in rows], dtype=float)
    names = [f"{number:02d}" for number in range(60)]
    qrels = [ir_measures.Qrel(names[user], f"d{rank}", 1) for user, rank in rows]
    run = [ir_measures.ScoredDoc(name, f"d{rank}", 100.0 - rank) for name in names for rank in range(1, 41)]
    shuffled = random.permutation(len(rows))
    ours = user_metrics(ranks[shuffled], user[shuffled], [k], extra=EXTRA)
    measures = {name: measure @ k for name, measure in MEASURES.items()}
    theirs = {
        (found.measure, found.query_id): found.value
        for found in ir_measures.iter_calc([*measures.values()], qrels, run)
    }
    targets = np.bincount(user)
    for name, measure in measures.items():
        expected = np.array([theirs[measure, of] for of in names])
        if name == "map":
            expected = expected * targets / np.minimum(targets, k)
        np.testing.assert_allclose(ours[f"{name}@{k}"], expected, rtol=1e-9, atol=1e-12)


def test_average_precision_by_hand() -> None:
    """Targets at 1 and 4 of three: (1/1 + 2/4) / 3; at 2 and 2 (a tie): 2/2 each; none found; one alone is MRR."""
    ranks = np.array([4.0, 1.0, 99.0, 2.0, 2.0, np.inf, 5.0])
    user = np.array([3, 3, 3, 5, 5, 8, 9])
    assert average_precision(ranks, user, 10).tolist() == pytest.approx([0.5, 1, 0, 0.2])
    assert precision(ranks, user, 10).tolist() == pytest.approx([0.2, 0.2, 0, 0.1])
    three = average_precision(np.array([2.0, 2.0, 2.0]), np.zeros(3, dtype=int), 10)
    assert three.tolist() == [1]  # 3/2 each, were it not for the bound
    perfect = average_precision(np.arange(1.0, 13.0), np.zeros(12, dtype=int), 5)
    assert perfect.tolist() == [1]


def test_novelty_is_mean_self_information() -> None:
    """Shares 4/8, 2/8 and 1/8 are 1, 2 and 3 bits; an item that nobody had counts as one that one had."""
    counts = np.array([4, 2, 1, 1, 0])
    lists = np.array([[0, 1, 2], [4, 2, -1], [-1, -1, -1]])
    assert novelty(lists, counts).tolist() == [2, 3, 0]
    assert novelty(lists[:1], np.zeros(5, dtype=int)).tolist() == [0]


@pytest.mark.parametrize("sparse", [False, True])
def test_diversity_is_the_mean_distance_of_pairs(sparse: bool) -> None:
    """Each list's pairs one by one; empty places and lists of one item; a vector of zeros is far from all."""
    random = np.random.default_rng(0)
    vectors = random.normal(size=(30, 6)) * (random.random((30, 6)) < 0.5)
    vectors[7] = 0
    lists = np.stack([random.permutation(30)[:8] for _ in range(20)])
    lists[0, 5:], lists[1, 1:], lists[2] = -1, -1, -1
    lengths = np.linalg.norm(vectors, axis=1)
    expected = []
    for items in lists:
        pairs = list(itertools.combinations(items[items >= 0], 2))
        products = [lengths[a] * lengths[b] for a, b in pairs]
        cosines = [vectors[a] @ vectors[b] / p if p else 0 for (a, b), p in zip(pairs, products, strict=True)]
        expected.append(1 - np.mean(cosines) if pairs else 0)
    tensor = torch.from_numpy(vectors).float()
    found = intra_list_diversity(lists, tensor.to_sparse() if sparse else tensor)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert found[3:].min() > 0


def test_popularity_ranks_are_those_of_scores() -> None:
    """Counts as scores, with ties and with what is excluded, ranked by the evaluator itself."""
    random = np.random.default_rng(0)
    counts, target = random.integers(0, 6, 40), random.integers(0, 40, 25)
    excluded = [np.setdiff1d(random.integers(0, 40, 9), [wanted]) for wanted in target]
    scores = torch.from_numpy(counts).float().repeat(25, 1)
    assert popularity_ranks(target, counts, None).tolist() == mid_ranks(scores, torch.from_numpy(target)).tolist()
    mask(scores, excluded, torch.from_numpy(target))
    assert popularity_ranks(target, counts, excluded).tolist() == mid_ranks(scores, torch.from_numpy(target)).tolist()


def serendipity_by_hand(split: Split, module: Table, k: int) -> float:
    """Each user's list and the most popular items that the user has not had, as sets."""
    queries, counts, found = split.queries("test"), split.training_counts(), []
    scores = module.query_table[: len(queries)] @ module.item_table.T
    for row in range(len(queries)):
        free = np.setdiff1d(np.arange(split.catalogue_size), np.setdiff1d(queries.history(row), queries.target[[row]]))
        own = set(free[np.argsort(-scores[row].numpy()[free], kind="stable")[:k]].tolist())
        below = [np.mean([np.sum(counts[free] > c), np.sum(counts[free] >= c) - 1]) for c in counts[free]]
        popular = set(free[np.array(below) < k].tolist())
        found.append(len((own - popular) & {int(queries.target[row])}) / k)
    return float(np.mean(found))


def test_a_run_reports_what_is_asked_for(tmp_path: Path) -> None:
    """With intervals in metrics.json, in slices where a slice has it, and not at all by default."""
    split = many_rows()
    module, run = Table(split), RunFolder(tmp_path / "table" / "version_0")
    metrics = RetrievalMetrics(cutoffs=[1, 10, 200], extra=EXTRA, mask_history=True, folder=run.path)
    trainer = Trainer(callbacks=[metrics], enable_checkpointing=False, **QUIET)
    (logs,) = trainer.test(module, datamodule=Rows(split), verbose=False)
    content = run.read_metrics()
    figures = content["metrics"]
    for name in EXTRA:
        figure = figures[f"test/{name}@10"]
        assert figure["low"] <= figure["value"] <= figure["high"]
        assert figure["value"] == pytest.approx(logs[f"test/{name}@10"], rel=1e-6)
    assert "test/ild@1" not in figures  # no pair
    assert figures["test/map@10"] == figures["test/mrr@10"]  # one target per user
    assert figures["test/precision@10"]["value"] == pytest.approx(figures["test/hr@10"]["value"] / 10)
    popular = figures["test/serendipity@200"]["value"]
    assert popular == pytest.approx(serendipity_by_hand(split, module, 200))
    assert 0 < popular <= figures["test/precision@200"]["value"]
    for parts in content["slices"].values():
        for part in parts.values():
            assert {"test/map@10", "test/precision@10"} <= part["metrics"].keys()
            assert "test/novelty@10" not in part["metrics"]
    default = logged(leave_one_out(), Table(leave_one_out()), tmp_path)
    assert not [name for name in default if name.split("/")[1].split("@")[0] in EXTRA]


def test_a_table_has_them(tmp_path: Path) -> None:
    """Rank metrics at any k come from the predictions, also of runs that were not asked for them; the others do not."""
    split = many_rows()
    runs = []
    for name, extra in (("asked", EXTRA), ("not", ())):
        runs.append(RunFolder(tmp_path / name / "version_0"))
        metrics = RetrievalMetrics(extra=extra, folder=runs[-1].path)
        Trainer(callbacks=[metrics], enable_checkpointing=False, **QUIET).test(Table(split), Rows(split), verbose=False)
    wanted = ["test/map@10", "test/precision@20", "test/map@3"]
    results = load_results([tmp_path], metrics=wanted, baseline="not").results
    stored = runs[0].read_metrics()["metrics"]
    for line in results.lines:
        assert line.cells["test/map@10"].value == stored["test/map@10"]["value"]
        assert line.cells["test/precision@20"].value == stored["test/precision@20"]["value"]
    assert results.slices[0].metrics.keys() == set(wanted)
    (line,) = load_results([tmp_path / "asked"], metrics=["test/novelty@10"]).results.lines
    assert line.cells["test/novelty@10"].low == stored["test/novelty@10"]["low"]
    with pytest.raises(InputError, match=r"got 'test/novelty@10', which .*not.version_0 lacks"):
        load_results([tmp_path], metrics=["test/novelty@10"])


def test_popularity_itself_is_never_serendipitous(make_data: MakeData) -> None:
    """Its lists are the primitive recommender's, history masked or not; its one direction has no diversity."""
    for masked in (True, False):
        settings: dict[str, Any] = {"cutoffs": [2, 5], "extra": EXTRA, "mask_history": masked}
        trainer = Trainer(callbacks=[RetrievalMetrics(**settings)], enable_checkpointing=False, **QUIET)
        (figures,) = trainer.test(Popularity(), make_data(), verbose=False)
        assert figures["test/hr@5"] > 0
        assert figures["test/serendipity@2"] == figures["test/serendipity@5"] == 0


def test_an_unknown_figure_is_refused() -> None:
    """A typo lists what there is."""
    with pytest.raises(InputError, match="Expected extra to be among precision, map, novelty, ild, serendipity, got"):
        RetrievalMetrics(extra=["mapp"])  # type: ignore[list-item]


def test_the_command_line_adds_them_and_watches_them(
    anyo: Anyo, capsys: pytest.CaptureFixture[str], small: list[str], tmp_path: Path
) -> None:
    """`fit` monitors MAP, a finished run is tested again with more; a typo and what is not asked for are refused."""
    config, run = str(CONFIGS / "sasrec.yaml"), RunFolder(tmp_path / "run")
    fit = ["fit", "-c", config, *small, f"--run={run.path}", "--model.encoders.dim=16"]
    said = refused(capsys, anyo, *fit, "--checkpoint.monitor=val/map@10")
    assert "Expected checkpoint.monitor among val/hr" in said
    assert "novelty" in refused(capsys, anyo, *fit, "--metrics.extra=[noveltie]")
    assert not run.path.exists()
    anyo(*fit, "--metrics.extra=[map]", "--checkpoint.monitor=val/map@10")
    first = run.read_metrics()["metrics"]
    assert first["test/map@10"]["value"] == first["test/mrr@10"]["value"]
    anyo("test", f"--run={run.path}", "--metrics.extra=[novelty, ild]", "--trainer.enable_progress_bar=false")
    again = run.read_metrics()["metrics"]
    assert again.keys() - first.keys() == {f"test/{n}@{k}" for n in ("novelty", "ild") for k in (5, 10, 20)}
    assert again["test/hr@10"] == first["test/hr@10"]

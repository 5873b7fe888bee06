"""Counting floors against plain loops over users and items."""

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import CONFIGS, Anyo, MakeData
from scipy import sparse

from anyo_lightning.data.datamodule import RecDataModule
from anyo_lightning.errors import InputError
from anyo_lightning.evaluation.scores import mid_ranks
from anyo_lightning.models import floors
from anyo_lightning.models.base import RetrievalModule
from anyo_lightning.models.floors import EASE, Markov, Popularity
from anyo_lightning.models.transitions import Transitions, sparse_mid_ranks
from anyo_lightning.runs import RunFolder


@pytest.fixture
def data(make_data: MakeData) -> RecDataModule:
    """The tiny data set; histories are read whole."""
    return make_data(max_items=100)


def scores(model: RetrievalModule, data: RecDataModule) -> np.ndarray:
    """Scores of all items for each test row, in the order of rows."""
    model.prepare(data)
    found = torch.zeros(len(data.queries("test")), data.split.catalogue_size)
    for batch in data.test_dataloader():
        step = model.test_step(batch, 0)
        found[step["row"]] = step["query"].to_dense() @ model.encode_catalogue().to_dense().T
    return found.numpy()


def test_popularity_counts_training_interactions(data: RecDataModule) -> None:
    """Everyone gets log(1 + count)."""
    counts = np.zeros(16)
    for user in range(data.split.users):
        for item in data.split.training_history(user):
            counts[item] += 1
    np.testing.assert_allclose(scores(Popularity(), data), np.tile(np.log1p(counts), (40, 1)), rtol=1e-5)


@pytest.mark.parametrize("counts", ["raw", "log1p"])
def test_markov_equals_a_loop(data: RecDataModule, counts: str) -> None:
    """Windowed 1/gap transitions of training, rows normalised, the latest items asked with decay."""
    matrix = np.zeros((16, 16))
    for user in range(data.split.users):
        history = data.split.training_history(user)
        for i, source in enumerate(history):
            for gap in range(1, 4):
                if i + gap < len(history):
                    matrix[source, history[i + gap]] += 1 / gap
    matrix = np.log1p(matrix) if counts == "log1p" else matrix
    matrix /= np.maximum(matrix.sum(1, keepdims=True), 1e-12)
    queries = data.queries("test")
    expected = np.zeros((len(queries), 16))
    for row in range(len(queries)):
        for k, item in enumerate(queries.history(row)[::-1][:5]):
            expected[row] += 0.6**k * matrix[item]
    settings = Transitions(window=3, counts=counts, recent=5, decay=0.6)  # type: ignore[arg-type]
    np.testing.assert_allclose(scores(Markov(transitions=settings), data), expected, rtol=1e-4, atol=1e-6)


def test_tuned_markov_is_chosen_on_validation(data: RecDataModule) -> None:
    """It is no worse on validation than the default, which is what is used without tuning; nothing is masked.

    Targets of the tiny data set repeat items of their own histories.
    """
    tuned, plain = Markov(tuned=True), Markov()
    tuned.prepare(data)
    plain.prepare(data)
    assert plain.transitions == Transitions()

    def validation_score(model: Markov) -> float:
        gains = 0.0
        queries = data.queries("validation")
        for batch in data.val_dataloader():
            found = model.validation_step(batch, 0)
            for row, query in zip(found["row"].tolist(), found["query"], strict=True):
                better = sum(float(query[i]) > float(query[queries.target[row]]) for i in range(16))
                ties = sum(float(query[i]) == float(query[queries.target[row]]) for i in range(16)) - 1
                rank = 1 + better + ties / 2
                gains += 1 / np.log2(1 + rank) if rank <= 10 else 0
        return gains

    assert validation_score(tuned) >= validation_score(plain) - 1e-6


def test_ease_solves_its_regression(data: RecDataModule) -> None:
    """B has a zero diagonal and is stationary: XᵀX(B - I) + λB is zero off the diagonal."""
    model = EASE(penalty=3.0)
    found = scores(model, data)
    interactions = np.zeros((40, 16))
    for user in range(40):
        interactions[user, data.split.training_history(user)] = 1
    weights = model.encode_catalogue().T.double().numpy()
    assert np.abs(np.diag(weights)).max() == 0
    residual = interactions.T @ interactions @ (weights - np.eye(16)) + 3.0 * weights
    np.testing.assert_allclose(residual - np.diag(np.diag(residual)), 0, atol=1e-4)
    queries = data.queries("test")
    held = np.zeros((40, 16))
    for row in range(len(queries)):
        held[row, queries.history(row)] = 1
    np.testing.assert_allclose(found, held @ weights, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_sparse_ranks_are_those_of_the_written_out_scores(masked: bool, seed: int) -> None:
    """Ties, targets that score zero, empty rows and several blocks."""
    random = np.random.default_rng(seed)
    rows, size = 1500, (3, 20, 80)[seed % 3]
    asking, matrix = (
        random.integers(3, size=shape) * (random.random(shape) < 0.2) for shape in ((rows, size), (size, size))
    )
    target = random.integers(size, size=rows)
    seen = random.random((rows, size)) < 0.4
    seen[np.arange(rows), target] = False
    scores = (asking @ matrix).astype(np.float32)
    if masked:
        scores[seen] = -np.inf
    sparse_asking, sparse_matrix = (sparse.csr_array(part.astype(float)) for part in (asking, matrix))
    found = sparse_mid_ranks(
        sparse_asking, sparse_matrix, target, sparse.csr_array(seen.astype(np.float32)) if masked else None
    )
    assert found.tolist() == mid_ranks(torch.from_numpy(scores), torch.from_numpy(target)).tolist()


def test_ease_needs_a_penalty_and_a_catalogue_that_can_be_inverted(
    data: RecDataModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both are refused in a sentence; Markov takes any catalogue."""
    with pytest.raises(InputError, match=r"Expected model.penalty to be so large .* got -1000"):
        EASE(penalty=-1000.0).prepare(data)
    monkeypatch.setattr(floors, "LARGEST_CATALOGUE", 15)
    with pytest.raises(InputError, match="Expected at most 15 items for EASE, which inverts them, got 16"):
        EASE().prepare(data)
    Markov().prepare(data)


def test_queries_of_floors_stay_sparse(data: RecDataModule) -> None:
    """Neither a query nor an item vector of Markov is written out, however large the catalogue."""
    for model in (Markov(), Markov(tuned=True)):
        model.prepare(data)
        assert model.encode_catalogue().is_sparse
        assert all(model.test_step(batch, 0)["query"].is_sparse for batch in data.test_dataloader())


@pytest.mark.parametrize("words", [("test",), ("predict",), ("recommend", "--user=u1")])
def test_a_floor_of_other_data_is_refused(
    words: tuple[str, ...],
    anyo: Anyo,
    small: list[str],
    tiny_data: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It has no checkpoint that would not fit: the file it was counted on has changed, and its results stay."""
    log, run = tmp_path / "ratings.csv", RunFolder(tmp_path / "markov")
    lines = tiny_data[0].read_text().splitlines()
    log.write_text("\n".join(lines))
    options = [*small, f"--data.interactions={log}"]
    anyo("fit", f"--config={CONFIGS}/markov.yaml", f"--run={run.path}", *options)
    before = run.metrics_file.read_text()
    log.write_text("\n".join(lines[:-30]))
    with pytest.raises(SystemExit):
        anyo(words[0], f"--run={run.path}", *words[1:])
    assert f"{run.path} is counted on, got split" in capsys.readouterr().err
    assert run.metrics_file.read_text() == before
    anyo("fit", f"--run={run.path}", *options)  # to count it again is no mistake
    assert run.metrics_file.read_text() != before

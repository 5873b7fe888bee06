"""Counting floors against plain loops over users and items."""

import numpy as np
import pytest
import torch
from helpers import MakeData

from anyo_lightning.data.datamodule import RecDataModule
from anyo_lightning.models.base import RetrievalModule
from anyo_lightning.models.floors import EASE, Markov, Popularity
from anyo_lightning.models.transitions import Transitions


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

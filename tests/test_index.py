"""`ItemIndex` on real FAISS indexes: exactness, factory strings, history filter, lists that end early."""

import sys

import faiss
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anyo_lightning.errors import InputError
from anyo_lightning.evaluation.index import ItemIndex, as_found, index_recall


@pytest.fixture
def vectors() -> np.ndarray:
    """500 item vectors of width 16."""
    return np.random.default_rng(0).normal(size=(500, 16)).astype(np.float32)


@pytest.fixture
def queries() -> np.ndarray:
    """70 queries of width 16."""
    return np.random.default_rng(1).normal(size=(70, 16)).astype(np.float32)


def test_flat_equals_torch_topk(vectors: np.ndarray, queries: np.ndarray) -> None:
    """The exact index finds the items and scores that one matrix product and topk do."""
    index = ItemIndex(vectors)
    items, scores = index.search(queries, 10)
    expected = (torch.from_numpy(queries) @ torch.from_numpy(vectors).T).topk(10)
    np.testing.assert_array_equal(items, expected.indices.numpy())
    np.testing.assert_allclose(scores, expected.values.numpy(), rtol=1e-5)
    assert index.exact


@pytest.mark.parametrize("history", [1, 15, 40, 300, 489])
def test_long_histories_are_filtered(vectors: np.ndarray, queries: np.ndarray, history: int) -> None:
    """The list is the exact one of what is left, whether the history is short, long or nearly the whole catalogue."""
    generator = np.random.default_rng(2)
    excluded = [generator.choice(500, history, replace=False) for _ in queries]
    items, _ = ItemIndex(vectors).search(queries, 10, excluded)
    scores = queries @ vectors.T
    for row, seen in enumerate(excluded):
        scores[row, seen] = -np.inf
    np.testing.assert_array_equal(items, np.argsort(-scores, axis=1)[:, :10])


def test_rows_with_histories_of_unlike_length_keep_their_order(vectors: np.ndarray, queries: np.ndarray) -> None:
    """No history, one of 3 and one of 400 in one search: each row gets what it gets alone."""
    excluded = [np.arange((0, 3, 400)[row % 3]) for row in range(len(queries))]
    index = ItemIndex(vectors)
    together, _ = index.search(queries, 5, excluded)
    alone = [index.search(queries[row : row + 1], 5, [excluded[row]])[0][0] for row in range(len(queries))]
    np.testing.assert_array_equal(together, alone)


def test_a_list_with_too_few_items_left_ends_in_minus_one(vectors: np.ndarray, queries: np.ndarray) -> None:
    """496 of 500 items excluded: four items, then -1 with minus infinity; k above the catalogue: the same."""
    items, scores = ItemIndex(vectors).search(queries, 10, [np.arange(496)] * len(queries))
    assert {frozenset(row) for row in items[:, :4].tolist()} == {frozenset({496, 497, 498, 499})}
    assert (items[:, 4:] == -1).all()
    assert np.isneginf(scores[:, 4:]).all()
    items, _ = ItemIndex(vectors).search(queries, 600)
    assert (items[:, 500:] == -1).all()
    assert (np.sort(items[:, :500], axis=1) == np.arange(500)).all()


def test_ids_of_minus_one_from_faiss_are_no_items(vectors: np.ndarray, queries: np.ndarray) -> None:
    """One probed cell of 50 holds some ten items: the rest of FAISS's list is -1, which is not item 499."""
    with pytest.warns(UserWarning, match="clustering 500 points to 50 centroids"):
        index = ItemIndex(vectors, factory="IVF50,Flat")
    items, scores = index.search(queries, 40, [np.arange(1, 100)] * len(queries))
    assert (items == -1).any()
    assert not ((items >= 1) & (items < 100)).any()
    assert (np.isneginf(scores) == (items == -1)).all()
    assert ((items == -1)[:, :-1] <= (items == -1)[:, 1:]).all()
    for row in items:
        found = row[row >= 0]
        assert len(set(found)) == len(found)


@pytest.mark.parametrize(
    ("factory", "kind", "least"),
    [
        ("HNSW32", faiss.IndexHNSWFlat, 0.95),
        ("IVF4,Flat", faiss.IndexIVFFlat, 0.3),
        ("PCA8,Flat", faiss.IndexPreTransform, 0.3),
        ("PCA8,HNSW16", faiss.IndexPreTransform, 0.3),
        ("SQ8", faiss.IndexScalarQuantizer, 0.9),
    ],
)
def test_factory_strings(vectors: np.ndarray, queries: np.ndarray, factory: str, kind: type, least: float) -> None:
    """FAISS's own types are built and trained, search by inner product, and their recall is measured."""
    index = ItemIndex(vectors, factory=factory)
    assert isinstance(index._index, kind)
    assert not index.exact
    found, scores = index.search(queries, 10, [np.arange(60)] * len(queries))
    exact, _ = ItemIndex(vectors).search(queries, 10, [np.arange(60)] * len(queries))
    recall = index_recall(found, exact).mean()
    assert least < recall <= 1
    assert (np.diff(scores, axis=1)[:, : (found >= 0).sum(axis=1).min() - 1] <= 0).all()


def test_hnsw_searches_wide_enough_for_a_long_history(vectors: np.ndarray, queries: np.ndarray) -> None:
    """HNSW looks at 16 items unless told otherwise; with 300 excluded that would leave nothing."""
    excluded = [np.argsort(-(query @ vectors.T))[:300] for query in queries]
    found, _ = ItemIndex(vectors, factory="HNSW32").search(queries, 10, excluded)
    exact, _ = ItemIndex(vectors).search(queries, 10, excluded)
    assert index_recall(found, exact).mean() > 0.9


def test_search_parameters_follow_a_colon(vectors: np.ndarray, queries: np.ndarray) -> None:
    """More probed cells find more, all of them everything; scores stay inner products of vectors as they are."""
    exact, scores = ItemIndex(vectors * 7).search(queries, 10)
    recalls = []
    for probes in (1, 4, 12):
        index = ItemIndex(vectors * 7, factory=f"IVF12,Flat:nprobe={probes}")
        found, found_scores = index.search(queries, 10)
        recalls.append(index_recall(found, exact).mean())
    assert recalls == sorted(recalls)
    assert recalls[0] < recalls[1] < recalls[2] == 1
    np.testing.assert_allclose(found_scores, scores, rtol=1e-5)


def test_a_wide_search_leaves_the_beam_of_the_next_as_it_was(vectors: np.ndarray, queries: np.ndarray) -> None:
    """HNSW's beam is widened for one long history, not for all that follow it; a wider one finds more."""
    index = ItemIndex(vectors, factory="HNSW4:efSearch=4")
    before, _ = index.search(queries, 4)
    index.search(queries[:1], 4, [np.arange(300)])
    after, _ = index.search(queries, 4)
    np.testing.assert_array_equal(before, after)
    exact, _ = ItemIndex(vectors).search(queries, 4)
    wide, _ = ItemIndex(vectors, factory="HNSW4:efSearch=200").search(queries, 4)
    assert index_recall(after, exact).mean() < index_recall(wide, exact).mean()


def test_what_faiss_writes_past_python_is_one_warning(vectors: np.ndarray, capfd: pytest.CaptureFixture[str]) -> None:
    """PQ8x4 trains eight times 16 centroids on 500 vectors; stderr stays clean and stays open."""
    with pytest.warns(UserWarning, match="PQ8x4") as caught:
        ItemIndex(vectors, factory="PQ8x4")
    messages = [str(warning.message) for warning in caught]
    assert messages == ["PQ8x4: clustering 500 points to 16 centroids: please provide at least 624 training points"]
    assert capfd.readouterr().err == ""
    print("still open", file=sys.stderr)
    assert capfd.readouterr().err == "still open\n"


def test_an_index_knows_its_cost(vectors: np.ndarray, queries: np.ndarray) -> None:
    """Its size is that of its file: the vectors and a header; queries a second exist once there were some."""
    index = ItemIndex(vectors)
    assert 500 * 16 * 4 < index.size < 500 * 16 * 4 + 200
    assert index.build_seconds > 0
    assert index.queries_per_second == 0
    index.search(queries, 10)
    assert index.queries_per_second > 0


@pytest.mark.parametrize(
    "factory",
    [
        "Flaat",
        "",
        "IVF1000,Flat",
        "PQ7",
        "LSH",
        "IDMap,Flat",
        "IVF4,Flat:nprobe",
        "IVF4,Flat:nprobe=0",
        "Flat:efSearch=3",
    ],
)
def test_a_factory_string_that_does_not_fit_is_refused_in_one_line(vectors: np.ndarray, factory: str) -> None:
    """Unknown, empty, too many cells, a width that does not divide, no inner product, parameters that are none."""
    with pytest.raises(InputError, match=r"Expected index to be a FAISS factory string .* got") as caught:
        ItemIndex(vectors, factory=factory)
    assert "\n" not in str(caught.value)


def test_index_recall_by_hand() -> None:
    """Two of three found in any order; an exact list that ends early counts what it has."""
    exact = np.array([[1, 2, 3], [4, -1, -1]])
    found = np.array([[3, 9, 1], [-1, -1, 4]])
    assert index_recall(found, exact).tolist() == pytest.approx([2 / 3, 1])


def test_items_that_tie_may_stand_for_each_other() -> None:
    """By hand: the second place is tied by the found 7; 9 is worse; a list that ends early; scores below zero."""
    exact = np.array([[1, 2, 3], [1, 2, 3], [4, 5, -1], [1, 2, 3]])
    exact_scores = np.array([[5, 4, 4], [5, 4, 3], [2, 1, -np.inf], [-3, -4, -4]], dtype=np.float32)
    found = np.array([[1, 7, 2], [1, 9, 3], [5, -1, -1], [7, 8, 1]])
    scores = np.array([[5, 4, 4], [5, 2.9, 3], [1, 9, 9], [-4, -4, -3]], dtype=np.float32)
    expected = [[1, 7, 2], [1, 2, 3], [4, 5, -1], [1, 7, 8]]
    assert as_found(exact, exact_scores, found, scores).tolist() == expected


def test_no_index_misses_one_of_two_equal_items(queries: np.ndarray) -> None:
    """Every vector thrice: a search of all cells has found everything."""
    half = np.random.default_rng(0).normal(size=(100, 16)).astype(np.float32)
    vectors = np.concatenate([half, half, half])
    scores = queries @ vectors.T
    exact, exact_scores = ItemIndex(vectors).search(queries, 5)
    found, _ = ItemIndex(vectors, factory="IVF4,Flat:nprobe=4").search(queries, 5)
    assert index_recall(found, exact).mean() < 1
    exact = as_found(exact, exact_scores, found, np.take_along_axis(scores, found, axis=1))
    assert index_recall(found, exact).mean() == 1


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_no_mask_loses_or_leaks_an_item(data: st.DataObject) -> None:
    """Any catalogue, any lists of excluded items, any k: the list is that of a sort of what is left."""
    items = data.draw(st.integers(1, 60))
    rows = data.draw(st.integers(1, 5))
    k = data.draw(st.integers(1, 70))
    random = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    vectors = random.permutation(items).astype(np.float32)[:, None]  # distinct scores, no ties
    queries = random.choice([-1.0, 1.0], size=(rows, 1)).astype(np.float32)
    excluded = [
        np.array(data.draw(st.lists(st.integers(0, items - 1), unique=True)), dtype=np.int64) for _ in range(rows)
    ]
    found, scores = ItemIndex(vectors).search(queries, k, excluded)
    for row in range(rows):
        left = np.setdiff1d(np.arange(items), excluded[row])
        expected = left[np.argsort(-(vectors[left, 0] * queries[row, 0]), kind="stable")][:k]
        np.testing.assert_array_equal(found[row, : len(expected)], expected)
        assert (found[row, len(expected) :] == -1).all()
        assert np.isneginf(scores[row, len(expected) :]).all()

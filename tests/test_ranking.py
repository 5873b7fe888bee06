"""Ranks and lists from one pass over the scores, against loops and sorts: ties, masks, tiny catalogues, devices."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from anyo_lightning.errors import InputError
from anyo_lightning.evaluation import ranking as ranking_module
from anyo_lightning.evaluation.index import ItemIndex, dense_for_index
from anyo_lightning.evaluation.ranking import Ranking, rank
from anyo_lightning.evaluation.scores import (
    TILE,
    Scorer,
    _best_on_device,
    _counted_on_device,
    best_items,
    mid_ranks,
)


class WithoutFloat64(TorchDispatchMode):
    """Refuses float64, as Apple's MPS does."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Run the operator and look at what comes out."""
        found = func(*args, **(kwargs or {}))
        assert not isinstance(found, torch.Tensor) or found.dtype != torch.float64, f"{func} made float64"
        return found


def sorted_lists(scores: np.ndarray, k: int) -> np.ndarray:
    """By a stable sort of each whole row; -1 where an item does not compete."""
    items = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.where(np.take_along_axis(scores, items, axis=1) == -np.inf, -1, items)


def looped_ranks(scores: np.ndarray, target: np.ndarray) -> list[float]:
    """One item after another."""
    found = []
    for row, wanted in zip(scores.tolist(), target.tolist(), strict=True):
        others = [score for item, score in enumerate(row) if item != wanted]
        higher, same = sum(s > row[wanted] for s in others), sum(s == row[wanted] for s in others)
        found.append(1 + higher + same / 2)
    return found


@settings(max_examples=150, deadline=None)
@given(
    items=st.one_of(st.integers(1, 40), st.integers(TILE - 2, 4 * TILE)),
    k=st.integers(1, 60),
    levels=st.sampled_from([1, 2, 5, 10_000]),
    share=st.sampled_from([0.0, 0.3, 0.97, 1.0]),
    seed=st.integers(0, 2**32),
)
def test_ranks_and_lists_are_those_of_a_loop_and_a_sort(
    items: int, k: int, levels: int, share: float, seed: int
) -> None:
    """Any catalogue, list, number of different scores and share of masked items; on the CPU and by torch's operators.

    Of items that tie the one with the smallest number comes first.
    """
    random = np.random.default_rng(seed)
    scores = random.integers(levels, size=(6, items)).astype(np.float32) - levels // 2
    target = random.integers(items, size=6)
    masked = random.random((6, items)) < share
    masked[np.arange(6), target] = False
    scores[masked] = -np.inf
    k = min(k, items)
    given_scores, given_target = torch.from_numpy(scores), torch.from_numpy(target)
    expected, best = sorted_lists(scores, k), -np.sort(-scores, axis=1)[:, :k]
    for found, values in (best_items(given_scores, k), _best_on_device(given_scores, k)):
        np.testing.assert_array_equal(np.where(values == -np.inf, -1, found), expected)
        np.testing.assert_array_equal(values, best)
    ranks = looped_ranks(scores, target)
    assert mid_ranks(given_scores, given_target).tolist() == ranks
    with WithoutFloat64():
        halves = _counted_on_device(given_scores, given_scores.gather(1, given_target[:, None]))
    assert (1 + (halves.numpy() - 1) / 2).tolist() == ranks


def example(items: int, dim: int, rows: int = 300) -> dict[str, Any]:
    """Queries, vectors, targets and histories of 0 to 40 items, which may hold the target and repeat themselves."""
    random = np.random.default_rng(items)
    histories = [random.integers(items, size=random.integers(40)) for _ in range(rows)]
    return {
        "queries": torch.from_numpy(random.normal(size=(rows, dim)).astype(np.float32)),
        "vectors": torch.from_numpy(random.normal(size=(items, dim)).astype(np.float32)),
        "target": random.integers(items, size=rows),
        "history": lambda row: histories[row],
    }


def ranked(example: dict[str, Any], index: ItemIndex | None, **changes: Any) -> Ranking:
    """All rows of an example."""
    settings = {"k": 10, "index": index, **example, **changes}
    return rank(np.arange(len(example["target"])), settings.pop("queries"), settings.pop("vectors"), **settings)  # type: ignore[misc]


@pytest.mark.parametrize("items", [7, 900])
@pytest.mark.parametrize("masked", [False, True])
def test_lists_of_an_exact_index_are_what_it_would_find(items: int, masked: bool) -> None:
    """Read from the scores they are FAISS's own: the same items in the same order, scores equal to rounding."""
    given = example(items, 16)
    given |= {} if masked else {"history": None}
    found, index = ranked(given, ItemIndex(given["vectors"].numpy())), ItemIndex(given["vectors"].numpy())
    history, k = given["history"], min(10, items)
    seen = [np.setdiff1d(history(row), [t]) for row, t in enumerate(given["target"])] if masked else None
    top_items, top_scores = index.search(given["queries"].numpy(), k, seen)
    np.testing.assert_array_equal(found.top_items, top_items)
    np.testing.assert_allclose(found.top_scores, top_scores, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(found.exact_top_items, top_items)


def test_an_exact_index_that_ties_finds_as_good_items() -> None:
    """Every vector twice: FAISS may show either, at the same scores."""
    given = example(400, 8)
    given["vectors"] = given["vectors"][torch.arange(400) // 2 * 2]
    index = ItemIndex(given["vectors"].numpy())
    found = ranked(given, index, history=None)
    top_items, top_scores = index.search(given["queries"].numpy(), 10)
    np.testing.assert_array_equal(found.top_items // 2, top_items // 2)
    np.testing.assert_allclose(found.top_scores, top_scores, rtol=1e-5)


@pytest.mark.parametrize("kind", ["sparse queries", "both sparse"])
@pytest.mark.parametrize("factory", [None, "HNSW16"])
def test_sparse_vectors_rank_as_dense_ones(kind: str, factory: str | None) -> None:
    """Scores, ranks and lists, with and without an approximate index."""
    given = example(300, 300)
    for name in ("queries", "vectors"):
        kept = torch.rand(given[name].shape, generator=torch.Generator().manual_seed(1)) < 0.05
        given[name] = (given[name] * 8).round() * kept  # exact in any order of summation, with ties
    index = None if factory is None else ItemIndex(given["vectors"].numpy(), factory=factory)
    dense = ranked(given, index)
    sparse = {"queries": given["queries"].to_sparse()}
    sparse |= {"vectors": given["vectors"].to_sparse()} if kind == "both sparse" else {}
    found = ranked(given, index, **sparse)
    for field in ("ranks", "top_items", "top_scores", "exact_top_items"):
        np.testing.assert_array_equal(getattr(found, field), getattr(dense, field))
    np.testing.assert_array_equal(dense_for_index(given["vectors"].to_sparse()), given["vectors"].numpy())


def test_sparse_vectors_are_never_written_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """100,000 items as wide as the catalogue (40 GB) are ranked in blocks; an index over them is refused."""
    size, random = 100_000, np.random.default_rng(0)
    monkeypatch.setattr(ranking_module, "BLOCK_SCORES", 2**20)
    places = torch.from_numpy(random.integers(size, size=(2, 200_000)))
    vectors = torch.sparse_coo_tensor(places, torch.ones(200_000), (size, size), check_invariants=True).coalesce()
    items = torch.arange(30) * 7
    queries = torch.sparse_coo_tensor(
        torch.stack([torch.arange(30), items]), torch.ones(30), (30, size), check_invariants=True
    )
    queries = queries.coalesce()
    target, no_history = np.arange(30), np.array([5])
    found = rank(np.arange(30), queries, vectors, target, index=None, k=5, history=lambda row: no_history)
    scores = vectors.t().coalesce().index_select(0, items).to_dense().numpy()
    scores[np.arange(30) != 5, 5] = -np.inf
    np.testing.assert_array_equal(found.top_items, sorted_lists(scores, 5))
    assert found.ranks.tolist() == mid_ranks(torch.from_numpy(scores), torch.arange(30)).tolist()
    with pytest.raises(InputError, match=r"100000 sparse ones of width 100000.* 37 GiB: only metrics.index Flat"):
        dense_for_index(vectors)


def test_the_order_of_summation_decides_no_tie() -> None:
    """0.1 + 0.2 + 0.3 is, in float64 and in float32, not always 0.3 + 0.2 + 0.1."""
    queries = torch.ones(1, 6).to_sparse()
    vectors = torch.tensor([[0.1, 0.2, 0.3, 0.7, 0, 0], [0.7, 0.3, 0.2, 0.1, 0, 0], [0, 0, 0.3, 0.1, 0.2, 0.7]])
    scores = Scorer(queries, vectors.to_sparse(), rows=1)(slice(0, 1))
    assert len(set(scores[0].tolist())) == 1


def test_a_block_leaves_nothing_in_the_next() -> None:
    """Two blocks share memory: what is masked in the first is not in the second."""
    given = example(2000, 4, rows=257)
    seen = np.arange(1990)
    both = ranked(given, None, history=lambda row: seen if row < 256 else seen[:0])
    (alone,) = ranked(given, None, history=None).ranks[256:].tolist()
    assert both.ranks[256] == alone
    assert both.ranks[:256].max() <= 11


def test_no_rows_give_empty_lists() -> None:
    """A process may have nothing to rank."""
    found = ranked(example(20, 4, rows=0), None)
    assert found.ranks.shape == (0,)
    assert found.top_items.shape == (0, 10)


@pytest.mark.parametrize("rows", [1, 2, 3, 257, 258, 259])
def test_equal_items_tie_in_few_rows(rows: int) -> None:
    """A last block of one to three rows is a product of other kernels, which round by an item's place."""
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(1682, 128, generator=generator)
    vectors[-1] = vectors[0]
    queries = torch.randn(rows, 128, generator=generator) + 0.2 * vectors[0]
    found = rank(np.arange(rows), queries, vectors, np.zeros(rows, int), index=None, k=5, history=None)
    assert len(found.ranks) == rows
    assert (found.ranks % 1 == 0.5).all()

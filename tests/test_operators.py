"""The operators as properties: how many items they keep, hide, move or replace, and that they write into nothing."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from anyo_lightning.views.neighbours import nearest
from anyo_lightning.views.operators import crop, importance, mask, reorder, substitute, substitute_before_last

HISTORIES = st.lists(st.integers(0, 29), min_size=1, max_size=40).map(lambda items: np.array(items, dtype=np.int32))
SHARES = st.sampled_from([0.0, 0.1, 0.29, 0.3, 0.6, 0.7, 0.99, 1.0])
SEEDS = st.integers(0, 2**32 - 1)
TARGETS = st.integers(0, 29)
SIMILAR = np.stack([(np.arange(30) + step) % 30 for step in (1, 2, 3)], axis=1)  # never the item itself


def floor(share: float, items: np.ndarray) -> int:
    """In whole percents, so without rounding."""
    return round(share * 100) * len(items) // 100


def contains(items: np.ndarray, part: np.ndarray) -> bool:
    """Whether `part` is a contiguous part of `items`."""
    starts = range(len(items) - len(part) + 1)
    return any(np.array_equal(items[start : start + len(part)], part) for start in starts)


@given(HISTORIES, SHARES, SEEDS)
def test_crop_keeps_a_contiguous_part(items: np.ndarray, share: float, seed: int) -> None:
    before = items.copy()
    view = crop(items, share=share, random=np.random.default_rng(seed))
    assert len(view) == max(floor(share, items), 1)
    assert contains(before, view)
    view += 1
    np.testing.assert_array_equal(items, before)


@given(HISTORIES, SHARES, SEEDS)
def test_mask_hides_a_share_but_never_all(items: np.ndarray, share: float, seed: int) -> None:
    before = items.copy()
    hidden = mask(items, share=share, random=np.random.default_rng(seed))
    assert hidden.shape == items.shape
    assert hidden.sum() == min(floor(share, items), len(items) - 1)
    np.testing.assert_array_equal(items, before)


@given(HISTORIES, SHARES, SEEDS)
def test_reorder_moves_items_of_one_part_alone(items: np.ndarray, share: float, seed: int) -> None:
    before = items.copy()
    view = reorder(items, share=share, random=np.random.default_rng(seed))
    assert Counter(view.tolist()) == Counter(before.tolist())
    moved = np.flatnonzero(view != before)
    if len(moved):
        assert moved[-1] - moved[0] + 1 <= floor(share, items)
    view += 1
    np.testing.assert_array_equal(items, before)


@given(HISTORIES, SHARES, TARGETS, SEEDS)
def test_substitute_replaces_a_share_by_neighbours(items: np.ndarray, share: float, target: int, seed: int) -> None:
    before = items.copy()
    view = substitute(items, share=share, similar=SIMILAR, target=target, random=np.random.default_rng(seed))
    changed = np.flatnonzero(view != before)
    assert len(changed) == floor(share, items)
    assert all(view[place] in SIMILAR[before[place]] and view[place] != target for place in changed)
    assert view.dtype == items.dtype
    np.testing.assert_array_equal(items, before)


@given(HISTORIES, SHARES, TARGETS, SEEDS)
def test_substitution_before_the_last_item(items: np.ndarray, chance: float, target: int, seed: int) -> None:
    before, random = items.copy(), np.random.default_rng(seed)
    view = substitute_before_last(items, chance=chance, similar=SIMILAR, target=target, random=random)
    changed = np.flatnonzero(view != before)
    assert view[-1] == before[-1]
    assert len(changed) <= (len(items) - 1 if chance else 0)
    assert len(changed) == len(items) - 1 or chance < 1
    assert all(view[place] in SIMILAR[before[place]] and view[place] != target for place in changed)
    np.testing.assert_array_equal(items, before)


def test_each_item_before_the_last_has_its_chance() -> None:
    """A quarter of 4,000 items, within four standard deviations; none where there is one item."""
    random = np.random.default_rng(0)
    items = np.arange(4001) % 10
    view = substitute_before_last(items, chance=0.25, similar=SIMILAR, target=20, random=random)
    assert abs(int((view != items).sum()) - 1000) < 4 * (4000 * 0.25 * 0.75) ** 0.5
    alone = substitute_before_last(np.array([7]), chance=1, similar=SIMILAR, target=8, random=random)
    assert alone.tolist() == [7]


@given(HISTORIES, SHARES, SEEDS)
def test_importance_drops_the_least(items: np.ndarray, share: float, seed: int) -> None:
    scores = np.random.default_rng(seed).permutation(len(items)).astype(np.float32)
    before = items.copy()
    view = importance(items, share=share, scores=scores)
    dropped = min(floor(share, items), len(items) - 1)
    np.testing.assert_array_equal(view, before[scores >= dropped])
    view += 1
    np.testing.assert_array_equal(items, before)


@pytest.mark.parametrize("operator", [crop, mask, reorder])
def test_operators_use_their_randomness(operator: object) -> None:
    """Two seeds give two views, one seed gives one."""
    items = np.arange(30)

    def view(seed: int) -> np.ndarray:
        return operator(items, share=0.5, random=np.random.default_rng(seed))  # type: ignore[operator]

    np.testing.assert_array_equal(view(0), view(0))
    assert not np.array_equal(view(0), view(1))


def test_every_start_and_every_neighbour_occurs() -> None:
    """A crop reaches both ends of a history, a substitution the whole row of neighbours."""
    random = np.random.default_rng(0)
    starts = {int(crop(np.arange(5), share=0.6, random=random)[0]) for _ in range(200)}
    assert starts == {0, 1, 2}
    for target, expected in ((20, {8, 9, 10}), (8, {9, 10}), (9, {8, 10}), (10, {8, 9})):
        views = [substitute(np.array([7]), share=1, similar=SIMILAR, target=target, random=random) for _ in range(300)]
        counts = Counter(int(item) for (item,) in views)
        assert set(counts) == expected
        assert min(counts.values()) > 60  # each as likely as the others: 100 or 150 of 300


def test_an_item_that_is_similar_to_the_target_alone_stays() -> None:
    """There is nothing else to put in its place."""
    only = (np.arange(30)[:, None] + 1) % 30
    view = substitute(np.array([7, 3]), share=1, similar=only, target=8, random=np.random.default_rng(0))
    assert view.tolist() == [7, 4]


def test_similar_items_are_those_of_the_highest_cosine() -> None:
    """Against a sort of all cosines; only candidates, never the item itself; lengths of vectors do not matter."""
    torch.manual_seed(0)
    vectors = torch.randn(40, 6)
    candidates = torch.arange(0, 40, 2)
    table = nearest(vectors * torch.rand(40, 1).add(0.1), candidates.numpy(), k=3)
    cosines = F.cosine_similarity(vectors[:, None], vectors[None], dim=2).fill_diagonal_(-2)
    cosines[:, 1::2] = -2
    np.testing.assert_array_equal(table, cosines.argsort(dim=1, descending=True)[:, :3].numpy())
    assert (nearest(vectors, np.array([4, 9]), k=5)[4] == [9, -1, -1, -1, -1]).all()

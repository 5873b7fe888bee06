"""Semantic neighbours: who they are by arithmetic, and that nothing outside training or of a target moves them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import MakeData
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from anyo_lightning.data.datamodule import RecDataModule
from anyo_lightning.data.splits import Split
from anyo_lightning.data.windows import with_shuffled_ties
from anyo_lightning.errors import InputError
from anyo_lightning.llm.backbone import Backbone
from anyo_lightning.views import neighbours
from anyo_lightning.views.neighbours import (
    Positives,
    mean_vectors,
    nearest,
    profile_texts,
    semantic_item_vectors,
    similar_prefixes,
    training_prefixes,
    user_text_vectors,
)


@pytest.fixture
def data(make_data: MakeData) -> RecDataModule:
    """The tiny data set; histories are read whole."""
    return make_data(max_items=100)


def with_items(split: Split, chosen: np.ndarray) -> Split:
    """The same split with another item at these interactions."""
    items = split.items.copy()
    items[chosen] = (items[chosen] + 5) % split.catalogue_size
    return replace(split, items=items)


def neighbours_of(split: Split, positives: Positives = "others") -> tuple[torch.Tensor, np.ndarray]:
    """Semantic vectors of prefixes over one-hot items, and everyone's three neighbours."""
    prefixes = training_prefixes(split, shuffled_ties=False)
    vectors = mean_vectors(prefixes, torch.eye(split.catalogue_size))
    return vectors, similar_prefixes(prefixes, vectors, positives, k=3)


def test_nearest_by_hand() -> None:
    """Five vectors at 0, 10, 30, 90 and 100 degrees, of any length; the last one is no candidate."""
    angles = torch.tensor([0.0, 10, 30, 90, 100]).deg2rad()
    vectors = torch.stack([angles.cos(), angles.sin()], dim=1) * torch.tensor([1.0, 9, 2, 3, 5])[:, None]
    found = nearest(vectors, np.arange(4), k=2)
    assert found.tolist() == [[1, 2], [0, 2], [1, 0], [2, 1], [3, 2]]
    assert nearest(vectors, np.array([2]), k=2).tolist() == [[2, -1], [2, -1], [-1, -1], [2, -1], [2, -1]]
    assert (nearest(vectors, np.array([], dtype=np.int64), k=2) == -1).all()
    vectors[1] = torch.nan
    with pytest.raises(InputError, match="finite vectors"):
        nearest(vectors, np.arange(4), k=2)


def test_nearest_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same whatever fits at a time."""
    vectors, groups = torch.randn(20, 3, generator=torch.Generator().manual_seed(0)), np.arange(20) // 3
    whole = nearest(vectors, np.arange(2, 20), k=4, groups=groups)
    monkeypatch.setattr(neighbours, "MOST_SCORES", 40)
    assert nearest(vectors, np.arange(2, 20), k=4, groups=groups).tolist() == whole.tolist()


@given(
    rows=st.integers(2, 12), k=st.integers(1, 12), equal=st.booleans(), seed=st.integers(0, 99), share=st.floats(0, 1)
)
def test_nearest_never_gives_the_row_itself(rows: int, k: int, equal: bool, seed: int, share: float) -> None:
    """Distinct other candidates, as many as there are up to k, also where all vectors are the same."""
    random = np.random.default_rng(seed)
    vectors = torch.from_numpy(random.normal(size=(1 if equal else rows, 3))).expand(rows, 3)
    candidates = np.flatnonzero(random.random(rows) < share)
    for row, others in enumerate(nearest(vectors, candidates, k=k).tolist()):
        kept = [other for other in others if other >= 0]
        assert others == kept + [-1] * (k - len(kept))
        assert len(kept) == len(set(kept)) == min(k, len(set(candidates.tolist()) - {row}))
        assert set(kept) <= set(candidates.tolist()) - {row}


def test_nearest_leaves_out_the_own_group() -> None:
    """Vectors at 0, 10, 30 and 90 degrees, of which the first two belong together."""
    angles = torch.tensor([0.0, 10, 30, 90]).deg2rad()
    vectors = torch.stack([angles.cos(), angles.sin()], dim=1)
    found = nearest(vectors, np.arange(4), k=3, groups=np.array([0, 0, 1, 2]))
    assert found.tolist() == [[2, 3, -1], [2, 3, -1], [1, 0, 3], [2, 1, 0]]


def by_hand(histories: list[list[int]], times: list[list[int]] | None = None) -> Split:
    """A split of these training histories, with nothing else."""
    items = np.concatenate(histories).astype(np.int32)
    offsets = np.append(0, np.cumsum([len(items) for items in histories]))
    return Split(
        name="by hand",
        strategy="none",
        ties="file_order",
        user_ids=np.arange(len(histories)).astype(str),
        item_ids=np.arange(8).astype(str),
        item_texts=["text"] * 8,
        offsets=offsets,
        items=items,
        stages=np.zeros(len(items), dtype=np.int8),
        tied=np.zeros(len(items), dtype=bool),
        timestamps=np.arange(len(items)) if times is None else np.concatenate(times),
        fingerprint="",
    )


def test_positives_by_hand() -> None:
    """Users 0: 0 1 2 0 3 and 1: 0 1 4; prefixes 0 to 3 of user 0 and 4 and 5 of user 1.

    The target of prefix 2 (0 1 2) is 0, which every prefix of user 0 has: it has no own neighbour without its target.
    """
    split = by_hand([[0, 1, 2, 0, 3], [0, 1, 4]])
    prefixes = training_prefixes(split, shuffled_ties=False)
    assert [items.tolist() for items in prefixes.histories()] == [[0], [0, 1], [0, 1, 2], [0, 1, 2, 0], [0], [0, 1]]
    assert prefixes.of_targets().tolist() == [-1, 0, 1, 2, 3, -1, 4, 5]
    vectors = mean_vectors(prefixes, torch.eye(8))
    root = 2**-0.5
    torch.testing.assert_close(vectors[1], torch.tensor([root, root, 0, 0, 0, 0, 0, 0]))
    torch.testing.assert_close(vectors[3], torch.tensor([2.0, 1, 1, 0, 0, 0, 0, 0]) / 6**0.5)

    def found(positives: Positives) -> list[set[int]]:
        return [set(row) - {-1} for row in similar_prefixes(prefixes, vectors, positives, k=5).tolist()]

    assert found("others") == [{4, 5}] * 4 + [{0, 1, 2, 3}] * 2
    assert found("own") == [{1, 2, 3}, {0, 2, 3}, {0, 1, 3}, {0, 1, 2}, {5}, {4}]
    # Target 1 of prefix 0 is in all longer ones, target 2 of prefix 1 in prefixes 2 and 3, target 3 of 3 in none.
    assert found("own_without_target") == [set(), {0}, set(), {0, 1, 2}, set(), {4}]
    assert found("all") == [set(range(6)) - {row} for row in range(6)]
    assert similar_prefixes(prefixes, vectors, "all", k=1)[:, 0].tolist() == [4, 5, 3, 2, 0, 1]
    assert similar_prefixes(prefixes, vectors, "own", k=2)[3].tolist() == [2, 1]  # best first


def test_at_most_so_many_prefixes_evenly_spaced() -> None:
    """The longest is among them."""
    split = by_hand([list(range(8)), [0, 1, 2]])
    for most, expected in ((1, [7, 10]), (2, [4, 7, 9, 10]), (3, [3, 5, 7, 9, 10]), (9, [1, 2, 3, 4, 5, 6, 7, 9, 10])):
        assert training_prefixes(split, shuffled_ties=False, most=most).end.tolist() == expected


def test_shuffled_ties_leave_prefixes_as_they_are() -> None:
    """Prefixes end where a timestamp begins; their target is any item of it, and none may be in a prefix without it."""
    split = by_hand([[0, 1, 2, 3, 2], [4, 5], [6]], times=[[1, 1, 2, 2, 3], [1, 1], [1]])
    prefixes = training_prefixes(split, shuffled_ties=True)
    assert [items.tolist() for items in prefixes.histories()] == [[0, 1], [0, 1, 2, 3]]
    assert prefixes.first_seen.tolist() == [2, 2]
    for seed in range(5):
        shuffled = training_prefixes(with_shuffled_ties(split, np.random.default_rng(seed)), shuffled_ties=True)
        assert [set(items) for items in shuffled.histories()] == [{0, 1}, {0, 1, 2, 3}]
        found = similar_prefixes(shuffled, mean_vectors(shuffled, torch.eye(8)), "own_without_target", k=1)
        assert found.tolist() == [[-1], [0]]


def test_validation_and_test_move_no_neighbour(data: RecDataModule) -> None:
    """Other items outside the training split change neither vectors nor neighbours."""
    vectors, neighbours = neighbours_of(data.split)
    changed = with_items(data.split, data.split.stages > 0)
    assert (changed.items != data.split.items).sum() == 80
    assert torch.equal(vectors, neighbours_of(changed)[0])
    assert np.array_equal(neighbours, neighbours_of(changed)[1])


def test_a_target_moves_no_vector_of_its_prefix(data: RecDataModule) -> None:
    """Another item at a position changes the user's longer prefixes alone."""
    prefixes = training_prefixes(data.split, shuffled_ties=False)
    position = int(prefixes.end[3])
    before, after = neighbours_of(data.split)[0], neighbours_of(with_items(data.split, np.array([position])))[0]
    longer = (prefixes.user == prefixes.user[3]) & (prefixes.end > position)
    assert longer.any()
    assert ((before != after).any(1).numpy() == longer).all()


def test_profile_texts_are_newest_first() -> None:
    """And None for an empty history."""
    histories = [np.array([0, 1]), np.array([], dtype=np.int64), np.array([1, 2])]
    assert profile_texts(histories, ["a", "b", "c"]) == ["b; a", None, "c; b"]


@pytest.mark.parametrize("kind", ["tiny_llm", "tiny_bert"])
def test_texts_become_centred_unit_vectors(
    kind: str, request: pytest.FixtureRequest, data: RecDataModule, titles: list[str]
) -> None:
    """Of a causal and of a bidirectional model, with LoRA or without: mean zero before scaling, length one."""
    backbone = Backbone(request.getfixturevalue(kind), dtype="float32")
    items = semantic_item_vectors(backbone, data, pooling="mean")
    assert items.shape == (16, 32)
    torch.testing.assert_close(items.norm(dim=1), torch.ones(16))
    users = user_text_vectors(backbone, [*data.split.item_texts, None], pooling="mean")
    torch.testing.assert_close(users[:16], items)
    assert (users[16] == 0).all()
    assert float(F.cosine_similarity(items[:1], items[1:]).mean()) < 0.5  # not one narrow cone

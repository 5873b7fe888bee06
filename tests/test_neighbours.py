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
from anyo_lightning.llm.backbone import Backbone
from anyo_lightning.views.neighbours import (
    mean_vectors,
    nearest,
    profile_texts,
    semantic_histories,
    semantic_item_vectors,
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


def user_neighbours(split: Split, *, shuffled_ties: bool = False) -> tuple[torch.Tensor, np.ndarray]:
    """Semantic vectors of users over one-hot items, and everyone's three neighbours."""
    histories = semantic_histories(split, shuffled_ties=shuffled_ties)
    vectors = mean_vectors(histories, torch.eye(split.catalogue_size))
    candidates = np.array([user for user, items in enumerate(histories) if len(items)])
    return vectors, nearest(vectors, candidates, k=3)


def test_nearest_by_hand() -> None:
    """Five vectors at 0, 10, 30, 90 and 100 degrees, of any length; the last one is no candidate."""
    angles = torch.tensor([0.0, 10, 30, 90, 100]).deg2rad()
    vectors = torch.stack([angles.cos(), angles.sin()], dim=1) * torch.tensor([1.0, 9, 2, 3, 5])[:, None]
    found = nearest(vectors, np.arange(4), k=2)
    assert found.tolist() == [[1, 2], [0, 2], [1, 0], [2, 1], [3, 2]]
    assert nearest(vectors, np.array([2]), k=2).tolist() == [[2, -1], [2, -1], [-1, -1], [2, -1], [2, -1]]
    assert (nearest(vectors, np.array([], dtype=np.int64), k=2) == -1).all()


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


def test_validation_and_test_move_no_neighbour(data: RecDataModule) -> None:
    """Other items outside the training split change neither vectors nor neighbours."""
    vectors, neighbours = user_neighbours(data.split)
    changed = with_items(data.split, data.split.stages > 0)
    assert (changed.items != data.split.items).sum() == 80
    assert torch.equal(vectors, user_neighbours(changed)[0])
    assert np.array_equal(neighbours, user_neighbours(changed)[1])


def test_a_target_moves_no_vector_of_its_user(data: RecDataModule) -> None:
    """Another last training item changes nothing; another one before it changes that user's vector."""
    last = data.split.offsets[:-1] + [len(data.split.training_history(u)) - 1 for u in range(data.split.users)]
    vectors, neighbours = user_neighbours(data.split)
    changed = user_neighbours(with_items(data.split, last))
    assert torch.equal(vectors, changed[0])
    assert np.array_equal(neighbours, changed[1])
    earlier = user_neighbours(with_items(data.split, last[:1] - 1))[0]
    assert not torch.equal(vectors[0], earlier[0])
    assert torch.equal(vectors[1:], earlier[1:])


def test_shuffled_ties_exclude_whatever_may_be_last(data: RecDataModule) -> None:
    """With the last three training items at one time, none of them stands for the user, in any epoch's order."""
    ends = [int(data.split.offsets[u]) + len(data.split.training_history(u)) for u in range(data.split.users)]
    times = data.split.timestamps.copy()
    for end in ends:
        times[end - 3 : end] = times[end - 1]
    split = replace(data.split, timestamps=times)
    before = semantic_histories(split, shuffled_ties=True)
    for seed in range(5):
        shuffled = with_shuffled_ties(split, np.random.default_rng(seed))
        assert all(map(np.array_equal, before, semantic_histories(shuffled, shuffled_ties=True)))
    assert all(np.array_equal(items, split.training_history(u)[:-3]) for u, items in enumerate(before))
    plain = semantic_histories(split, shuffled_ties=False)
    assert all(np.array_equal(items, split.training_history(u)[:-1]) for u, items in enumerate(plain))
    plain[0][:] = 0
    assert split.training_history(0).any()  # copies: the stored interactions stay


def test_a_user_with_nothing_left_takes_no_part() -> None:
    """One training item alone: an empty history, a zero vector, no text, nobody's neighbour."""
    histories = [np.array([0, 1]), np.array([], dtype=np.int64), np.array([1, 2])]
    vectors = mean_vectors(histories, torch.eye(3))
    torch.testing.assert_close(vectors, torch.tensor([[1.0, 1, 0], [0, 0, 0], [0, 1, 1]]) / 2**0.5)
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

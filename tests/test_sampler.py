"""Token-budget batches: the budget, the shuffle, and what several processes share."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anyo_lightning.data.sampler import TokenBudgetBatches


def test_batches_keep_the_budget_and_waste_little() -> None:
    """Padded size within the budget, every row once, less than 5% padding, the same number of batches each epoch."""
    lengths = np.random.default_rng(0).integers(20, 1000, size=3000)
    sampler = TokenBudgetBatches(lengths, budget=8192, seed=3)
    sizes = set()
    for epoch in range(3):
        sampler.set_epoch(epoch)
        batches = list(sampler)
        assert sorted(row for rows in batches for row in rows) == list(range(3000))
        assert max(lengths[rows].max() * len(rows) for rows in batches) <= 8192
        assert lengths.sum() > 0.95 * sum(lengths[rows].max() * len(rows) for rows in batches)
        sizes.add(len(batches))
        assert len(batches) == len(sampler)
    assert len(sizes) == 1


def test_batches_depend_on_seed_and_epoch_alone() -> None:
    """The same seed and epoch give the same batches, another epoch or seed others."""
    lengths = np.random.default_rng(0).integers(20, 100, size=300)

    def batches(seed: int, epoch: int) -> list[list[int]]:
        sampler = TokenBudgetBatches(lengths, budget=500, seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert batches(0, 0) == batches(0, 0)
    assert batches(0, 0) != batches(0, 1)
    assert batches(0, 0) != batches(1, 0)


def test_batches_resume() -> None:
    """A resumed epoch goes on where it stopped, and the one after it is whole."""
    lengths = np.random.default_rng(0).integers(20, 100, size=101)
    whole = list(TokenBudgetBatches(lengths, budget=500, seed=0))
    resumed = TokenBudgetBatches(lengths, budget=500, seed=0)
    resumed.resume(4)
    assert list(resumed) == whole[4:]
    assert list(resumed) == whole


@given(
    rows=st.integers(1, 400),
    world_size=st.sampled_from([1, 2, 3, 8]),
    budget=st.integers(100, 3000),
    longest=st.integers(20, 1000),
    seed=st.integers(0, 5),
)
@settings(max_examples=60, deadline=None)
def test_any_number_of_processes_takes_the_same_steps(
    rows: int, world_size: int, budget: int, longest: int, seed: int
) -> None:
    """The shares of each step are, together, the rows of one process's step: also where some have none."""
    lengths = np.random.default_rng(seed).integers(1, longest, size=rows)
    one = list(TokenBudgetBatches(lengths, budget=budget, seed=seed, epoch=2))
    shards = [
        list(TokenBudgetBatches(lengths, budget=budget, seed=seed, epoch=2, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    assert sorted(row for batch in one for row in batch) == list(range(rows))
    for step, shares in zip(one, zip(*shards, strict=True), strict=True):
        assert len(step) == 1 or lengths[step].max() * len(step) <= budget
        assert sorted(row for share in shares for row in share) == sorted(step)
        sizes = [len(share) for share in shares]
        assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_a_steps_processes_read_about_equally_much(world_size: int) -> None:
    """Tokens per row of a step's shares differ by less than 3%, at the shape of ML-100K's windows."""
    lengths = np.random.default_rng(0).integers(60, 400, size=2345)
    shards = [
        list(TokenBudgetBatches(lengths, budget=24000, seed=0, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    means = np.array([[lengths[batch].mean() for batch in shard] for shard in shards])
    assert ((means.max(0) - means.min(0)) / means.max(0)).max() < 0.03


def test_evaluation_batches_do_not_depend_on_the_number_of_processes() -> None:
    """The same batches for one process and for three, of which each takes equally many."""
    lengths = np.random.default_rng(0).integers(20, 100, size=101)
    one = list(TokenBudgetBatches(lengths, budget=500, seed=None))
    three = [list(TokenBudgetBatches(lengths, budget=500, seed=None, rank=r, world_size=3)) for r in range(3)]
    assert {tuple(rows) for shard in three for rows in shard} == {tuple(rows) for rows in one}
    assert {len(shard) for shard in three} == {-(-len(one) // 3)}


def test_a_step_of_fewer_rows_than_processes_leaves_some_without() -> None:
    """They take part in every step all the same."""
    shards = [list(TokenBudgetBatches(np.array([5, 7]), budget=100, seed=0, rank=r, world_size=3)) for r in range(3)]
    assert sorted(map(str, shards)) == ["[[0]]", "[[1]]", "[[]]"]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_repeated_evaluation_batches_are_known(world_size: int) -> None:
    """Without each process's last one where it is a repeat, all processes together have every row once."""
    lengths = np.random.default_rng(0).integers(1, 50, 60)
    found: list[int] = []
    repeats = 0
    for rank in range(world_size):
        sampler = TokenBudgetBatches(lengths, budget=300, seed=None, rank=rank, world_size=world_size)
        own = list(sampler)
        repeats += sampler.last_is_repeated
        for rows in own[:-1] if sampler.last_is_repeated else own:
            found += rows
    count = len(TokenBudgetBatches(lengths, budget=300, seed=None))
    assert sorted(found) == list(range(60))
    assert repeats == -count % world_size

"""Windows, token store, token-budget batches and collate."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anyo_lightning.data.batches import HistoryDataset
from anyo_lightning.data.datamodule import RecDataModule
from anyo_lightning.data.sampler import TokenBudgetBatches
from anyo_lightning.data.splits import Split
from anyo_lightning.data.tokens import HIDDEN, ItemTokenStore
from anyo_lightning.data.windows import query_windows, training_windows, with_shuffled_ties
from anyo_lightning.encoders.text import TextEncoders
from anyo_lightning.errors import InputError
from anyo_lightning.llm.language_model import LLM


def made_split(lengths: list[int], catalogue: int = 11) -> Split:
    """Users with the given numbers of interactions; the last two are validation and test."""
    random = np.random.default_rng(sum(lengths))
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    stages = np.concatenate([[0] * (n - 2) + [1, 2] for n in lengths]).astype(np.int8)
    total = int(offsets[-1])
    return Split(
        name="made",
        strategy="leave_one_out",
        ties="file_order",
        user_ids=np.array([f"u{i}" for i in range(len(lengths))]),
        item_ids=np.array([f"i{i}" for i in range(catalogue)]),
        item_texts=[f"item {i}" for i in range(catalogue)],
        offsets=offsets,
        items=random.integers(catalogue, size=total).astype(np.int32),
        stages=stages,
        tied=np.zeros(total, dtype=bool),
        timestamps=np.arange(total),
        fingerprint="0" * 16,
    )


def store(catalogue: int = 11) -> ItemTokenStore:
    """Item i has i % 4 + 1 tokens 100·i + …, then the separator 1."""
    spans = [[*(100 * i + j for j in range(i % 4 + 1)), 1] for i in range(catalogue)]
    offsets = np.cumsum([0, *map(len, spans)], dtype=np.int64)
    flat = np.concatenate([np.array(s, np.int32) for s in spans])
    return ItemTokenStore(flat, offsets, separator=1, hidden=np.array([9, 1], np.int32))


def supervised_positions(split: Split, windows_of: HistoryDataset, batches: list[list[int]]) -> list[tuple[int, int]]:
    """(user, position of the target) of every supervised boundary."""
    found = []
    for rows in batches:
        batch = windows_of[rows]
        for b, row in enumerate(rows):
            for i in batch.target_mask[b].nonzero()[:, 0].tolist():
                position = int(windows_of.start[row]) + i + 1
                assert int(batch.target_ids[b, i]) == split.items[position]
                found.append((int(batch.user[b]), position))
    return found


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(3, 60), min_size=1, max_size=6),
    max_items=st.integers(1, 20),
    max_tokens=st.integers(10, 60),
    supervision=st.sampled_from(["all", "last"]),
    overlap=st.sampled_from([0.0, 0.2, 0.5, 0.9]),
    seed=st.none() | st.integers(0, 5),
)
def test_each_target_is_supervised_exactly_once(
    lengths: list[int], max_items: int, max_tokens: int, supervision: str, overlap: float, seed: int | None
) -> None:
    """All training items but each user's first are targets, once; no window is longer than it may be."""
    split, tokens = made_split(lengths), store()
    windows = training_windows(
        split,
        tokens.lengths,
        max_items=max_items,
        max_length=max_tokens,
        supervision=supervision,  # type: ignore[arg-type]
        overlap=overlap,
        random=None if seed is None else np.random.default_rng(seed),
    )
    assert (windows.end - windows.start <= max_items).all()
    assert (windows.length <= max_tokens).all()
    dataset = HistoryDataset.training(split, windows, tokens)
    batches = [rows.tolist() for rows in TokenBudgetBatches(windows.length, budget=80, seed=0).batches()]
    found = sorted(supervised_positions(split, dataset, batches))
    starts, ends = split.offsets[:-1], split.offsets[1:] - 2
    expected = [(u, p) for u in range(split.users) for p in range(int(starts[u]) + 1, int(ends[u]))]
    assert found == expected
    if not expected:
        return
    whole = dataset[list(range(len(dataset)))]
    assert (whole.targets.numpy() == split.items[whole.target_positions.numpy()]).all()


def test_later_windows_overlap_by_half() -> None:
    """A boundary of a later window sees at least half a window of context."""
    split = made_split([100])
    windows = training_windows(split, np.ones(11, dtype=np.int64), max_items=20, max_length=20, supervision="all")
    assert windows.start.tolist() == [0, 10, 20, 30, 40, 50, 60, 70, 80]
    assert (windows.supervised[1:] - windows.start[1:] == 10).all()


def test_queries_read_the_latest_whole_items_that_fit() -> None:
    """No target is in its own history, and the oldest items are dropped whole."""
    split, tokens = made_split([30, 5, 12]), store()
    queries = split.queries("test")
    start, end = query_windows(queries, tokens.lengths, max_items=100, max_length=25)
    for row in range(len(queries)):
        history = queries.items[start[row] : end[row]]
        assert end[row] == queries.history_end[row]
        assert tokens.lengths[history].sum() <= 25
        if start[row] > queries.history_start[row]:
            assert tokens.lengths[queries.items[start[row] - 1 : end[row]]].sum() > 25


def test_collate_gathers_each_items_tokens() -> None:
    """Token ids are the items' spans one after another; boundaries are their separators; pads are separators."""
    split, tokens = made_split([9, 14]), store()
    windows = training_windows(split, tokens.lengths, max_items=50, max_length=500, supervision="all")
    batch = HistoryDataset.training(split, windows, tokens)[[0, 1]]
    assert batch.token_ids is not None
    assert batch.boundaries is not None
    for b, user in enumerate(batch.user.tolist()):
        history = split.training_history(user)[:-1]
        expected = np.concatenate([tokens.span(i) for i in history])
        assert batch.token_ids[b, : len(expected)].tolist() == expected.tolist()
        assert (batch.token_ids[b, len(expected) :] == 1).all()
        ends = np.cumsum(tokens.lengths[history]) - 1
        assert batch.boundaries[b, : len(history)].tolist() == ends.tolist()
        assert (batch.token_ids[b, batch.boundaries[b, : len(history)]] == 1).all()
        assert batch.item_mask[b].sum() == len(history)
    assert batch.token_count == int(windows.length.sum())


def test_token_store_is_built_once(tmp_path: Path) -> None:
    """A second build reads the files; another text, limit or tokenizer is another store; long texts are cut."""
    calls = []

    def tokenize(texts: list[str]) -> list[list[int]]:
        if texts != [HIDDEN]:  # its few tokens are not kept
            calls.append(texts)
        return [[ord(c) for c in text] for text in texts]

    def build(texts: list[str], max_tokens: int = 4) -> ItemTokenStore:
        return ItemTokenStore.build(
            texts, tokenize, separator=7, max_tokens=max_tokens, folder=tmp_path, identity="letters"
        )

    first, again = build(["ab", "abcdef"]), build(["ab", "abcdef"])
    assert len(calls) == 1
    assert [*again.span(1), *again.span(0)] == [97, 98, 99, 7, 97, 98, 7]
    assert first.lengths.tolist() == [3, 4]
    build(["ab", "abcdef"], max_tokens=9)
    build(["ab", "abcdeg"])
    assert len(calls) == 3


def test_damaged_token_store_is_set_aside(tmp_path: Path) -> None:
    """A truncated file is reported, kept under another name, and the texts are tokenised again."""

    def build() -> ItemTokenStore:
        return ItemTokenStore.build(
            ["ab", "c"],
            lambda texts: [[ord(c) for c in text] for text in texts],
            separator=7,
            max_tokens=4,
            folder=tmp_path,
            identity="letters",
        )

    build()
    file = next(tmp_path.glob("*/token_ids.npy"))
    file.write_bytes(file.read_bytes()[:60])
    with pytest.warns(UserWarning, match="damaged"):
        again = build()
    assert [*again.span(0), *again.span(1)] == [97, 98, 7, 99, 7]
    assert len(list(tmp_path.glob("*.damaged-*"))) == 1


def test_titles_only_needs_no_catalogue(tiny_data: tuple[Path, Path], tiny_llm: str) -> None:
    """Without item texts there is no title: the items' ids stand in their place."""
    data = RecDataModule(interactions=tiny_data[0], titles_only=True)
    with pytest.warns(UserWarning, match="have no text"):
        data.setup("fit")
    data.read_for(TextEncoders(LLM(tiny_llm)))
    assert data.tokens is not None


def test_evaluation_batches_ask_for_the_last_state(tiny_data: tuple[Path, Path]) -> None:
    """One supervised boundary per row, at the history's end, whose target is the row's."""
    data = RecDataModule(interactions=tiny_data[0], items=tiny_data[1], max_items=7, evaluation_batch_tokens=40)
    data.setup("fit")
    queries = data.queries("validation")
    rows = []
    for batch in data.val_dataloader():
        assert (batch.target_mask.sum(1) == 1).all()
        last = batch.item_mask.sum(1) - 1
        assert torch.equal(batch.target_mask.nonzero()[:, 1], last)
        for b, row in enumerate(batch.row.tolist()):
            assert batch.item_ids[b, last[b]] == queries.history(row)[-1]
            assert batch.targets[b] == queries.target[row]
        rows += batch.row.tolist()
    assert sorted(rows) == list(range(len(queries)))


def test_batches_of_mixed_lengths_hold_equally_many_random_rows(tiny_data: tuple[Path, Path]) -> None:
    """Without `group_by_length` each batch but one has as many rows, every target comes, lengths are mixed."""
    interactions, items = tiny_data
    data = RecDataModule(
        interactions=interactions, items=items, k_core=1, max_items=12, batch_tokens=120, group_by_length=False
    )
    data.setup("fit")
    loader = data.train_dataloader()
    batches = list(loader)
    sizes = sorted(len(batch.user) for batch in batches)
    assert set(sizes[1:]) == {int(120 / 1.03) // 12}
    largest = max(batches, key=lambda batch: len(batch.user))
    assert len(largest.item_mask.sum(1).unique()) > 1
    grouped = RecDataModule(interactions=interactions, items=items, k_core=1, max_items=12, batch_tokens=120)
    grouped.setup("fit")
    assert sum(len(b.targets) for b in batches) == sum(len(b.targets) for b in grouped.train_dataloader())


def test_small_budget_is_refused() -> None:
    """A window must hold two items at least."""
    with pytest.raises(InputError, match=r"data\.max_tokens"):
        RecDataModule(max_tokens=60, max_item_tokens=48)


def test_titles_only_shortens_histories_not_items(tmp_path: Path, tiny_llm: str) -> None:
    """Tokens come from the template's first field, item texts keep all of it."""
    rows = [f"u{u},m{(u + t) % 4},{t}" for u in range(8) for t in range(4)]
    (tmp_path / "i.csv").write_text("user_id,item_id,timestamp\n" + "\n".join(rows) + "\n")
    (tmp_path / "c.csv").write_text(
        "item_id,name,kind\n" + "\n".join(f"m{i},Film {i},Drama and more" for i in range(4)) + "\n"
    )
    files = {"interactions": tmp_path / "i.csv", "items": tmp_path / "c.csv", "template": "{name}: {kind}"}
    llm = LLM(tiny_llm)
    lengths = []
    for titles_only in (False, True):
        data = RecDataModule(**files, titles_only=titles_only, k_core=0)  # type: ignore[arg-type]
        data.setup("fit")
        data.read_for(TextEncoders(llm))
        assert data.split.item_texts[0].endswith("Drama and more")
        lengths.append(data.reader.item_lengths)
        tokens = data.tokens
        assert tokens is not None
        text = llm.tokenizer.decode(tokens.span(0)[:-1])
        assert text == ("Film 0" if titles_only else "Film 0: Drama and more")
    assert (lengths[1] < lengths[0]).all()


def test_shuffled_ties_stay_within_their_timestamp() -> None:
    """Each (user, time) keeps its items, only training ones move, and something does move."""
    split = made_split([40, 30, 3])
    split = replace(split, timestamps=np.arange(73) // 6, items=np.arange(73, dtype=np.int32))
    shuffled = with_shuffled_ties(split, np.random.default_rng(0))
    keys = list(zip(split.user_of_interaction, split.timestamps, split.stages, strict=True))
    assert sorted(zip(keys, shuffled.items, strict=True)) == sorted(zip(keys, split.items, strict=True))
    later = split.stages > 0
    assert (shuffled.items[later] == split.items[later]).all()
    assert (shuffled.items != split.items).sum() > 30
    assert (split.items == np.arange(73)).all()

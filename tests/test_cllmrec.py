"""CLLMRec: the loss by hand, what is no negative, what a view may have seen, and training to the end."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from helpers import MakeData, differing, fit, prepare, tiny, validated
from lightning.pytorch import seed_everything
from torch import Tensor, nn

from anyo_lightning.data.batches import HistoryBatch
from anyo_lightning.data.datamodule import RecDataModule
from anyo_lightning.encoders.text import Reads, TextEncoders
from anyo_lightning.errors import InputError
from anyo_lightning.models.cllmrec import CLLMRec, ViewOf
from anyo_lightning.models.contrast import boundary_identities, prefixes, same_content, shared_identity
from anyo_lightning.models.e4srec import E4SRec
from anyo_lightning.runs import RunFolder
from anyo_lightning.views.prompts import Kind
from anyo_lightning.views.store import write_views
from anyo_lightning.views.written import TokenisedView, WrittenViews

VIEWS = get_args(ViewOf)


@pytest.fixture
def views_from(make_data: MakeData, tmp_path: Path) -> Callable[[Kind], Path]:
    """Files of written views: of each user's training items without the last one, every third line unread."""
    split = make_data().split

    def write(kind: Kind) -> Path:
        rows = []
        for user in range(split.users):
            items = split.item_ids[split.training_history(user)[:-1]].tolist()
            lines = [None if i % 3 == 2 else f"Like {item}" for i, item in enumerate(items)]
            rows.append(
                (str(split.user_ids[user]), items, [f"User {user}"] if kind == "summarise" else lines, "written")
            )
        write_views(tmp_path / f"{kind}.parquet", rows, kind=kind, split=split, settings="by hand")
        return tmp_path / f"{kind}.parquet"

    return write


def make_model(tiny_llm: str, *, reads: Reads = "both", **settings: Any) -> CLLMRec:
    """The variant with tiny settings."""
    encoders = TextEncoders(tiny(tiny_llm), dim=16, reads=reads)
    return CLLMRec(encoders, optimizer=partial(torch.optim.AdamW, lr=1e-2), **settings)


def prepared(model: CLLMRec, data: RecDataModule) -> tuple[CLLMRec, HistoryBatch]:
    """The model on the data, and a batch."""
    seed_everything(0, verbose=False)
    prepare(model, data)
    return model, next(iter(data.train_dataloader()))


def two_boundaries(batch: HistoryBatch, **changes: Any) -> HistoryBatch:
    """Two histories of two items, of which the second one's boundary is supervised."""
    return replace(
        batch,
        user=torch.tensor([3, 7]),
        item_ids=torch.tensor([[1, 2], [4, 5]]),
        item_mask=torch.ones(2, 2, dtype=torch.bool),
        target_ids=torch.tensor([[2, 3], [5, 6]]),
        target_mask=torch.tensor([[False, True]] * 2),
        **changes,
    )


def test_loss_by_hand(tiny_llm: str, make_data: MakeData, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two boundaries whose two views agree and that are orthogonal to each other; cosines, so lengths do not matter.

    Each of the four views has its other view at cosine 1 and the two views of the other history at cosine 0, so the
    contrastive loss is -log(e^(1/τ) / (e^(1/τ) + 2)). A history without a negative has loss 0.
    """
    model, batch = prepared(make_model(tiny_llm, views=("original", "crop"), temperature=0.5), make_data())
    two = two_boundaries(batch)
    states, other = torch.zeros(2, 16), torch.eye(16)[:2] * 3
    states[0, 0], states[1, 1] = 5.0, 0.1
    monkeypatch.setattr(model, "encode_in_batches", lambda *_, **__: other)
    expected = -math.log(math.exp(2) / (math.exp(2) + 2))
    loss, parts = model.contrastive_loss(states, two)
    assert float(loss) == pytest.approx(expected, abs=1e-6)
    assert float(parts["anchors"]) == 2
    total, parts = model.loss(states, two)
    assert total.item() == pytest.approx(parts["next_item"].item() + 0.1 * expected, abs=1e-6)
    assert float(model.contrastive_loss(states, replace(two, user=torch.tensor([3, 3])))[0]) == pytest.approx(
        0, abs=1e-6
    )
    model.mask_false_negatives = False
    same_user = model.contrastive_loss(states, replace(two, user=torch.tensor([3, 3])))[0]
    assert float(same_user) == pytest.approx(expected, abs=1e-6)


def test_weighted_loss_by_hand(tiny_llm: str, make_data: MakeData, monkeypatch: pytest.MonkeyPatch) -> None:
    """First views (1, 0) and (0, 1), second ones (.6, .8) and (0, 1): their cosines are .6 and 0, and .8 and 1.

    With τ = .5 and w = .5 the losses are -log(e^1.2 / (e^1.2 + e^0)) and -log(e^2 / (e^2 + e^.8)).
    """
    settings = {"views": ("crop", "reorder"), "temperature": 0.5, "negative_weight": 0.5}
    model, batch = prepared(make_model(tiny_llm, **settings), make_data())
    views = [torch.zeros(2, 16), torch.zeros(2, 16)]
    views[0][0, 0], views[0][1, 1] = 4.0, 1.0
    views[1][0, :2], views[1][1, 1] = torch.tensor([0.3, 0.4]), 2.0
    monkeypatch.setattr(model, "encode_in_batches", lambda *_, **__: views.pop(0))
    loss, _ = model.contrastive_loss(torch.zeros(2, 16), two_boundaries(batch))
    expected = [math.log(1 + math.exp(-1.2)), math.log(1 + math.exp(0.8 - 2))]
    assert float(loss) == pytest.approx(sum(expected) / 2, abs=1e-6)


def test_false_negatives(tiny_llm: str, make_data: MakeData) -> None:
    """One user, one target, or the same items read; padding is no item."""
    _, batch = prepared(make_model(tiny_llm, weight=0), make_data())
    batch = replace(
        batch,
        user=torch.tensor([0, 1, 0, 3, 4]),
        item_ids=torch.tensor([[1, 2], [4, 5], [6, 7], [1, 2], [1, 0]]),
        item_mask=torch.tensor([[True, True]] * 4 + [[True, False]]),
        target_ids=torch.tensor([[9, 10], [10, 11], [12, 13], [14, 15], [11, 0]]),
        target_mask=torch.tensor([[True, True]] * 4 + [[True, False]]),
    )
    rows = torch.tensor([1, 3, 5, 7, 8])
    identities = torch.cat([boundary_identities(batch)[rows], same_content(prefixes(batch, rows))], dim=1)
    shared = shared_identity(identities, identities)
    assert {(i, j) for i, j in shared.nonzero().tolist() if i < j} == {(0, 2), (0, 3), (1, 4)}
    assert bool(shared.diagonal().all())
    texts = same_content([np.array(tokens) for tokens in ([5], [6], [5], [5, 6])])
    assert {(i, j) for i, j in shared_identity(texts, texts).nonzero().tolist() if i < j} == {(0, 2)}


def test_anchors_are_boundaries_of_all_kinds(tiny_llm: str, make_data: MakeData) -> None:
    """Of all supervised boundaries as many as asked for, each with what was read before it; all if there are fewer."""
    model, batch = prepared(make_model(tiny_llm, views=("original", "crop"), anchors=7), make_data())
    found = set()
    for _ in range(60):
        rows, _ = model.find_anchors(batch)
        assert len(rows) == 7 == len(set(rows.tolist()))
        found |= set(rows.tolist())
    assert len(found) > 0.9 * len(batch.targets)
    model.anchors = 10_000
    rows, _ = model.find_anchors(batch)
    assert torch.equal(rows, torch.arange(len(batch.targets)))
    for row, items in zip(rows.tolist(), prefixes(batch, rows), strict=True):
        place, column = (int(places[row]) for places in batch.target_places)
        np.testing.assert_array_equal(items, batch.item_ids[place, : column + 1].numpy())
        assert model.data.split.items[batch.start[place] + len(items)] == batch.targets[row]


def test_views_without_a_quarter(tiny_llm: str, make_data: MakeData, monkeypatch: pytest.MonkeyPatch) -> None:
    """The quarter of each prefix whose states are smallest, or largest, in the mean of their absolute values."""
    settings = {"views": ("without_least", "without_most"), "anchors": 10_000}
    model, batch = prepared(make_model(tiny_llm, **settings), make_data(overlap=0))
    one = batch.of_rows(np.array([int(batch.item_mask.sum(1).argmax())]))
    count = int(one.item_mask.sum())
    assert count >= 8
    sizes = torch.randperm(count, generator=torch.Generator().manual_seed(0)).float()
    states = torch.zeros(count, 16)
    states[:, 3], states[:, 5] = -sizes, sizes / 2  # a sum without absolute values would order them the other way
    read: list[list[np.ndarray]] = []

    def spy(items: list[np.ndarray], **_: Any) -> Tensor:
        read.append(items)
        return torch.randn(len(items), 16)

    monkeypatch.setattr(model, "encode_in_batches", spy)
    model.contrastive_loss(states, one)
    least, most = read
    items = one.histories()[0]
    for end, without_least, without_most in zip(range(1, count + 1), least, most, strict=True):
        order = np.argsort(sizes[:end].numpy())
        dropped = end // 4
        np.testing.assert_array_equal(without_least, items[np.sort(order[dropped:])])
        np.testing.assert_array_equal(without_most, items[np.sort(order[: end - dropped])])


def test_no_view_knows_its_target(tiny_llm: str, make_data: MakeData, monkeypatch: pytest.MonkeyPatch) -> None:
    """Later items than a boundary's history change no view of it: not through states, ranks or vectors."""
    data = make_data(overlap=0)
    for view in ("importance", "without_least", "without_most"):
        model, batch = prepared(make_model(tiny_llm, reads="vectors", views=("original", view), anchors=10_000), data)
        model.eval()
        read: list[list[np.ndarray]] = []
        whole = model.encode_in_batches

        def spy(items: list[np.ndarray], read: Any = read, whole: Any = whole, **options: Any) -> Tensor:
            read.append(items)
            return whole(items, **options)

        monkeypatch.setattr(model, "encode_in_batches", spy)
        changed = batch.item_ids.clone()
        cut = 5
        changed[:, cut:] = (changed[:, cut:] + 3) % 16
        for items in (batch.item_ids, changed):
            here = replace(batch, item_ids=items)
            model.contrastive_loss(model(here), here)
        columns = batch.target_places[1]
        kept = (columns < cut).nonzero()[:, 0].tolist()
        assert 10 < len(kept) < len(columns)
        for row in kept:
            np.testing.assert_array_equal(read[0][row], read[1][row])


def test_pruning_by_states_needs_a_state_at_each_item(tiny_llm: str, make_data: MakeData) -> None:
    """Refused with windows that overlap or with one state per history, but not at weight 0."""
    views = ("without_least", "without_most")
    for options in ({"overlap": 0.5}, {"overlap": 0.0, "supervision": "last"}):
        with pytest.raises(InputError, match=r"Expected data\.supervision all and data\.overlap 0"):
            prepare(make_model(tiny_llm, views=views), make_data(**options))
    prepare(make_model(tiny_llm, views=views, weight=0), make_data())
    with pytest.raises(InputError, match=r"model\.anchors to be positive, got 0"):
        prepare(make_model(tiny_llm, anchors=0, weight=0), make_data())


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("first", ["original", "crop"])
def test_every_view_trains_what_it_should(
    first: ViewOf,
    view: ViewOf,
    tiny_llm: str,
    make_data: MakeData,
    views_from: Callable[[Kind], Path],
) -> None:
    """The contrastive loss alone reaches LoRA, projector and head; nothing stored is changed; tokens are counted."""
    file = views_from(view) if view in get_args(Kind) else None
    data = make_data(overlap=0)
    model, batch = prepared(make_model(tiny_llm, views=(first, view), views_from=file, projection_head=True), data)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    stored, texts = data.split.items.copy(), np.array(data.tokens.token_ids)
    before = batch.item_ids.clone()
    model.train()
    model.seen.tokens = 0
    loss, _ = model.contrastive_loss(model(batch), batch)
    assert loss.isfinite()
    assert model.seen.tokens > 0
    loss.backward()
    for part in ("lora_", "history_encoder.projector", "head.0", "head.2"):
        grown = [p.grad is not None and bool(p.grad.abs().sum() > 0) for n, p in model.named_parameters() if part in n]
        assert grown, part
        assert any(grown), part
    np.testing.assert_array_equal(data.split.items, stored)
    np.testing.assert_array_equal(data.tokens.token_ids, texts)
    assert torch.equal(batch.item_ids, before)


def test_views_read_what_they_say(
    tiny_llm: str,
    make_data: MakeData,
    views_from: Callable[[Kind], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is handed to the encoder, view by view."""
    settings = {"views_from": views_from("summarise"), "anchors": 10_000}
    model, batch = prepared(make_model(tiny_llm, **settings), make_data())
    histories, calls = prefixes(batch, torch.arange(len(batch.targets))), []

    def spy(of: Sequence[np.ndarray], hidden: Any = None, spans: Any = None, budget: Any = None) -> Tensor:
        calls.append((list(of), hidden, spans))
        return torch.randn(len(of), 16)

    states = model(batch)
    monkeypatch.setattr(model, "encode_histories", spy)
    monkeypatch.setattr(model, "encode_in_batches", spy)

    def read(*views: str) -> list[Any]:
        calls.clear()
        model.views = views  # type: ignore[assignment]
        if "substitute" in views:
            model.similar = (np.arange(16)[:, None] + [1, 2]) % 16
        model.contrastive_loss(states, batch)
        return list(calls)

    ((again, hidden, _),) = read("original", "original")
    assert hidden is None
    assert all(np.array_equal(a, b) for a, b in zip(again, histories, strict=True))
    ((masked, hidden, _),) = read("original", "mask")
    assert all(np.array_equal(a, b) for a, b in zip(masked, histories, strict=True))
    assert [int(of.sum()) for of in hidden] == [int(0.3 * len(items) + 1e-9) for items in histories]
    cropped, reordered = read("crop", "reorder")
    assert [len(items) for items in cropped[0]] == [max(int(0.6 * len(items) + 1e-9), 1) for items in histories]
    assert [sorted(items) for items in reordered[0]] == [sorted(items) for items in histories]
    ((substituted, *_),) = read("original", "substitute")
    changed = [(a != b).sum() for a, b in zip(substituted, histories, strict=True)]
    assert changed == [int(0.2 * len(items) + 1e-9) for items in histories]
    followed = list(zip(substituted, histories, batch.targets.tolist(), strict=True))
    assert not any((a[a != b] == target).any() for a, b, target in followed)
    similar = [np.isin((target - b[a != b]) % 16, [1, 2]).any() for a, b, target in followed]
    assert sum(similar) > 10
    ((pruned, *_),) = read("original", "importance")
    for kept, items in zip(pruned, histories, strict=True):
        scores = model.importance_scores(items)
        left = np.sort(np.argsort(scores, kind="stable")[int(0.25 * len(items) + 1e-9) :])
        np.testing.assert_array_equal(kept, items[left])
    ((texts, hidden, spans),) = read("original", "summarise")
    rows, _ = model.find_anchors(batch)
    users = batch.user[batch.target_places[0]][rows].tolist()
    assert 0 < len(texts) == len(set(users)) <= len(rows) < len(histories)
    assert all(of.all() and len(of) == 1 for of in hidden)
    assert all(len(of) == 1 and of[0][-1] == model.data.tokens.separator for of in spans)


def test_states_of_written_views_stand_at_their_anchors(
    tiny_llm: str, make_data: MakeData, views_from: Callable[[Kind], Path]
) -> None:
    """Anchors that share a view read it once: each row is what it is alone; without any there are none."""
    model, _ = prepared(make_model(tiny_llm, views_from=views_from("summarise")), make_data())
    model.eval()
    written = model._read("summarise").views
    views = [written[user][0] for user in (2, 1, 2, 4, 1)]
    model.train().seen.tokens = 0
    model.encode_written(views)
    assert model.seen.tokens == sum(len(written[user][0].spans[0]) for user in (1, 2, 4))
    states = model.eval().encode_written(views)
    for row in range(5):
        alone = model.encode_written(views[row : row + 1])
        torch.testing.assert_close(states[row : row + 1], alone, rtol=1e-4, atol=1e-5)
    assert model.encode_written([]).shape == (0, 16)


def test_importance_is_the_cosine_with_the_others(tiny_llm: str, make_data: MakeData) -> None:
    """The item that points away from the rest of the history scores least; one item alone scores 0."""
    model, _ = prepared(make_model(tiny_llm, weight=0), make_data())
    model.item_encoder.vectors[:4] = torch.zeros_like(model.item_encoder.vectors[:4])
    model.item_encoder.vectors[0, 0] = model.item_encoder.vectors[1, 0] = 2.0
    model.item_encoder.vectors[2, :2] = torch.tensor([1.0, 1.0])
    model.item_encoder.vectors[3, 1] = 9.0
    scores = model.importance_scores(np.array([3, 0, 1, 2]))
    # item 3 (0, 9) against (5, 1); 0 and 1 (2, 0) against (3, 10); 2 (1, 1) against (4, 9)
    expected = [1 / 26**0.5, 3 / 109**0.5, 3 / 109**0.5, 13 / (2 * 97) ** 0.5]
    np.testing.assert_allclose(scores, expected, rtol=1e-5)
    assert model.importance_scores(np.array([3])) == pytest.approx([0.0])


def test_a_view_that_was_written_from_the_target_is_never_used() -> None:
    """Of the others the one that shares most with the history is taken, if half of it was read."""
    views = WrittenViews(
        {5: [TokenisedView(np.array(items), [np.array([name])]) for name, items in enumerate(([7, 8, 9], [4, 5, 6]))]},
        digest="",
    )

    def found(user: int, items: list[int], target: int) -> int | None:
        view = views.find(user, np.array(items), target)
        return None if view is None else int(view.spans[0][0])

    assert found(5, [4, 5, 6, 7, 8, 9], 10) == 0
    assert found(5, [3, 4, 5, 6], 7) == 1
    assert found(5, [3, 4, 5], 6) is None  # the other view is of nothing that was read
    assert found(5, [3, 9, 8, 4, 5], 6) == 0
    assert found(5, [3, 9, 4, 5], 6) is None  # a third of the other was read
    assert found(5, [4, 9, 8], 3) == 0
    assert found(5, [6, 4], 9) == 1
    assert found(6, [4, 5], 9) is None
    views.views[5].pop()
    assert found(5, [4, 5, 6, 7], 8) is None


def test_no_state_meets_its_target_in_training(
    tiny_llm: str,
    make_data: MakeData,
    views_from: Callable[[Kind], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With short windows, random cuts and shuffled ties: no view used was written from the target."""
    data = make_data(max_items=6, random_cuts=True, shuffle_ties=True)
    model, _ = prepared(make_model(tiny_llm, views_from=views_from("summarise")), data)
    used: list[tuple[TokenisedView | None, int]] = []
    find = WrittenViews.find

    def spy(self: WrittenViews, user: int, items: np.ndarray, target: int) -> TokenisedView | None:
        view = find(self, user, items, target)
        used.append((view, target))
        return view

    monkeypatch.setattr(WrittenViews, "find", spy)
    for batch in data.train_dataloader():
        before = len(used)
        _, parts = model.loss(model(batch), batch)
        recent = used[before:]
        assert float(parts["anchors"]) == sum(view is not None for view, _ in recent)
        assert [target for _, target in recent] == batch.targets.tolist()
    assert any(view is None for view, _ in used)
    assert any(view is not None for view, _ in used)
    assert all(view is None or target not in view.items for view, target in used)


@pytest.mark.parametrize("kind", get_args(Kind))
def test_a_written_view_is_read_as_text_without_vectors(
    kind: Kind, tiny_llm: str, make_data: MakeData, views_from: Callable[[Kind], Path]
) -> None:
    """Another user's items behind the same texts give the same state: no vector of an item is read."""
    data = make_data()
    model, _ = prepared(make_model(tiny_llm, views=("original", kind), views_from=views_from(kind)), data)
    model.eval()
    view = model._read(kind).views[0][0]
    spans, count = view.spans[:2], len(view.spans[:2])
    texts = [data.tokens.separator]
    assert all(span[-1] in texts for span in spans)
    hidden = [np.ones(count, dtype=bool)]
    states = [model.encode_histories([np.full(count, item)], hidden=hidden, spans=[spans]) for item in (1, 9)]
    torch.testing.assert_close(states[0], states[1])
    if kind == "rewrite":
        np.testing.assert_array_equal(view.spans[2], data.tokens.span(int(view.items[2])))
        assert len(view.spans) == len(view.items)


def test_written_views_need_text(
    tiny_llm: str, make_data: MakeData, views_from: Callable[[Kind], Path], tmp_path: Path
) -> None:
    """Refused with vectors; a missing file is named before training; a wrong share too."""
    with pytest.raises(InputError, match="reads texts or both"):
        prepare(make_model(tiny_llm, reads="vectors"), make_data())
    prepare(make_model(tiny_llm, reads="vectors", weight=0), make_data())
    model, batch = prepared(make_model(tiny_llm, reads="vectors", views=("crop", "mask")), make_data())
    assert model.loss(model(batch), batch)[0].isfinite()
    with pytest.raises(InputError, match=r"model\.crop_share between 0 and 1"):
        prepare(make_model(tiny_llm, crop_share=1.5), make_data())
    with pytest.raises(InputError, match="anyo augment --kind summarise"):
        fit(make_model(tiny_llm, views_from=tmp_path / "none.parquet"), make_data(), tmp_path)


def test_without_weight_it_is_e4srec(tiny_llm: str, make_data: MakeData, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same parameters and the same loss, and no view is encoded or looked for."""
    model, batch = prepared(make_model(tiny_llm, weight=0, projection_head=True), make_data())
    seed_everything(0, verbose=False)
    other = prepare(E4SRec(TextEncoders(tiny(tiny_llm), dim=16, reads="both")), make_data())
    monkeypatch.setattr(model, "encode_histories", None)
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in other.named_parameters()}
    losses = []
    for of in (model, other):
        torch.manual_seed(1)
        losses.append(of.loss(of(batch), batch))
    assert torch.equal(losses[0][0], losses[1][0])
    assert losses[0][1] == {}


def test_training_lowers_both_losses_and_beats_chance(
    tiny_llm: str, make_data: MakeData, views_from: Callable[[Kind], Path], tmp_path: Path
) -> None:
    """The tiny data are loops through the catalogue; the views of a history come nearer to each other."""
    settings = {"views": ("original", "summarise"), "views_from": views_from("summarise"), "weight": 0.5}
    model, batch = prepared(make_model(tiny_llm, **settings), make_data())
    before = model.contrastive_loss(model(batch), batch)[0].item()
    model = make_model(tiny_llm, **settings)
    metrics = fit(model, make_data(), tmp_path, epochs=25).callback_metrics
    after = model.contrastive_loss(model(batch), batch)[0].item()
    assert after < 0.7 * before
    assert float(metrics["val/hr@5"]) > 0.5  # chance .31


def test_checkpoints_restore_and_resume_exactly(
    tiny_llm: str, make_data: MakeData, views_from: Callable[[Kind], Path], tmp_path: Path
) -> None:
    """Two epochs and two more are four; figures come back without the views; other views are refused in training."""
    settings: dict[str, Any] = {
        "views": ("rewrite", "substitute"),
        "views_from": views_from("rewrite"),
        "projection_head": True,
        "decay": False,
        "warmup": 0.0,
    }
    whole = fit(make_model(tiny_llm, **settings), make_data(), tmp_path / "whole", epochs=4)
    fit(make_model(tiny_llm, **settings), make_data(), tmp_path / "parts", epochs=2)
    last = RunFolder(tmp_path / "parts").last_checkpoint
    resumed = fit(make_model(tiny_llm, **settings), make_data(), tmp_path / "parts", epochs=4, ckpt_path=last)
    states = [trainer.lightning_module.state_dict() for trainer in (whole, resumed)]
    assert any(key.startswith("head.") for key in states[0])
    assert not differing(*states)
    figures = validated(resumed.lightning_module, make_data(), last)
    settings["views_from"].unlink()
    assert validated(make_model(tiny_llm, **settings), make_data(), last) == figures
    split = make_data().split
    write_views(tmp_path / "rewrite.parquet", [], kind="rewrite", split=split, settings="others")
    with pytest.raises(InputError, match="views that the run has trained with"):
        fit(make_model(tiny_llm, **settings), make_data(), tmp_path / "x", epochs=6, ckpt_path=last)

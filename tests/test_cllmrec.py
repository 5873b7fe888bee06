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
from anyo_lightning.models.cllmrec import CLLMRec, ViewOf, same_items, same_text
from anyo_lightning.models.contrast import same_history, shared_identity
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


def test_loss_by_hand(tiny_llm: str, make_data: MakeData, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two histories whose two views agree and that are orthogonal to each other; cosines, so lengths do not matter.

    Each of the four views has its other view at cosine 1 and the two views of the other history at cosine 0, so the
    contrastive loss is -log(e^(1/τ) / (e^(1/τ) + 2)). A history without a negative has loss 0.
    """
    model, batch = prepared(make_model(tiny_llm, views=("original", "crop"), temperature=0.5), make_data())
    two = replace(
        batch,
        user=torch.tensor([3, 7]),
        item_ids=torch.tensor([[1, 2], [4, 5]]),
        item_mask=torch.ones(2, 2, dtype=torch.bool),
        target_ids=torch.tensor([[2, 3], [5, 6]]),
        target_mask=torch.ones(2, 2, dtype=torch.bool),
    )
    states = torch.zeros(4, 16)
    states[1, 0], states[3, 1] = 5.0, 0.1  # the last states
    states[0, 2] = states[2, 2] = 1.0  # others, which do not count
    other = torch.eye(16)[:2] * 3
    monkeypatch.setattr(model, "encode_histories", lambda histories: other)
    expected = -math.log(math.exp(2) / (math.exp(2) + 2))
    loss, _ = model.contrastive_loss(states, two)
    assert float(loss) == pytest.approx(expected, abs=1e-6)
    total, parts = model.loss(states, two)
    assert total.item() == pytest.approx(parts["next_item"].item() + 0.1 * expected, abs=1e-6)
    assert float(model.contrastive_loss(states, replace(two, user=torch.tensor([3, 3])))[0]) == pytest.approx(
        0, abs=1e-6
    )
    model.mask_false_negatives = False
    same_user = model.contrastive_loss(states, replace(two, user=torch.tensor([3, 3])))[0]
    assert float(same_user) == pytest.approx(expected, abs=1e-6)


def test_false_negatives(tiny_llm: str, make_data: MakeData) -> None:
    """One user, one last target, or the same items read; padding is no item, an earlier target does not count."""
    _, batch = prepared(make_model(tiny_llm, weight=0), make_data())
    batch = replace(
        batch,
        user=torch.tensor([0, 1, 0, 3, 4]),
        item_ids=torch.tensor([[1, 2], [4, 5], [6, 7], [1, 2], [1, 0]]),
        item_mask=torch.tensor([[True, True]] * 4 + [[True, False]]),
        target_ids=torch.tensor([[9, 10], [10, 11], [12, 13], [14, 15], [11, 0]]),
        target_mask=torch.tensor([[True, True]] * 4 + [[True, False]]),
    )
    identities = torch.cat([same_history(batch), same_items(batch)], dim=1)
    shared = shared_identity(identities, identities)
    assert {(i, j) for i, j in shared.nonzero().tolist() if i < j} == {(0, 2), (0, 3), (1, 4)}
    assert bool(shared.diagonal().all())
    one, other = (TokenisedView(np.array([1]), [np.array([token])]) for token in (5, 6))
    alike = TokenisedView(np.array([2]), [np.array([5])])
    texts = same_text([one, None, other, alike, None], torch.arange(5))
    assert {(i, j) for i, j in shared_identity(texts, texts).nonzero().tolist() if i < j} == {(0, 3)}


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
    data = make_data()
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
    model, batch = prepared(make_model(tiny_llm, views_from=views_from("summarise")), make_data())
    histories, calls = batch.histories(), []
    targets = batch.targets[batch.last_states].tolist()

    def spy(of: Sequence[np.ndarray], hidden: Any = None, spans: Any = None) -> Tensor:
        calls.append((list(of), hidden, spans))
        return torch.randn(len(of), 16)

    monkeypatch.setattr(model, "encode_histories", spy)
    states = model(batch)

    def read(*views: str) -> list[Any]:
        calls.clear()
        model.views = views  # type: ignore[assignment]
        if "substitute" in views:
            model.similar = np.stack([(np.arange(16) + 1) % 16] * 2, axis=1)
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
    ((pruned, *_),) = read("original", "importance")
    for kept, items in zip(pruned, histories, strict=True):
        scores = model.importance_scores(items)
        left = np.sort(np.argsort(scores, kind="stable")[int(0.25 * len(items) + 1e-9) :])
        np.testing.assert_array_equal(kept, items[left])
    found = read("original", "summarise")
    usable = [
        t not in model.data.split.training_history(u)[:-1] for u, t in zip(batch.user.tolist(), targets, strict=True)
    ]
    assert 0 < sum(usable) < len(usable)
    (texts, hidden, spans), (others, *_) = found
    assert len(texts) == sum(usable)
    assert all(of.all() and len(of) == 1 for of in hidden)
    assert all(len(of) == 1 and of[0][-1] == model.data.tokens.separator for of in spans)
    kept_as_they_are = [items for items, use in zip(histories, usable, strict=True) if not use]
    assert all(np.array_equal(a, b) for a, b in zip(others, kept_as_they_are, strict=True))


def test_states_of_written_views_stand_at_their_histories(
    tiny_llm: str, make_data: MakeData, views_from: Callable[[Kind], Path]
) -> None:
    """Some histories have a view and some are read as they are: each row is what it is alone."""
    model, batch = prepared(make_model(tiny_llm, views_from=views_from("summarise")), make_data())
    model.eval()
    histories = batch.histories()[:6]
    views = [model._read("summarise").views[row][0] if row in (1, 2, 4) else None for row in range(6)]
    states = model._encode_written(views, histories)
    for row in range(6):
        alone = model._encode_written(views[row : row + 1], histories[row : row + 1])
        torch.testing.assert_close(states[row : row + 1], alone, rtol=1e-4, atol=1e-5)


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
        _, parts = model.loss(model(batch), batch)
        recent = used[-len(batch.user) :]
        assert float(parts["fallback_summarise"]) == pytest.approx(
            sum(view is None for view, _ in recent) / len(recent)
        )
        assert [target for _, target in recent] == batch.targets[batch.last_states].tolist()
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

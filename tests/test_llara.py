"""The dual encoder: its loss, negatives, mining and gradient caching."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from dual_encoders import Make, batch_of, builder, fit, maker
from helpers import LORA, MakeData, differing, prepare
from lightning.pytorch.callbacks import LambdaCallback
from torch import nn
from torch.nn import functional as F

from anyo_lightning.data.batches import HistoryBatch
from anyo_lightning.data.splits import MISSING
from anyo_lightning.encoders import live
from anyo_lightning.encoders.whitening import Whitened
from anyo_lightning.models import parts
from anyo_lightning.models.e4srec import E4SRec
from anyo_lightning.models.llara import LLaRA, sample_targets


@pytest.fixture
def make(tiny_llm: str) -> Make:
    return maker(tiny_llm)


@pytest.fixture
def built(make: Make, make_data: MakeData) -> Make:
    return builder(make, make_data)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("corrected", [True, False])
def test_loss_is_info_nce_over_the_step(built: Make, masked: bool, corrected: bool) -> None:
    """Summed by hand: every distinct target of the step is a negative, except what the user has in training."""
    model = built(mask_false_negatives=masked, popularity_correction=corrected, temperature=0.2)
    batch = batch_of(model).of_rows(np.arange(3))
    states, split = model(batch).detach(), model.data.split
    vectors, targets = model.encode_catalogue(), batch.targets.tolist()
    users = batch.user[batch.target_mask.nonzero()[:, 0]].tolist()
    counts = split.training_counts()
    total, skipped = 0.0, 0
    for state, target, user in zip(states, targets, users, strict=True):
        own, others = math.exp(float(state @ vectors[target]) / 0.2), 0.0
        for item in set(targets) - {target}:
            if masked and item in split.training_history(user):
                skipped += 1
                continue
            expected = 1 - (1 - counts[item] / counts.sum()) ** len(targets) if corrected else 1
            others += math.exp(float(state @ vectors[item]) / 0.2) / expected
        total += math.log((own + others) / own)
    loss, _ = model.loss(states, batch)
    assert loss.item() == pytest.approx(total / len(targets), rel=1e-4)
    assert (skipped > 0) == masked


@pytest.mark.parametrize("held", [None, 40])
def test_catalogue_as_keys_is_the_full_softmax(built: Make, held: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Value and gradients of a plain cross-entropy over all items' cosines, also in parts without activations."""
    model = built(keys="catalogue", temperature=0.1, learn_temperature=True).train()
    batch = next(iter(model.data.train_dataloader()))
    logits = model(batch) @ model.item_encoder(model.training_items).T / model.current_temperature()
    expected = F.cross_entropy(logits, model.position_in_training[batch.targets])
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    naive = torch.autograd.grad(expected, list(trained.values()))
    model.data.held_tokens = held
    model.item_encoder.batch_tokens = 60  # many passes
    passes: list[int] = []
    monkeypatch.setattr(live, "recomputed", lambda *inputs, whole=live.recomputed: passes.append(1) or whole(*inputs))
    loss, parts = model.loss(model(batch), batch)
    assert len(passes) > 3
    assert float(parts["temperature"]) == pytest.approx(0.1)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    found = torch.autograd.grad(loss, list(trained.values()))
    for name, one, other in zip(trained, found, naive, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5, msg=name)


def test_catalogue_as_keys_supervises_every_boundary(make: Make, make_data: MakeData, tmp_path: Path) -> None:
    """They cost no further items: each target once an epoch, and the model learns the loops."""
    model = make(keys="catalogue", targets_per_history=1)
    metrics = fit(model, make_data(), tmp_path, epochs=15).callback_metrics
    split = model.data.split
    assert model.seen.targets == 15 * sum(len(split.training_history(user)) - 1 for user in range(split.users))
    assert float(metrics["val/hr@5"]) > 0.5  # chance .31


def test_any_model_has_its_live_encoders_measured(make: Make, make_data: MakeData) -> None:
    """E4SRec with a live item tower: the full softmax that LLaRA has with the catalogue as keys at τ = 1."""
    models = []
    for kind, settings in ((E4SRec, {"temperature": 1.0}), (LLaRA, {"keys": "catalogue", "temperature": 1.0})):
        torch.manual_seed(0)
        models.append(prepare(make(kind, dim=16, whiten=True, dropout=0.0, **settings), make_data()).eval())
    batch = next(iter(models[0].data.train_dataloader()))
    for side in ("history_encoder", "item_encoder"):
        parts = [[m for m in getattr(model, side).modules() if isinstance(m, Whitened)] for model in models]
        assert [len(found) for found in parts] == [1, 1]
        assert parts[0][0].measured
    weights = [model.state_dict() for model in models]
    assert weights[0].pop("temperature.log_ratio") == 0  # E4SRec's is learned; it is 1 still
    assert not differing(*weights)
    losses = [model.loss(model(batch), batch)[0] for model in models]
    torch.testing.assert_close(*losses)


def test_a_users_own_items_are_no_negatives(built: Make) -> None:
    """All training items of a user are masked, those after the state as well; others' are not."""
    model = built()
    user = torch.tensor([4, 9])
    owned = model.owned(user, torch.arange(16))
    for row, one in enumerate(user.tolist()):
        assert owned[row].nonzero()[:, 0].tolist() == sorted(set(model.data.split.training_history(one).tolist()))
    assert owned.any()
    assert not owned.all()


def test_sampled_targets_are_some_of_the_supervised_ones(built: Make) -> None:
    """At most so many per history, all of them where there are fewer; other draws choose others."""
    model = built()
    batch = next(iter(model.data.train_dataloader()))
    chosen = sample_targets(batch, 2)
    assert not bool((chosen.target_mask & ~batch.target_mask).any())
    assert chosen.target_mask.sum(1).tolist() == batch.target_mask.sum(1).clamp(max=2).tolist()
    assert not torch.equal(chosen.target_mask, sample_targets(batch, 2).target_mask)
    assert torch.equal(sample_targets(batch, 99).target_mask, batch.target_mask)


def test_both_sides_train_lora_and_nothing_frozen(built: Make) -> None:
    """Each side alone gives every LoRA weight and the projector a gradient, and nothing else has one."""
    model = built(learn_temperature=True)
    batch = batch_of(model)
    sides = {"histories": lambda: model(batch), "items": lambda: model.item_encoder(batch.targets)}
    for side, encode in sides.items():
        model.zero_grad(set_to_none=True)
        (encode()[:, 0]).sum().backward()
        for name, parameter in model.named_parameters():
            trained = "lora_" in name or "projector" in name
            assert (parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)) == trained, (side, name)
    loss, parts = model.loss(model(batch), batch)
    loss.backward()
    assert float(model.learned_temperature.log_ratio.grad) != 0
    assert float(parts["temperature"]) == pytest.approx(0.1)


def test_a_learned_temperature_keeps_its_gradient_at_the_floor(make: Make, make_data: MakeData, tmp_path: Path) -> None:
    """A step beyond the floor is taken back before a checkpoint can be written, so that a later one can raise it."""
    seen: list[float] = []
    push = LambdaCallback(
        on_before_optimizer_step=lambda _, module, __: module.learned_temperature.log_ratio.grad.fill_(1.0),
        on_train_batch_end=lambda _, module, *__: seen.append(module.learned_temperature.log_ratio.item()),
    )
    model = make(
        learn_temperature=True, temperature=0.02, learning_rates={"learned_temperature": 3.0}, warmup=0.0, decay=False
    )
    fit(model, make_data(batch_tokens=600), tmp_path, epochs=3, callbacks=[push])
    floor = math.log(0.01 / 0.02)
    assert seen == pytest.approx([floor] * len(seen))
    assert seen
    model.zero_grad()
    nn.init.constant_(model.learned_temperature.log_ratio, floor)
    batch = batch_of(model)
    loss, parts = model.loss(model(batch), batch)
    loss.backward()
    assert float(parts["temperature"]) == pytest.approx(0.01)
    assert float(model.learned_temperature.log_ratio.grad) != 0


def test_mined_negatives_are_the_best_items_that_a_user_does_not_have(built: Make) -> None:
    """By the state before the last training item; other validation and test items change nothing."""
    model = built(hard_negatives=2, mined_negatives=4)
    assert bool((model.mined == MISSING).all())
    assert len(model.sample_mined(torch.arange(40))) == 0
    model.mine()
    mined, split, vectors = model.mined.clone(), model.data.split, model.encode_catalogue()
    for user in range(split.users):
        history = split.training_history(user)
        with torch.no_grad():
            scores = (model(model.data.collate([history[:-1]])) @ vectors.T)[0]
        scores[torch.from_numpy(history)] = -torch.inf
        left = 16 - len(set(history.tolist()))
        assert mined[user].tolist() == scores.topk(min(4, left)).indices.tolist() + [-1] * max(4 - left, 0)
    sample = model.sample_mined(torch.tensor([5, 6]))
    assert set(sample.tolist()) <= set(mined[5:7].flatten().tolist()) - {-1}
    assert len(sample) == 4
    others = np.where(split.stages > 0, (split.items + 5) % 16, split.items)
    model.data._split = replace(split, items=others)
    model.mined.fill_(-1)
    model.mine()
    assert torch.equal(model.mined, mined)


def test_mined_negatives_join_the_loss(built: Make) -> None:
    """With a list of items that are no targets, the step encodes those too; logQ leaves them alone."""
    model = built(hard_negatives=1, mined_negatives=1, popularity_correction=True)
    batch = batch_of(model).of_rows(np.arange(2))
    plain = model.loss(model(batch), batch)[0].item()
    absent = next(item for item in range(16) if item not in batch.targets.tolist())
    model.mined.fill_(absent)
    chances = model.log_chances(torch.tensor([absent, int(batch.targets[0])]), batch.targets)
    assert float(chances[0]) == 0
    assert float(chances[1]) < 0
    model.mask_false_negatives = False
    assert model.loss(model(batch), batch)[0].item() > plain


def gradients(model: LLaRA, batch: HistoryBatch) -> dict[str, torch.Tensor]:
    """Of a training step under one seed."""
    model.train().zero_grad(set_to_none=True)
    torch.manual_seed(7)
    model.loss(model(batch), batch)[0].backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_gradient_cache_equals_direct_gradients(built: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """With dropout in LoRA and before the projector: parts without activations against the same parts with them."""
    lora = {**LORA, "lora_dropout": 0.3}
    model = built(lora=lora, dropout=0.3, learn_temperature=True)
    model.data.held_tokens = 100
    batch = batch_of(model)
    passes: list[int] = []
    hook = model.backbones[0].model.register_forward_hook(lambda *_: passes.append(1))
    cached, twice = gradients(model, batch), len(passes)
    passes.clear()
    for module in (live, parts):
        monkeypatch.setattr(module, "recomputed", lambda encode, *inputs: encode(*inputs))
    direct = gradients(model, batch)
    hook.remove()
    assert twice == 2 * len(passes) > 20  # many parts, each read twice
    assert set(cached) == set(direct)
    for name, gradient in direct.items():
        torch.testing.assert_close(cached[name], gradient, rtol=1e-5, atol=1e-5, msg=name)
    other = gradients(model, batch_of(model, seed=1))
    assert any(not torch.allclose(other[name], gradient, atol=1e-4) for name, gradient in direct.items())

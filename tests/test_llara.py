"""The dual encoder: pooling, negatives, mining, gradient caching, pretext tasks, and runs that start from runs."""

import inspect
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import LORA, MakeData, differing, prepare, tiny, validated, weights
from helpers import fit as fit_without_clipping
from lightning.pytorch.callbacks import LambdaCallback
from torch import nn
from torch.nn import functional as F
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, LlamaModel

from anyo_lightning.data.batches import HistoryBatch
from anyo_lightning.data.splits import MISSING
from anyo_lightning.encoders import live
from anyo_lightning.encoders.live import LiveTextEncoders, LiveTextItems, PromptedHistory
from anyo_lightning.encoders.pretext import PretextRows, output_embeddings
from anyo_lightning.encoders.projector import Projector
from anyo_lightning.encoders.whitening import Whitened, whiten
from anyo_lightning.errors import InputError
from anyo_lightning.llm.backbone import Backbone, load_tokenizer
from anyo_lightning.llm.language_model import LLM
from anyo_lightning.losses import bag_of_tokens
from anyo_lightning.models import parts
from anyo_lightning.models.base import RetrievalModule
from anyo_lightning.models.e4srec import E4SRec
from anyo_lightning.models.llara import LLaRA, sample_targets
from anyo_lightning.models.llara_pretrain import LLaRAPretrain
from anyo_lightning.runs import RunFolder

ENCODERS = inspect.signature(LiveTextEncoders).parameters
Make = Callable[..., Any]
fit = partial(fit_without_clipping, gradient_clip_val=1.0)


@pytest.fixture
def make(tiny_llm: str) -> Make:
    """LLaRA, or its pre-training, over the tiny LLM; a setting goes to the encoders where they have it."""

    def build(kind: type[RetrievalModule] = LLaRA, lora: dict[str, Any] | None = LORA, **settings: Any) -> Any:
        own = {"dim": 16, "dropout": 0.0} if kind is LLaRA else {"dim": None, "whiten": False}
        own |= {name: settings.pop(name) for name in ENCODERS.keys() & settings.keys()}
        encoders = LiveTextEncoders(tiny(tiny_llm, lora=lora), **own)
        return kind(encoders, **({"optimizer": partial(torch.optim.AdamW, lr=1e-2)} | settings))

    return build


@pytest.fixture
def built(make: Make, make_data: MakeData) -> Make:
    """The same on the data, with LoRA away from zero, in evaluation mode."""

    def build(kind: type[RetrievalModule] = LLaRA, data: dict[str, Any] | None = None, **settings: Any) -> Any:
        torch.manual_seed(0)
        module = prepare(make(kind, **settings), make_data(**(of_kind(kind) | (data or {}))))
        for name, parameter in module.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
        return module.eval()

    return build


def of_kind(kind: type[RetrievalModule]) -> dict[str, Any]:
    """What the pre-training asks of the data."""
    return {"supervision": "last"} if kind is LLaRAPretrain else {}


def batch_of(module: RetrievalModule, seed: int = 0) -> HistoryBatch:
    """The first training batch, with two random targets per history."""
    torch.manual_seed(seed)
    return sample_targets(next(iter(module.data.train_dataloader())), 2)


# --- pooling ---------------------------------------------------------------------------------------------------------


def test_items_are_pooled_at_their_own_eos_whatever_the_batch(built: Make, tiny_llm: str) -> None:
    """Text, prompt, EOS, read alone: the last state of the LLM; beside 15 others: the same."""
    model = built(dim=None, whiten=False, self_prompt=" itself")
    tokenizer = load_tokenizer(tiny_llm)
    together = model.item_encoder(torch.arange(16))
    prompt, end = tokenizer(" itself")["input_ids"], tokenizer.eos_token_id
    for item, text in enumerate(model.data.split.item_texts):
        tokens = [*tokenizer(text)["input_ids"], *prompt, end]
        expected = F.normalize(model.backbones[0](torch.tensor([tokens]))[0, -1], dim=0)
        torch.testing.assert_close(together[item], expected, rtol=1e-4, atol=1e-5)
    model.item_encoder.batch_tokens = 40  # other passes, same vectors, in the order asked for
    order = torch.tensor([7, 0, 7, 12])
    torch.testing.assert_close(model.item_encoder(order), together[order], rtol=1e-4, atol=1e-5)
    assert model.item_encoder(torch.empty(0, dtype=torch.long)).shape == (0, 32)


def test_text_is_cut_before_prompt_and_eos(built: Make) -> None:
    """The longest item loses the end of its text, not its pooled token."""
    model = built(data={"max_item_tokens": 5})
    (text,) = model.item_encoder.texts(torch.tensor([5]))
    assert len(text) == 4
    assert model.item_encoder.token_count(torch.tensor([5])) == 4 + len(model.item_encoder.suffix)
    assert model.item_encoder.suffix[-1] == model.item_encoder.reader.end


def test_added_tokens_are_pooled_by_their_mean_and_trained(built: Make) -> None:
    """Their rows get gradients, the LLM's own table has none, and the vector is the mean over their states."""
    model = built(dim=None, whiten=False, pooled_tokens=3)
    reader, items = model.item_encoder.reader, model.item_encoder
    (text,) = items.texts(torch.tensor([2]))
    before = torch.tensor([[*text, *items.suffix[:-3]]])
    embeddings = torch.cat([model.backbones[0].embed(before), reader.added[None]], dim=1)
    states = model.backbones[0](input_embeddings=embeddings)[0, -3:]
    torch.testing.assert_close(items(torch.tensor([2, 5]))[0], F.normalize(states.mean(0), dim=0), rtol=1e-4, atol=1e-5)
    items(torch.arange(4))[:, 0].sum().backward()
    assert bool((reader.added.grad.abs().sum(1) > 0).all())
    assert model.backbones[0].model.get_input_embeddings().weight.grad is None


@pytest.mark.parametrize("pooled_tokens", [0, 2])
def test_last_supervision_ends_histories_in_the_next_prompt(built: Make, pooled_tokens: int) -> None:
    """The prompt stands where the last separator was; a padded row has the state that it has alone."""
    settings = {"dim": None, "whiten": False, "next_prompt": " next", "pooled_tokens": pooled_tokens}
    model = built(data={"supervision": "last"}, **settings)
    assert isinstance(model.history_encoder, PromptedHistory)
    data, reader = model.data, model.item_encoder.reader
    histories = [np.array([3]), np.array([1, 5, 2])]
    states = model(data.collate(histories))
    prompt = load_tokenizer(*model.backbones[0].source)(" next")["input_ids"]
    for state, history in zip(states, histories, strict=True):
        tokens = [*np.concatenate([data.tokens.span(item) for item in history])[:-1], *prompt]
        row = torch.tensor([[*tokens, *[reader.end] * reader.count]])
        places = len(tokens) + torch.arange(reader.count)
        expected = F.normalize(reader(row, places[None, None])[0, 0], dim=0)
        torch.testing.assert_close(state, expected, rtol=1e-4, atol=1e-5)


def test_states_and_items_are_unit_vectors(built: Make) -> None:
    """Both sides, with a projector."""
    model = built()
    states = model(batch_of(model))
    torch.testing.assert_close(states.norm(dim=1), torch.ones(len(states)))
    torch.testing.assert_close(model.encode_catalogue().norm(dim=1), torch.ones(16))


@pytest.mark.parametrize("supervision", ["all", "last"])
def test_both_sides_are_whitened_before_training(make: Make, make_data: MakeData, supervision: str) -> None:
    """Items reach the projector as `whiten` makes them of their own states; histories are measured, too."""
    model = prepare(make(dim=None), make_data(supervision=supervision))
    items, histories = (
        next(module for module in encoder.modules() if isinstance(module, Whitened))
        for encoder in (model.item_encoder, model.history_encoder)
    )
    assert items is not histories
    for side in (items, histories):
        assert float((side.rotation - torch.eye(32)).abs().max()) > 0.1
        assert float(side.mean.abs().max()) > 0.01
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    items.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output)))
    model.encode_catalogue()
    ((states, whitened),) = seen
    torch.testing.assert_close(whitened, whiten(states), rtol=1e-3, atol=1e-3)


def test_init_from_a_run_keeps_its_whitening(make: Make, make_data: MakeData, tmp_path: Path) -> None:
    """Measured again on trained states it would be another basis than the one the projectors have learned."""
    fit(make(), make_data(), tmp_path, epochs=1)
    saved = weights(RunFolder(tmp_path).best_checkpoint)
    again = prepare(make(init_from=tmp_path), make_data())
    assert not differing(saved, {key: again.state_dict()[key] for key in saved})


def test_nothing_is_drawn_before_the_first_mining(built: Make) -> None:
    """So that the first epoch is that of a run without mined negatives, dropout and all."""
    model = built(hard_negatives=2, mined_negatives=4)
    before = torch.get_rng_state()
    assert len(model.sample_mined(torch.arange(3))) == 0
    assert torch.equal(torch.get_rng_state(), before)


def test_whitening_meets_no_other_default_device(make: Make, make_data: MakeData) -> None:
    """Lightning builds models with a GPU as the default device."""
    model = make()
    with torch.device("meta"):
        prepare(model, make_data())
    assert {p.device.type for p in [*model.parameters(), *model.buffers()]} == {"cpu"}


def test_items_have_a_perceptron_of_their_own_where_asked(built: Make) -> None:
    """`hidden` gives items other weights than histories have; without it both share one map."""
    for hidden, shared in ((None, True), (24, False)):
        model = built(hidden=hidden)
        sides = (model.history_encoder, model.item_encoder)
        of_histories, of_items = (next(m for m in side.modules() if isinstance(m, Projector)) for side in sides)
        assert (of_histories is of_items) == shared
        assert of_items.map[0].out_features == (hidden or 16)


def test_a_bidirectional_backbone_is_refused(tiny_bert: str, make_data: MakeData) -> None:
    """EOS would be the first token as well as the last one: it is a causal model's pooling."""
    data = make_data(supervision="last", max_tokens=40, max_item_tokens=20)
    with pytest.raises(InputError, match="causal backbone"):
        prepare(LLaRA(LiveTextEncoders(LLM(tiny_bert, dtype="float32"))), data)


# --- loss and negatives ----------------------------------------------------------------------------------------------


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
    for kind, settings in ((E4SRec, {}), (LLaRA, {"keys": "catalogue", "temperature": 1.0})):
        torch.manual_seed(0)
        models.append(prepare(make(kind, dim=16, whiten=True, dropout=0.0, **settings), make_data()).eval())
    batch = next(iter(models[0].data.train_dataloader()))
    for side in ("history_encoder", "item_encoder"):
        parts = [[m for m in getattr(model, side).modules() if isinstance(m, Whitened)] for model in models]
        assert [len(found) for found in parts] == [1, 1]
        assert parts[0][0].measured
    assert not differing(*(model.state_dict() for model in models))
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


# --- gradient caching ------------------------------------------------------------------------------------------------


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


# --- pre-training ----------------------------------------------------------------------------------------------------

TEXTS = [np.array([11, 12, 13]), np.array([21])]


def pretext_rows(self_prompt: list[int]) -> PretextRows:
    return PretextRows.of(TEXTS, self_prompt=self_prompt, next_prompt=[8, 9], end=0, count=1)


def test_pretext_rows_by_hand() -> None:
    """Tokens, positions and mask of a row of three tokens and one of one, which is padded."""
    rows = pretext_rows([5, 6])
    assert rows.token_ids.tolist() == [[11, 12, 13, 5, 6, 0, 8, 9, 0], [21, 5, 6, 0, 8, 9, 0, 0, 0]]
    assert rows.position_ids[0].tolist() == [0, 1, 2, 3, 4, 5, 3, 4, 5]
    assert rows.position_ids[1, :7].tolist() == [0, 1, 2, 3, 1, 2, 3]
    assert rows.pooled.tolist() == [[[5], [8]], [[3], [6]]]
    seen = [row.nonzero()[:, 0].tolist() for row in rows.attention_mask[0]]
    assert seen[:6] == [list(range(i + 1)) for i in range(6)]
    assert seen[6:] == [[0, 1, 2, 6], [0, 1, 2, 6, 7], [0, 1, 2, 6, 7, 8]]


def test_next_does_not_see_self(built: Make) -> None:
    """Other SELF tokens change SELF's state and nothing in NEXT's; each is the state of its own text and prompt."""
    model = built(LLaRAPretrain)
    reader = model.item_encoder.reader

    def states(rows: PretextRows) -> torch.Tensor:
        return reader(rows.token_ids, rows.pooled, attention_mask=rows.attention_mask, position_ids=rows.position_ids)

    one, other = states(pretext_rows([5, 6])), states(pretext_rows([30, 6]))
    torch.testing.assert_close(one[:, 1], other[:, 1], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(one[:, 0], other[:, 0], atol=1e-2)
    for row, text in enumerate(TEXTS):
        for task, prompt in enumerate(([5, 6], [8, 9])):
            alone = model.backbones[0](torch.tensor([[*text, *prompt, 0]]))[0, -1]
            torch.testing.assert_close(one[row, task], alone, rtol=1e-4, atol=1e-5)


def test_pretext_in_bfloat16_falls_to_sdpa(tiny_llm: str) -> None:
    """The blocked kernel knows no mask of pairs: `auto` gives the states of `sdpa`."""
    rows = pretext_rows([5, 6])
    options = {"attention_mask": rows.attention_mask, "position_ids": rows.position_ids}
    make = partial(Backbone, tiny_llm, dtype="bfloat16")
    auto, sdpa = (make(attention=kind)(rows.token_ids, **options) for kind in ("auto", "sdpa"))
    assert torch.equal(auto, sdpa)
    with pytest.raises(InputError, match="attention auto or sdpa"):
        make(attention="eager")(rows.token_ids, **options)


def test_bag_of_tokens_by_hand() -> None:
    """-(1/2) (log p_0 + log p_1) for logits (1, 0) is (0.3133 + 1.3133) / 2."""
    bags, half = torch.tensor([[0, 0], [0, 1]]), torch.tensor([0.5, 0.5])
    assert float(bag_of_tokens(torch.tensor([[1.0, 0.0]]), torch.eye(2), bags, half)) == pytest.approx(0.8133, abs=1e-4)


def test_pretext_losses_by_hand(built: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """EBAE: the mean over a step's distinct items; EBAR: over its pairs; distinct tokens of each text count once."""
    model = built(LLaRAPretrain, data={"max_items": 1, "overlap": 0}, next_prompt="")
    logged: dict[str, torch.Tensor] = {}
    monkeypatch.setattr(model, "log_dict", lambda values, **_: logged.update(values))
    batch = next(iter(model.data.train_dataloader()))
    assert batch.item_ids.shape[1] == 1
    loss = model.training_step(batch, 0)
    head = model.backbones[0].model.get_input_embeddings().weight

    def bag_loss(state: torch.Tensor, item: int) -> float:
        tokens = list(set(model.item_encoder.texts(torch.tensor([item]))[0].tolist()))
        return -float((head @ state).log_softmax(0)[tokens].mean())

    items = sorted(set(batch.item_ids[:, 0].tolist()))
    self_states, next_states = model.pretext_states(torch.tensor(items)).unbind(1)
    ebae = np.mean([bag_loss(state, item) for state, item in zip(self_states, items, strict=True)])
    pairs = zip(batch.item_ids[:, 0].tolist(), batch.targets.tolist(), strict=True)
    ebar = np.mean([bag_loss(next_states[items.index(item)], target) for item, target in pairs])
    assert float(logged["train/ebae"]) == pytest.approx(ebae, rel=1e-4)
    assert float(logged["train/ebar"]) == pytest.approx(ebar, rel=1e-4)
    share = len(batch.targets) / model.data.targets_per_batch  # so that all targets of an epoch weigh the same
    assert float(loss) == pytest.approx(share * (ebae + ebar), rel=1e-4)
    assert model.seen.targets == len(batch.targets)


@pytest.mark.parametrize("settings", [{"next_prompt": ""}, {}, {"pooled_tokens": 2}])
def test_pretext_states_are_what_the_dual_encoder_reads(settings: dict[str, Any], built: Make) -> None:
    """SELF is an item's vector, NEXT the query of a history of that item, by which it is validated, up to length."""
    model = built(LLaRAPretrain, **settings)
    states = F.normalize(model.pretext_states(torch.arange(16)), dim=-1)
    torch.testing.assert_close(states[:, 0], model.item_encoder(torch.arange(16)), rtol=1e-4, atol=1e-5)
    histories = model(model.data.collate([np.array([item]) for item in range(16)]))
    torch.testing.assert_close(states[:, 1], histories, rtol=1e-4, atol=1e-5)


def test_output_embeddings(tiny_llm: str, tmp_path: Path) -> None:
    """Tied: the input's; untied: loaded; an untied model that was saved without them is refused."""
    tied = Backbone(tiny_llm)
    assert output_embeddings(tied) is tied.model.get_input_embeddings().weight
    config = LlamaConfig.from_pretrained(tiny_llm, tie_word_embeddings=False)
    whole = LlamaForCausalLM(config)
    for name, model in (("whole", whole), ("headless", LlamaModel(config))):
        model.save_pretrained(str(tmp_path / name))
        AutoTokenizer.from_pretrained(tiny_llm).save_pretrained(str(tmp_path / name))
    found = output_embeddings(Backbone(str(tmp_path / "whole"), dtype="float32"))
    torch.testing.assert_close(found, whole.lm_head.weight.detach())
    with pytest.raises(InputError, match="output embeddings"):
        output_embeddings(Backbone(str(tmp_path / "headless")))


# --- runs ------------------------------------------------------------------------------------------------------------


def test_training_beats_chance(make: Make, make_data: MakeData, tmp_path: Path) -> None:
    """The data are loops through the catalogue: a model that learns anything ranks the next item high."""
    model = make(hard_negatives=1, mined_negatives=3, mask_false_negatives=False)
    trainer = fit(model, make_data(), tmp_path, epochs=25)
    assert float(trainer.callback_metrics["val/hr@5"]) > 0.5  # chance .31
    assert model.seen.targets < 25 * int((model.data.split.stages == 0).sum())
    assert bool((model.mined >= 0).any())


def test_pretraining_lowers_both_losses(make: Make, make_data: MakeData, tmp_path: Path) -> None:
    """And its run starts LLaRA: the same LoRA, the same added tokens, everything else afresh."""
    options = {"max_items": 1, "overlap": 0, "supervision": "last"}
    first = fit(make(LLaRAPretrain, pooled_tokens=2), make_data(**options), tmp_path / "first", epochs=1)
    trainer = fit(make(LLaRAPretrain, pooled_tokens=2), make_data(**options), tmp_path / "pre", epochs=15)
    for part in ("train/ebae", "train/ebar"):
        assert float(trainer.callback_metrics[part]) < float(first.callback_metrics[part]) - 0.25
    assert float(trainer.callback_metrics["val/hr@5"]) > 0.5  # chance .31
    saved = weights(RunFolder(tmp_path / "pre").best_checkpoint)
    started = make(pooled_tokens=2, hard_negatives=1, learn_temperature=True, init_from=tmp_path / "pre")
    state = prepare(started, make_data()).state_dict()
    assert any("lora_B" in key for key in saved)
    assert any(key.endswith("reader.added") for key in saved)
    for key, value in saved.items():
        assert key.startswith("history_encoder.") or torch.equal(state[key], value), key
    rotation = state["item_encoder.head.0.rotation"]  # of the weights that it starts from
    assert float((rotation - torch.eye(32)).abs().max()) > 0.1
    assert float(state["learned_temperature.log_ratio"]) == 0
    queries = make(pooled_tokens=2, init_from=tmp_path / "pre")  # a history encoder of another kind, of the same LLM
    prepare(queries, make_data(supervision="last"))
    assert torch.equal(queries.state_dict()["item_encoder.reader.added"], saved["item_encoder.reader.added"])
    names = [name for name, parameter in queries.named_parameters() if parameter.requires_grad and "lora" in name]
    assert all(name.startswith("history_encoder.backbone.") for name in names)  # as with supervision of all
    fresh = make(LLaRAPretrain, pooled_tokens=2, init_from=tmp_path / "llara")
    fit(make(pooled_tokens=2), make_data(), tmp_path / "llara", epochs=1)
    with pytest.raises(InputError, match="checkpoint of model LLaRAPretrain, got LLaRA"):
        prepare(fresh, make_data(**options))
    with pytest.raises(InputError, match="unknown"):  # the pre-training's added tokens have no place here
        prepare(make(init_from=tmp_path / "pre"), make_data())


@pytest.mark.parametrize(("first", "then"), [(0, 2), (2, 0), (2, 2)])
def test_a_run_starts_from_one_with_other_negatives(
    make: Make, make_data: MakeData, tmp_path: Path, first: int, then: int
) -> None:
    """In-batch negatives first, mined ones then, or the reverse: the weights are taken over, the lists are not."""
    fit(make(hard_negatives=first, mined_negatives=4), make_data(), tmp_path, epochs=1)
    model = prepare(make(hard_negatives=then, mined_negatives=4, init_from=tmp_path), make_data())
    saved = weights(RunFolder(tmp_path).best_checkpoint)
    state = model.state_dict()
    assert any("lora_B" in key and bool(value.any()) for key, value in saved.items())
    for key, value in saved.items():
        assert key == "mined" or torch.equal(state[key], value), key
    assert ("mined" in state) == (then > 0)
    assert not then or bool((model.mined == MISSING).all())


def test_checkpoint_restores_exactly(make: Make, make_data: MakeData, tmp_path: Path) -> None:
    """Mined lists and all, without the LLM; the figures are the same."""
    settings = {"hard_negatives": 2, "mined_negatives": 4, "learn_temperature": True, "pooled_tokens": 2}
    model = make(**settings)
    trainer = fit(model, make_data(), tmp_path, epochs=2)
    last = RunFolder(tmp_path).last_checkpoint
    saved = weights(last)
    assert torch.equal(saved["mined"], model.mined)
    assert not any("base_layer" in key or "embed_tokens" in key for key in saved)
    first = validated(trainer.lightning_module, make_data(), last)
    other = make(**settings)
    assert validated(other, make_data(), last) == first
    assert torch.equal(other.mined, model.mined)


def test_a_resumed_run_equals_an_uninterrupted_one(make: Make, make_data: MakeData, tmp_path: Path) -> None:
    """Four epochs in two parts, mining after the second and the fourth, with dropout."""
    settings = {"hard_negatives": 2, "mined_negatives": 4, "refresh_epochs": 2, "dropout": 0.2}
    settings |= {"warmup": 0.0, "decay": False}
    whole = fit(make(**settings), make_data(batch_tokens=600), tmp_path / "whole", epochs=4).lightning_module
    fit(make(**settings), make_data(batch_tokens=600), tmp_path / "parts", epochs=2)
    start = RunFolder(tmp_path / "parts").last_checkpoint
    parts = fit(make(**settings), make_data(batch_tokens=600), tmp_path / "parts", epochs=4, ckpt_path=start)
    assert parts.global_step > 8
    assert not differing(whole.state_dict(), parts.lightning_module.state_dict())
    assert whole.seen == parts.lightning_module.seen


def test_mining_takes_the_vectors_of_the_validation(
    make: Make, make_data: MakeData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The catalogue is encoded once per epoch; a frozen LLM encodes it once in all."""
    passes: list[int] = []
    encode = LiveTextItems._encode

    def counted(self: LiveTextItems, ids: torch.Tensor) -> torch.Tensor:
        if len(ids) == 16 and not torch.is_grad_enabled():
            passes.append(1)
        return encode(self, ids)

    monkeypatch.setattr(LiveTextItems, "_encode", counted)
    fit(make(hard_negatives=1), make_data(), tmp_path / "lora", epochs=3)
    assert len(passes) == 4  # before training, and at each validation
    passes.clear()
    model = make(lora=None, hard_negatives=1)
    fit(model, make_data(), tmp_path / "frozen", epochs=3)
    assert len(passes) == 1
    assert model.item_encoder.token_count(torch.arange(16)) == 0


def test_settings_that_cannot_work_are_refused(make: Make, make_data: MakeData) -> None:
    """One sentence each."""
    refused: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 0.005, "learn_temperature": True},
        {"targets_per_history": 0},
        {"hard_negatives": 9, "mined_negatives": 3},
        {"hidden": 8, "dim": None},
        {"hard_negatives": 3, "keys": "catalogue"},
    ]
    for settings in refused:
        with pytest.raises(InputError, match=next(iter(settings))):
            make(**settings)
    with pytest.raises(InputError, match=r"backbone\.lora"):
        prepare(make(lora=None, dim=None), make_data())
    with pytest.raises(InputError, match=r"backbone\.lora"):
        prepare(make(LLaRAPretrain, lora=None), make_data(supervision="last"))
    with pytest.raises(InputError, match="titles_only"):
        prepare(make(LLaRAPretrain), make_data(supervision="last", titles_only=True))
    for settings, supervision in (({}, "all"), ({"dim": 16}, "last"), ({"whiten": True}, "last")):
        with pytest.raises(InputError, match=r"encoders\.dim null, model\.encoders\.whiten false and data"):
            prepare(make(LLaRAPretrain, **settings), make_data(supervision=supervision))

"""HLLM: histories of live item vectors, gradients through both language models, what a step counts."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import LORA, MakeData, assert_same_values_and_gradients, fit, prepare, tiny
from torch import Tensor, nn
from torch.nn import functional as F

from anyo_lightning.data.datamodule import RecDataModule
from anyo_lightning.encoders.hierarchical import HierarchicalEncoders
from anyo_lightning.encoders.live import LiveTextEncoders
from anyo_lightning.encoders.whitening import Whitened
from anyo_lightning.errors import InputError
from anyo_lightning.models.csft import CSFT
from anyo_lightning.models.llara import LLaRA


def hllm(llm: str, data: RecDataModule, **settings: Any) -> LLaRA:
    """Built, with LoRA away from zero; the item language model has one layer less."""
    torch.manual_seed(0)
    encoders = HierarchicalEncoders(
        tiny(llm), item_backbone=tiny(llm, layers=2), **({"dim": 16, "dropout": 0.0} | settings)
    )
    model = prepare(LLaRA(encoders, keys="catalogue"), data)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize("supervision", ["all", "last"])
@pytest.mark.parametrize("whiten", [True, False])
def test_the_user_model_reads_what_the_item_model_makes_of_each_text(
    supervision: str, whiten: bool, tiny_llm: str, make_data: MakeData
) -> None:
    """Each item alone, then each history alone, by the two language models and the maps between them."""
    data = make_data(max_items=6, supervision=supervision)
    model = hllm(tiny_llm, data, whiten=whiten).eval()
    history, items = model.history_encoder, model.item_encoder
    user_llm, item_llm = model.backbones
    assert len(user_llm.model.layers) == len(item_llm.model.layers) + 1
    batch = next(iter(data.train_dataloader()))
    found, expected = model(batch), []
    for row, (ids, mask) in enumerate(zip(batch.item_ids, batch.item_mask, strict=True)):
        vectors = []
        for item in ids[mask]:
            (text,) = items.texts(item[None])
            token_ids = torch.tensor([[*text, *items.suffix]])
            state = items.head[0](item_llm(token_ids)[0, -1])
            vectors.append(history.injection.norm(state))
            ranked = F.normalize(items.head[1](state), dim=0)
            torch.testing.assert_close(model.encode_items(item[None])[0], ranked, rtol=1e-4, atol=1e-5)
        after = [user_llm.embed(history.response)] if supervision == "last" else []
        read = torch.cat([user_llm.embed(history.prompt), history.injection.linear(torch.stack(vectors)), *after])
        states = user_llm(input_embeddings=read[None])[0]
        places = batch.target_mask[row].nonzero()[:, 0] + len(history.prompt)
        states = states[-1:] if supervision == "last" else states[places]
        expected.append(F.normalize(history.projector[0](states), dim=1))
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(len(found)))


def test_an_item_that_occurs_often_is_encoded_once_with_the_gradients_of_all(
    tiny_llm: str, make_data: MakeData
) -> None:
    """The same values and gradients as with each occurrence encoded by itself; each distinct item counts once."""
    model = hllm(tiny_llm, make_data(max_items=6), whiten=False)
    injection, items = model.history_encoder.injection.eval(), model.item_encoder
    ids = torch.tensor([[3, 7, 3], [7, 7, 0]])
    trained = [parameter for parameter in injection.parameters() if parameter.requires_grad and parameter.ndim == 2]
    trained = [parameter for parameter in trained if parameter is not items.head[1].map[0].weight]
    one_by_one = torch.stack(
        [injection.norm(injection.whitened(items.states(item[None])[0])) for item in ids.flatten()]
    )
    expected = injection.linear(one_by_one).view(2, 3, -1)
    assert_same_values_and_gradients(injection(ids), expected, trained)
    assert injection.tokens_of(ids) == items.token_count(torch.tensor([0, 3, 7]))
    hidden = injection(ids, ids == 7)
    torch.testing.assert_close(hidden[0, 1], injection.linear.bias)
    torch.testing.assert_close(hidden[ids != 7], expected[ids != 7])


def test_both_models_learn_from_either_side(tiny_llm: str, make_data: MakeData) -> None:
    """States alone have gradients in both language models, items alone in theirs; the whitening is measured once."""
    data = make_data(max_items=6)
    model = hllm(tiny_llm, data)
    (whitened,) = {part for part in model.modules() if isinstance(part, Whitened)}
    assert whitened.measured
    user_llm, item_llm = model.backbones
    batch = next(iter(data.train_dataloader()))

    def reached(value: Tensor) -> tuple[bool, bool]:
        model.zero_grad()
        value.backward()
        return tuple(
            any(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in llm.parameters())
            for llm in (user_llm, item_llm)
        )

    assert reached(model(batch)[:, 0].sum()) == (True, True)
    assert reached(model.encode_items(model.training_items)[:, 0].sum()) == (False, True)
    assert {id(p) for p in user_llm.parameters()}.isdisjoint(id(p) for p in item_llm.parameters())


def test_a_frozen_item_model_is_read_once(tiny_llm: str, make_data: MakeData) -> None:
    """Without LoRA its states are kept, of all items, and no token of it counts."""
    data = make_data(max_items=6)
    encoders = HierarchicalEncoders(tiny(tiny_llm), item_backbone=tiny(tiny_llm, lora=None), dim=16)
    model = prepare(LLaRA(encoders), data)
    passes: list[int] = []
    model.backbones[1].register_forward_pre_hook(lambda *_: passes.append(1))
    for batch in data.train_dataloader():
        model.loss(model(batch).float(), batch)
    assert sum(passes) <= 1  # when the whitening was measured, or now
    assert model.history_encoder.injection.tokens_of(torch.arange(5)) == 0


def test_a_step_counts_the_tokens_of_both(tiny_llm: str, make_data: MakeData) -> None:
    """Items and one prompt of the user LLM, the texts of the histories' items, and those of the loss."""
    data = make_data(max_items=6)
    model = hllm(tiny_llm, data).train()
    history, items = model.history_encoder, model.item_encoder
    batch = next(iter(data.train_dataloader()))
    loss, _ = model.loss(model(batch).float(), batch)
    prompts = len(history.prompt) * (len(batch.user) - 1)
    expected = batch.token_count - prompts + items.token_count(torch.unique(batch.item_ids))
    assert model.seen.tokens == expected + items.token_count(model.training_items)
    loss.backward()
    assert model.seen.tokens == expected + items.token_count(model.training_items)


def test_tokens_do_not_depend_on_the_memory_that_was_found(tiny_llm: str, make_data: MakeData, tmp_path: Path) -> None:
    """What is computed again, in a backward pass or in the trial before training, is not counted again."""
    counted = []
    for held in (None, "auto"):
        model = LLaRA(HierarchicalEncoders(tiny(tiny_llm), item_backbone=tiny(tiny_llm), dim=16))
        fit(model, make_data(max_items=6, micro_batch_tokens=held), tmp_path / str(held), epochs=1)
        counted.append(model.seen.tokens)
    assert counted[0] == counted[1] > 0


def test_the_user_model_can_start_from_a_fine_tuned_one(tiny_llm: str, make_data: MakeData, tmp_path: Path) -> None:
    """CSFT's LoRA reads histories; the item LLM starts as it is."""
    csft = CSFT(LiveTextEncoders(tiny(tiny_llm), dim=None, whiten=False))
    fit(csft, make_data(max_tokens=300), tmp_path / "csft", epochs=1)
    encoders = HierarchicalEncoders(tiny(tiny_llm), item_backbone=tiny(tiny_llm), dim=16)
    model = prepare(LLaRA(encoders, init_from=tmp_path / "csft"), make_data(max_items=6))
    trained = dict(csft.backbones[0].named_parameters())
    lora = [name for name in trained if "lora_B" in name]
    assert all(torch.equal(model.backbones[0].get_parameter(name), trained[name]) for name in lora)
    assert all(not bool(model.backbones[1].get_parameter(name).any()) for name in lora)
    assert any(bool(trained[name].any()) for name in lora)


def test_the_item_model_has_a_rate_of_its_own(tiny_llm: str, make_data: MakeData, tmp_path: Path) -> None:
    """At a rate of 0 it stays as it was, and the user LLM is trained."""
    reader = "history_encoder.injection.items.reader"
    model = LLaRA(
        HierarchicalEncoders(tiny(tiny_llm), item_backbone=tiny(tiny_llm), dim=16), learning_rates={reader: 0.0}
    )
    fit(model, make_data(max_items=6), tmp_path, epochs=1)
    changed = [
        any(bool(p.abs().sum()) for name, p in llm.named_parameters() if "lora_B" in name) for llm in model.backbones
    ]
    assert changed == [True, False]


def test_bad_options(tiny_llm: str, tiny_bert: str, make_data: MakeData) -> None:
    """Shares out of range, and models that see what they should predict."""
    with pytest.raises(InputError, match=r"input_dropout in \[0, 1\), got 1"):
        HierarchicalEncoders(tiny(tiny_llm), item_backbone=tiny(tiny_llm), input_dropout=1)
    for pair in ((tiny_llm, tiny_bert), (tiny_bert, tiny_llm)):
        user, item = (tiny(folder, lora=LORA if folder == tiny_llm else None) for folder in pair)
        with pytest.raises(InputError, match="Expected a causal backbone"):
            prepare(LLaRA(HierarchicalEncoders(user, item_backbone=item)), make_data(max_items=6))

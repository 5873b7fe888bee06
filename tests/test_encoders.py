"""History and item encoders: states at the right places, of the right items, with gradients where they belong."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import LORA, MakeData
from torch import nn
from transformers import BertConfig, BertModel

from anyo_lightning.data.batches import HistoryBatch, HistoryDataset
from anyo_lightning.data.datamodule import RecDataModule
from anyo_lightning.data.windows import training_windows
from anyo_lightning.encoders.history import Injection, ItemTokenHistory, TextHistory
from anyo_lightning.encoders.id_history import Body, IdHistory, Positions
from anyo_lightning.encoders.items import FrozenTextItems
from anyo_lightning.encoders.projector import Projector
from anyo_lightning.encoders.text import TextEncoders
from anyo_lightning.encoders.whitening import whiten
from anyo_lightning.errors import InputError
from anyo_lightning.llm.backbone import Backbone
from anyo_lightning.llm.language_model import LLM


@pytest.fixture
def data(make_data: MakeData) -> RecDataModule:
    """The tiny data set, in windows of 12 items."""
    return make_data(max_items=12, max_tokens=200)


def training_batch(data: RecDataModule, rows: list[int]) -> HistoryBatch:
    """These windows as one batch."""
    length = data.max_tokens if data.tokens else data.max_items
    windows = training_windows(
        data.split,
        data.reader.item_lengths,
        max_items=data.max_items,
        max_length=length,
        supervision=data.supervision,
    )
    return HistoryDataset.training(data.split, windows, data.tokens)[rows]


def text_history(tiny_llm: str, data: RecDataModule, *, injected: bool = False) -> TextHistory:
    """A text encoder in float32, so that equalities hold to rounding."""
    torch.manual_seed(0)
    backbone = Backbone(tiny_llm, dtype="float32", lora=LORA)
    data.read_for(TextEncoders(LLM(tiny_llm)))
    injection = Injection(torch.randn(16, 6), backbone=backbone) if injected else None
    return TextHistory(backbone, projector=Projector(32, 8), supervision="all", injection=injection)


def assert_causal(encoder: nn.Module, *, alone: HistoryBatch, together: HistoryBatch) -> None:
    """The first history's states are the same beside others, and another last item changes the last one only."""
    before = encoder(alone)
    torch.testing.assert_close(encoder(together)[: len(alone.targets)], before, rtol=1e-4, atol=1e-5)
    changed = alone.item_ids.clone()
    changed[0, -1] = (changed[0, -1] + 1) % 16
    after = encoder(replace(alone, item_ids=changed))
    torch.testing.assert_close(before[:-1], after[:-1], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(before[-1], after[-1], atol=1e-4)


@pytest.mark.parametrize("injected", [False, True])
def test_text_states_do_not_depend_on_the_batch(tiny_llm: str, data: RecDataModule, injected: bool) -> None:
    """A history alone has the states that it has beside a longer one."""
    encoder = text_history(tiny_llm, data, injected=injected).eval()
    together = training_batch(data, [0, 1, 2])
    states = encoder(together).split(together.target_mask.sum(1).tolist())
    for row in range(3):
        torch.testing.assert_close(encoder(training_batch(data, [row])), states[row], rtol=1e-4, atol=1e-5)


def test_text_state_is_read_at_the_separator_and_sees_no_later_item(tiny_llm: str, data: RecDataModule) -> None:
    """Another last item changes the last state and none before it."""
    encoder = text_history(tiny_llm, data).eval()
    batch = training_batch(data, [0])
    assert batch.token_ids is not None
    assert batch.boundaries is not None
    last_but_one = int(batch.boundaries[0, -2])
    changed = batch.token_ids.clone()
    changed[0, last_but_one + 1 : -1] = 5
    before, after = encoder(batch), encoder(replace(batch, token_ids=changed))
    torch.testing.assert_close(before[:-1], after[:-1], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(before[-1], after[-1], atol=1e-3)


def test_injected_vector_stands_at_the_separator(tiny_llm: str, data: RecDataModule) -> None:
    """Another vector of the last item changes the last state alone; injecting the separator's embedding, none."""
    encoder = text_history(tiny_llm, data, injected=True).eval()
    assert encoder.injection is not None
    batch = training_batch(data, [0])
    last = int(batch.item_ids[0, -1])
    alone = (batch.item_ids[0] == last).sum() == 1
    before = encoder(batch)
    encoder.injection.item_vectors[last] += 1
    after = encoder(batch)
    assert not torch.allclose(before[-1], after[-1], atol=1e-3)
    assert not alone or torch.allclose(before[:-1], after[:-1], atol=1e-5)
    plain = TextHistory(encoder.backbone, projector=encoder.projector, supervision="all")(batch)
    nn.init.zeros_(encoder.injection.linear.weight)
    separator = encoder.backbone.embed(torch.tensor([data.tokens.separator]))[0]  # type: ignore[union-attr]
    encoder.injection.linear.bias.data.copy_(separator)
    torch.testing.assert_close(encoder(batch), plain, rtol=1e-4, atol=1e-5)


def test_only_lora_and_projector_are_trained(tiny_llm: str, data: RecDataModule) -> None:
    """Every LoRA and projector weight gets a gradient, once LoRA's B is not zero; nothing else has one."""
    encoder = text_history(tiny_llm, data)
    for name, parameter in encoder.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    encoder(training_batch(data, [0, 1])).square().sum().backward()
    for name, parameter in encoder.named_parameters():
        trained = "lora_" in name or name.startswith("projector")
        assert parameter.requires_grad == trained, name
        assert (parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)) == trained, name


def test_bidirectional_backbone_needs_last_supervision(tiny_bert: str, data: RecDataModule) -> None:
    """It would see the items that it should predict; with `last` its state ignores padding."""
    backbone = Backbone(tiny_bert, dtype="float32")
    with pytest.raises(InputError, match=r"data\.supervision last"):
        TextHistory(backbone, projector=Projector(32, 8), supervision="all")
    data.supervision, data.max_tokens = "last", 60
    data.read_for(TextEncoders(LLM(tiny_bert)))
    encoder = TextHistory(backbone, projector=Projector(32, 8), supervision="last").eval()
    states = encoder(training_batch(data, [0, 7]))
    torch.testing.assert_close(states[:1], encoder(training_batch(data, [0])), rtol=1e-4, atol=1e-5)


def test_bidirectional_backbone_cannot_read_vectors(tiny_bert: str) -> None:
    """It would see the items that it should predict."""
    backbone = Backbone(tiny_bert, dtype="float32")
    with pytest.raises(InputError, match="causal backbone"):
        ItemTokenHistory(
            backbone,
            injection=Injection(torch.randn(16, 6), backbone=backbone),
            projector=Projector(32, 8),
            prompt=[1],
            response=[1],
            supervision="all",
        )


@pytest.mark.parametrize("supervision", ["all", "last"])
def test_item_tokens_are_causal_and_ignore_padding(tiny_llm: str, data: RecDataModule, supervision: str) -> None:
    """States alone equal those in a padded batch; a later item changes no earlier state."""
    torch.manual_seed(0)
    backbone = Backbone(tiny_llm, dtype="float32")
    encoder = ItemTokenHistory(
        backbone,
        injection=Injection(torch.randn(16, 6), backbone=backbone),
        projector=Projector(32, 8),
        prompt=[3, 4, 5],
        response=[6, 7],
        supervision=supervision,
    ).eval()
    data.supervision = supervision  # type: ignore[assignment]
    assert_causal(encoder, alone=training_batch(data, [0]), together=training_batch(data, [0, 9]))


@pytest.mark.parametrize("body", ["paper", "recbole"])
@pytest.mark.parametrize("positions", ["start", "end"])
def test_id_history_is_causal_and_ignores_padding(data: RecDataModule, body: Body, positions: Positions) -> None:
    """The same for SASRec."""
    torch.manual_seed(0)
    encoder = id_history(body=body, positions=positions, std=1.0).eval()
    assert_causal(encoder, alone=training_batch(data, [0]), together=training_batch(data, [0, 1, 2]))


def id_history(*, std: float, **options: Any) -> IdHistory:
    """SASRec's encoder of width 8, two layers, all matrices of one size: nothing is too small to see."""
    encoder = IdHistory(nn.Embedding(16, 8), dim=8, max_items=12, layers=2, heads=2, dropout=0.5, **options)
    for parameter in encoder.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=std)
    return encoder


def test_positions_from_the_end_do_not_depend_on_what_came_before(data: RecDataModule) -> None:
    """With all but the latest items hidden and unattended, the last position is that of a history of one item."""
    torch.manual_seed(0)
    encoder = id_history(positions="end", std=1.0).eval()
    seen: list[torch.Tensor] = []
    encoder.transformer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    encoder(data.collate([np.array([7]), np.array([4, 5, 7]), np.array([1, 2, 3, 4, 7])]))
    (inputs,) = seen
    torch.testing.assert_close(inputs[0, 0], inputs[1, 2])
    torch.testing.assert_close(inputs[0, 0], inputs[2, 4])
    assert not torch.allclose(inputs[2, 3], encoder.embedding(torch.tensor(4)) * 8**0.5 + encoder.position[0])


def test_recbole_body_is_that_of_bert(data: RecDataModule) -> None:
    """With the same weights, transformers' BERT as a decoder gives the same states; dropouts are where BERT's are."""
    torch.manual_seed(0)
    encoder = id_history(body="recbole", std=0.5).eval()
    config = BertConfig(
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=12,
        is_decoder=True,
    )
    bert = BertModel(config, add_pooling_layer=False).eval()
    nn.init.zeros_(bert.embeddings.token_type_embeddings.weight)
    bert.embeddings.position_embeddings.weight.data.copy_(encoder.position)
    for block, layer in zip(encoder.transformer.layers, bert.encoder.layer, strict=True):
        attention = layer.attention
        for part, rows in zip(("query", "key", "value"), block.self_attn.in_proj_weight.chunk(3), strict=True):
            getattr(attention.self, part).weight.data.copy_(rows)
            nn.init.zeros_(getattr(attention.self, part).bias)
        attention.output.dense.load_state_dict(block.self_attn.out_proj.state_dict())
        layer.intermediate.dense.load_state_dict(block.linear1.state_dict())
        layer.output.dense.load_state_dict(block.linear2.state_dict())
    batch = training_batch(data, [0])
    with torch.no_grad():
        expected = bert(inputs_embeds=encoder.embedding(batch.item_ids)).last_hidden_state[batch.target_mask]
    torch.testing.assert_close(encoder(batch), expected, rtol=1e-4, atol=1e-5)
    assert [block.dropout.p for block in encoder.transformer.layers] == [0, 0]
    assert [block.dropout1.p for block in encoder.transformer.layers] == [0.5, 0.5]
    assert [block.self_attn.dropout for block in encoder.transformer.layers] == [0.5, 0.5]


def test_residual_starts_at_zero_and_leaves_unseen_items_alone() -> None:
    """At the start vectors are the text's; a step moves those of trained items only."""
    torch.manual_seed(0)
    texts = torch.randn(9, 5)
    trained = torch.tensor([True] * 6 + [False] * 3)
    projector = Projector(5, 4, norm=False)
    items = FrozenTextItems(texts, projector=projector, trained=trained, id_residual=True)
    ids = torch.arange(9)
    start = items(ids)
    torch.testing.assert_close(start, FrozenTextItems(texts, projector=projector, trained=trained)(ids))
    assert items.residual is not None
    items(ids).sum().backward()
    assert (items.residual.weight.grad[:6] == 1).all()
    assert (items.residual.weight.grad[6:] == 0).all()
    nn.init.ones_(items.residual.weight)
    torch.testing.assert_close(items(ids), start + trained[:, None].float())


def test_whitened_vectors_have_identity_covariance() -> None:
    """More items than dimensions: mean 0 and covariance 1; fewer: nothing blows up."""
    torch.manual_seed(0)
    vectors = torch.randn(500, 6, dtype=torch.float64) @ torch.randn(6, 6, dtype=torch.float64) + 3
    white = whiten(vectors, shrinkage=0)
    torch.testing.assert_close(white.mean(0), torch.zeros(6, dtype=torch.float64), atol=1e-9, rtol=0)
    torch.testing.assert_close(white.T @ white / 500, torch.eye(6, dtype=torch.float64))
    few = whiten(torch.randn(4, 50))
    assert few.isfinite().all()
    assert few.norm(dim=1).max() < 10


@pytest.mark.parametrize("kind", ["text", "both", "id"])
def test_a_hidden_item_is_not_known(tiny_llm: str, data: RecDataModule, kind: str) -> None:
    """Two histories that differ in a hidden item alone have one state; unhidden they differ."""
    if kind == "id":
        encoder: nn.Module = IdHistory(nn.Embedding(16, 8), dim=8, max_items=12, layers=1, heads=2, dropout=0.0)
    else:
        encoder = text_history(tiny_llm, data, injected=kind == "both")
    encoder.eval()
    histories = [np.array([1, 2, 3]), np.array([1, 9, 3])]
    hidden = [np.array([False, True, False])] * 2
    states = encoder(data.collate(histories, hidden=hidden))
    torch.testing.assert_close(states[0], states[1])
    shown = encoder(data.collate(histories))
    assert shown.shape == (2, 8)
    assert not torch.allclose(shown[0], shown[1], atol=1e-3)
    assert not torch.allclose(shown[0], states[0], atol=1e-3)


def test_any_history_is_read_as_a_training_window_is(tiny_llm: str, data: RecDataModule) -> None:
    """`collate` of a window's own items gives the state at its last boundary."""
    encoder = text_history(tiny_llm, data, injected=True).eval()
    batch = training_batch(data, [0, 3, 5])
    states = encoder(batch)[batch.last_states]
    torch.testing.assert_close(encoder(data.collate(batch.histories())), states, rtol=1e-4, atol=1e-5)

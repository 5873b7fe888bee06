"""A prefix that is read once for all rows: states and gradients are those of a prefix in each row."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from helpers import started_backbone
from torch import Tensor, nn
from torch.nn import functional as F

from anyo_lightning.data.batches import HistoryBatch
from anyo_lightning.encoders.history import Injection, ItemTokenHistory
from anyo_lightning.encoders.projector import Projector
from anyo_lightning.llm import attention, backbone
from anyo_lightning.llm.attention import automatic_attention, causal_attention
from anyo_lightning.llm.backbone import Backbone
from anyo_lightning.llm.shared_prefix import FAMILIES

SMALL = {
    **{"vocab_size": 256, "num_hidden_layers": 3, "hidden_size": 32, "intermediate_size": 64, "head_dim": 8},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
PREFIX, ROWS, TOKENS = 5, 4, 7


def pass_of(model: Backbone, *, read: Any = None, prefix: int = PREFIX, tokens: int = TOKENS) -> list[Tensor]:
    """States, and the gradients of the rows' embeddings and of LoRA."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 190, (ROWS, tokens), generator=generator)
    rows = model.embed(ids).detach().requires_grad_()
    states = model(input_embeddings=rows, prefix=model.embed(torch.arange(1, 1 + prefix)), read=read)
    weight = torch.randn(states.shape, generator=generator)
    return [states.detach(), *torch.autograd.grad((states * weight).sum(), [rows, *trained])]


def in_each_row(monkeypatch: pytest.MonkeyPatch, model: Backbone, **options: Any) -> list[Tensor]:
    """`pass_of` with sharing switched off."""
    with monkeypatch.context() as patch:
        patch.setattr(backbone, "can_share", lambda *_: False)
        return pass_of(model, **options)


def assert_close(found: list[Tensor], expected: list[Tensor], *, states: float = 1e-5, gradients: float = 1e-4) -> None:
    """Relative to the size of each tensor."""
    for place, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert float((one - other).norm()) <= (gradients if place else states) * float(other.norm())


def tokens_seen(model: Backbone) -> list[int]:
    """Filled with the number of tokens that each feed-forward block reads."""
    seen: list[int] = []
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][..., 0].numel()))
    return seen


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("read", [None, (torch.tensor([0, 3, 1, 3]), torch.tensor([6, 0, 3, 6]))], ids=["all", "some"])
def test_equal_to_a_prefix_in_each_row(
    read: Any, checkpointing: bool, tiny_llm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With and without recomputed activations, all states or some; the prefix costs its tokens once."""
    model = started_backbone(tiny_llm, gradient_checkpointing=checkpointing)
    seen = tokens_seen(model)
    expected = in_each_row(monkeypatch, model, read=read)
    assert seen[0] == ROWS * (PREFIX + TOKENS)
    seen.clear()
    assert_close(pass_of(model, read=read), expected)
    assert seen[0] == PREFIX + ROWS * TOKENS
    assert len(seen) == (6 if checkpointing else 3)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision(dtype: str, tiny_llm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As far apart as rounding puts them; float16 takes torch's attention."""
    model = started_backbone(tiny_llm, dtype=dtype)
    found, expected = pass_of(model), in_each_row(monkeypatch, model)
    assert_close(found, expected, states=0.05, gradients=0.1)


@pytest.mark.parametrize("name", FAMILIES)
def test_families_that_share(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is told of the layout through all of its layers; a window longer than a row changes nothing."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(name, **SMALL)
    transformers.AutoModel.from_config(config).save_pretrained(str(tmp_path))
    model = started_backbone(str(tmp_path))
    assert model.shares_prefix(PREFIX + TOKENS)
    seen = tokens_seen(model)
    found = pass_of(model)
    assert seen == [PREFIX + ROWS * TOKENS] * 3
    assert_close(found, in_each_row(monkeypatch, model))


@pytest.mark.parametrize(
    ("config", "options"),
    [
        (transformers.GPT2Config(vocab_size=256, n_embd=32, n_layer=2, n_head=4), {}),
        (transformers.Gemma2Config(**SMALL), {}),  # eager attention
        (transformers.MistralConfig(**SMALL, sliding_window=8), {}),
        (transformers.LlamaConfig(**SMALL), {"attention": "sdpa"}),
        (transformers.LlamaConfig(**SMALL), {"attention": "eager"}),
    ],
    ids=["gpt2", "gemma2", "window", "sdpa", "eager"],
)
def test_others_read_it_in_each_row(config: Any, options: dict[str, str], tmp_path: Path) -> None:
    """Unknown families, other attentions and short windows: the states are those of whole rows."""
    torch.manual_seed(0)
    transformers.AutoModel.from_config(config).save_pretrained(str(tmp_path))
    model = started_backbone(str(tmp_path), **options).eval()
    assert not model.shares_prefix(PREFIX + TOKENS)
    prefix, rows = model.embed(torch.arange(1, 1 + PREFIX)), model.embed(torch.arange(8, 29).view(3, 7))
    whole = model(input_embeddings=torch.cat([prefix.expand(3, -1, -1), rows], dim=1))
    read = torch.tensor([0, 2]), torch.tensor([6, 1])
    torch.testing.assert_close(model(input_embeddings=rows, prefix=prefix), whole[:, PREFIX:])
    torch.testing.assert_close(model(input_embeddings=rows, prefix=prefix, read=read), whole[:, PREFIX:][read])


def test_no_prefix_and_one_row(tiny_llm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty prefix is none; the states after a layer are those of whole rows."""
    model = started_backbone(tiny_llm)
    rows = model.embed(torch.arange(8, 29).view(3, 7))
    torch.testing.assert_close(model(input_embeddings=rows, prefix=rows[0, :0]), model(input_embeddings=rows))
    whole = model(input_embeddings=torch.cat([rows[0, :2].expand(3, -1, -1), rows], dim=1), layer=1)
    torch.testing.assert_close(model(input_embeddings=rows, prefix=rows[0, :2], layer=1), whole[:, 2:])
    torch.testing.assert_close(model(input_embeddings=rows[:1], prefix=rows[0, :2], layer=1), whole[:1, 2:])


@pytest.mark.parametrize(("tokens", "keys"), [(1, 4), (7, 20), (130, 135), (300, 1000)])
def test_attention_to_earlier_keys(tokens: int, keys: int) -> None:
    """Ours and torch's bias against a mask that is written out, values and gradients in float64."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 4, tokens, 8), (2, 2, keys, 8), (2, 2, keys, 8)]
    inputs = [torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_() for shape in shapes]
    mask = torch.ones(tokens, keys, dtype=torch.bool).tril(keys - tokens)
    expected = F.scaled_dot_product_attention(*inputs, attn_mask=mask, enable_gqa=True)
    weight = torch.randn(expected.shape, dtype=torch.float64, generator=generator)
    gradients = torch.autograd.grad((expected * weight).sum(), inputs)
    for found in (
        causal_attention(*inputs, scaling=8**-0.5),
        attention._attend(*inputs, dropout=0.0, scaling=None),  # torch's, in float64
    ):
        torch.testing.assert_close(found, expected)
        for one, other in zip(torch.autograd.grad((found * weight).sum(), inputs), gradients, strict=True):
            torch.testing.assert_close(one, other)


def test_rows_do_not_see_each_other(tiny_llm: str) -> None:
    """A changed row changes no other; a changed prefix changes all."""
    model = started_backbone(tiny_llm)
    prefix, rows = model.embed(torch.arange(1, 4)), model.embed(torch.arange(8, 29).view(3, 7))
    other = rows.clone()
    other[1] += 1
    before, after = (model(input_embeddings=one, prefix=prefix).detach() for one in (rows, other))
    changed = (before - after).abs().amax((1, 2))
    assert changed[1] > 0.1
    assert float(changed[[0, 2]].max()) < 1e-5
    moved = model(input_embeddings=rows, prefix=prefix.flip(0)).detach()
    assert float((before - moved).abs().amax(2).min()) > 1e-4


def batch_of(lengths: list[int], items: int) -> HistoryBatch:
    """Histories of some lengths, every item supervised."""
    count = max(lengths)
    mask = torch.arange(count) < torch.tensor(lengths)[:, None]
    ids = torch.randint(0, items, mask.shape, generator=torch.Generator().manual_seed(0))
    index = torch.arange(len(lengths))
    return HistoryBatch(index, index, ids, mask, ids, mask, token_count=sum(lengths) + 6 * len(lengths))


@pytest.mark.parametrize("supervision", ["all", "last"])
def test_item_vectors_behind_a_prompt(supervision: str, tiny_llm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """States and gradients of the encoder, response marker and all, whose batch counts the prompt once."""
    model = started_backbone(tiny_llm)
    seen = tokens_seen(model)
    encoder = ItemTokenHistory(
        model,
        injection=Injection(torch.randn(20, 16, generator=torch.Generator().manual_seed(1)), backbone=model),
        projector=Projector(32, 8),
        prompt=[5, 6, 7, 8],
        response=[9, 10] if supervision == "last" else [],
        supervision=supervision,
    )
    batch = batch_of([3, 6, 1], items=20)
    trained = [parameter for parameter in encoder.parameters() if parameter.requires_grad]
    results = []
    for shared in (True, False):
        monkeypatch.setattr(backbone, "can_share", lambda *_, shared=shared: shared)
        states = encoder(batch)
        results.append([states.detach(), *torch.autograd.grad(states.square().sum(), trained)])
    assert_close(*results)
    own = 6 + (2 if supervision == "last" else 0)
    assert seen[0] == 4 + 3 * own
    assert seen[3] == 3 * (4 + own)
    assert encoder.tokens_read(batch) == batch.token_count
    monkeypatch.undo()
    assert encoder.tokens_read(batch) == batch.token_count - 4 * 2
    assert encoder.tokens_read(batch, [np.array([0, 2]), np.array([1])]) == batch.token_count - 4 * 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_attention_is_torchs_where_blocks_do_not_fit(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows longer than the blocks are for, and other dtypes: the same numbers."""
    monkeypatch.setattr(attention, "LONGEST", 10)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, heads, 5 + 3 * 7, 8, generator=generator).to(dtype) for heads in (4, 2, 2))
    module = nn.Module()
    module.is_causal = True
    found, _ = automatic_attention(module, query, key, value, None, shared_prefix=(5, 7))
    own = torch.tensor([-1] * 5 + [row for row in range(3) for _ in range(7)])
    place = torch.arange(26)
    mask = (place[:, None] >= place) & ((own[:, None] == own) | (own == -1))
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
    torch.testing.assert_close(found, expected.transpose(1, 2))


@pytest.mark.real
def test_equal_on_the_real_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three layers in float32 and bfloat16."""
    for dtype, states, gradients in (("float32", 1e-5, 1e-4), ("bfloat16", 0.02, 0.05)):
        model = started_backbone("smollm2-135m-instruct", dtype=dtype, layers=3)
        assert_close(pass_of(model), in_each_row(monkeypatch, model), states=states, gradients=gradients)

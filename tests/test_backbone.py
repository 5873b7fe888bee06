"""Backbone: what is loaded, what is trained, and that a state means what it should."""

import os
import re
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers import LORA, assert_same_values_and_gradients
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers.utils import is_flash_attn_2_available

from anyo_lightning.errors import InputError
from anyo_lightning.hardware import fast_dtype
from anyo_lightning.internals import recompute_activations
from anyo_lightning.llm import attention
from anyo_lightning.llm.attention import automatic_attention, causal_attention
from anyo_lightning.llm.backbone import Backbone, load_tokenizer
from anyo_lightning.llm.evaluation_mode import evaluating
from anyo_lightning.llm.last_layer import READ_ALONE
from anyo_lightning.llm.selfcheck import self_check


@pytest.fixture
def ids() -> torch.Tensor:
    """Two rows of seven tokens."""
    return torch.randint(1, 190, (2, 7), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("attention", ["auto", "sdpa", "eager"])
def test_self_check_accepts_a_sound_model(tiny_llm: str, tiny_bert: str, dtype: str, attention: str) -> None:
    """Every dtype and attention passes: padding on both sides, causality, drift."""
    for folder in (tiny_llm, tiny_bert):
        backbone = Backbone(folder, dtype=dtype, attention=attention, lora=LORA).train()
        self_check(backbone, load_tokenizer(folder))
        assert backbone.training


def test_states_equal_transformers_own(tiny_llm: str, ids: torch.Tensor) -> None:
    """The states are those of the model that transformers loads; embeddings may stand in for tokens."""
    backbone = Backbone(tiny_llm, dtype="float32").eval()
    expected = backbone.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).last_hidden_state
    assert backbone.causal
    assert backbone.hidden_size == 32
    torch.testing.assert_close(backbone(ids), expected)
    torch.testing.assert_close(backbone(input_embeddings=backbone.embed(ids)), expected)


def test_first_layers_give_the_state_after_that_layer(tiny_llm: str, ids: torch.Tensor) -> None:
    """A model cut to two layers has the whole model's state after layer two, and the norm applied to it."""
    whole, cut = Backbone(tiny_llm, dtype="float32").eval(), Backbone(tiny_llm, dtype="float32", layers=2).eval()
    assert len(cut.model.layers) == 2
    assert cut.parameters_total < whole.parameters_total
    torch.testing.assert_close(cut(ids), whole.model.norm(whole(ids, layer=2)))
    torch.testing.assert_close(whole(ids, layer=0), whole.embed(ids))


def test_the_last_layer_is_computed_where_a_state_is_read(tiny_llm: str, ids: torch.Tensor) -> None:
    """But for keys and values; with gradient checkpointing everywhere; states and gradients are equal."""
    backbone = Backbone(tiny_llm, dtype="float32", lora=LORA)
    for name, parameter in backbone.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    last = backbone.model.layers[-1]
    parts = [layer.mlp.up_proj for layer in backbone.model.layers]
    parts += [last.self_attn.q_proj, last.self_attn.o_proj, last.self_attn.k_proj]
    rows, columns = torch.tensor([[0], [1]]), torch.tensor([[1, 4, 4], [0, 6, 2]])
    weight = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0))
    seen: list[int] = []
    for part in parts:
        part.base_layer.register_forward_hook(lambda _, inputs, output: seen.append(output[..., 0].numel()))
    results = []
    for checkpointing in (False, True):
        if checkpointing:
            recompute_activations(backbone.model)
        seen.clear()
        states = backbone(ids, read=(rows, columns))
        assert sorted(seen) == sorted([14] * len(parts) if checkpointing else [14, 14, 14, 6, 6, 6])
        trained = [parameter for parameter in backbone.parameters() if parameter.requires_grad]
        results.append((states, *torch.autograd.grad((states * weight).sum(), trained)))
    torch.testing.assert_close(backbone(ids)[rows, columns], results[0][0])
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-4)
    backbone = Backbone(tiny_llm, dtype="float32", lora=LORA)
    assert backbone(ids, read=(rows[:0, 0], columns[:0, 0])).shape == (0, 32)


def test_reading_leaves_a_forward_of_others(tiny_llm: str, ids: torch.Tensor) -> None:
    """Hooks of accelerate are a `forward` of the instance: they run in each pass, and stay."""
    backbone = Backbone(tiny_llm, dtype="float32")
    block, calls = backbone.model.layers[-1].mlp, []
    whole = block.forward
    block.forward = lambda states: calls.append(states.shape) or whole(states)
    for _ in range(2):
        backbone(ids, read=(torch.tensor([0]), torch.tensor([3])))
    backbone(ids)
    assert calls == [(1, 1, 32), (1, 1, 32), (2, 7, 32)]


@pytest.mark.parametrize("name", READ_ALONE)
def test_families_whose_last_layer_reads_alone(name: str, tmp_path: Path) -> None:
    """States and gradients with `read` are those without."""
    torch.manual_seed(0)
    small = SMALL_DECODER | {"head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = transformers.AutoConfig.for_model(name, **small)
    transformers.AutoModel.from_config(config).save_pretrained(str(tmp_path))
    backbone = Backbone(str(tmp_path), dtype="float32", lora=LORA)
    for key, parameter in backbone.named_parameters():
        if "lora_B" in key:
            nn.init.normal_(parameter, std=0.1)
    ids, places = torch.arange(1, 19).view(2, 9), (torch.tensor([0, 1, 1]), torch.tensor([8, 0, 3]))
    weight = torch.randn(3, 32)
    trained = [parameter for parameter in backbone.parameters() if parameter.requires_grad]
    sizes: list[int] = []
    backbone.model.layers[-1].mlp.up_proj.base_layer.register_forward_hook(lambda *at: sizes.append(at[2].shape[1]))
    results = [
        (states, *torch.autograd.grad((states * weight).sum(), trained))
        for states in (backbone(ids)[places], backbone(ids, read=places))
    ]
    assert sizes == [9, 3]
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-4)


def test_lora_weights_alone_are_trained(tiny_llm: str, ids: torch.Tensor) -> None:
    """LoRA weights are float32 and get gradients; nothing else does; frozen keys are exactly the rest."""
    backbone = Backbone(tiny_llm, dtype="bfloat16", lora=LORA)
    nn.init.normal_(backbone.model.layers[0].mlp.up_proj.lora_B["default"].weight)
    backbone(ids).float().square().mean().backward()
    trained = {name for name, parameter in backbone.named_parameters() if parameter.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    for name, parameter in backbone.named_parameters():
        assert parameter.dtype == (torch.float32 if name in trained else torch.bfloat16)
        assert (parameter.grad is not None) == (name in trained)
    assert set(backbone.frozen_state_keys()) | trained == set(backbone.state_dict())
    assert not set(backbone.frozen_state_keys()) & trained


def test_auto_is_what_the_hardware_has(tiny_llm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16 only where the CPU or the GPU multiplies in it; the identity names which it is."""
    for capabilities, dtype in (
        ({"avx2": True, "avx512_bf16": False}, "float32"),
        ({"avx512_bf16": True}, "bfloat16"),
        ({"amx_bf16": True}, "bfloat16"),
        ({"neon": True, "bf16": True}, "bfloat16"),
        ({"neon": True}, "float32"),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=capabilities: found, raising=False)
        backbone = Backbone(tiny_llm)
        assert backbone.identity["dtype"] == dtype
        assert backbone.dtype == next(backbone.parameters()).dtype == getattr(torch, dtype)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for native in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, native=native: native)
        assert fast_dtype() == ("bfloat16" if native else "float32")


@pytest.mark.parametrize("name", ["_is_avx512_bf16_supported", "_is_amx_tile_supported", None])
def test_auto_on_a_torch_without_capabilities(monkeypatch: pytest.MonkeyPatch, name: str | None) -> None:
    """Torch 2.10 and older lack `get_capabilities`: either of two sets of instructions is enough."""
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    for known in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, known, lambda known=known: known == name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert fast_dtype() == ("float32" if name is None else "bfloat16")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_product_runs_in_the_dtype(dtype: torch.dtype, tiny_llm: str, ids: torch.Tensor) -> None:
    """Inputs and outputs of all base and LoRA layers are of it, with no autocast around and inside one."""
    backbone = Backbone(tiny_llm, dtype=str(dtype).removeprefix("torch."), lora={**LORA, "lora_dropout": 0.1})
    seen: set[torch.dtype] = set()
    for module in backbone.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda _, inputs, output: seen.update((inputs[0].dtype, output.dtype)))
    assert backbone(ids).dtype == dtype
    with torch.autocast("cpu", dtype=torch.bfloat16):
        backbone(ids)
    assert seen == {dtype}


def test_gradients_after_a_frozen_pass_in_one_autocast(tiny_llm: str, ids: torch.Tensor) -> None:
    """A pass under no_grad must not leave cast weights without gradients to the next pass."""
    backbone = Backbone(tiny_llm, dtype="bfloat16", lora=LORA)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with torch.no_grad():
            backbone(ids)
        backbone(ids).float().square().mean().backward()
    gradients = [parameter.grad for parameter in backbone.parameters() if parameter.requires_grad]
    assert all(gradient is not None for gradient in gradients)
    assert any(float(gradient.abs().sum()) > 0 for gradient in gradients if gradient is not None)


def test_lora_can_be_disabled(tiny_llm: str, ids: torch.Tensor) -> None:
    """Inside the context the states are the frozen model's; afterwards LoRA acts and trains again."""
    frozen, backbone = Backbone(tiny_llm, dtype="float32").eval(), Backbone(tiny_llm, dtype="float32", lora=LORA).eval()
    for name, parameter in backbone.named_parameters():
        if "lora_B" in name:
            nn.init.constant_(parameter, 0.1)
    adapted = backbone(ids)
    with backbone.with_lora_disabled():
        torch.testing.assert_close(backbone(ids), frozen(ids))
    torch.testing.assert_close(backbone(ids), adapted)
    assert not torch.allclose(adapted, frozen(ids))
    assert all(parameter.requires_grad == ("lora_" in name) for name, parameter in backbone.named_parameters())


def test_evaluating_gives_each_part_its_mode_back(tiny_bert: str, ids: torch.Tensor) -> None:
    """A loaded model trains, dropout and all; inside the context nothing does, and an error does not change that."""
    backbone = Backbone(tiny_bert, lora=LORA)
    assert all(part.training for part in backbone.modules())
    still = next(part for part in backbone.modules() if isinstance(part, nn.Dropout)).eval()
    with suppress(ZeroDivisionError), evaluating(backbone):
        assert not any(part.training for part in backbone.modules())
        assert not backbone(ids).requires_grad
        _ = 1 / 0
    assert [part for part in backbone.modules() if not part.training] == [still]
    assert backbone(ids).requires_grad


def test_gradient_checkpointing_changes_no_gradient(tiny_llm: str, ids: torch.Tensor) -> None:
    """Recomputed activations give the same gradients."""
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(1)
        backbone = Backbone(tiny_llm, dtype="float32", lora=LORA, gradient_checkpointing=checkpointing).train()
        backbone(ids).square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in backbone.parameters() if p.grad is not None]))
    torch.testing.assert_close(gradients[0], gradients[1])


def test_identity_is_the_content_and_the_settings(tiny_llm: str, tmp_path: Path) -> None:
    """A copied folder is the same backbone; other weights, depth or dtype are not; no path is in it."""
    shutil.copytree(tiny_llm, tmp_path / "copy" / "tiny-llm")
    copied = str(tmp_path / "copy" / "tiny-llm")
    identity = Backbone(tiny_llm).identity
    assert Backbone(copied).identity == identity
    assert all("/" not in value for value in identity.values())
    assert Backbone(tiny_llm, layers=1).identity != identity
    assert Backbone(tiny_llm, dtype="float16").identity != identity
    weights = load_file(f"{copied}/model.safetensors")
    weights["norm.weight"] = weights["norm.weight"] + 1
    save_file(weights, f"{copied}/model.safetensors", metadata={"format": "pt"})
    assert Backbone(copied).identity != identity


SMALL = {"vocab_size": 256, "num_hidden_layers": 3, "initializer_range": 0.2}
SMALL_DECODER = SMALL | {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
SMALL_ENCODER = SMALL | {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}


@pytest.mark.parametrize(
    ("config", "causal"),
    [
        (transformers.GPT2Config(vocab_size=256, n_embd=32, n_layer=3, n_head=4, initializer_range=0.2), True),
        (transformers.Qwen3Config(**SMALL_DECODER, head_dim=8), True),
        (transformers.MistralConfig(**SMALL_DECODER, sliding_window=16), True),
        (transformers.Gemma2Config(**SMALL_DECODER, head_dim=8, sliding_window=16, pad_token_id=0), True),  # eager
        (transformers.Gemma3TextConfig(**SMALL_DECODER, head_dim=8, sliding_window=16, pad_token_id=0), True),
        (transformers.RobertaConfig(**SMALL_ENCODER), False),
        (transformers.MPNetConfig(**SMALL_ENCODER), False),  # attention without an sdpa of its own
        (transformers.ModernBertConfig(**SMALL_ENCODER, pad_token_id=0, cls_token_id=1, sep_token_id=2), False),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_other_architectures(
    config: transformers.PreTrainedConfig, causal: bool, tiny_bert: str, tmp_path: Path
) -> None:
    """Decoders and encoders of other families, cut to two layers: sound, adapted by LoRA, of the right direction.

    A read of some states is for those in `READ_ALONE` only: here a wrong addition to that list would show.
    """
    torch.manual_seed(0)
    transformers.AutoModel.from_config(config).save_pretrained(str(tmp_path))
    backbone = Backbone(str(tmp_path), layers=2, lora=LORA)
    assert backbone.causal == causal
    self_check(backbone, load_tokenizer(tiny_bert))
    ids = torch.arange(1, 19).view(2, 9)
    backbone(ids).float().mean().backward()
    assert all(p.grad is not None for p in backbone.parameters() if p.requires_grad)
    places = torch.tensor([0, 1, 1]), torch.tensor([8, 0, 3])
    mask = None if causal else torch.ones_like(ids, dtype=torch.bool)
    backbone.float().eval().dtype = torch.float32  # as the self-check does
    expected = backbone(ids, attention_mask=mask)[places]
    torch.testing.assert_close(backbone(ids, attention_mask=mask, read=places), expected)


def test_values_narrower_than_keys() -> None:
    """As in DeepSeek's attention: torch's own kernel takes it."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 3, 9, width, generator=generator) for width in (24, 24, 16))
    module = nn.Module()
    module.is_causal = True
    found, _ = automatic_attention(module, query, key, value, None)
    expected = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    torch.testing.assert_close(found, expected.transpose(1, 2))


@pytest.mark.parametrize(
    ("dtype", "tokens", "masked", "ours"),
    [
        (torch.float32, 150, False, True),
        (torch.bfloat16, 150, False, True),
        (torch.float32, 150, True, False),
        (torch.float32, 1025, False, False),
        (torch.float64, 150, False, False),
    ],
)
def test_which_attention_is_taken(
    dtype: torch.dtype, tokens: int, masked: bool, ours: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ours on a CPU without a mask, up to its longest row, and with torch's values; torch's elsewhere."""
    calls = []
    monkeypatch.setattr(attention, "causal_attention", lambda *a, **k: calls.append(1) or causal_attention(*a, **k))
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, heads, tokens, 8, generator=generator).to(dtype) for heads in (4, 2, 2))
    module = nn.Module()
    module.is_causal, module.num_key_value_groups = True, 2
    mask = torch.ones(tokens, tokens, dtype=torch.bool).tril()[None, None] if masked else None
    found, _ = automatic_attention(module, query, key, value, mask)
    expected = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    tolerance = {"rtol": 0.03, "atol": 0.03} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(found, expected.transpose(1, 2), **tolerance)
    assert bool(calls) == ours


class Recorder(TorchFunctionMode):
    """Notes what torch's attention is given."""

    def __init__(self) -> None:
        super().__init__()
        self.given: list[dict[str, object]] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.scaled_dot_product_attention:
            self.given.append(kwargs)
        return function(*args, **(kwargs or {}))


def test_other_devices_can_use_the_flash_kernel() -> None:
    """Without padding torch's attention gets no mask, is told that it is causal, and shares key heads."""
    module = nn.Module()
    module.is_causal, module.num_key_value_groups = True, 2
    query, key, value = (torch.empty(2, heads, 7, 8, device="meta") for heads in (4, 2, 2))
    with Recorder() as seen:
        automatic_attention(module, query, key, value, None)
    assert seen.given[0]["attn_mask"] is None
    assert seen.given[0]["is_causal"] is True
    assert seen.given[0]["enable_gqa"] is True


@pytest.mark.parametrize(("tokens", "key_heads"), [(1, 2), (7, 1), (128, 3), (300, 2)])
def test_causal_attention_equals_torchs(tokens: int, key_heads: int) -> None:
    """Values and gradients in float64, for lengths below, at and above the block."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 2 * key_heads, tokens, 8), (2, key_heads, tokens, 8), (2, key_heads, tokens, 8)]
    inputs = [torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_() for shape in shapes]
    expected = F.scaled_dot_product_attention(*inputs, is_causal=True, enable_gqa=True)
    found = causal_attention(*inputs, scaling=8**-0.5)
    assert_same_values_and_gradients(found, expected, inputs)


def test_self_check_names_what_is_wrong(tiny_llm: str, tiny_bert: str) -> None:
    """A model that is not causal, one that looks at padding, one with NaN, one with a foreign tokenizer."""
    tokenizer = load_tokenizer(tiny_llm)
    backbone = Backbone(tiny_llm, dtype="float32")
    for layer in backbone.model.layers:
        layer.self_attn.is_causal = False
    with pytest.raises(InputError, match="right padding"):
        self_check(backbone, tokenizer)

    backbone = Backbone(tiny_llm, dtype="float32")
    backbone.model.norm.weight[0] = float("nan")
    with pytest.raises(InputError, match="finite"):
        self_check(backbone, tokenizer)

    bidirectional = Backbone(tiny_bert, dtype="float32")
    bidirectional.causal = True
    with pytest.raises(InputError, match=r"tiny-bert \(float32"):
        self_check(bidirectional, load_tokenizer(tiny_bert))

    with pytest.raises(InputError, match="tokenizer that fits"):
        self_check(Backbone(tiny_bert), tokenizer)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"layers": 4}, "Expected layers between 1 and 3, got 4"),
        ({"lora": {"rank": 4}}, "Expected fields of peft's LoraConfig for lora, got: .*rank"),
        ({"lora": {"target_modules": ["nowhere"]}}, "LoraConfig for lora, got: .*nowhere"),
        ({"attention": "nonsense"}, "Expected a readable model for the backbone, got tiny-llm: .*nonsense"),
        ({"revision": "main"}, "Expected no revision"),
        ({"quantization_config": {}, "sharded": True}, "Expected a sharded backbone without quantization_config"),
        (
            {"attention": "flash_attention_2", "dtype": "float32"},
            "Expected dtype bfloat16 or float16 for attention flash_attention_2, got float32",
        ),
        pytest.param(
            {"attention": "flash_attention_2", "dtype": "bfloat16"},
            "Expected a GPU and the package flash-attn for attention flash_attention_2, got neither or one",
            marks=pytest.mark.skipif(is_flash_attn_2_available(), reason="there is flash attention 2"),
        ),
    ],
)
def test_wrong_settings_get_one_sentence(tiny_llm: str, settings: dict[str, object], sentence: str) -> None:
    """One line that says what was expected and what was found."""
    with pytest.raises(InputError, match=sentence) as raised:
        Backbone(tiny_llm, **settings)
    assert "\n" not in str(raised.value)


def test_unreachable_hub_id(tmp_path: Path) -> None:
    """Offline, an unknown hub id and a folder without a model give one line that lists what is possible."""
    for call in (lambda: Backbone("nobody/no-such-model"), lambda: load_tokenizer("nobody/no-such-model")):
        with pytest.raises(InputError, match=r"smollm2-135m-instruct.*got nobody/no-such-model") as raised:
            call()
        assert "\n" not in str(raised.value)
    with pytest.raises(InputError, match=re.escape("config.json")):
        Backbone(str(tmp_path))


HUB = """
import sys
from anyo_lightning.llm.backbone import Backbone, load_tokenizer
for revision in (None, "main", sys.argv[1]):
    assert load_tokenizer("someone/tiny", revision).pad_token is not None
    print(*sorted(Backbone("someone/tiny", revision=revision).identity.items()))
"""


def test_hub_id_in_the_local_hub_cache(tiny_llm: str, tmp_path: Path) -> None:
    """A hub id that was downloaded before works offline, and its identity is the commit, however it was asked for."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--someone--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    shutil.copytree(tiny_llm, repository / "snapshots" / commit)
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", HUB, commit]
    finished = subprocess.run(
        command, env=environment, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True
    )
    lines = finished.stdout.splitlines()
    assert len(lines) == 3
    assert len(set(lines)) == 1
    assert commit in lines[0]
    assert "('name', 'someone/tiny')" in lines[0]


def test_too_many_tokens(tiny_bert: str) -> None:
    """More tokens than positions are refused before they index out of a table."""
    with pytest.raises(InputError, match="the 64 positions of tiny-bert, got rows of 65 tokens"):
        Backbone(tiny_bert)(torch.ones(1, 65, dtype=torch.long))


def test_truncated_weights(tiny_llm: str, tmp_path: Path) -> None:
    """A damaged or incomplete weight file is named in one line."""
    folder = tmp_path / "broken"
    shutil.copytree(tiny_llm, folder)
    file = folder / "model.safetensors"
    weights = load_file(file)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InputError, match="Expected a readable model for the backbone, got broken"):
        Backbone(str(folder))
    del weights["layers.1.mlp.up_proj.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"got none for 1, such as layers\.1\.mlp\.up_proj\.weight"):
        Backbone(str(folder))

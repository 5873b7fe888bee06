"""LoRA by products that accumulate: equal to peft's own forward and backward pass, and left to peft elsewhere."""

import copy
from typing import Any

import pytest
import torch
from helpers import LORA, started_backbone
from peft import LoraConfig
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2Model

from anyo_lightning.llm.backbone import Backbone
from anyo_lightning.llm.low_rank import Adapted, AdaptedProduct, AddedProduct

# Of three layers of a tiny model, whose gradients pass on each other's rounding.
ROUNDING = {torch.float32: 2e-5, torch.bfloat16: 0.08, torch.float16: 0.01}


@pytest.fixture
def ids() -> Tensor:
    """Three rows of eleven tokens."""
    return torch.randint(1, 190, (3, 11), generator=torch.Generator().manual_seed(0))


def by_peft(backbone: Backbone) -> Backbone:
    """A copy whose LoRA layers are peft's own."""
    copied = copy.deepcopy(backbone)
    for module in copied.modules():
        if isinstance(module, Adapted):
            module.__class__ = LoraLinear
    return copied


def pass_of(backbone: Backbone, ids: Tensor, **options: Any) -> tuple[Tensor, list[Tensor]]:
    """States, and the gradients of the input embeddings and of LoRA's weights."""
    trained = [parameter for parameter in backbone.parameters() if parameter.requires_grad]
    embeddings = backbone.embed(ids).float().requires_grad_()
    states = backbone(input_embeddings=embeddings, **options)
    weight = torch.randn(states.shape, generator=torch.Generator().manual_seed(0))
    return states.detach(), list(torch.autograd.grad((states.float() * weight).sum(), [embeddings, *trained]))


def count(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often each of the two functions is applied from here on."""
    calls = {"product": 0, "added": 0}
    for name, function in (("product", AdaptedProduct), ("added", AddedProduct)):
        apply = function.apply

        def counted(*args: Any, name: str = name, apply: Any = apply) -> Any:
            calls[name] += 1
            return apply(*args)

        monkeypatch.setattr(function, "apply", counted)
    return calls


def assert_close(found: Any, expected: Any, tolerance: float) -> None:
    """States and each gradient, relative to the size of the whole tensor."""
    for one, other in zip((found[0], *found[1]), (expected[0], *expected[1]), strict=True):
        assert float((one - other).norm()) <= tolerance * float(other.norm())


@pytest.mark.parametrize("dtype", list(ROUNDING))
@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("read", [False, True])
def test_equal_to_pefts(
    dtype: torch.dtype, hooked: bool, read: bool, tiny_llm: str, ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """States, gradients of LoRA and of the input; a base layer with hooks is called as a module."""
    backbone = started_backbone(tiny_llm, dtype=str(dtype).removeprefix("torch."))
    options = {"read": (torch.tensor([0, 2, 1]), torch.tensor([10, 3, 0]))} if read else {}
    expected = pass_of(by_peft(backbone), ids, **options)
    seen: list[int] = []
    if hooked:
        for module in backbone.modules():
            if isinstance(module, Adapted):
                module.base_layer.register_forward_hook(lambda *_: seen.append(1))
    calls = count(monkeypatch)
    assert_close(pass_of(backbone, ids, **options), expected, ROUNDING[dtype])
    assert calls == ({"product": 0, "added": 21} if hooked else {"product": 21, "added": 0})
    assert len(seen) == (21 if hooked else 0)


@pytest.mark.parametrize("dtype", list(ROUNDING))
def test_rounds_less_than_pefts(dtype: torch.dtype) -> None:
    """One layer against float64: output and gradients of x, A and B are at least as near as by peft's formula."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (99, 64), "weight": (48, 64), "down": (8, 64), "up": (48, 8), "dy": (99, 48)}
    given = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}

    def run(kind: torch.dtype, ours: bool) -> list[Tensor]:
        x, weight, down, up, dy = (tensor.to(kind, copy=True) for tensor in given.values())
        trained = [tensor.requires_grad_() for tensor in (x, down, up)]
        if ours:
            y = AdaptedProduct.apply(x, weight, None, down, up * 2)[0]
        else:
            y = x @ weight.t() + ((x @ down.t()) @ up.t()) * 2
        return [y.detach(), *torch.autograd.grad(y, trained, dy)]

    for exact, one, other in zip(run(torch.float64, False), run(dtype, True), run(dtype, False), strict=True):
        assert float((one - exact).norm()) <= 1.01 * float((other - exact).norm())


def test_names_and_copies_are_pefts(tiny_llm: str, ids: Tensor) -> None:
    """State-dict keys are those of peft, and a copied model computes the same."""
    backbone = started_backbone(tiny_llm)
    assert list(backbone.state_dict()) == list(by_peft(backbone).state_dict())
    assert all(isinstance(module, LoraLinear) for module in backbone.modules() if isinstance(module, Adapted))
    torch.testing.assert_close(copy.deepcopy(backbone)(ids), backbone(ids), rtol=0, atol=0)


def test_a_bias_is_added(tmp_path: Any, ids: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Base layers with a bias, as Qwen2's."""
    torch.manual_seed(0)
    small = {"vocab_size": 256, "num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64}
    model = Qwen2Model(Qwen2Config(**small, num_attention_heads=4, num_key_value_heads=2))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    model.save_pretrained(str(tmp_path))
    backbone = started_backbone(str(tmp_path))
    expected = pass_of(by_peft(backbone), ids)
    calls = count(monkeypatch)
    assert_close(pass_of(backbone, ids), expected, 2e-5)
    assert calls["product"] == 14


@pytest.mark.parametrize(
    "lora",
    [
        {"use_dora": True},
        {"lora_bias": True, "target_modules": ["q_proj"]},
        {"lora_dropout": 0.5},
        {"use_rslora": True},
    ],
    ids=lambda lora: next(iter(lora)),
)
def test_what_else_peft_does(
    lora: dict[str, Any], tmp_path: Any, tiny_llm: str, ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Variants, a bias of LoRA and dropout in training are peft's own; rank-stabilised scaling is a factor."""
    if "lora_bias" in lora:  # peft wants a bias to merge it into
        small = {"vocab_size": 256, "num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64}
        Qwen2Model(Qwen2Config(**small, num_attention_heads=4, num_key_value_heads=2)).save_pretrained(str(tmp_path))
        tiny_llm = str(tmp_path)
    backbone = started_backbone(tiny_llm, lora=LORA | lora)
    calls = count(monkeypatch)
    results = []
    for one in (backbone, by_peft(backbone)):
        torch.manual_seed(1)
        results.append(pass_of(one, ids))
    assert_close(*results, 2e-5)
    assert bool(calls["product"]) == ("use_rslora" in lora)
    backbone.eval()
    torch.testing.assert_close(backbone(ids), by_peft(backbone)(ids), rtol=1e-5, atol=1e-5)
    assert bool(calls["product"]) == ("use_rslora" in lora or "lora_dropout" in lora)


def test_a_configuration_stays_as_it_was_given(tiny_llm: str) -> None:
    """Peft would write the layers that it finds into it, and a run of it would look like another."""
    config = LoraConfig(r=2, target_modules="all-linear")
    Backbone(tiny_llm, lora=config)
    assert config.target_modules == "all-linear"


def test_merged_and_several_adapters(tiny_llm: str, ids: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that were merged into the base are not added again; several adapters are added by peft."""
    backbone = started_backbone(tiny_llm)
    expected = backbone(ids)
    layers = [module for module in backbone.modules() if isinstance(module, Adapted)]
    second = LoraConfig(r=2, lora_alpha=4, init_lora_weights=False)
    calls = count(monkeypatch)
    for layer in layers:
        layer.merge()
    torch.testing.assert_close(backbone(ids), expected, rtol=1e-4, atol=1e-4)
    for layer in layers:
        layer.unmerge()
        layer.update_layer("second", 2, lora_alpha=4, config=second)
        layer.set_adapter(["default", "second"])
    assert not torch.allclose(backbone(ids), expected, atol=1e-3)
    torch.testing.assert_close(backbone(ids), by_peft(backbone)(ids))
    assert calls == {"product": 0, "added": 0}


def test_no_gradient_where_none_is_asked_for(tiny_llm: str, ids: Tensor) -> None:
    """Frozen weights get none; a frozen A gets none while B does."""
    backbone = started_backbone(tiny_llm)
    for name, parameter in backbone.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    backbone(ids).square().mean().backward()
    for name, parameter in backbone.named_parameters():
        assert (parameter.grad is not None) == ("lora_B" in name)


@pytest.mark.real
def test_equal_on_the_real_model() -> None:
    """Three layers in float32 and bfloat16."""
    ids = torch.randint(1, 1000, (2, 50), generator=torch.Generator().manual_seed(0))
    for dtype, tolerance in (("float32", 2e-5), ("bfloat16", 5e-2)):
        backbone = started_backbone("smollm2-135m-instruct", dtype=dtype, layers=3)
        assert_close(pass_of(backbone, ids), pass_of(by_peft(backbone), ids), tolerance)

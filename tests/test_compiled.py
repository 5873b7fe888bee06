"""`compile: true`: the numbers of plain layers, a bounded number of compilations, and a compiler that works."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import LORA, assert_same_values_and_gradients
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn import functional as F

from anyo_lightning.errors import InputError
from anyo_lightning.llm.backbone import Backbone
from anyo_lightning.llm.blocked_attention import causal_attention_backward, causal_attention_op
from anyo_lightning.llm.evaluation_mode import evaluating


def test_attention_as_one_operation() -> None:
    """Values and gradients in float64 are those of torch's: within one block, over several, behind a prefix."""
    generator = torch.Generator().manual_seed(0)
    for tokens, keys in ((5, 5), (7, 12), (130, 130), (300, 310)):
        shapes = [(2, 4, tokens, 8), (2, 2, keys, 8), (2, 2, keys, 8)]
        inputs = [torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_() for shape in shapes]
        mask = torch.ones(tokens, keys, dtype=torch.bool).tril(keys - tokens)
        expected = F.scaled_dot_product_attention(*inputs, attn_mask=mask, enable_gqa=True)
        found = causal_attention_op(*inputs, 8**-0.5)
        assert_same_values_and_gradients(found, expected, inputs)


def test_attention_as_the_compiler_sees_it() -> None:
    """Shapes, dtypes and the registered backward pass, by torch's own check of an operation."""
    shapes = [(2, heads, 6, 8) for heads in (4, 2, 2)]
    whole = [torch.randn(shape, requires_grad=True) for shape in shapes]
    strided = [torch.randn(2, 6, heads, 8).transpose(1, 2).requires_grad_() for heads in (4, 2, 2)]
    for inputs in (whole, strided):
        torch.library.opcheck(causal_attention_op, (*inputs, 0.3))
        gradients = causal_attention_backward(torch.ones(shapes[0]), *inputs, torch.ones(shapes[0]), 0.3)
        assert all(gradient.is_contiguous() for gradient in gradients)


def pass_of(backbone: Backbone, ids: Tensor, **options: object) -> list[Tensor]:
    """States and gradients of LoRA."""
    trained = [parameter for parameter in backbone.parameters() if parameter.requires_grad]
    states = backbone(ids, **options)
    weight = torch.randn(states.shape, generator=torch.Generator().manual_seed(0))
    return [states.detach(), *torch.autograd.grad((states * weight).sum(), trained)]


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_same_numbers_from_few_compilations(checkpointing: bool, tiny_llm: str) -> None:
    """Batches of many shapes, read in part or whole, in training; evaluation between them compiles nothing."""
    models = []
    for compiled in (False, True):
        torch.manual_seed(0)
        options = {"dtype": "float32", "lora": LORA, "gradient_checkpointing": checkpointing}
        models.append(Backbone(tiny_llm, compile=compiled, **options).place(torch.device("cpu")))
        for name, parameter in models[-1].named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
    plain, compiled_one = models
    assert list(plain.state_dict()) == list(compiled_one.state_dict())
    before = counters["stats"]["unique_graphs"]
    for rows, tokens in ((3, 7), (1, 9), (5, 150), (8, 8)):
        ids = torch.randint(1, 190, (rows, tokens), generator=torch.Generator().manual_seed(tokens))
        for read in (None, (torch.tensor([0, rows - 1]), torch.tensor([tokens - 1, 2]))):
            for one, other in zip(*(pass_of(model, ids, read=read) for model in models), strict=True):
                assert float((one - other).norm()) <= 1e-4 * float(one.norm())
        with evaluating(compiled_one):
            compiled_one(ids)
    assert 1 <= counters["stats"]["unique_graphs"] - before <= 3


@pytest.mark.slow
def test_behind_a_shared_prefix(tiny_llm: str) -> None:
    """One compilation for prompts and rows of several lengths."""
    models = []
    for compiled in (False, True):
        torch.manual_seed(0)
        models.append(Backbone(tiny_llm, compile=compiled, dtype="float32", lora=LORA).place(torch.device("cpu")))
    before = counters["stats"]["unique_graphs"]
    for size, tokens in ((5, 6), (8, 30), (3, 9)):
        ids = torch.randint(1, 190, (size, tokens), generator=torch.Generator().manual_seed(tokens))
        rows = [model.embed(ids).detach().requires_grad_() for model in models]
        weight = torch.randn(size, tokens, 32, generator=torch.Generator().manual_seed(0))
        results = []
        for model, own in zip(models, rows, strict=True):
            states = model(input_embeddings=own, prefix=model.embed(torch.arange(1, 6)))
            results.append((states.detach(), *torch.autograd.grad((states * weight).sum(), [own])))
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
    assert 1 <= counters["stats"]["unique_graphs"] - before <= 3


def test_one_layer_is_too_few(tiny_llm: str) -> None:
    """The last layer is not compiled."""
    with pytest.raises(InputError, match="Expected two layers or more for compile"):
        Backbone(tiny_llm, layers=1, compile=True).place(torch.device("cpu"))


CHECK = """
import sys, torch
from anyo_lightning.errors import InputError
from anyo_lightning.llm.compiled import check_compiler
try:
    check_compiler(torch.device("cpu"))
except InputError as error:
    print(error)
"""


def test_no_compiler(tmp_path: Path) -> None:
    """One sentence, before anything is trained."""
    environment = os.environ | {"CXX": "/nowhere/g++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    finished = subprocess.run(
        [sys.executable, "-c", CHECK],
        env=environment,
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    assert finished.stdout.startswith("Expected a C++ compiler (such as g++) that works for compile, got: ")
    assert finished.stdout.count("\n") == 1

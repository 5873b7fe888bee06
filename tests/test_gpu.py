"""What only a GPU can show; `benchmarks/gpu.py` runs these. Everything is tiny: seconds on any card."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import LORA, fit, tiny, trainer_for, weights, write_loops
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.nn import functional as F

from anyo_lightning.data.datamodule import RecDataModule
from anyo_lightning.encoders.text import TextEncoders
from anyo_lightning.llm.backbone import Backbone
from anyo_lightning.llm.sharding import shard_layers
from anyo_lightning.losses import full_softmax
from anyo_lightning.models.e4srec import E4SRec
from anyo_lightning.runs import RunFolder
from anyo_lightning.training.cost_ledger import CostLedger

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]

GPU: dict[str, Any] = {"accelerator": "gpu", "devices": 1}


@pytest.fixture(scope="module")
def many_users(tmp_path_factory: pytest.TempPathFactory, titles: list[str]) -> tuple[Path, Path]:
    """800 users: one whose target moves from the first rank to the second changes NDCG by less than .0005."""
    return write_loops(tmp_path_factory.mktemp("gpu"), titles, users=800, lengths=(6, 12))


def data_of(files: tuple[Path, Path]) -> RecDataModule:
    return RecDataModule(interactions=files[0], items=files[1], max_items=20, max_tokens=300, batch_tokens=4000)


def model_of(folder: str, **options: Any) -> E4SRec:
    """Without dropout, whose random numbers differ between devices."""
    return E4SRec(TextEncoders(tiny(folder, **options), dim=16, dropout=0.0, input_dropout=0.0))


def figures_of(folder: Path, data: RecDataModule, model: E4SRec, **options: Any) -> dict[str, float]:
    """The test figures of a run's last checkpoint."""
    trainer = trainer_for(folder, callbacks=[], **options)
    (figures,) = trainer.test(model, data, ckpt_path=folder / "checkpoints" / "last.ckpt", verbose=False)
    return {name: value for name, value in figures.items() if name.startswith("test/ndcg")}


def test_figures_on_gpu_and_cpu_agree(tmp_path: Path, tiny_llm: str, many_users: tuple[Path, Path]) -> None:
    """Trained on each; and of one checkpoint tested on both."""
    figures = {}
    for kind, options in {"cpu": {}, "gpu": GPU}.items():
        fit(model_of(tiny_llm), data_of(many_users), tmp_path / kind, epochs=1, **options)
        figures[kind] = figures_of(tmp_path / kind, data_of(many_users), model_of(tiny_llm), **options)
    crossed = figures_of(tmp_path / "gpu", data_of(many_users), model_of(tiny_llm))
    assert figures["gpu"]
    assert figures["gpu"] == pytest.approx(figures["cpu"], abs=0.002)
    assert crossed == pytest.approx(figures["gpu"], abs=0.002)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_states_of_low_precision(tiny_llm: str, dtype: Any) -> None:
    """Against float32 on the CPU: each state points the same way."""
    if dtype == "bfloat16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        pytest.skip("no bfloat16")
    token_ids = torch.randint(1, 300, (8, 100), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        exact = Backbone(tiny_llm, dtype="float32")(token_ids)
        states = Backbone(tiny_llm, dtype=dtype).to("cuda")(token_ids.cuda())
    assert states.dtype == getattr(torch, dtype)
    assert F.cosine_similarity(states.float().cpu(), exact, dim=-1).min() > 0.99


def test_states_of_float32(tiny_llm: str) -> None:
    """Equal to the CPU's to rounding: no TF32, and the same mask."""
    token_ids = torch.randint(1, 300, (8, 100), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        exact = Backbone(tiny_llm, dtype="float32")(token_ids)
        states = Backbone(tiny_llm, dtype="float32").to("cuda")(token_ids.cuda())
    torch.testing.assert_close(states.cpu(), exact, rtol=1e-3, atol=1e-4)


def test_kernels_of_the_gpu_stay_there(tiny_llm: str) -> None:
    """A model that is made after one on the GPU computes on the CPU as ever, Liger or not."""
    token_ids = torch.randint(1, 300, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = Backbone(tiny_llm, dtype="float32")(token_ids)
        Backbone(tiny_llm, dtype="float32").place(torch.device("cuda"))(token_ids.cuda())
        after = Backbone(tiny_llm, dtype="float32")(token_ids)
    torch.testing.assert_close(after, before)


@pytest.mark.parametrize("reads", ["texts", "vectors", "both"])
def test_steps_are_counted(tmp_path: Path, tiny_llm: str, many_users: tuple[Path, Path], reads: Any) -> None:
    """A step in which FLOPs are counted is trained like others, whatever kernels attention takes."""
    model = E4SRec(TextEncoders(tiny(tiny_llm), reads=reads, dim=16))
    data = data_of(many_users)
    fit(model, data, tmp_path, epochs=1, callbacks=[CostLedger(RunFolder(tmp_path), every=1)], **GPU)
    assert RunFolder(tmp_path).read_curves()["flops"][-1] > 0  # type: ignore[index]


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone, over NCCL."""
    torch.cuda.set_device(0)
    torch.distributed.init_process_group("nccl", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_a_sharded_backbone(tiny_llm: str, gradient_checkpointing: bool) -> None:
    """States and LoRA's gradients are those of the whole one."""
    token_ids = torch.randint(1, 300, (4, 50), device="cuda")
    found = []
    for sharded in (False, True):
        options: dict[str, Any] = {"dtype": "float32", "lora": LORA, "gradient_checkpointing": gradient_checkpointing}
        torch.manual_seed(0)
        backbone = Backbone(tiny_llm, **options)
        for name, weight in backbone.named_parameters():
            if "lora_B" in name:  # zero at the start, where lora_A takes no gradient
                torch.nn.init.normal_(weight, std=0.1)
        if sharded:
            shard_layers(backbone.model, torch.device("cuda"))
        backbone.to("cuda")
        states = backbone(token_ids)
        states.square().mean().backward()
        gradients = {n: w.grad for n, w in backbone.named_parameters() if w.requires_grad and w.grad is not None}
        found.append((states.detach(), gradients))
    (states, gradients), (sharded_states, sharded_gradients) = found
    torch.testing.assert_close(sharded_states, states, rtol=1e-5, atol=1e-5)
    assert gradients
    assert gradients.keys() == sharded_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(sharded_gradients[name], gradient, rtol=1e-4, atol=1e-6)


def test_a_resumed_run(tmp_path: Path, tiny_llm: str, many_users: tuple[Path, Path]) -> None:
    """Ends where the uninterrupted one does: closer than a twentieth of what the resumed epoch changes.

    Not bit-identical: a GPU adds in another order each time.
    """
    each = ModelCheckpoint(tmp_path / "each", filename="{epoch}", monitor="val/mrr@10", save_top_k=-1)
    fit(model_of(tiny_llm), data_of(many_users), tmp_path / "whole", callbacks=[each], **GPU)
    middle = tmp_path / "each" / "epoch=0.ckpt"
    fit(model_of(tiny_llm), data_of(many_users), tmp_path / "resumed", ckpt_path=middle, **GPU)
    first, whole, resumed = (
        torch.cat([weight.flatten().float().cpu() for weight in weights(path).values()])
        for path in (middle, *(tmp_path / name / "checkpoints" / "last.ckpt" for name in ("whole", "resumed")))
    )
    assert (whole - first).norm() > 0
    assert (resumed - whole).norm() < 0.05 * (whole - first).norm()


def test_four_bits(tiny_llm: str) -> None:
    """NF4 states point where those of float32 do, and LoRA takes gradients.

    A weight is off by 9% on average: the random model's states have a mean cosine of .90 on an H200.
    """
    pytest.importorskip("bitsandbytes")
    token_ids = torch.randint(1, 300, (4, 50), generator=torch.Generator().manual_seed(0))
    settings = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    backbone = Backbone(tiny_llm, dtype="float32", lora=LORA, quantization_config=settings).to("cuda")
    states = backbone(token_ids.cuda())
    with torch.no_grad():
        exact = Backbone(tiny_llm, dtype="float32")(token_ids)
    assert F.cosine_similarity(states.detach().float().cpu(), exact, dim=-1).mean() > 0.8
    states.float().square().mean().backward()
    trained = [weight for weight in backbone.parameters() if weight.requires_grad]
    assert any(weight.grad is not None and bool(weight.grad.ne(0).any()) for weight in trained)


@pytest.mark.parametrize("count", [1, 700])
def test_full_softmax(count: int) -> None:
    """Loss and both gradients equal cross-entropy over all logits."""
    torch.manual_seed(0)
    states, vectors = torch.randn(count, 32, device="cuda"), torch.randn(5000, 32, device="cuda")
    targets = torch.randint(5000, (count,), device="cuda")
    found = []
    for loss in (full_softmax, lambda s, v, t: F.cross_entropy(s @ v.T, t)):
        inputs = states.clone().requires_grad_(), vectors.clone().requires_grad_()
        value = loss(*inputs, targets)
        value.backward()
        found.append((value.detach(), *(tensor.grad for tensor in inputs)))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)

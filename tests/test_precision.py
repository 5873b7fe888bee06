"""float16 weights train with a loss scaler or not at all."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import LORA

from anyo_lightning.hardware import fast_dtype
from anyo_lightning.llm.backbone import Backbone

Anyo = Callable[..., str]


def fit(tiny_data: tuple[Path, Path], folder: Path, llm: str, *options: str) -> list[str]:
    """The words of a short training of a variant with a language model."""
    return [
        *("fit", "--model=Anyo", "--model.encoders=TextEncoders", f"--run={folder / 'run'}"),
        *("--model.encoders.backbone=LLM", f"--model.encoders.backbone.name={llm}", "--model.encoders.dim=16"),
        *(f"--data.interactions={tiny_data[0]}", f"--data.items={tiny_data[1]}", "--trainer.logger=false"),
        *("--trainer.limit_train_batches=1", "--trainer.max_epochs=1", "--trainer.accelerator=cpu", *options),
    ]


@pytest.mark.parametrize("precision", [None, "32-true", "bf16-mixed"])
def test_float16_without_a_loss_scaler_is_refused(
    anyo: Anyo,
    capsys: pytest.CaptureFixture[str],
    tiny_data: tuple[Path, Path],
    tiny_llm: str,
    tmp_path: Path,
    precision: str | None,
) -> None:
    """In one sentence that names both options, before there is a run folder."""
    options = [] if precision is None else [f"--trainer.precision={precision}"]
    with pytest.raises(SystemExit) as exit_:
        anyo(*fit(tiny_data, tmp_path, tiny_llm, "--model.encoders.backbone.dtype=float16", *options))
    assert exit_.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("anyo: error:")]
    assert "trainer.precision 16-mixed" in line
    assert "model.encoders.backbone.dtype float16" in line
    assert (precision or "null") in line
    assert not (tmp_path / "run").exists()


@pytest.mark.filterwarnings("ignore:.*is not supported on CPU")  # Lightning takes bf16-mixed there
def test_float16_with_a_loss_scaler_trains(
    anyo: Anyo, tiny_data: tuple[Path, Path], tiny_llm: str, tmp_path: Path
) -> None:
    """To its test."""
    options = ("--model.encoders.backbone.dtype=float16", "--trainer.precision=16-mixed")
    anyo(*fit(tiny_data, tmp_path, tiny_llm, *options))
    assert (tmp_path / "run" / "metrics.json").exists()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_other_dtypes_need_none(
    anyo: Anyo, tiny_data: tuple[Path, Path], tiny_llm: str, tmp_path: Path, dtype: str
) -> None:
    """As before."""
    anyo(*fit(tiny_data, tmp_path, tiny_llm, f"--model.encoders.backbone.dtype={dtype}"))
    assert (tmp_path / "run" / "metrics.json").exists()


@pytest.mark.parametrize(("native", "expected"), [(True, "bfloat16"), (False, "float32")])
def test_an_emulated_bfloat16_is_not_fast(monkeypatch: pytest.MonkeyPatch, native: bool, expected: str) -> None:
    """A T4 multiplies bfloat16 by emulation, and torch counts that as support unless it is asked not to."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: native or including_emulation)
    assert fast_dtype() == expected


def test_float16_under_a_loss_scaler_lowers_the_loss(tiny_llm: str) -> None:
    """What Lightning's 16-mixed does on a GPU, by hand, since it takes bfloat16 on a CPU: LoRA learns a fixed batch."""
    torch.manual_seed(0)
    backbone = Backbone(tiny_llm, dtype="float16", lora=LORA)
    trained = [weight for weight in backbone.parameters() if weight.requires_grad]
    optimizer, scaler = torch.optim.AdamW(trained, lr=1e-2), torch.amp.GradScaler("cpu")
    token_ids, wanted = torch.randint(1, 300, (4, 30)), torch.randn(4, 30, backbone.hidden_size)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            states = backbone(token_ids)
        loss = (states.float() - wanted).square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(float(loss.detach()))
    assert states.dtype == torch.float16
    assert all(weight.dtype == torch.float32 for weight in trained)
    assert losses[-1] < 0.9 * losses[0]

"""float16 weights train with a loss scaler or not at all."""

from collections.abc import Callable
from pathlib import Path

import pytest

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

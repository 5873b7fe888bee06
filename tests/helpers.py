"""What several test files build alike: tiny language models, models on data, short trainings, refusals."""

import json
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from anyo_lightning.data.datamodule import RecDataModule
from anyo_lightning.evaluation.callback import RetrievalMetrics
from anyo_lightning.llm.backbone import Backbone
from anyo_lightning.llm.language_model import LLM
from anyo_lightning.models.base import RetrievalModule
from anyo_lightning.runs import RunFolder

CONFIGS = Path(__file__).parents[1] / "configs"
LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
Anyo = Callable[..., str]
MakeData = Callable[..., RecDataModule]
Model = TypeVar("Model", bound=RetrievalModule)


def tiny(folder: str, **changes: Any) -> LLM:
    """A language model with LoRA, in float32, so that equalities hold to rounding."""
    return LLM(folder, **({"dtype": "float32", "lora": LORA} | changes))


def started_backbone(folder: str, **options: Any) -> Backbone:
    """A language model, by default a `tiny` one, whose LoRA has an effect."""
    torch.manual_seed(0)
    backbone = Backbone(folder, **({"dtype": "float32", "lora": LORA} | options))
    for name, parameter in backbone.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return backbone


def assert_same_values_and_gradients(found: Tensor, expected: Tensor, inputs: Sequence[Tensor]) -> None:
    """Equal, and so are the gradients of a random projection of each, up to rounding of their dtype."""
    torch.testing.assert_close(found, expected)
    weight = torch.randn(expected.shape, dtype=expected.dtype, generator=torch.Generator().manual_seed(1))
    for one, other in zip(
        torch.autograd.grad((found * weight).sum(), inputs),
        torch.autograd.grad((expected * weight).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def prepare(model: Model, data: RecDataModule, *, saved: dict[str, Tensor] | None = None) -> Model:
    """The model, built on the data as a Trainer builds it."""
    data.setup("fit")
    data.read_for(model)
    model.prepare(data, saved=saved)
    return model


def trainer_for(folder: Path, epochs: int = 1, callbacks: Sequence[Callback] = (), **options: Any) -> Trainer:
    """On one CPU thread; the best and the last checkpoint as in a run folder."""
    seed_everything(0, verbose=False)
    place = RunFolder(folder).checkpoints
    best = ModelCheckpoint(place, filename="best", monitor="val/ndcg@10", mode="max", enable_version_counter=False)
    last = ModelCheckpoint(place, filename="last", enable_version_counter=False)
    return Trainer(
        max_epochs=epochs,
        callbacks=[*callbacks, RetrievalMetrics(mask_history=False), best, last],
        default_root_dir=str(folder),
        reload_dataloaders_every_n_epochs=1,
        **(QUIET | options),
    )


def fit(
    model: RetrievalModule,
    data: RecDataModule,
    folder: Path,
    epochs: int = 2,
    *,
    callbacks: Sequence[Callback] = (),
    ckpt_path: Path | None = None,
    **options: Any,
) -> Trainer:
    """Train, from a checkpoint where one is named."""
    trainer = trainer_for(folder, epochs, callbacks, **options)
    trainer.fit(model, data, ckpt_path=ckpt_path)
    return trainer


def validated(model: LightningModule, data: RecDataModule, checkpoint: Path) -> dict[str, float]:
    """The figures of a checkpoint in a Trainer of its own, without what the clock says."""
    trainer = Trainer(callbacks=[RetrievalMetrics(mask_history=False)], enable_checkpointing=False, **QUIET)
    (figures,) = trainer.validate(model, data, ckpt_path=checkpoint, verbose=False)
    return {name: value for name, value in figures.items() if "seconds" not in name}


def save_as_run(model: RetrievalModule, folder: Path) -> Path:
    """A run folder whose best checkpoint is the model as it is, built but not trained."""
    checkpoint: dict[str, Any] = {"state_dict": model.state_dict()}
    model.on_save_checkpoint(checkpoint)
    best = RunFolder(folder).best_checkpoint
    best.parent.mkdir(parents=True)
    torch.save(checkpoint, best)
    return folder


def weights(checkpoint: Path) -> dict[str, Tensor]:
    """The weights in a checkpoint."""
    saved: dict[str, Tensor] = torch.load(checkpoint, weights_only=True)["state_dict"]
    return saved


def differing(first: dict[str, Tensor], second: dict[str, Tensor]) -> set[str]:
    """The names under which two states are not bit-identical."""
    both = first.keys() & second.keys()
    return (first.keys() ^ second.keys()) | {name for name in both if not torch.equal(first[name], second[name])}


def settings_of(config: Path) -> dict[str, Any]:
    """The content of a configuration, with the files that it names in the places of their names."""

    def whole(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: whole(inner) for name, inner in value.items()}
        if isinstance(value, str) and value.endswith(".yaml"):
            return yaml.safe_load((config.parent / value).read_text())
        return value

    content: dict[str, Any] = whole(yaml.safe_load(config.read_text()))
    return content


def write_loops(folder: Path, titles: Sequence[str], *, users: int, lengths: tuple[int, int]) -> tuple[Path, Path]:
    """Two CSV files: users with so many (the second number excluded) of these items, in noisy loops through them."""
    random = np.random.default_rng(0)
    rows = ["user_id,item_id,timestamp"]
    for user in range(users):
        item = int(random.integers(len(titles)))
        for moment in range(int(random.integers(*lengths))):
            rows.append(f"u{user},m{item},{moment}")
            item = (item + 1) % len(titles) if random.random() < 0.8 else int(random.integers(len(titles)))
    (folder / "interactions.csv").write_text("\n".join(rows) + "\n")
    items = [f'm{i},"{title}"' for i, title in enumerate(titles)]
    (folder / "items.csv").write_text("\n".join(["item_id,title", *items]) + "\n")
    return folder / "interactions.csv", folder / "items.csv"


def notebook_cells(file: Path) -> list[str]:
    """The code of a notebook."""
    return ["".join(cell["source"]) for cell in json.loads(file.read_text())["cells"] if cell["cell_type"] == "code"]


def kill_after(process: "subprocess.Popen[bytes]", files: int, folder: Path, pattern: str) -> int:
    """Kill a process as soon as it has written so many files; returns how many there are."""
    deadline = time.monotonic() + 90
    while len(list(folder.glob(pattern))) < files:
        assert process.poll() is None, "ended before it was killed"
        assert time.monotonic() < deadline, "wrote nothing"
        time.sleep(0.02)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    return len(list(folder.glob(pattern)))


def refused(capsys: pytest.CaptureFixture[str], anyo: Anyo, *arguments: object) -> str:
    """The one line with which the command line refuses; exit code 2 and no traceback."""
    with pytest.raises(SystemExit) as stopped:
        anyo(*arguments)
    assert stopped.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("anyo: error:")]
    assert len(lines) == 1
    return lines[0]

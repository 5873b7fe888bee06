"""A fault in a class of the user's own ends with its line, not with a sentence about options."""

import sys
import traceback
from pathlib import Path

import pytest
from helpers import CONFIGS, Anyo, refused

from anyo_lightning.cli.main import main

OWN = """
import torch
from anyo_lightning import SASRec

class Name(SASRec):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.scale = scales

class Value(SASRec):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.scale = int("x")

class Key(SASRec):
    def next_item_loss(self, *args, **kwargs):
        return {}["scale"]

class Option(SASRec):
    def configure_optimizers(self):
        return super().configure_optimizers()

class Shape(SASRec):
    def next_item_loss(self, *args, **kwargs):
        return torch.zeros(2, 3) @ torch.zeros(2, 3)
"""


@pytest.mark.parametrize(
    ("name", "error", "line"),
    [
        ("Name", NameError, "self.scale = scales"),
        ("Value", ValueError, 'self.scale = int("x")'),
        ("Key", KeyError, 'return {}["scale"]'),
        ("Shape", RuntimeError, "return torch.zeros(2, 3) @ torch.zeros(2, 3)"),
    ],
)
def test_a_fault_in_an_own_class_names_its_line(
    name: str,
    error: type[Exception],
    line: str,
    tiny_data: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whether the constructor or the first step raises it, and whether it does so itself or a library it calls."""
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    monkeypatch.delitem(sys.modules, "of_ones_own", raising=False)
    (tmp_path / "of_ones_own.py").write_text(OWN)
    run = tmp_path / "run"
    options = [f"--data.interactions={tiny_data[0]}", f"--data.items={tiny_data[1]}", "--trainer.accelerator=cpu"]
    with pytest.raises(error) as caught:
        main(["fit", f"-c={CONFIGS}/sasrec.yaml", f"--model.class_path=of_ones_own.{name}", *options, f"--run={run}"])
    assert type(caught.value) is error
    assert line in [frame.line for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert not run.exists()  # nothing was trained
    monkeypatch.delitem(sys.modules, "of_ones_own", raising=False)


def test_a_bad_option_of_an_own_class_is_one(
    tiny_data: tuple[Path, Path],
    tmp_path: Path,
    anyo: Anyo,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Also where the class passes on what a library then refuses."""
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    monkeypatch.delitem(sys.modules, "of_ones_own", raising=False)
    (tmp_path / "of_ones_own.py").write_text(OWN)
    options = [f"--data.interactions={tiny_data[0]}", f"--data.items={tiny_data[1]}", "--trainer.accelerator=cpu"]
    own = ["--model.class_path=of_ones_own.Option", "--model.optimizer.lr=-1", f"--run={tmp_path / 'run'}"]
    assert "Invalid learning rate" in refused(capsys, anyo, "fit", f"-c={CONFIGS}/sasrec.yaml", *own, *options)
    monkeypatch.delitem(sys.modules, "of_ones_own", raising=False)

"""A fault in a class of the user's own ends with its line, not with a sentence about options."""

import sys
import traceback
from collections.abc import Iterator
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


@pytest.fixture
def fit(tiny_data: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The words of `anyo fit` with a class of `OWN` to be named, in the folder `run`."""
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    monkeypatch.delitem(sys.modules, "of_ones_own", raising=False)
    (tmp_path / "of_ones_own.py").write_text(OWN)
    files = [f"--data.interactions={tiny_data[0]}", f"--data.items={tiny_data[1]}"]
    yield ["fit", f"-c={CONFIGS}/sasrec.yaml", *files, "--trainer.accelerator=cpu", f"--run={tmp_path / 'run'}"]
    monkeypatch.delitem(sys.modules, "of_ones_own", raising=False)


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
    name: str, error: type[Exception], line: str, fit: list[str], tmp_path: Path
) -> None:
    """Whether the constructor or the first step raises it, and whether it does so itself or a library it calls."""
    with pytest.raises(error) as caught:
        main([*fit, f"--model.class_path=of_ones_own.{name}"])
    assert type(caught.value) is error
    assert line in [frame.line for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert not (tmp_path / "run").exists()  # nothing was trained


def test_a_bad_option_of_an_own_class_is_one(fit: list[str], anyo: Anyo, capsys: pytest.CaptureFixture[str]) -> None:
    """Also where the class passes on what a library then refuses."""
    own = ["--model.class_path=of_ones_own.Option", "--model.optimizer.lr=-1"]
    assert "Invalid learning rate" in refused(capsys, anyo, *fit, *own)

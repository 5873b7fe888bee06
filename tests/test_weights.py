"""Every target weighs the same: in the batches that one step adds up, and over an epoch with one target per row."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from anyo_lightning.data.batches import HistoryBatch
from anyo_lightning.data.datamodule import RecDataModule
from anyo_lightning.encoders.ids import IdEncoders
from anyo_lightning.models.sasrec import SASRec

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning")
DESCENT = {"optimizer": lambda groups: torch.optim.SGD(groups, lr=1.0), "warmup": 0.0, "decay": False}


class Given(RecDataModule):
    """Trains on given lists of windows."""

    given: list[list[int]]

    def train_dataloader(self) -> Any:
        """One batch per list."""
        return DataLoader(super().train_dataloader().dataset, batch_size=None, sampler=self.given)


class Marked(SASRec):
    """Its loss is the mean of one number per training window, whose gradient is the window's weight."""

    def build(self, data: RecDataModule) -> None:
        """One number per window."""
        self.marks = nn.Parameter(torch.zeros(len(data.train_dataloader().dataset)))  # type: ignore[arg-type]

    def loss(self, states: Tensor, batch: HistoryBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean over the batch's windows."""
        return self.global_mean(self.marks[batch.row].mean(), len(states)), {}


def trainer(folder: Path, **settings: Any) -> Trainer:
    """A quiet Trainer for one epoch, without clipping."""
    options: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    options |= {"enable_checkpointing": False, "limit_val_batches": 0, "accelerator": "cpu", "max_epochs": 1}
    return Trainer(default_root_dir=folder, **options, **settings)


def descended(
    data: tuple[Path, Path], folder: Path, batches: list[list[int]], *, accumulate: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What one epoch of gradient descent takes from each weight, and what was logged."""
    torch.manual_seed(0)
    model = SASRec(IdEncoders(dim=16, dropout=0.0), **DESCENT)
    module = Given(interactions=data[0], items=data[1])
    module.given = batches
    module.setup("fit")
    model.prepare(module)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    fitted = trainer(folder, accumulate_grad_batches=accumulate)
    fitted.fit(model, module)
    changes = {name: before[name] - weight.detach() for name, weight in model.named_parameters()}
    return changes, dict(fitted.logged_metrics)


@pytest.mark.parametrize("accumulate", [3, 5], ids=["a full window", "the last window of an epoch"])
def test_accumulated_gradients_are_those_of_one_batch(
    tiny_data: tuple[Path, Path], tmp_path: Path, accumulate: int
) -> None:
    """Batches of 1, 7 and 20 windows in one step equal 28 windows in one batch, and so does the norm that is logged."""
    rows = list(range(28))
    whole, logged = descended(tiny_data, tmp_path, [rows], accumulate=1)
    parts, logged_of_parts = descended(tiny_data, tmp_path, [rows[:1], rows[1:8], rows[8:]], accumulate=accumulate)
    assert max(change.abs().max() for change in whole.values()) > 1e-3
    for name, change in whole.items():
        torch.testing.assert_close(parts[name], change, rtol=0, atol=1e-6)
    torch.testing.assert_close(logged_of_parts["grad_norm/others"], logged["grad_norm/others"], rtol=1e-5, atol=0)


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("grouped", [True, False])
def test_every_target_of_an_epoch_weighs_the_same(
    tiny_data: tuple[Path, Path], tmp_path: Path, accumulate: int, grouped: bool
) -> None:
    """With one target per row, batches of short rows hold many: their losses weigh more."""
    data = RecDataModule(
        interactions=tiny_data[0], items=tiny_data[1], supervision="last", batch_tokens=60, group_by_length=grouped
    )
    model = Marked(IdEncoders(dim=16, dropout=0.0), **DESCENT)
    fitted = trainer(tmp_path, accumulate_grad_batches=accumulate)
    fitted.fit(model, data)
    weights = -model.marks.detach()
    sizes = [len(rows) for rows in data.train_dataloader().batches.batches()]
    assert len(sizes) > 10
    assert not grouped or max(sizes) > 3 * min(sizes)
    torch.testing.assert_close(
        weights, torch.full_like(weights, len(sizes) / sum(sizes) / accumulate), rtol=1e-5, atol=0
    )


def test_the_loss_that_is_logged_is_a_plain_mean(tiny_data: tuple[Path, Path], tmp_path: Path) -> None:
    """Whatever it weighs."""

    class Constant(Marked):
        def loss(self, states: Tensor, batch: HistoryBatch) -> tuple[Tensor, dict[str, Tensor]]:
            return super().loss(states, batch)[0] * 0 + 2.5, {}

    data = RecDataModule(interactions=tiny_data[0], items=tiny_data[1], supervision="last", batch_tokens=60)
    fitted = trainer(tmp_path, accumulate_grad_batches=2)
    fitted.fit(Constant(IdEncoders(dim=16), **DESCENT), data)
    assert float(fitted.logged_metrics["train/loss"]) == 2.5

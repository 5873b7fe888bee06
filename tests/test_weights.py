"""With one target per row every target of an epoch weighs the same."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from anyo_lightning.data.batches import HistoryBatch
from anyo_lightning.data.datamodule import RecDataModule
from anyo_lightning.encoders.ids import IdEncoders
from anyo_lightning.errors import InputError
from anyo_lightning.models.sasrec import SASRec

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning")
DESCENT = {"optimizer": lambda groups: torch.optim.SGD(groups, lr=1.0), "warmup": 0.0, "decay": False}


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


@pytest.mark.parametrize("grouped", [True, False])
def test_every_target_of_an_epoch_weighs_the_same(tiny_data: tuple[Path, Path], tmp_path: Path, grouped: bool) -> None:
    """With one target per row, batches of short rows hold many: their losses weigh more."""
    data = RecDataModule(
        interactions=tiny_data[0], items=tiny_data[1], supervision="last", batch_tokens=60, group_by_length=grouped
    )
    model = Marked(IdEncoders(dim=16, dropout=0.0), **DESCENT)
    fitted = trainer(tmp_path)
    fitted.fit(model, data)
    weights = -model.marks.detach()
    sizes = [len(rows) for rows in data.train_dataloader().batches.batches()]
    assert len(sizes) > 10
    assert not grouped or max(sizes) > 3 * min(sizes)
    torch.testing.assert_close(weights, torch.full_like(weights, len(sizes) / sum(sizes)), rtol=1e-5, atol=0)


def test_the_loss_that_is_logged_is_a_plain_mean(tiny_data: tuple[Path, Path], tmp_path: Path) -> None:
    """Whatever it weighs."""

    class Constant(Marked):
        def loss(self, states: Tensor, batch: HistoryBatch) -> tuple[Tensor, dict[str, Tensor]]:
            return super().loss(states, batch)[0] * 0 + 2.5, {}

    data = RecDataModule(interactions=tiny_data[0], items=tiny_data[1], supervision="last", batch_tokens=60)
    fitted = trainer(tmp_path)
    fitted.fit(Constant(IdEncoders(dim=16), **DESCENT), data)
    assert float(fitted.logged_metrics["train/loss"]) == 2.5


def test_accumulated_steps_are_refused(tiny_data: tuple[Path, Path], tmp_path: Path) -> None:
    """They would make a step another one: the two options that do what is wanted are named."""
    data = RecDataModule(interactions=tiny_data[0], items=tiny_data[1])
    with pytest.raises(InputError, match=r"accumulate_grad_batches 1, got 4: raise data\.batch_tokens .*micro_batch"):
        trainer(tmp_path, accumulate_grad_batches=4).fit(SASRec(IdEncoders(dim=16)), data)

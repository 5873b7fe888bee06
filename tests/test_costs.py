"""The cost ledger: FLOPs by hand and against a count of every step, what goes on after a restart, what a run says."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

from anyo_lightning.data.datamodule import RecDataModule
from anyo_lightning.evaluation.callback import RetrievalMetrics
from anyo_lightning.llm.backbone import Backbone
from anyo_lightning.models.base import RetrievalModule
from anyo_lightning.models.e4srec import E4SRec
from anyo_lightning.models.floors import Popularity
from anyo_lightning.models.sasrec import SASRec
from anyo_lightning.runs import RunFolder
from anyo_lightning.training import cost_ledger as costs
from anyo_lightning.training.cost_ledger import CostLedger
from anyo_lightning.training.flops import flop_counter

TOLERANCE = 0.05  # of a sample of a third of the steps
SERVING = {"catalogue_encode_seconds", "index_build_seconds", "history_encode_seconds", "queries_per_second"}
TRAINING = {"train_seconds", "tokens", "targets", "flops", "checkpoint_bytes", "ndcg@10_per_pflop"}


def make_data(files: tuple[Path, Path], **changes: Any) -> RecDataModule:
    """The tiny data in small batches."""
    settings: dict[str, Any] = {"max_items": 20, "max_tokens": 300, "batch_tokens": 600}
    return RecDataModule(interactions=files[0], items=files[1], **(settings | changes))


def train(model: RetrievalModule, data: RecDataModule, folder: Path, *, every: int, epochs: int = 3) -> Trainer:
    """Train with a ledger."""
    seed_everything(0, verbose=False)
    checkpoint = ModelCheckpoint(RunFolder(folder).checkpoints, filename="best", enable_version_counter=False)
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=[RetrievalMetrics(), CostLedger(every), checkpoint],
        default_root_dir=str(folder),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, data, ckpt_path=RunFolder(folder).best_checkpoint if checkpoint_there(folder) else None)
    return trainer


def checkpoint_there(folder: Path) -> bool:
    """Whether an earlier training left one."""
    return RunFolder(folder).best_checkpoint.is_file()


def last_row(folder: Path) -> dict[str, Any]:
    """The last line of curves.csv."""
    curves = RunFolder(folder).read_curves()
    assert curves is not None
    return curves.row(-1, named=True)


def test_sasrec_by_hand(tiny_data: tuple[Path, Path]) -> None:
    """A layer multiplies 12 d² weights with each position, and two t × t matrices; backward is 2 and 2.5 times that.

    Attention's backward pass works the scores out again: 5 products for 2. The softmax has 3 products: logits, and the
    gradients of states and vectors.
    """
    data = make_data(tiny_data, batch_tokens=200)
    data.setup("fit")
    model = SASRec(dim=16, layers=2, heads=2, dropout=0.0)
    model.prepare(data)
    batch = next(iter(data.train_dataloader()))
    with flop_counter() as counter:
        states = model(batch)
        model.loss(states, batch)[0].backward()
    rows, length = batch.item_ids.shape
    layer = 3 * 2 * 12 * 16**2 + (2 + 5) * 2 * length * 16
    softmax = 3 * 2 * 16 * len(states) * len(model.training_items)
    assert counter.get_total_flops() == 2 * rows * length * layer + softmax
    assert softmax > 0.01 * counter.get_total_flops()


@pytest.mark.parametrize("name", ["sasrec", "e4srec"])
def test_a_sample_of_steps_is_near_the_count_of_all(
    name: str, tiny_data: tuple[Path, Path], tiny_llm: str, tmp_path: Path
) -> None:
    """Within 5% of torch's counter around every step; counting changes the weights by rounding at most."""
    lora = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
    backbone = partial(Backbone, tiny_llm, dtype="float32", lora=lora)
    weights, flops = [], []
    for every in (1, 3, 10**9):
        model = SASRec(dim=16) if name == "sasrec" else E4SRec(backbone=backbone, dim=16)
        trainer = train(
            model,
            make_data(tiny_data, batch_tokens=100 if name == "sasrec" else 600),
            tmp_path / str(every),
            every=every,
        )
        assert trainer.global_step > 12
        weights.append(model.state_dict())
        flops.append(last_row(tmp_path / str(every))["flops"])
    assert flops[1] != flops[0]
    assert flops[1] == pytest.approx(flops[0], rel=TOLERANCE)
    for key, value in weights[1].items():
        torch.testing.assert_close(value, weights[2][key], rtol=1e-4, atol=1e-6)


def test_a_resumed_run_goes_on_with_its_sample_and_its_peak(
    tiny_data: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two epochs and two more cost what four do; the peak of the first process is not forgotten."""
    train(SASRec(dim=16), make_data(tiny_data), tmp_path / "whole", every=2, epochs=4)
    monkeypatch.setattr(costs, "peak_memory_gib", lambda: 5.0)
    train(SASRec(dim=16), make_data(tiny_data), tmp_path / "parts", every=2, epochs=2)
    monkeypatch.setattr(costs, "peak_memory_gib", lambda: 3.0)
    train(SASRec(dim=16), make_data(tiny_data), tmp_path / "parts", every=2, epochs=4)
    whole, parts = last_row(tmp_path / "whole"), last_row(tmp_path / "parts")
    for name in ("step", "tokens", "targets", "flops"):
        assert parts[name] == whole[name] > 0
    assert parts["peak_memory_gib"] == 5.0


def test_a_run_says_what_training_and_serving_cost(tiny_data: tuple[Path, Path], tmp_path: Path) -> None:
    """All of the ledger in metrics.json, from what was measured; a floor is not trained and has no figure a PFLOP."""
    data = make_data(tiny_data)
    trainer = train(SASRec(dim=16), data, tmp_path / "sasrec", every=2)
    trainer.test(trainer.lightning_module, data, verbose=False)
    metrics = RunFolder(tmp_path / "sasrec").read_metrics()
    cost = metrics["cost"]
    assert SERVING | TRAINING | {"trainable_parameters", "peak_memory_gib"} <= set(cost)
    assert all(value > 0 for value in cost.values())
    assert cost["checkpoint_bytes"] == RunFolder(tmp_path / "sasrec").best_checkpoint.stat().st_size
    ndcg = metrics["metrics"]["test/ndcg@10"]["value"]
    assert cost["ndcg@10_per_pflop"] * cost["flops"] == pytest.approx(ndcg * 1e15)
    floor = Trainer(
        accelerator="cpu",
        callbacks=[RetrievalMetrics()],
        default_root_dir=str(tmp_path / "floor"),
        logger=False,
        enable_progress_bar=False,
    )
    floor.test(Popularity(), make_data(tiny_data), verbose=False)
    cost = RunFolder(tmp_path / "floor").read_metrics()["cost"]
    assert SERVING | {"train_seconds", "peak_memory_gib"} <= set(cost)
    assert cost["tokens"] == cost["targets"] == 0
    assert not {"flops", "ndcg@10_per_pflop", "checkpoint_bytes"} & set(cost)

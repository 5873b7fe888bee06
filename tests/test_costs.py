"""The cost ledger: FLOPs by hand and against a count of every step, what continues after a restart, what a run says."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import QUIET, MakeData, fit, prepare, tiny
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from anyo_lightning import losses
from anyo_lightning.data.batches import HistoryBatch
from anyo_lightning.data.datamodule import RecDataModule
from anyo_lightning.encoders.ids import IdEncoders
from anyo_lightning.encoders.text import TextEncoders
from anyo_lightning.evaluation.callback import RetrievalMetrics
from anyo_lightning.llm import attention
from anyo_lightning.models.base import RetrievalModule
from anyo_lightning.models.e4srec import E4SRec
from anyo_lightning.models.floors import Popularity
from anyo_lightning.models.sasrec import SASRec
from anyo_lightning.runs import RunFolder
from anyo_lightning.training import cost_ledger as costs
from anyo_lightning.training.cost_ledger import CostLedger
from anyo_lightning.training.flops import flop_counter

needs_kernel = pytest.mark.skipif(not losses.FUSED, reason="torch has linear_cross_entropy from 2.13 on")
TOLERANCE = 0.05  # of a sample of a third of the steps
SERVING = {"catalogue_encode_seconds", "index_build_seconds", "history_encode_seconds", "queries_per_second"}
TRAINING = {"train_seconds", "tokens", "targets", "flops", "checkpoint_bytes", "ndcg@10_per_pflop"}


def train(model: RetrievalModule, data: RecDataModule, folder: Path, *, every: int, epochs: int = 3) -> Trainer:
    """Train with a ledger, from where an earlier training has stopped."""
    last = RunFolder(folder).last_checkpoint
    ledger = CostLedger(RunFolder(folder), every=every)
    return fit(model, data, folder, epochs, callbacks=[ledger], ckpt_path=last if last.is_file() else None)


def last_row(folder: Path) -> dict[str, Any]:
    """The last line of curves.csv."""
    curves = RunFolder(folder).read_curves()
    assert curves is not None
    return curves.row(-1, named=True)


@pytest.mark.parametrize("fused", [pytest.param(True, marks=needs_kernel), False])
def test_sasrec_by_hand(fused: bool, make_data: MakeData, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer multiplies 12 d² weights with each position, and two t × t matrices; backward is 2 and 2.5 times that.

    Attention's backward pass works the scores out again: 5 products for 2. The softmax has 3 products: logits, and the
    gradients of states and vectors; and the logits again where they are recomputed.
    """
    monkeypatch.setattr(losses, "FUSED", fused)
    data = make_data(batch_tokens=200)
    model = prepare(SASRec(IdEncoders(dim=16, layers=2, heads=2, dropout=0.0)), data)
    batch = next(iter(data.train_dataloader()))
    with flop_counter() as counter:
        states = model(batch)
        model.loss(states, batch)[0].backward()
    rows, length = batch.item_ids.shape
    layer = 3 * 2 * 12 * 16**2 + (2 + 5) * 2 * length * 16
    softmax = (3 if fused else 4) * 2 * 16 * len(states) * len(model.training_items)
    assert counter.get_total_flops() == 2 * rows * length * layer + softmax
    assert softmax > 0.01 * counter.get_total_flops()


@pytest.mark.parametrize(("kernel", "heads"), [("flash", 3), ("cudnn", 3), ("efficient", 9)])
def test_attention_of_gpus(kernel: str, heads: int) -> None:
    """Counted where three heads of queries share one of keys; torch's own counter fails there. No GPU is needed."""
    query = torch.empty(2, 9, 50, 64, device="meta", dtype=torch.bfloat16, requires_grad=True)
    key = torch.empty(2, heads, 50, 64, device="meta", dtype=torch.bfloat16, requires_grad=True)
    options = {"flash": (0.0, True), "efficient": (None, True, 0.0, True), "cudnn": (None, True, 0.0, True)}[kernel]
    with flop_counter() as counter:
        states = getattr(torch.ops.aten, f"_scaled_dot_product_{kernel}_attention")(query, key, key, *options)[0]
        forward = counter.get_total_flops()
        states.sum().backward()
    assert forward == 2 * 2 * (2 * 9) * 50 * 50 * 64
    assert counter.get_total_flops() == (2 + 5) / 2 * forward


def test_attention_of_gpus_to_earlier_keys() -> None:
    """The kernel that torch takes for a causal mask of fewer queries than keys: another order of dimensions."""
    query = torch.empty(2, 5, 9, 64, device="meta", requires_grad=True)
    key = torch.empty(2, 45, 9, 64, device="meta", requires_grad=True)
    options = {"bias": None, "cu_seqlens_q": None, "cu_seqlens_k": None, "max_seqlen_q": None, "max_seqlen_k": None}
    with flop_counter() as counter:
        states = torch.ops.aten._efficient_attention_forward(
            query, key, key, **options, dropout_p=0.0, custom_mask_type=2, compute_log_sumexp=True
        )[0]
        forward = counter.get_total_flops()
        states.sum().backward()
    assert forward == 2 * 2 * (2 * 9) * 5 * 45 * 64
    assert counter.get_total_flops() == (2 + 5) / 2 * forward


def test_attention_to_earlier_keys_can_be_counted() -> None:
    """Torch makes its mask as a subclass of tensors, which it cannot while something counts."""
    query, key = torch.zeros(1, 2, 3, 8, dtype=torch.float64), torch.zeros(1, 1, 5, 8, dtype=torch.float64)
    with flop_counter() as counter:
        attention._attend(query, key, key, dropout=0.0, scaling=None)
    assert counter.get_total_flops() > 0


@pytest.mark.parametrize("name", ["sasrec", "e4srec"])
def test_a_sample_of_steps_is_near_the_count_of_all(
    name: str, make_data: MakeData, tiny_llm: str, tmp_path: Path
) -> None:
    """Within 5% of torch's counter around every step; counting changes the weights by rounding at most."""
    make = {
        "sasrec": lambda: SASRec(IdEncoders(dim=16)),
        "e4srec": lambda: E4SRec(TextEncoders(tiny(tiny_llm), dim=16)),
    }[name]
    weights, flops = [], []
    for every in (1, 3, 10**9):
        model, data = make(), make_data(batch_tokens=100 if name == "sasrec" else 600)
        trainer = train(model, data, tmp_path / str(every), every=every)
        assert trainer.global_step > 12
        weights.append(model.state_dict())
        flops.append(last_row(tmp_path / str(every))["flops"])
    assert flops[1] != flops[0]
    assert flops[1] == pytest.approx(flops[0], rel=TOLERANCE)
    for key, value in weights[1].items():
        torch.testing.assert_close(value, weights[2][key], rtol=1e-4, atol=1e-6)


def test_a_resumed_run_goes_on_with_its_sample_and_its_peak(
    make_data: MakeData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two epochs and two more cost what four do; the peak of the first process is not forgotten."""
    train(SASRec(IdEncoders(dim=16)), make_data(batch_tokens=600), tmp_path / "whole", every=2, epochs=4)
    monkeypatch.setattr(costs, "peak_memory_gib", lambda: 5.0)
    train(SASRec(IdEncoders(dim=16)), make_data(batch_tokens=600), tmp_path / "parts", every=2, epochs=2)
    monkeypatch.setattr(costs, "peak_memory_gib", lambda: 3.0)
    train(SASRec(IdEncoders(dim=16)), make_data(batch_tokens=600), tmp_path / "parts", every=2, epochs=4)
    whole, parts = last_row(tmp_path / "whole"), last_row(tmp_path / "parts")
    for name in ("step", "tokens", "targets", "flops"):
        assert parts[name] == whole[name] > 0
    assert parts["peak_memory_gib"] == 5.0


def test_rows_of_a_run_that_is_resumed_within_an_epoch_name_it(make_data: MakeData, tmp_path: Path) -> None:
    """Lightning begins no epoch there: what is left of it, and its validation, belong to the same epoch as before."""

    class Saves(Callback):
        def on_train_batch_end(
            self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            if (trainer.current_epoch, batch_idx) == (1, 1):
                trainer.save_checkpoint(tmp_path / "within.ckpt")

    ledgers = [CostLedger(RunFolder(tmp_path / name), every=1) for name in ("whole", "rest")]
    for ledger, start in zip(ledgers, (None, tmp_path / "within.ckpt"), strict=True):
        model, data = SASRec(IdEncoders(dim=16)), make_data(batch_tokens=100)
        fit(model, data, ledger.run.path, callbacks=[ledger, *([] if start else [Saves()])], ckpt_path=start)
    epochs = [{row["step"]: row["epoch"] for row in ledger.rows} for ledger in ledgers]
    assert len(epochs[1]) > 2
    assert epochs[1].items() <= epochs[0].items()


def test_a_run_says_what_training_and_serving_cost(make_data: MakeData, tmp_path: Path) -> None:
    """All of the ledger in metrics.json, from what was measured; a floor is not trained and has no figure a PFLOP."""
    data, run = make_data(batch_tokens=600), RunFolder(tmp_path / "sasrec")
    model = train(SASRec(IdEncoders(dim=16)), data, run.path, every=2).lightning_module
    Trainer(callbacks=[RetrievalMetrics(folder=run.path)], **QUIET).test(model, data, verbose=False)
    metrics = run.read_metrics()
    cost = metrics["cost"]
    assert SERVING | TRAINING | {"trainable_parameters", "peak_memory_gib"} <= set(cost)
    assert all(value > 0 for value in cost.values())
    assert cost["checkpoint_bytes"] == run.best_checkpoint.stat().st_size
    ndcg = metrics["metrics"]["test/ndcg@10"]["value"]
    assert cost["ndcg@10_per_pflop"] * cost["flops"] == pytest.approx(ndcg * 1e15)
    floor = RunFolder(tmp_path / "floor")
    Trainer(callbacks=[RetrievalMetrics(folder=floor.path)], **QUIET).test(Popularity(), data, verbose=False)
    cost = floor.read_metrics()["cost"]
    assert SERVING | {"train_seconds", "peak_memory_gib"} <= set(cost)
    assert cost["tokens"] == cost["targets"] == 0
    assert not {"flops", "ndcg@10_per_pflop", "checkpoint_bytes"} & set(cost)


def test_counting_ends_with_an_exception(make_data: MakeData, tmp_path: Path) -> None:
    """What is computed after a training that has failed is not counted, and another one can follow."""

    class Fails(SASRec):
        def training_step(self, batch: HistoryBatch, batch_idx: int) -> Tensor:
            raise ValueError("as planned")

    with pytest.raises(ValueError, match="as planned"):
        train(Fails(IdEncoders(dim=16)), make_data(), tmp_path, every=1, epochs=1)
    assert not torch.utils._python_dispatch._get_current_dispatch_mode_stack()

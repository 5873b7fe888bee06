"""Models as Lightning trains them: they learn, save little, load back exactly, and refuse what is not theirs."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.nn import functional as F

from anyo_lightning.data.datamodule import RecDataModule
from anyo_lightning.errors import InputError
from anyo_lightning.evaluation.callback import RetrievalMetrics
from anyo_lightning.llm.backbone import Backbone
from anyo_lightning.models import identity
from anyo_lightning.models.anyo import Anyo
from anyo_lightning.models.base import RetrievalModule
from anyo_lightning.models.e4srec import E4SRec
from anyo_lightning.models.sasrec import SASRec
from anyo_lightning.runs import RunFolder

Make = Callable[..., RetrievalModule]


@pytest.fixture
def make_data(tiny_data: tuple[Path, Path]) -> Callable[..., RecDataModule]:
    """Data modules over the tiny data set."""
    defaults: dict[str, Any] = {"max_items": 20, "max_tokens": 300, "batch_tokens": 2000}
    return lambda **changes: RecDataModule(interactions=tiny_data[0], items=tiny_data[1], **(defaults | changes))


def backbone(folder: str, **changes: Any) -> Callable[[], Backbone]:
    """A tiny backbone with LoRA."""
    lora = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
    return partial(Backbone, folder, **({"dtype": "float32", "lora": lora} | changes))


def fit(model: RetrievalModule, data: RecDataModule, folder: Path, epochs: int = 2, **options: Any) -> Trainer:
    """Train on one CPU thread, the best checkpoint as in a run folder."""
    seed_everything(0, verbose=False)
    checkpoint = ModelCheckpoint(
        RunFolder(folder).checkpoints, filename="best", monitor="val/ndcg@10", mode="max", enable_version_counter=False
    )
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=[RetrievalMetrics(mask_history=False), checkpoint],
        default_root_dir=str(folder),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(model, data)
    return trainer


def variants(folder: str) -> dict[str, Make]:
    """The trained variants with tiny settings."""
    optimizer = partial(torch.optim.AdamW, lr=1e-2)
    return {
        "sasrec": partial(SASRec, dim=16, dropout=0.0, optimizer=optimizer),
        "e4srec": partial(E4SRec, backbone=backbone(folder), dim=16, optimizer=optimizer),
        "hybrid": partial(E4SRec, backbone=backbone(folder), dim=16, id_residual=True, optimizer=optimizer),
        "anyo": partial(Anyo, backbone=backbone(folder), dim=16, negatives=8, optimizer=optimizer),
    }


@pytest.mark.parametrize("name", ["sasrec", "e4srec", "hybrid", "anyo"])
def test_training_lowers_the_loss_and_beats_chance(
    name: str, tiny_llm: str, make_data: Callable[..., RecDataModule], tmp_path: Path
) -> None:
    """The data are loops through the catalogue: a model that learns anything ranks the next item high."""
    first = fit(variants(tiny_llm)[name](), make_data(), tmp_path / "first", epochs=1).callback_metrics
    last = fit(variants(tiny_llm)[name](), make_data(), tmp_path, epochs=25).callback_metrics
    assert float(last["train/loss"]) < 0.9 * float(first["train/loss"])
    assert float(last["val/hr@5"]) > 0.5  # chance .31: 5 of 16 items, none of which is masked here


@pytest.mark.parametrize("name", ["sasrec", "e4srec", "hybrid", "anyo"])
def test_checkpoint_restores_exactly_and_leaves_the_backbone_out(
    name: str, tiny_llm: str, make_data: Callable[..., RecDataModule], tmp_path: Path
) -> None:
    """Another process's model with the checkpoint gives the same figures; no frozen weight is in the file."""
    make = variants(tiny_llm)[name]
    trainer = fit(make(), make_data(), tmp_path)
    best = str(RunFolder(tmp_path).best_checkpoint)
    first = trainer.validate(trainer.lightning_module, make_data(), ckpt_path=best, verbose=False)[0]
    seed_everything(123, verbose=False)
    fresh = Trainer(
        accelerator="cpu",
        callbacks=[RetrievalMetrics(mask_history=False)],
        logger=False,
        enable_progress_bar=False,
        default_root_dir=str(tmp_path),
    )
    model = make()
    second = fresh.validate(model, make_data(), ckpt_path=best, verbose=False)[0]
    assert {k: v for k, v in first.items() if k != "val/seconds"} == {
        k: v for k, v in second.items() if k != "val/seconds"
    }
    saved = torch.load(best, weights_only=True)
    assert not set(saved["state_dict"]) & identity.frozen_keys(model)
    assert set(saved["state_dict"]) | identity.frozen_keys(model) == set(model.state_dict())
    if name != "sasrec":
        assert any("lora_A" in key for key in saved["state_dict"])
        assert len(identity.frozen_keys(model)) > 20


def test_foreign_checkpoints_are_refused(
    tiny_llm: str, make_data: Callable[..., RecDataModule], tmp_path: Path
) -> None:
    """Another model, backbone depth or split: one sentence that names both."""
    make = variants(tiny_llm)["e4srec"]
    fit(make(), make_data(), tmp_path, epochs=1)
    best = str(RunFolder(tmp_path).best_checkpoint)
    quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False}

    def validate(model: RetrievalModule, data: RecDataModule) -> None:
        Trainer(**quiet, callbacks=[RetrievalMetrics(mask_history=False)]).validate(model, data, ckpt_path=best)

    with pytest.raises(InputError, match="checkpoint of model Anyo, got E4SRec"):
        validate(variants(tiny_llm)["anyo"](), make_data())
    with pytest.raises(InputError, match=r"checkpoint of backbone .*layers=2.*got .*layers=3"):
        validate(E4SRec(backbone=backbone(tiny_llm, layers=2), dim=16), make_data())
    with pytest.raises(InputError, match="checkpoint of split"):
        validate(make(), make_data(ties="shuffle", ties_seed=3, k_core=0, strategy="ratio"))
    fit(variants(tiny_llm)["hybrid"](), make_data(), tmp_path / "hybrid", epochs=1)
    best = str(RunFolder(tmp_path / "hybrid").best_checkpoint)
    with pytest.raises(InputError, match=r"unknown item_encoder\.residual"):
        validate(make(), make_data())


def test_item_vectors_and_init_come_from_runs(
    tiny_llm: str, make_data: Callable[..., RecDataModule], tmp_path: Path
) -> None:
    """The paper's E4SRec reads a SASRec run's vectors, frozen; `init_from` starts from a run's weights."""
    fit(variants(tiny_llm)["sasrec"](), make_data(), tmp_path / "sasrec", epochs=1)
    model = E4SRec(backbone=backbone(tiny_llm), dim=16, item_vectors_from=tmp_path / "sasrec")
    fit(model, make_data(supervision="last"), tmp_path / "paper", epochs=1)
    saved = torch.load(RunFolder(tmp_path / "sasrec").best_checkpoint, weights_only=True)["state_dict"]
    trained = saved["item_encoder.embedding.weight"]
    standardised = (trained - trained.mean(0)) / trained.std()
    torch.testing.assert_close(model.history_encoder.injection.item_vectors, standardised)
    again = E4SRec(
        backbone=backbone(tiny_llm), dim=16, item_vectors_from=tmp_path / "sasrec", init_from=tmp_path / "paper"
    )
    data = make_data(supervision="last")
    data.setup("fit")
    again.prepare(data)
    best = torch.load(RunFolder(tmp_path / "paper").best_checkpoint, weights_only=True)["state_dict"]
    for key, value in best.items():
        torch.testing.assert_close(again.state_dict()[key], value, msg=key)
    gone = tmp_path / "gone"  # a finished run needs its own checkpoint, not the folders that it started from
    alone = E4SRec(backbone=backbone(tiny_llm), dim=16, item_vectors_from=gone, init_from=gone)
    alone.restored = best
    alone.prepare(data)
    torch.testing.assert_close(alone.history_encoder.injection.item_vectors, standardised)
    with pytest.raises(InputError, match="item embeddings"):
        identity.item_vectors(_run_without_ids(tiny_llm, make_data, tmp_path), data.split)


def _run_without_ids(tiny_llm: str, make_data: Callable[..., RecDataModule], tmp_path: Path) -> Path:
    fit(variants(tiny_llm)["e4srec"](), make_data(), tmp_path / "text", epochs=1)
    return tmp_path / "text"


def test_losses_range_over_training_items_only(tiny_llm: str, tmp_path: Path) -> None:
    """An item that occurs in the test alone is no candidate of the loss, and is ranked all the same."""
    rows = [f"u{u},m{(u + t) % 6},{t}" for u in range(12) for t in range(5)] + [f"u{u},new,9" for u in range(3)]
    (tmp_path / "i.csv").write_text("user_id,item_id,timestamp\n" + "\n".join(rows) + "\n")
    items = [f"m{i},Movie {i}" for i in range(6)] + ["new,A new one"]
    (tmp_path / "c.csv").write_text("item_id,title\n" + "\n".join(items) + "\n")
    data = RecDataModule(
        interactions=tmp_path / "i.csv",
        items=tmp_path / "c.csv",
        k_core=0,
        strategy="global_time",
        times=(4, 9),
        max_tokens=200,
    )
    data.setup("fit")
    model = variants(tiny_llm)["hybrid"]()
    model.prepare(data)
    model.eval()  # without dropout
    assert model.training_items.tolist() == list(range(6))
    batch = next(iter(data.train_dataloader()))
    states = model(batch)
    expected = F.cross_entropy(states @ model.encode_catalogue()[:6].T, batch.targets)
    torch.testing.assert_close(model.loss(states, batch)[0], expected)
    assert model.encode_catalogue().shape == (7, 16)


def test_learning_rates_by_name(tiny_llm: str, make_data: Callable[..., RecDataModule], tmp_path: Path) -> None:
    """The LoRA group has its own rate, the rest the optimizer's; both rise and fall together."""
    model = E4SRec(
        backbone=backbone(tiny_llm),
        dim=16,
        optimizer=partial(torch.optim.AdamW, lr=1e-2),
        learning_rates={"history_encoder.backbone": 1e-3},
    )
    trainer = fit(model, make_data(), tmp_path, epochs=3)
    groups = {group["name"]: group for group in trainer.optimizers[0].param_groups}
    assert groups["history_encoder.backbone"]["initial_lr"] == 1e-3
    assert groups["others"]["initial_lr"] == 1e-2
    lora = {id(p) for n, p in model.named_parameters() if "lora_" in n}
    assert {id(p) for p in groups["history_encoder.backbone"]["params"]} == lora
    assert groups["others"]["lr"] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("name", ["sasrec", "e4srec", "hybrid", "anyo"])
def test_models_are_made_on_the_cpu_whatever_the_default_device(
    name: str, tiny_llm: str, make_data: Callable[..., RecDataModule]
) -> None:
    """Lightning builds models with a GPU as the default device, where new tensors would meet those of numpy."""
    data = make_data()
    data.setup("fit")
    model = variants(tiny_llm)[name]()
    with torch.device("meta"):
        model.prepare(data)
    tensors = [*model.named_parameters(), *model.named_buffers()]
    assert len(tensors) > 5
    assert {name: t.device.type for name, t in tensors if t.device.type != "cpu"} == {}


def test_seeds_differ_in_their_batches(make_data: Callable[..., RecDataModule]) -> None:
    """`seed_everything` alone gives other batches; the same seed the same ones."""

    def batches(seed: int) -> list[list[int]]:
        seed_everything(seed, verbose=False)
        data = make_data(batch_tokens=60)
        data.setup("fit")
        return list(data.train_dataloader().sampler)

    assert batches(0) == batches(0)
    assert batches(0) != batches(1)

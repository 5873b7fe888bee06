"""E4SRec taught by a SASRec run: both terms by hand, a teacher that stays as it is, and no need of it afterwards."""

import math
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from helpers import CONFIGS, Anyo, MakeData, differing, fit, prepare, refused, save_as_run, tiny, weights
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.nn import functional as F

from anyo_lightning.encoders.hierarchical import HierarchicalEncoders
from anyo_lightning.encoders.ids import IdEncoders
from anyo_lightning.encoders.live import LiveTextEncoders, LiveTextItems
from anyo_lightning.encoders.text import TextEncoders
from anyo_lightning.encoders.text_start import TextStartEncoders
from anyo_lightning.errors import InputError
from anyo_lightning.models.distillation import WEIGHTS
from anyo_lightning.models.e4srec import E4SRec
from anyo_lightning.models.sasrec import SASRec
from anyo_lightning.runs import RunFolder

Make = Callable[..., E4SRec]


@pytest.fixture
def sasrec(make_data: MakeData, tmp_path: Path) -> SASRec:
    """What the run folder `sasrec` holds: random weights, larger than those that training starts from."""
    torch.manual_seed(1)
    model = prepare(SASRec(IdEncoders(dim=6, layers=1, heads=2, body="recbole", positions="end")), make_data())
    torch.nn.init.normal_(model.item_encoder.embedding.weight)
    save_as_run(model, tmp_path / "sasrec")
    return model.eval()


@pytest.fixture
def make(tiny_llm: str, sasrec: SASRec, tmp_path: Path) -> Make:
    """Students of it, without dropout."""

    def student(**options: Any) -> E4SRec:
        torch.manual_seed(0)
        encoders = TextEncoders(tiny(tiny_llm), reads="vectors", dim=8, dropout=0.0, input_dropout=0.0)
        settings = {"distil_from": tmp_path / "sasrec", "distillation": 0.5, "alignment": 0.25} | options
        return E4SRec(encoders, optimizer=partial(torch.optim.AdamW, lr=1e-2), **settings)

    return student


def test_loss_by_hand(make: Make, sasrec: SASRec, make_data: MakeData) -> None:
    """Each target's squared distance and cross-entropy, the teacher reading what the student reads."""
    model = prepare(make(), make_data(max_items=7))
    (batch, *_) = model.data.train_dataloader()
    states, vectors = model(batch), model.encode_items(torch.arange(16))
    read = sasrec.encode_batch(batch).detach()
    teacher = sasrec.encode_items(torch.arange(16)).detach()
    assert model.distillation is not None
    maps = dict(model.distillation.named_parameters())
    next_item, distances, alignments = [], [], []
    for state, taught, target in zip(states, read, batch.targets.tolist(), strict=True):
        next_item.append((vectors @ state).logsumexp(0) - vectors[target] @ state)
        mapped = maps["state_map.weight"] @ state + maps["state_map.bias"]
        distances.append(sum((mapped[i] - taught[i]) ** 2 for i in range(6)) / 6)
        own = maps["item_map.weight"] @ vectors[target]
        cosines = torch.stack([own @ other / (own.norm() * other.norm()) for other in teacher])
        alignments.append(math.log(sum(math.exp(float(c) / 2) for c in cosines)) - float(cosines[target]) / 2)
    loss, parts = model.loss(states, batch)
    torch.testing.assert_close(parts["teacher_states"], torch.stack(distances).mean())
    assert float(parts["teacher_items"]) == pytest.approx(sum(alignments) / len(alignments), rel=1e-5)
    expected = torch.stack(next_item).mean() + 0.5 * parts["teacher_states"] + 0.25 * parts["teacher_items"]
    torch.testing.assert_close(loss, expected)


def test_a_step_without_targets(make: Make, make_data: MakeData) -> None:
    """A process without a share of a step: zero, with a gradient of zero for all that is trained."""
    model = prepare(make(), make_data())
    (batch, *_) = model.data.train_dataloader()
    nothing = batch.of_rows(np.empty(0, dtype=np.int64))
    loss, _ = model.loss(model(nothing), nothing)
    loss.backward()
    assert float(loss.detach()) == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.distillation.parameters())


@pytest.mark.parametrize(("distillation", "alignment"), [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0)])
def test_weights_say_what_is_learnt(
    make: Make, make_data: MakeData, tmp_path: Path, distillation: float, alignment: float
) -> None:
    """A step moves the language model differently with each term; without both it is E4SRec's, bit for bit."""
    found = {}
    for name, options in {
        "plain": {"distil_from": None},
        "taught": {"distillation": distillation, "alignment": alignment},
    }.items():
        model = make(**options)
        fit(model, make_data(), tmp_path / name, epochs=1)
        found[name] = weights(RunFolder(tmp_path / name).last_checkpoint)
    maps = {name for name in found["taught"] if name.startswith("distillation.")}
    assert maps == {*(WEIGHTS[:2] if distillation else ()), *(WEIGHTS[2:] if alignment else ())}
    changed = differing(found["plain"], found["taught"]) - maps
    assert bool(changed) == bool(distillation or alignment)
    assert any("lora" in name for name in changed) == bool(distillation or alignment)


def test_the_teacher_stays_as_it_is(make: Make, sasrec: SASRec, make_data: MakeData, tmp_path: Path) -> None:
    """Frozen, without dropout, in no parameter, buffer or checkpoint; both distances fall."""
    model = make(distillation=1.0, alignment=1.0)
    data = make_data(batch_tokens=300)
    prepare(model, data)
    (batch, *_) = data.train_dataloader()
    first = model.loss(model(batch), batch)[1]
    fit(model, data, tmp_path / "run", epochs=10)
    assert model.distillation is not None
    teacher = model.distillation.teacher
    assert teacher is not None
    model.train()
    torch.testing.assert_close(teacher.states(batch), sasrec.encode_batch(batch).detach())
    assert not differing(dict(teacher.history.state_dict()), dict(sasrec.history_encoder.state_dict()))
    own = {name for name in model.state_dict() if name.startswith("distillation.")}
    assert own == set(WEIGHTS) == {n for n in weights(RunFolder(tmp_path / "run").best_checkpoint) if "distil" in n}
    last = model.eval().loss(model(batch), batch)[1]
    assert float(last["teacher_states"]) < 0.7 * float(first["teacher_states"])
    assert float(last["teacher_items"]) < float(first["teacher_items"]) - 0.1


def test_a_resumed_student_is_the_uninterrupted_one(make: Make, make_data: MakeData, tmp_path: Path) -> None:
    """Weights and maps."""

    class Stop(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            trainer.should_stop = True

    whole, halves = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "halves")
    data = partial(make_data, batch_tokens=300)
    fit(make(), data(), whole.path, epochs=2)
    fit(make(), data(), halves.path, epochs=2, callbacks=[Stop()])
    second = make()
    second.restore_from(halves.last_checkpoint)
    fit(second, data(), halves.path, epochs=2, ckpt_path=halves.last_checkpoint)
    assert not differing(*(weights(run.last_checkpoint) for run in (whole, halves)))


def test_it_starts_from_a_run_without_a_teacher(make: Make, make_data: MakeData, tmp_path: Path) -> None:
    """And the reverse: maps start afresh or are left behind."""
    fit(make(), make_data(), tmp_path / "taught", epochs=1)
    fit(make(distil_from=None), make_data(), tmp_path / "plain", epochs=1)
    for start, options in (("plain", {}), ("taught", {"distil_from": None}), ("taught", {})):
        model = prepare(make(init_from=tmp_path / start, **options), make_data())
        for name, value in weights(RunFolder(tmp_path / start).best_checkpoint).items():
            if name not in WEIGHTS:
                assert torch.equal(model.state_dict()[name], value), name


def test_a_student_that_encodes_items_anew_is_built_without_reading_one(
    tiny_llm: str, sasrec: SASRec, make_data: MakeData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The language model is on its own device by then, and nothing else is yet."""
    monkeypatch.setattr(LiveTextItems, "forward", lambda *arguments: pytest.fail("an item was read"))
    live = partial(HierarchicalEncoders, tiny(tiny_llm), item_backbone=tiny(tiny_llm), whiten=False)
    model = E4SRec(live(dim=12), temperature=0.1, distil_from=tmp_path / "sasrec")
    data = make_data(max_items=7)
    data.read_for(model)
    model.prepare(data)
    assert model.distillation is not None
    assert model.distillation.state_map.weight.shape[1] == 12
    dual = LiveTextEncoders(tiny(tiny_llm), dim=None)
    with pytest.raises(InputError, match=r"a width, model\.encoders\.dim, with model\.distil_from, got none"):
        prepare(E4SRec(dual, temperature=0.1, distil_from=tmp_path / "sasrec"), make_data(max_items=7))


def test_teachers_that_do_not_fit(make: Make, tiny_llm: str, make_data: MakeData, tmp_path: Path) -> None:
    """None, another split, another kind, a shorter window; and weights below zero."""
    with pytest.raises(InputError, match=r"Expected a checkpoint, got no file .*none"):
        prepare(make(distil_from=tmp_path / "none"), make_data())
    with pytest.raises(InputError, match=r"sasrec to be a run on split \w+, got \w+"):
        prepare(make(), make_data(k_core=6))
    with pytest.raises(InputError, match=r"data\.max_items at most 20, .* got 21"):
        prepare(make(), make_data(max_items=21))
    plain = prepare(make(distil_from=None), make_data())
    with pytest.raises(InputError, match=r"distil_from to name a run of SASRec whose .* got E4SRec"):
        prepare(make(distil_from=save_as_run(plain, tmp_path / "e4srec")), make_data())
    for name in ("distillation", "alignment"):
        with pytest.raises(InputError, match=rf"model\.{name} to be at least 0, got -1"):
            make(**{name: -1.0})


def test_a_table_that_started_from_texts_teaches(
    make: Make, tiny_llm: str, make_data: MakeData, tmp_path: Path
) -> None:
    """Its table is all its own; one with frozen dimensions is refused."""
    encoders = partial(TextStartEncoders, tiny(tiny_llm, lora=None), dim=8)
    taught = prepare(SASRec(encoders(tied=False)), make_data())
    model = prepare(make(distil_from=save_as_run(taught, tmp_path / "free")), make_data())
    (batch, *_) = model.data.train_dataloader()
    assert model.distillation is not None
    assert model.distillation.teacher is not None
    torch.testing.assert_close(model.distillation.teacher.states(batch), taught.eval().encode_batch(batch).detach())
    torch.testing.assert_close(
        model.distillation.teacher.vectors, F.normalize(taught.item_encoder.embedding.weight.detach(), dim=-1)
    )
    split = save_as_run(prepare(SASRec(encoders(frozen=4)), make_data()), tmp_path / "split")
    with pytest.raises(InputError, match="a run of SASRec whose table is all trained, got SASRec"):
        prepare(make(distil_from=split), make_data())


def test_a_trained_run_needs_no_teacher(
    anyo: Anyo,
    small: list[str],
    small_llm: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """From the command line: fit, test again and resume where the teacher is elsewhere."""
    teacher, run = tmp_path / "teacher", RunFolder(tmp_path / "taught")
    anyo("fit", f"--config={CONFIGS / 'sasrec.yaml'}", *small, f"--run={teacher}", "--final_test=false")
    config = f"--config={CONFIGS / 'e4srec_vectors.yaml'}"
    anyo("fit", config, *small, *small_llm, f"--model.distil_from={teacher}", f"--run={run.path}")
    assert {"train/teacher_states", "train/teacher_items"} <= set(pl.read_csv(run.curves_file).columns)
    figures, read = (run.read_metrics()[name] for name in ("metrics", "lineage"))
    assert (read["distil_from"]["variant"], read["distil_from"]["model"]) == ("teacher", "SASRec")
    (moved := tmp_path / "elsewhere" / teacher.name).parent.mkdir()
    shutil.move(teacher, moved)
    anyo("test", f"--run={run.path}")
    again = run.read_metrics()["metrics"]
    assert run.read_metrics()["lineage"] == read
    assert {n: v for n, v in again.items() if "seconds" not in n} == {
        n: v for n, v in figures.items() if "seconds" not in n
    }
    more = ("fit", f"--run={run.path}", "--early_stopping.patience=10")
    assert "no file" in refused(capsys, anyo, *more)
    anyo(*more, f"--model.distil_from={moved}")
    other = ("--model.distillation=2", f"--model.distil_from={moved}")
    assert "model.distillation 1.0, with which" in refused(capsys, anyo, *more, *other)

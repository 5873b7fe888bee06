"""A student: what a teacher's run writes, the loss by arithmetic, and that nothing of the teacher is needed after."""

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from helpers import CONFIGS, Anyo, MakeData, differing, fit, prepare, refused, weights
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.nn import functional as F

from anyo_lightning.data.datamodule import RecDataModule
from anyo_lightning.data.lessons import Lessons, read_lessons, training_boundaries, write_lessons
from anyo_lightning.data.windows import with_shuffled_ties
from anyo_lightning.encoders.ids import IdEncoders
from anyo_lightning.errors import InputError
from anyo_lightning.models.sasrec import SASRec
from anyo_lightning.models.student import Student
from anyo_lightning.runs import RunFolder

Make = Callable[..., Student]


def write_teacher(folder: Path, data: RecDataModule, *, k: int = 3, width: int = 5) -> Lessons:
    """Random lists, some of which end early, and random vectors."""
    random = np.random.default_rng(0)
    trained = np.flatnonzero(data.split.training_counts())
    lists = np.stack([random.permutation(trained)[:k] for _ in training_boundaries(data.split)]).astype(np.int32)
    lists[1::7, 1:], lists[2::7] = -1, -1
    lessons = Lessons(
        torch.from_numpy(lists),
        torch.zeros(lists.shape),
        torch.randn(data.split.catalogue_size, width, generator=torch.Generator().manual_seed(0)),
    )
    write_lessons(folder / "teacher.safetensors", lessons, split=data.split)
    return lessons


@pytest.fixture
def make(make_data: MakeData, tmp_path: Path) -> Make:
    """Students of a random teacher, without dropout."""
    write_teacher(tmp_path, make_data())

    def student(**options: Any) -> Student:
        torch.manual_seed(0)
        return Student(IdEncoders(dim=8, heads=1, dropout=0.0), teacher=tmp_path, **options)

    return student


def test_a_run_writes_its_lists_at_all_training_boundaries(
    anyo: Anyo, small: list[str], tmp_path: Path, make_data: MakeData
) -> None:
    """Those of the trained model reading each prefix by itself, without what the user has had; and its vectors."""
    run = RunFolder(tmp_path / "teacher")
    # Repeats in the tiny data: histories are masked only if that is asked for.
    anyo("fit", f"--config={CONFIGS / 'sasrec.yaml'}", *small, f"--run={run.path}", "--metrics.mask_history=true")
    assert str(run.path) in anyo("predict", f"--run={run.path}", "--teach=4")
    assert not run.queries_file.is_file()
    data = make_data(max_items=100)
    lessons = read_lessons(run.path, split=data.split)
    model = SASRec(IdEncoders(dim=64))
    model.restore_from(run.best_checkpoint)
    prepare(model, data).eval()
    model.load_state_dict(weights(run.best_checkpoint))
    vectors = model.encode_items(torch.arange(data.split.catalogue_size))
    torch.testing.assert_close(lessons.vectors, vectors)
    number = 0
    for user in range(data.split.users):
        sequence = data.split.items[data.split.offsets[user] : data.split.offsets[user + 1] - 2]  # two are left out
        for length in range(1, len(sequence)):
            scores = (model.encode_histories([sequence[:length]]) @ vectors.T)[0]
            scores[torch.from_numpy(sequence[:length]).long()] = -torch.inf
            scores[torch.from_numpy(data.split.training_counts() == 0)] = -torch.inf
            expected = scores.topk(4)
            torch.testing.assert_close(lessons.scores[number], expected.values)
            there = expected.values > -torch.inf
            assert lessons.items[number].tolist() == torch.where(there, expected.indices, -1).tolist()
            number += 1
    assert number == len(lessons.items) > 100
    assert (lessons.items < 0).any()  # some have had nearly everything


def test_loss_by_hand(make: Make, make_data: MakeData, tmp_path: Path) -> None:
    """Cross-entropies of lists with weights e^(-r/λ), in windows of a long history, and cosines."""
    data = make_data(max_items=7)
    lessons = read_lessons(tmp_path, split=data.split)
    model = prepare(make(distillation=0.5, alignment=0.25, list_scale=2.0), data)
    boundaries = training_boundaries(data.split).tolist()
    dataset = data.train_dataloader().dataset
    batch = dataset[list(range(len(dataset)))]
    states = model(batch)
    assert batch.start is not None
    assert (batch.start[1:] > 0).any()
    vectors = model.encode_items(torch.arange(data.split.catalogue_size))
    trained = model.training_items
    next_item, lists, seen = [], [], set()
    for state, row, column in zip(states, *batch.target_places, strict=True):
        position = int(dataset.start[row] + column)
        logits = torch.full((len(vectors),), -torch.inf)
        logits[trained] = vectors[trained] @ state
        log_softmax = logits - logits.logsumexp(0)
        target = data.split.items[position + 1]
        listed = [item for item in lessons.items[boundaries.index(position)].tolist() if item >= 0] or [target]
        shares = np.exp(-np.arange(len(listed)) / 2.0)
        lists.append(-sum(share * log_softmax[item] for share, item in zip(shares / shares.sum(), listed, strict=True)))
        next_item.append(-log_softmax[target])
        seen.add(position)
    assert seen == set(boundaries)
    mapped = lessons.vectors @ model.teacher_map.weight.T
    cosines = [F.cosine_similarity(mapped[i], vectors[i], dim=0) for i in trained]
    loss, parts = model.loss(states, batch)
    torch.testing.assert_close(parts["lists"], torch.stack(lists).mean())
    torch.testing.assert_close(parts["vectors"], 1 - torch.stack(cosines).mean())
    torch.testing.assert_close(loss, torch.stack(next_item).mean() + 0.5 * parts["lists"] + 0.25 * parts["vectors"])


@pytest.mark.parametrize(
    "changes", [{"random_cuts": True, "max_items": 7}, {"shuffle_ties": True}, {"supervision": "last"}]
)
def test_a_list_is_found_by_user_and_position(make: Make, make_data: MakeData, tmp_path: Path, changes: Any) -> None:
    """However a history is cut, and whichever of the items of one moment comes first."""
    data = make_data(**changes)
    model = prepare(make(), data)
    lessons = read_lessons(tmp_path, split=data.split)
    dataset = data.train_dataloader().dataset
    batch = dataset[list(range(len(dataset)))[::-1]]
    found = model.lists_of(batch)
    positions = [
        int(dataset.start[r] + c)
        for r, c in zip(batch.row[batch.target_places[0]], batch.target_places[1], strict=True)
    ]
    numbers = np.searchsorted(training_boundaries(data.split), positions)
    assert sorted(numbers.tolist()) == list(range(len(lessons.items)))
    expected = lessons.items[torch.from_numpy(numbers)].long()
    there = found >= 0
    assert torch.equal(model.training_items[found.clamp(min=0)][there], expected[there])
    assert torch.equal(expected < 0, ~there)


def test_shuffled_ties_keep_boundaries(make_data: MakeData) -> None:
    """The places of training boundaries are those of the split in file order."""
    split = make_data().split
    shuffled = with_shuffled_ties(split, np.random.default_rng(0))
    assert np.array_equal(training_boundaries(split), training_boundaries(shuffled))


def test_lists_are_of_training_items_only(make_data: MakeData) -> None:
    """No boundary's next item is a target of validation or test."""
    split = make_data().split
    boundaries = training_boundaries(split)
    assert (split.stages[boundaries + 1] == 0).all()
    assert len(boundaries) == (split.stages == 0).sum() - split.users


def test_weights_of_zero_are_sasrec(make_data: MakeData, tmp_path: Path) -> None:
    """Bit for bit, dropout included, and without a teacher."""
    found = {}
    for name, kind in {
        "sasrec": SASRec,
        "student": partial(Student, teacher=tmp_path / "none", distillation=0.0, alignment=0.0),
    }.items():
        torch.manual_seed(0)
        fit(kind(IdEncoders(dim=8)), make_data(batch_tokens=100), tmp_path / name)
        found[name] = weights(RunFolder(tmp_path / name).last_checkpoint)
    assert not differing(found["sasrec"], found["student"])


def test_a_student_learns_from_its_teacher(make: Make, make_data: MakeData, tmp_path: Path) -> None:
    """A teacher that always recommends the same items, and its vectors: each term moves what it is about."""
    data = make_data(batch_tokens=100)
    lessons = read_lessons(tmp_path, split=data.split)
    lists = np.array([4, 9, 2], dtype=np.int32)
    constant = Lessons(torch.from_numpy(np.tile(lists, (len(lessons.items), 1))), lessons.scores, lessons.vectors)
    write_lessons(tmp_path / "teacher.safetensors", constant, split=data.split)
    shares, distances = {}, {}
    for taught in (True, False):
        model = make(distillation=4.0 * taught, alignment=1.0, optimizer=partial(torch.optim.AdamW, lr=0.01))
        prepare(model, data)
        before = float(model.teacher_distance(model.training_vectors()).detach())
        fit(model, data, tmp_path / str(taught), epochs=4)
        batch = data.train_dataloader().dataset[list(range(20))]
        shares[taught] = float((model.eval()(batch) @ model.training_vectors().T).softmax(1)[:, lists].sum(1).mean())
        distances[taught] = float(model.teacher_distance(model.training_vectors())) / before
    assert len(data.split.item_ids) == len(model.training_items)
    assert shares[True] > 2 * shares[False]
    assert max(distances.values()) < 0.7


def test_a_resumed_student_is_the_uninterrupted_one(make: Make, make_data: MakeData, tmp_path: Path) -> None:
    """Weights and the teacher's map."""

    class Stop(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            trainer.should_stop = True

    whole, halves = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "halves")
    data = partial(make_data, batch_tokens=100)
    fit(make(), data(), whole.path, epochs=2)
    fit(make(), data(), halves.path, epochs=2, callbacks=[Stop()])
    second = make()
    second.restore_from(halves.last_checkpoint)
    fit(second, data(), halves.path, epochs=2, ckpt_path=halves.last_checkpoint)
    before, after = (weights(run.last_checkpoint) for run in (whole, halves))
    assert "teacher_map.weight" in before
    assert not differing(before, after)


def test_a_trained_student_needs_no_teacher(anyo: Anyo, small: list[str], tmp_path: Path) -> None:
    """From the command line: teach, fit, and test again where the teacher is gone; its cost is its own."""
    teacher, run = tmp_path / "teacher", RunFolder(tmp_path / "student")
    anyo("fit", f"--config={CONFIGS / 'sasrec.yaml'}", *small, f"--run={teacher}", "--final_test=false")
    anyo("predict", f"--run={teacher}", "--teach=5")
    student = [f"--config={CONFIGS / 'student.yaml'}", *small, f"--model.teacher={teacher}", f"--run={run.path}"]
    anyo("fit", *student)
    curves = pl.read_csv(run.curves_file)
    assert {"train/lists", "train/vectors"} <= set(curves.columns)
    figures, read = (run.read_metrics()[name] for name in ("metrics", "lineage"))
    assert read["teacher"]["settings"]["model.class_path"].endswith(".SASRec")
    (moved := tmp_path / "elsewhere" / teacher.name).parent.mkdir()
    shutil.move(teacher, moved)
    anyo("test", f"--run={run.path}")
    again = run.read_metrics()["metrics"]
    assert run.read_metrics()["lineage"] == read
    assert {n: v for n, v in again.items() if "seconds" not in n} == {
        n: v for n, v in figures.items() if "seconds" not in n
    }
    anyo("fit", f"--run={run.path}", f"--model.teacher={moved}", "--trainer.max_epochs=2")


def test_floors_teach(anyo: Anyo, small: list[str], make_data: MakeData, tmp_path: Path) -> None:
    """Their vectors are sparse and there is no checkpoint."""
    anyo("fit", f"--config={CONFIGS / 'markov.yaml'}", *small, f"--run={tmp_path}", "--trainer.max_epochs=0")
    anyo("predict", f"--run={tmp_path}", "--teach=5")
    split = make_data().split
    lessons = read_lessons(tmp_path, split=split)
    assert lessons.items.shape == (len(training_boundaries(split)), 5)
    assert lessons.vectors.shape == (split.catalogue_size, split.catalogue_size)


def test_bad_teachers(make: Make, make_data: MakeData, tmp_path: Path) -> None:
    """None, one of another split, no file of ours."""
    with pytest.raises(InputError, match=r"`anyo predict --run TEACHER --teach 20` writes, got no file .*none"):
        prepare(Student(IdEncoders(dim=8), teacher=tmp_path / "none"), make_data())
    with pytest.raises(InputError, match=r"to be of a run on split \w+, got \w+"):
        prepare(make(), make_data(k_core=6))
    (tmp_path / "teacher.safetensors").write_text("nothing")
    with pytest.raises(InputError, match=r"teacher\.safetensors to be what"):
        prepare(make(), make_data())


def test_bad_options(anyo: Anyo, small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Weights below zero, a scale of zero, --teach with another command."""
    for options, words in (
        ({"distillation": -1.0}, "distillation to be at least 0, got -1"),
        ({"alignment": -1.0}, "alignment to be at least 0, got -1"),
        ({"list_scale": 0.0}, "list_scale to be positive, got 0"),
    ):
        with pytest.raises(InputError, match=words):
            Student(IdEncoders(dim=8), teacher=tmp_path, **options)
    sasrec = [f"--config={CONFIGS / 'sasrec.yaml'}", *small, f"--run={tmp_path / 'run'}"]
    assert "--teach with predict" in refused(capsys, anyo, "fit", *sasrec, "--teach=5")
    anyo("fit", *sasrec, "--final_test=false")
    few = ["--teach=5", "--trainer.limit_predict_batches=0.5", "--data.evaluation_batch_tokens=100"]
    assert "limit_predict_batches" in refused(capsys, anyo, "predict", f"--run={tmp_path / 'run'}", *few)

"""What a run notes of the runs that it has read, and what a comparison makes of it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import yaml
from fake_runs import write_run
from helpers import MakeData, fit, prepare, save_as_run, tiny

from anyo_lightning.checkpoint_io import describe_run
from anyo_lightning.compare.columns import notes
from anyo_lightning.compare.results import load_results
from anyo_lightning.compare.settings import agree, read_settings
from anyo_lightning.encoders.ids import IdEncoders
from anyo_lightning.encoders.vectors import VectorEncoders
from anyo_lightning.models.e4srec import E4SRec
from anyo_lightning.models.sasrec import SASRec
from anyo_lightning.runs import RUN_OPTIONS, RunFolder, named_run
from anyo_lightning.serving.model_card import runs_read

RANKS = np.tile(np.arange(1, 21), 10)
Seeds = Callable[..., list[tuple[int | None, ...]]]


def configure(run: RunFolder, **model: Any) -> RunFolder:
    """Give a run a configuration."""
    config = {"class_path": "anyo_lightning.SASRec", "init_args": model}
    run.config_file.write_text(json.dumps({"seed_everything": 0, "trainer": {"devices": 1}, "model": config}))
    return run


def note(run: RunFolder, **lineage: Any) -> None:
    """Write what a run has noted into its metrics.json."""
    run.write_metrics(run.read_metrics() | {"lineage": lineage})


@pytest.fixture
def seeds(tmp_path: Path) -> Seeds:
    """Two runs that read another one each by some option; the seeds of each row of their table."""

    def rows(option: str, *, rates: tuple[float, float], gone: bool, noted: bool, file: str = "") -> list[Any]:
        for seed, rate in enumerate(rates):
            read = RunFolder(write_run(tmp_path / "read", "sasrec", RANKS, seed=seed))
            configure(read, lr=rate)
            run = RunFolder(write_run(tmp_path / "runs", "taught", RANKS, seed=seed))
            place, several = str(read.path / file), option == "runs"
            configure(run, **{option: [place, place] if several else place})
            if noted:
                note(run, **dict.fromkeys(["0.runs", "1.runs"] if several else [option], describe_run(Path(place))))
        if gone:
            shutil.rmtree(tmp_path / "read")
        results = load_results([tmp_path / "runs"], metrics=["test/hr@10"]).results
        told = "sasrec" if any("only the name is known, sasrec." in line for line in notes(results)) else ""
        return [*(line.seeds for line in results.lines), told]

    return rows


@pytest.mark.parametrize("noted", [True, False])
@pytest.mark.parametrize("option", RUN_OPTIONS)
def test_of_runs_that_were_read_the_settings_count(option: str, noted: bool, seeds: Seeds) -> None:
    """Those in the folder, or those noted; not where the folder lies."""
    assert seeds(option, rates=(0.1, 0.1), gone=False, noted=noted) == [(0, 1), ""]


@pytest.mark.parametrize("noted", [True, False])
@pytest.mark.parametrize("option", RUN_OPTIONS)
def test_seeds_that_have_read_different_runs_are_not_averaged(option: str, noted: bool, seeds: Seeds) -> None:
    """Nor where they have noted that these were different."""
    assert seeds(option, rates=(0.1, 0.2), gone=False, noted=noted) == [(0,), (1,), ""]


@pytest.mark.parametrize("option", ["teacher", "runs"])
@pytest.mark.parametrize(("rates", "same"), [((0.1, 0.1), True), ((0.1, 0.2), False)])
def test_runs_that_are_gone_count_by_what_was_noted(
    option: str, rates: tuple[float, float], same: bool, seeds: Seeds
) -> None:
    """As if they were there."""
    assert seeds(option, rates=rates, gone=True, noted=True) == ([(0, 1), ""] if same else [(0,), (1,), ""])


@pytest.mark.parametrize("option", ["distil_from", "runs"])
def test_runs_that_are_gone_and_were_not_noted_count_by_name(option: str, seeds: Seeds) -> None:
    """A sentence below the table says that no more is known."""
    assert seeds(option, rates=(0.1, 0.2), gone=True, noted=False) == [(0, 1), "sasrec"]


def test_a_teacher_may_be_named_by_its_file(seeds: Seeds, tmp_path: Path) -> None:
    """Its settings are those of the folder around it."""
    assert seeds("teacher", rates=(0.1, 0.2), gone=True, noted=True, file="teacher.safetensors") == [(0,), (1,), ""]
    assert named_run(tmp_path / "teacher.safetensors").path == named_run(tmp_path).path == tmp_path


@pytest.mark.parametrize("any_draw", [False, True])
@pytest.mark.parametrize("different", [None, "split", "texts", "files", "first", "cut"])
def test_what_was_noted_is_what_is_there(tmp_path: Path, different: str | None, any_draw: bool) -> None:
    """A run whose teacher is noted and gone, and one whose teacher is there, agree in the same as two that are there.

    Whatever differs: the data, what the teacher has read itself, a time limit that has ended it. Where ties may be
    drawn in any way, splits may differ, but then files must be the same.
    """
    found = {}
    for noted in (False, True):
        for side in (0, 1):
            other, folder = side and different, tmp_path / f"{noted}" / f"{side}"
            first = configure(RunFolder(write_run(folder, "first", RANKS)), lr=0.2 if other == "first" else 0.1)
            titles = "ABCDEFGHIX" if other == "texts" else "ABCDEFGHIJ"
            fingerprint = "b" if other == "split" else "a"
            teacher = RunFolder(write_run(folder, "teacher", RANKS, titles=titles, fingerprint=fingerprint))
            trainer = {"max_epochs": 3, "max_steps": -1, "max_time": "00:01:00:00", "gradient_clip_val": float("inf")}
            data = {
                "interactions": "y.csv" if other == "files" else "x.csv",
                "ties_seed": side * any_draw,
                "seed": side,
            }
            model = {"init_from": str(first.path)}
            teacher.config_file.write_text(yaml.safe_dump({"trainer": trainer, "data": data, "model": model}))
            teacher.write_curves(
                pl.DataFrame({"step": [1, 2, 3][: 2 if other == "cut" else 3]}).with_columns(epoch=pl.col("step") - 1)
            )
            note(teacher, init_from=describe_run(first.path))
            run = configure(RunFolder(write_run(folder, "taught", RANKS)), distil_from=str(teacher.path))
            if noted:
                note(run, distil_from=describe_run(teacher.path))
                shutil.rmtree(teacher.path)
                shutil.rmtree(first.path)
            found[noted, side] = read_settings(run, any_draw=any_draw)
    same = different not in (("texts", "files", "first", "cut") if any_draw else ("split", "texts", "first", "cut"))
    for one, other_one in (((False, 0), (False, 1)), ((True, 0), (True, 1)), ((False, 0), (True, 1))):
        assert agree(found[one], found[other_one]) == same, (one, other_one)
    assert agree(found[False, 0], found[True, 0])


def test_a_run_describes_another_one(tiny_llm: str, make_data: MakeData, tmp_path: Path) -> None:
    """By its best checkpoint; of a floor, a bare file and a configuration that cannot be read, as far as they tell."""
    start = RunFolder(tmp_path / "start")
    fit(SASRec(IdEncoders(dim=8, heads=1)), make_data(), start.path, epochs=1)
    model = prepare(SASRec(IdEncoders(dim=8, heads=1), init_from=start.path), make_data())
    first = model.lineage["init_from"]
    assert (first["run"], first["variant"], first["model"]) == (str(start.path), "start", "SASRec")
    assert (first["split"], first["settings"], first["lineage"]) == (make_data().split.fingerprint, None, {})
    next_run = configure(RunFolder(save_as_run(model, tmp_path / "next")), lr=0.1)
    encoders = VectorEncoders(tiny(tiny_llm), item_vectors_from=start.path, dim=8)
    assert prepare(E4SRec(encoders, distil_from=next_run.path), make_data()).lineage.keys() == {
        "item_vectors_from",
        "distil_from",
    }
    second = describe_run(next_run.path)
    assert second["lineage"] == {"init_from": first}
    card = dict(runs_read({"teacher": second}))
    assert card["the run that `teacher` named"] == f"next, `SASRec`, weights `{first['weights']}`"
    assert card["the run that `init_from` named, in that run"].startswith("start, `SASRec`, weights")
    assert second["weights"] == first["weights"]  # which it has started from, and not changed
    assert second["settings"]["model.init_args.lr"] == 0.1
    assert second["settings"]["split"] == first["split"]
    next_run.config_file.write_text("a: [")
    assert describe_run(next_run.path)["settings"] is None
    floor = configure(RunFolder(write_run(tmp_path, "markov", RANKS, fingerprint="ab")))
    found = describe_run(floor.path)
    assert (found["variant"], found["model"], found["split"], found["weights"]) == ("markov", "SASRec", "ab", None)
    assert describe_run(tmp_path / "alone" / "lists.safetensors")["variant"] == "alone"


def test_runs_of_options_that_are_not_there_were_not_read(make_data: MakeData, tmp_path: Path) -> None:
    """An option may name a folder of which nothing is needed, or hold what is no folder."""
    model = SASRec(IdEncoders(dim=8, heads=1))
    model.teacher, model.distil_from = object(), tmp_path / "gone"  # type: ignore[assignment]
    assert prepare(model, make_data()).lineage == {}

"""`anyo compare`: which runs are seeds of one row."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from fake_runs import spread_ranks, write_run, write_three

from anyo_lightning.compare.results import load_results
from anyo_lightning.runs import RunFolder


@pytest.fixture
def ranks() -> np.ndarray:
    return spread_ranks()


@pytest.fixture
def runs(tmp_path: Path, ranks: np.ndarray) -> Path:
    return write_three(tmp_path, ranks)


def test_seeds_are_one_row_with_mean_deviation_and_users_averaged(runs: Path, ranks: np.ndarray) -> None:
    """By hand: the mean of two seeds' means, their standard deviation, and each user's mean against the baseline's."""
    other = np.roll(ranks, 7)
    write_run(runs, "sasrec", other, seed=1)
    results = load_results([runs], metrics=["test/hr@10"], baseline="markov").results
    line = next(line for line in results.lines if line.variant == "sasrec")
    cell, first, second = line.cells["test/hr@10"], np.roll(ranks, 1) <= 10, other <= 10
    assert line.seeds == (0, 1)
    assert cell.by_seed == (first.mean(), second.mean())
    assert cell.value == pytest.approx(np.mean([first.mean(), second.mean()]))
    assert cell.deviation == pytest.approx(np.std([first.mean(), second.mean()], ddof=1))
    averaged = (first + second.astype(float)) / 2
    assert cell.difference is not None
    assert cell.difference.effect_size == pytest.approx(
        (averaged - (ranks <= 10)).mean() / (averaged - (ranks <= 10)).std(ddof=1)
    )
    assert cell.low is not None
    assert cell.high is not None
    assert cell.low < cell.value < cell.high


def test_seeds_of_other_settings_are_rows_of_their_own(runs: Path, ranks: np.ndarray) -> None:
    """The seed, folders and the progress bar do not matter; a learning rate does."""
    config = "seed_everything: {}\ntrainer: {{max_epochs: 3, default_root_dir: runs/{}}}\nmodel: {{lr: {}}}\n"
    for version, (seed, rate) in enumerate([(0, 0.1), (1, 0.1), (2, 0.2)]):
        path = write_run(runs, "anyo", np.roll(ranks, version), seed=seed)
        RunFolder(path).config_file.write_text(config.format(seed, version, rate))
    results = load_results([runs / "anyo"], metrics=["test/hr@10"]).results
    assert {line.variant: line.seeds for line in results.lines} == {
        "anyo (version_0)": (0, 1),
        "anyo (version_2)": (2,),
    }


@pytest.mark.parametrize(
    ("block", "values", "same"),
    [
        ("trainer", [{"limit_val_batches": 2}, {"limit_val_batches": 4}], False),
        ("trainer", [{"callbacks": [{"class_path": "Own", "init_args": {"rate": n}}]} for n in (1, 2)], False),
        ("early_stopping", [{"stopping_threshold": 0.1}, {"stopping_threshold": 0.2}], False),
        ("metrics", [{"index": "Flat"}, {"index": "HNSW32"}], False),
        ("own_block", [{"weight": 1}, {"weight": 2}], False),
        ("metrics", [{"cutoffs": [10], "variant": "anyo"}, {"cutoffs": [5, 10], "variant": None}], True),
        ("trainer", [{"accelerator": "cpu", "logger": False}, {"accelerator": "cuda", "logger": True}], True),
        ("trainer", [{"devices": 1}, {"devices": 8, "num_nodes": 2}], True),
        ("data", [{"num_workers": 0, "micro_batch_tokens": None}, {"num_workers": 4, "micro_batch_tokens": 10}], True),
        ("data", [{"batch_tokens": 100}, {"batch_tokens": 200}], False),
        ("checkpoint", [{"dirpath": "runs/a", "verbose": True}, {"dirpath": "runs/b", "verbose": False}], True),
        ("final_test", [True, False], True),
        ("trainer", [{"precision": None}, {"precision": "32-true"}], True),
        ("trainer", [{"precision": None}, {"precision": "bf16-mixed"}], False),
        ("trainer", [{"check_val_every_n_epoch": 1}, {"check_val_every_n_epoch": 2}], False),
        ("trainer", [{"val_check_interval": 1}, {"val_check_interval": 1.0}], False),
        ("trainer", [{}, {"gradient_clip_val": None, "accumulate_grad_batches": 1}], True),
        ("trainer", [{}, {"accumulate_grad_batches": 2}], False),
        ("metrics", [{}, {"index": "Flat"}], True),
        ("metrics", [{}, {"index": "HNSW32"}], False),
        ("data", [{"max_items": 7, "overlap": 0.5}, {"max_items": 7}], True),
        ("data", [{"max_items": 7, "overlap": 0.0}, {"max_items": 7}], False),
    ],
)
def test_whatever_settings_differ_are_not_averaged(
    tmp_path: Path, ranks: np.ndarray, block: str, values: list[Any], same: bool
) -> None:
    """Also those that a user's own classes have; what changes neither learning nor figures may differ."""
    for seed, value in enumerate(values):
        run = RunFolder(write_run(tmp_path, "anyo", ranks, seed=seed))
        run.config_file.write_text(json.dumps({"seed_everything": seed, "model": {"lr": 0.1}, block: value}))
    lines = load_results([tmp_path], metrics=["test/hr@10"]).results.lines
    assert [line.seeds for line in lines] == ([(0, 1)] if same else [(0,), (1,)])


@pytest.mark.parametrize("teachers", [("sasrec", "sasrec"), ("sasrec", "anyo")])
def test_runs_that_started_from_runs_of_one_variant_are_seeds_of_one_row(
    tmp_path: Path, ranks: np.ndarray, teachers: tuple[str, str]
) -> None:
    """Whatever the folders of those are called."""
    for seed, teacher in enumerate(teachers):
        started_from = write_run(tmp_path / "teachers", teacher, ranks, seed=seed, folder=f"teacher{seed}")
        run = RunFolder(write_run(tmp_path / "runs", "taught", ranks, seed=seed))
        run.config_file.write_text(json.dumps({"model": {"init_from": str(started_from)}}))
    lines = load_results([tmp_path / "runs"], metrics=["test/hr@10"]).results.lines
    assert [line.seeds for line in lines] == ([(0, 1)] if teachers[0] == teachers[1] else [(0,), (1,)])


@pytest.mark.parametrize(
    ("class_path", "options", "same"),
    [
        ("anyo_lightning.E4SRec", {"distillation": 1.0}, True),
        ("anyo_lightning.E4SRec", {"distillation": 0.5}, False),
        ("nowhere.Model", {"distillation": 1.0}, False),
    ],
)
def test_an_option_that_a_run_lacks_is_at_its_default(
    tmp_path: Path, ranks: np.ndarray, class_path: str, options: dict[str, Any], same: bool
) -> None:
    """A run of an earlier version and one that has the option; of a class that is not there no default is known."""
    for seed, init_args in enumerate(({"warmup": 0.1}, {"warmup": 0.1} | options)):
        run = RunFolder(write_run(tmp_path, "anyo", ranks, seed=seed))
        run.config_file.write_text(json.dumps({"model": {"class_path": class_path, "init_args": init_args}}))
    lines = load_results([tmp_path], metrics=["test/hr@10"]).results.lines
    assert [line.seeds for line in lines] == ([(0, 1)] if same else [(0,), (1,)])


@pytest.mark.parametrize(
    ("epochs", "values", "same"),
    [(5, [0.1, 0.2, 0.3, 0.4, 0.5], True), (4, [0.1, 0.5, 0.4, 0.3], True), (4, [0.1, 0.2, 0.5, 0.4], False)],
)
def test_a_time_limit_matters_only_to_a_run_that_it_ended(
    tmp_path: Path, ranks: np.ndarray, epochs: int, values: list[float], same: bool
) -> None:
    """One that trained all of its five epochs, one that lost patience before, and one that did neither."""
    for seed, limit in enumerate((None, "00:01:00:00")):
        run = RunFolder(write_run(tmp_path, "anyo", ranks, seed=seed))
        stopping = {"monitor": "val/ndcg@10", "mode": "max", "patience": 2}
        trainer = {"max_epochs": 5, "max_steps": -1, "max_time": limit}
        run.config_file.write_text(json.dumps({"trainer": trainer, "early_stopping": stopping}))
        run.write_curves(pl.DataFrame({"step": range(epochs), "epoch": range(epochs), "val/ndcg@10": values}))
    lines = load_results([tmp_path], metrics=["test/hr@10"]).results.lines
    assert [line.seeds for line in lines] == ([(0, 1)] if same else [(0,), (1,)])


def items_from(run: RunFolder, file: str) -> None:
    """Give a run a configuration that names a file of items."""
    run.config_file.write_text(json.dumps({"data": {"interactions": "log.csv", "items": file}}))


def test_runs_that_read_other_texts_are_not_averaged(tmp_path: Path, ranks: np.ndarray) -> None:
    """The split's fingerprint is the same; texts decide wherever files lie, and without a catalogue where they lay."""
    runs = []
    for seed, titles in enumerate(("ABCDEFGHIJ", "ABCDEFGHIJ", "ABCDEFGHIX")):
        runs.append(RunFolder(write_run(tmp_path, "anyo", ranks, seed=seed, titles=titles)))
        items_from(runs[-1], f"items{seed}.csv")
    lines = load_results([tmp_path], metrics=["test/hr@10"]).results.lines
    assert [line.seeds for line in lines] == [(0, 1), (2,)]
    for run in runs:
        run.catalogue_file.unlink()
    lines = load_results([tmp_path], metrics=["test/hr@10"]).results.lines
    assert [line.seeds for line in lines] == [(0,), (1,), (2,)]
    for run in runs[1:]:
        items_from(run, "items1.csv")
    lines = load_results([tmp_path], metrics=["test/hr@10"]).results.lines
    assert [line.seeds for line in lines] == [(0,), (1, 2)]


@pytest.mark.parametrize("different", [None, "rate", "first rate", "split", "texts"])
def test_teachers_of_one_name_may_be_several(tmp_path: Path, ranks: np.ndarray, different: str | None) -> None:
    """Their own settings count, and those of the runs that these started from; their seeds and folders do not."""
    for seed in (0, 1):
        first, teacher = (
            RunFolder(
                write_run(
                    tmp_path / "teachers",
                    name,
                    ranks,
                    seed=seed,
                    fingerprint=f"{seed if different == 'split' else 0}",
                    titles="ABCDEFGHIX" if different == "texts" and seed else "ABCDEFGHIJ",
                    folder=f"{name}{seed}",
                )
            )
            for name in ("first", "teacher")
        )
        run = RunFolder(write_run(tmp_path / "runs", "taught", ranks, seed=seed))
        for folder, started_from, rate in ((first, None, "first rate"), (teacher, first, "rate"), (run, teacher, "")):
            model = {"lr": 0.2 if rate == different and seed else 0.1}
            model |= {"distil_from": str(started_from.path)} if started_from else {}
            folder.config_file.write_text(json.dumps({"model": model, "data": {"seed": seed, "items": f"{seed}.csv"}}))
    lines = load_results([tmp_path / "runs"], metrics=["test/hr@10"]).results.lines
    assert [line.seeds for line in lines] == ([(0,), (1,)] if different else [(0, 1)])


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("metrics.json", "{"),
        ("metrics.json", "[]"),
        ("metrics.json", '{"variant": 1}'),
        ("config.yaml", "a: ["),
        ("config.yaml", '{"trainer": {"max_time": "1:00", "max_epochs": "many"}}'),
        ("config.yaml", '{"model": {"init_from": "TEACHER"}}'),
        ("catalogue.parquet", "x"),
    ],
)
def test_a_broken_teacher_does_not_end_a_comparison(tmp_path: Path, ranks: np.ndarray, file: str, text: str) -> None:
    """Nor does one that names itself; runs of that one teacher are seeds of one row."""
    teacher = write_run(tmp_path / "teachers", "sasrec", ranks)
    (teacher / file).write_text(text.replace("TEACHER", str(teacher)))
    for seed in (0, 1):
        run = RunFolder(write_run(tmp_path / "runs", "taught", ranks, seed=seed))
        run.config_file.write_text(json.dumps({"model": {"init_from": str(teacher)}}))
    lines = load_results([tmp_path / "runs"], metrics=["test/hr@10"]).results.lines
    assert [line.seeds for line in lines] == [(0, 1)]

"""Run folders: what is written is read back, nothing is half-written, the newest tested version is found."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from anyo_lightning.compare.environments import describe_environments
from anyo_lightning.compare.find_runs import find_runs
from anyo_lightning.disk import renamed_to
from anyo_lightning.environment import environment
from anyo_lightning.errors import InputError
from anyo_lightning.runs import METRICS_KEYS, RunFolder


def content(variant: str = "sasrec") -> dict[str, Any]:
    """A metrics.json with nothing in it."""
    return {key: {} for key in METRICS_KEYS} | {"variant": variant, "seed": 0}


def make_tested(folder: Path, seed: int = 0) -> RunFolder:
    """A run folder with a metrics.json."""
    run = RunFolder(folder)
    run.write_metrics(content() | {"seed": seed})
    return run


def test_new_runs_take_the_next_version(tmp_path: Path) -> None:
    """0, 1, and after a version 7 made by hand 8; `version_ten` and files do not count."""
    assert RunFolder.new(tmp_path, "sasrec").path == tmp_path / "sasrec" / "version_0"
    assert RunFolder.new(tmp_path, "sasrec").path.is_dir()
    (tmp_path / "sasrec" / "version_7").mkdir()
    (tmp_path / "sasrec" / "version_ten").mkdir()
    assert RunFolder.new(tmp_path, "sasrec").version == 8


def test_variant_is_what_the_folder_is_called(tmp_path: Path) -> None:
    """`runs/sasrec/version_3` is sasrec, and so is a folder of that name anywhere."""
    assert RunFolder(tmp_path / "sasrec" / "version_3").variant == "sasrec"
    assert RunFolder(tmp_path / "sasrec").variant == "sasrec"


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    """metrics.json, both Parquet files and curves.csv, with text beyond ASCII, and no temporary file left."""
    run = RunFolder(tmp_path / "run")
    predictions = pl.DataFrame({"user_id": ["ü"], "rank": [1.5], "top_item_ids": [["a", "b"]]})
    catalogue = pl.DataFrame({"item_id": ["a"], "text": ["Amélie (2001)"]})
    curves = pl.DataFrame({"step": [1, 2], "val/ndcg@10": [None, 0.1]})
    run.write_predictions(predictions)
    run.write_catalogue(catalogue)
    run.write_curves(curves)
    assert not run.finished
    run.write_metrics(content("é"))
    assert run.finished
    assert run.read_metrics() == content("é")
    assert run.read_predictions().equals(predictions)
    assert run.read_predictions(["rank"]).columns == ["rank"]
    assert run.read_catalogue().equals(catalogue)
    read = run.read_curves()
    assert read is not None
    assert read.equals(curves)
    names = {"metrics.json", "predictions.parquet", "catalogue.parquet", "curves.csv"}
    assert {file.name for file in run.path.iterdir()} == names


def test_files_are_as_readable_as_any_other(tmp_path: Path) -> None:
    """The temporary name's private permissions do not survive the renaming."""
    (tmp_path / "other").write_text("")
    with renamed_to(tmp_path / "file") as temporary:
        temporary.write_text("")
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    """An error half-way, or a figure that is not a number, changes nothing on disk."""
    run = make_tested(tmp_path)
    before = run.metrics_file.read_bytes()

    def fail() -> None:
        with renamed_to(run.metrics_file) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    with pytest.raises(ValueError, match="JSON"):
        run.write_metrics(content() | {"cost": {"flops": float("nan")}})
    assert run.metrics_file.read_bytes() == before
    assert os.listdir(tmp_path) == ["metrics.json"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "tested run with a metrics.json"),
        ("{", "to be JSON"),
        ("[]", "found it without"),
        ('{"seed": 1}', "variant, split"),
    ],
)
def test_metrics_that_cannot_be_read_are_named(tmp_path: Path, text: str | None, message: str) -> None:
    """None, truncated, a list, keys missing: one line each."""
    if text is not None:
        (tmp_path / "metrics.json").write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        RunFolder(tmp_path).read_metrics()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"), [("{", "to be JSON"), ("{}", "found it without"), ("[]", "found it without")]
)
def test_probes_that_cannot_be_read_are_named(tmp_path: Path, text: str, message: str) -> None:
    """One sentence with the file's name; a run without is none."""
    run = RunFolder(tmp_path)
    assert run.read_probes() is None
    run.probes_file.write_text(text)
    with pytest.raises(InputError, match=message):
        run.read_probes()


def test_parquet_and_csv_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    """Missing, or not what the name says; a run without training has no curves, which is no mistake."""
    run = RunFolder(tmp_path)
    assert run.read_curves() is None
    with pytest.raises(InputError, match="no such file"):
        run.read_predictions()
    run.predictions_file.write_text("not Parquet")
    with pytest.raises(InputError, match="to be a Parquet file of ours") as caught:
        run.read_predictions()
    assert "\n" not in str(caught.value)
    run.write_catalogue(pl.DataFrame({"item_id": ["a"]}))
    run.catalogue_file.replace(run.predictions_file)
    with pytest.raises(InputError, match="to be a Parquet file of ours"):
        run.read_predictions(["rank"])
    run.curves_file.write_text("")
    with pytest.raises(InputError, match="to be a CSV file of ours"):
        run.read_curves()


def test_find_runs_takes_the_newest_tested_version_of_each_seed(tmp_path: Path) -> None:
    """Versions 0 to 2 of seeds 0, 1 and 0 again: the last two count."""
    for version, seed in enumerate((0, 1, 0)):
        make_tested(tmp_path / "sasrec" / f"version_{version}", seed)
    assert sorted(run.version for run in find_runs(tmp_path)[0]) == [1, 2]


def test_find_runs_takes_the_newest_tested_version_of_each_variant(tmp_path: Path) -> None:
    """Version 10 is newer than 9, an untested 11 does not count, a variant never tested is reported."""
    newest = make_tested(tmp_path / "sasrec" / "version_10")
    make_tested(tmp_path / "sasrec" / "version_9")
    for unfinished in ("sasrec/version_11", "anyo/version_0", "anyo/version_1"):
        (tmp_path / unfinished).mkdir(parents=True)
        (tmp_path / unfinished / "config.yaml").write_text("")
    by_name = make_tested(tmp_path / "my_e4srec")
    (tmp_path / "notes").mkdir()
    found, passed_over = find_runs(tmp_path)
    assert {run.path for run in found} == {newest.path, by_name.path}
    assert [run.path for run in passed_over] == [tmp_path / "anyo" / "version_1"]
    assert [run.path for run in find_runs(tmp_path / "sasrec")[0]] == [newest.path]
    assert [run.path for run in find_runs(newest.path)[0]] == [newest.path]


def test_find_runs_reports_a_folder_without_runs_and_refuses_none(tmp_path: Path) -> None:
    """An empty folder is passed over; one that is not there is a mistake."""
    found, passed_over = find_runs(tmp_path)
    assert not found
    assert [run.path for run in passed_over] == [tmp_path]
    with pytest.raises(InputError, match="found none at"):
        find_runs(tmp_path / "typo")


def test_environment_says_what_figures_depend_on_and_names_no_machine() -> None:
    """Versions and hardware are there; no path, no host name; it is plain JSON."""
    found = environment()
    assert found["versions"]["torch"]
    assert found["hardware"]["cpu_cores"] >= 1
    assert found["commit"] is None or re.fullmatch(r"[0-9a-f]{12}(\+changes)?", found["commit"])
    text = json.dumps(found)
    assert str(Path.home()) not in text
    assert str(Path(__file__).parents[1]) not in text
    assert os.uname().nodename not in text


def test_rows_of_two_machines_name_both() -> None:
    """Each machine and each commit once, also where a run of an earlier version does not say its dtype."""
    here = {"cpu": "Xeon", "cpu_cores": 2, "threads": 1, "memory_gib": 23.5, "gpus": [], "dtype": "bfloat16"}
    there = {**here, "cpu": "EPYC", "dtype": "float32"}
    old = {name: value for name, value in here.items() if name != "dtype"}
    runs = [{"hardware": here, "commit": "b"}, {"hardware": there, "commit": "a"}, {"hardware": here, "commit": "a"}]
    text = describe_environments(runs)
    assert text.count("2 cores of Xeon, 23.5 GiB, no GPU, 1 thread(s) a run, bfloat16") == 1
    assert text.count("2 cores of EPYC, 23.5 GiB, no GPU, 1 thread(s) a run, float32") == 1
    assert text.endswith(", at commit a, b")
    assert describe_environments([{"hardware": old, "commit": None}]).endswith("1 thread(s) a run, at commit None")


def test_two_processes_never_get_the_same_version(tmp_path: Path) -> None:
    """Three processes make three runs each: nine folders."""
    program = (
        "import sys; from anyo_lightning.runs import RunFolder\nfor _ in range(3): RunFolder.new(sys.argv[1], 'x')"
    )
    processes = [subprocess.Popen([sys.executable, "-c", program, str(tmp_path)]) for _ in range(3)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0, 0]
    assert len(list((tmp_path / "x").iterdir())) == 9

"""Weights & Biases offline and MLflow on a local database: what a run writes there, read back from their own files."""

import csv
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import CONFIGS, Anyo
from jsonargparse import Namespace

from anyo_lightning.cli.loggers import going_on
from anyo_lightning.errors import InputError
from anyo_lightning.runs import RunFolder


@pytest.fixture
def loggers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A configuration with both and TensorBoard, all of which write below tmp_path."""
    wandb, _ = pytest.importorskip("wandb"), pytest.importorskip("mlflow")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.chdir(tmp_path)
    settings = {
        "WandbLogger": {"project": "tiny", "save_dir": str(tmp_path), "offline": True},
        "MLFlowLogger": {
            "experiment_name": "tiny",
            "tracking_uri": f"sqlite:///{tmp_path / 'mlflow.db'}",
            "artifact_location": f"file:{tmp_path / 'artifacts'}",
        },
        "TensorBoardLogger": {"save_dir": str(tmp_path / "board")},
    }
    entries = [{"class_path": name, "init_args": options} for name, options in settings.items()]
    file = tmp_path / "loggers.yaml"
    file.write_text(yaml.safe_dump({"trainer": {"logger": entries}}))
    yield file
    wandb.teardown()


def wandb_folders(folder: Path) -> list[Path]:
    """One per start of an offline run, once all of it is written: finishing a run does not wait for that."""
    import wandb

    wandb.teardown()
    return list((folder / "wandb").glob("offline-run-*"))


def wandb_records(folder: Path) -> list[Any]:
    """What a `.wandb` file holds: blocks of 32 KiB of (checksum, length, kind, part of a protobuf), after 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = folder.glob("*.wandb")
    content, place, records, parts = file.read_bytes(), 7, [], b""
    while place < len(content):
        if (left := 32768 - place % 32768) < 7:  # too few for a header: zeros
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", content[place : place + 7])
        parts += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            records.append(Record.FromString(parts))
            parts = b""
    return records


def wandb_history(folder: Path) -> dict[str, list[float]]:
    """All values of each logged number, in order."""
    found: dict[str, list[float]] = {}
    for record in wandb_records(folder):
        for item in record.history.item:
            value = json.loads(item.value_json)
            if isinstance(value, int | float):
                found.setdefault(item.key or "/".join(item.nested_key), []).append(value)
    return found


def wandb_table(folder: Path, name: str) -> dict[str, Any]:
    """The latest table of a name."""
    files = (folder / "files" / "media" / "table").glob(f"{name}_*.table.json")
    table: dict[str, Any] = json.loads(max(files, key=lambda file: int(file.stem.split("_")[1])).read_text())
    return table


def test_wandb_and_mlflow_show_what_tensorboard_shows(
    anyo: Anyo, small: list[str], loggers: Path, tmp_path: Path
) -> None:
    """Figures, slices, costs, settings and recommendations are those of the run folder; a resumed run goes on there."""
    from mlflow.tracking import MlflowClient

    run = RunFolder(tmp_path / "run")
    words = [f"--config={CONFIGS / 'sasrec.yaml'}", f"--config={loggers}", *small, "--model.decay=false"]
    anyo("fit", *words, f"--run={run.path}")
    figures = run.read_metrics()
    ndcg = figures["metrics"]["test/ndcg@10"]
    assert list((tmp_path / "board").rglob("events*"))

    (folder,) = wandb_folders(tmp_path)
    logged = wandb_history(folder)
    assert logged["test/ndcg@10"] == [pytest.approx(ndcg["value"])]
    assert len(logged["val/ndcg@10"]) == 1
    assert {name: logged[f"cost/{name}"][-1] for name in figures["cost"]} == pytest.approx(figures["cost"])
    settings = {
        item.key: json.loads(item.value_json) for record in wandb_records(folder) for item in record.config.update
    }
    assert settings["encoders.dim"] == 64
    table = wandb_table(folder, "test/figures")
    assert table["columns"] == ["figure", "value", "low", "high"]
    assert [row for row in table["data"] if row[0] == "test/ndcg@10"] == [
        ["test/ndcg@10", *(pytest.approx(ndcg[name]) for name in ("value", "low", "high"))]
    ]
    head = figures["slices"]["target popularity"]["head"]["rows"]
    assert ["target popularity", "head", head] in [row[:3] for row in wandb_table(folder, "test/slices")["data"]]
    assert len(wandb_table(folder, "val/recommendations")["data"]) == 5
    assert wandb_table(folder, "test/recommendations")["columns"][:5] == ["user", "read last", "target", "rank", "1"]

    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    (one,) = client.search_runs([client.get_experiment_by_name("tiny").experiment_id])
    assert one.info.status == "FINISHED"
    assert one.data.metrics["test/ndcg10"] == pytest.approx(ndcg["value"])  # Lightning leaves the @ out
    assert one.data.metrics["cost/targets"] == figures["cost"]["targets"]
    assert one.data.params["encoders.dim"] == "64"
    (artifacts,) = (tmp_path / "artifacts").glob("*/artifacts")
    with next((artifacts / "test" / "figures").iterdir()).open(newline="") as file:
        rows = {name: numbers for name, *numbers in csv.reader(file)}
    assert [float(number) for number in rows["test/ndcg@10"]] == [ndcg[name] for name in ("value", "low", "high")]
    with next((artifacts / "test" / "slices").iterdir()).open(newline="") as file:
        assert ["target popularity", "head", str(head)] in [row[:3] for row in csv.reader(file)]
    assert len(list((artifacts / "val" / "recommendations").iterdir())) == 1

    anyo("fit", *words, f"--run={run.path}", "--trainer.max_epochs=2")  # a setting that MLflow would refuse to change
    (again,) = client.search_runs([one.info.experiment_id])
    assert again.info.run_id == one.info.run_id
    assert again.data.params["trainer.max_epochs"] == "1"
    assert len(client.get_metric_history(again.info.run_id, "val/ndcg10")) == 2
    assert len(list((artifacts / "val" / "recommendations").iterdir())) == 2
    loggers.write_text(loggers.read_text().replace("experiment_name: tiny", "experiment_name: other"))
    anyo("fit", *words, f"--config={loggers}", f"--run={run.path}", "--trainer.max_epochs=3")
    (elsewhere,) = client.search_runs([client.get_experiment_by_name("other").experiment_id])
    assert len(client.get_metric_history(elsewhere.info.run_id, "val/ndcg10")) == 1
    assert len(client.get_metric_history(again.info.run_id, "val/ndcg10")) == 2
    folders = wandb_folders(tmp_path)
    assert len(folders) == 3
    assert len({path.name.rpartition("-")[2] for path in folders}) == 1  # one id: `wandb sync` joins them
    entries = yaml.safe_load(run.config_file.read_text())["trainer"]["logger"]
    ids = {entry["class_path"]: entry["init_args"] for entry in entries}
    assert ids["lightning.pytorch.loggers.WandbLogger"]["id"] is None  # another run with this config.yaml is another
    assert ids["lightning.pytorch.loggers.MLFlowLogger"]["run_id"] is None


def entry(name: str, **options: Any) -> Namespace:
    """A logger of a parsed configuration."""
    return Namespace(class_path=f"lightning.pytorch.loggers.{name}", init_args=Namespace(**options))


def test_ids_are_of_a_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run's id goes to the logger of its project or experiment alone, unless one is given, and only within."""
    client = pytest.importorskip("mlflow.tracking").MlflowClient(one := f"sqlite:///{tmp_path / 'one.db'}")
    run_id = client.create_run(client.create_experiment("tiny")).info.run_id
    run = RunFolder(tmp_path)
    run.write_logger_ids({"WandbLogger mine": "abc", "WandbLogger me mine": "ghi", f"MLFlowLogger {one} tiny": run_id})
    mine = entry("WandbLogger", project="mine", id=None, version=None, resume=None)
    named = entry("WandbLogger", project="mine", id=None, version="given", resume=None)
    by_default = entry("WandbLogger", project=None, id=None, resume=None)
    elsewhere = entry("MLFlowLogger", tracking_uri="http://two", experiment_name="tiny", run_id=None)
    other = entry("MLFlowLogger", tracking_uri=one, experiment_name="other", run_id=None)
    same = entry("MLFlowLogger", tracking_uri=one, experiment_name="tiny", run_id=None)
    board = entry("TensorBoardLogger", save_dir="x")
    with going_on([mine, named, by_default, elsewhere, other, same, board], run):
        assert mine.init_args.id == "abc"
        assert mine.init_args.resume == "allow"
        assert named.init_args.id is by_default.init_args.id is None
        assert elsewhere.init_args.run_id is other.init_args.run_id is None
        assert same.init_args.run_id == run_id
    assert mine.init_args.id is mine.init_args.resume is same.init_args.run_id is None
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    with going_on(by_default, run):
        assert by_default.init_args.id == "abc"
    monkeypatch.setenv("WANDB_ENTITY", "me")
    with going_on([mine, by_default], run):
        assert mine.init_args.id == by_default.init_args.id == "ghi"
    for nothing in (None, True, False):
        with going_on(nothing, run):
            pass
    run.logger_ids_file.write_text("[1")
    with pytest.raises(InputError, match="to be JSON of ours"), going_on(mine, run):
        pass


def test_a_run_that_the_server_has_lost_is_not_gone_on_in(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Deleted, or of a database that is another one by now: a sentence, and no id."""
    client = pytest.importorskip("mlflow.tracking").MlflowClient(place := f"sqlite:///{tmp_path / 'mlflow.db'}")
    deleted = client.create_run(client.create_experiment("tiny")).info.run_id
    client.delete_run(deleted)
    for lost in (deleted, "0" * 32):
        run = RunFolder(tmp_path)
        run.write_logger_ids({f"MLFlowLogger {place} tiny": lost})
        logger = entry("MLFlowLogger", tracking_uri=place, experiment_name="tiny", run_id=None)
        with going_on(logger, run):
            assert logger.init_args.run_id is None
        assert f"has no run {lost}" in capsys.readouterr().err

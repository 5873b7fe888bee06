"""The command line, as users type it: every yaml, run folders, resuming, and one clear sentence for each mistake."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest
import torch
import yaml

from anyo_lightning.runs import RunFolder

CONFIGS = sorted(Path(__file__).parents[1].glob("configs/*.yaml"))
NO_FILES = ("--data.interactions=null", "--data.items=null")
Anyo = Callable[..., str]


def refused(capsys: pytest.CaptureFixture[str], anyo: Anyo, *arguments: object) -> str:
    """The one line with which the command line refuses; exit code 2 and no traceback."""
    with pytest.raises(SystemExit) as stopped:
        anyo(*arguments)
    assert stopped.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("anyo: error:")]
    assert len(lines) == 1
    return lines[0]


@pytest.fixture
def tiny(tiny_data: tuple[Path, Path], tiny_llm: str, tmp_path: Path) -> Callable[..., list[str]]:
    """Options that make a configuration small: the tiny data and LLM, one step."""

    def options(config: Path, sasrec: Path | None = None) -> list[str]:
        content = yaml.safe_load(config.read_text())
        found = [
            f"--config={config}",
            f"--data.interactions={tiny_data[0]}",
            f"--data.items={tiny_data[1]}",
            "--data.template=null",
            "--data.max_items=20",
            "--trainer.accelerator=cpu",
            "--trainer.limit_train_batches=1",
            "--trainer.enable_progress_bar=false",
            f"--trainer.default_root_dir={tmp_path / 'runs'}",
        ]
        if content["trainer"].get("max_epochs"):
            found.append("--trainer.max_epochs=1")
        settings = content["model"].get("init_args", {})
        if "backbone" in settings:
            found.append(f"--model.init_args.backbone.init_args.name={tiny_llm}")
            found.append("--model.init_args.backbone.init_args.layers=2")
            found.append("--data.max_tokens=300")
        if "semantics" in settings:
            found.append(f"--model.init_args.semantics.init_args.name={tiny_llm}")
        if "item_vectors_from" in settings:
            found.append(f"--model.init_args.item_vectors_from={sasrec}")
        return found

    return options


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_survives_a_step(
    config: Path, anyo: Anyo, tiny: Callable[..., list[str]], tiny_llm: str, tmp_path: Path
) -> None:
    """Fit ends with a tested run folder, and `test --run` repeats its figures."""
    sasrec = tmp_path / "sasrec"
    if "item_vectors_from" in config.read_text():
        anyo("fit", *tiny(config.parent / "sasrec.yaml"), f"--run={sasrec}")
    if "summarise" in config.read_text():
        files = [option for option in tiny(config) if option.startswith(("--data.interactions", "--data.items"))]
        anyo("augment", *files, f"--llm={tiny_llm}")
    anyo("fit", *tiny(config, sasrec))
    run = RunFolder(tmp_path / "runs" / config.stem / "version_0")
    metrics = run.read_metrics()
    assert metrics["variant"] == config.stem
    assert 0 <= metrics["metrics"]["test/ndcg@10"]["value"] <= 1
    assert run.config_file.is_file()
    trained = yaml.safe_load(config.read_text())["trainer"].get("max_epochs") != 0
    assert run.best_checkpoint.is_file() == run.last_checkpoint.is_file() == trained
    anyo("predict", f"--run={run.path}")
    assert len(pl.read_parquet(run.queries_file)) == 40
    anyo("validate", f"--run={run.path}")
    anyo("test", f"--run={run.path}")
    again = run.read_metrics()
    assert without_seconds(again["metrics"]) == without_seconds(metrics["metrics"])
    assert again["cost"].get("views_seconds") == metrics["cost"].get("views_seconds")
    assert ("views_seconds" in metrics["cost"]) == ("summarise" in config.read_text())
    if trained:
        assert again["cost"]["targets"] == pl.read_csv(run.curves_file)["targets"][-1]
        assert again["cost"]["targets"] == metrics["cost"]["targets"] > 0
        assert again["cost"]["train_seconds"] == metrics["cost"]["train_seconds"] > 0


def without_seconds(metrics: dict[str, object]) -> dict[str, object]:
    """All but what the clock says."""
    return {name: value for name, value in metrics.items() if "seconds" not in name}


def test_optimizers_name_their_weight_decay() -> None:
    """Another optimizer than the default AdamW silently takes over its decay of 0.01, which in Adam is a strong L2."""
    optimizers = [yaml.safe_load(path.read_text())["model"].get("init_args", {}).get("optimizer") for path in CONFIGS]
    assert len(named := [optimizer for optimizer in optimizers if optimizer]) > 5
    assert all("weight_decay" in optimizer["init_args"] for optimizer in named)


def test_overlays_fit_every_configuration() -> None:
    """There are configurations and overlays, and an overlay has only what all configurations have, or a backbone."""
    overlays = sorted((CONFIGS[0].parent / "overlays").glob("*.yaml"))
    assert len(CONFIGS) >= 9
    assert {path.stem for path in overlays} >= {"demo", "debug", "gpu"}
    for overlay in overlays:
        allowed = {"trainer", "data", "metrics"} | ({"model"} if overlay.stem in ("fsdp", "table") else set())
        assert set(yaml.safe_load(overlay.read_text())) <= allowed


def test_fit_goes_on_exactly_from_the_last_epoch(anyo: Anyo, tiny: Callable[..., list[str]], tmp_path: Path) -> None:
    """Four epochs in two commands end with the weights, counts and curves of four in one, dropout and all.

    The metric never improves after the first epoch (its minimum is watched while it rises), so that best is not last.
    """
    options = [*tiny(CONFIGS[0].parent / "sasrec.yaml"), "--trainer.max_epochs=4", "--checkpoint.mode=min"]
    options += ["--model.init_args.decay=false", "--final_test=false", "--early_stopping.patience=99"]
    whole, parts = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "parts")
    anyo("fit", *options, f"--run={whole.path}")
    anyo("fit", *options, f"--run={parts.path}", "--trainer.max_epochs=2")
    assert torch.load(parts.last_checkpoint, weights_only=True)["epoch"] == 1
    anyo("fit", *options, f"--run={parts.path}")
    states = [torch.load(run.last_checkpoint, weights_only=True) for run in (whole, parts)]
    assert states[0]["global_step"] == states[1]["global_step"] == 4
    assert states[0]["anyo_lightning"]["seen"] == states[1]["anyo_lightning"]["seen"]
    for key, value in states[0]["state_dict"].items():
        assert torch.equal(value, states[1]["state_dict"][key]), key
    steps = [pl.read_csv(run.curves_file)["step"].to_list() for run in (whole, parts)]
    assert steps == [[1, 2, 3, 4], [1, 2, 3, 4]]


def test_a_run_that_started_from_another_checkpoint_goes_on_from_its_own(
    anyo: Anyo, tiny: Callable[..., list[str]], tmp_path: Path
) -> None:
    """--ckpt_path is for one command: the run's own configuration does not name another run's checkpoint."""
    first, second = RunFolder(tmp_path / "first"), RunFolder(tmp_path / "second")
    options = tiny(CONFIGS[0].parent / "sasrec.yaml")
    anyo("fit", *options, f"--run={first.path}")
    anyo("fit", *options, f"--run={second.path}", "--trainer.max_epochs=2", f"--ckpt_path={first.last_checkpoint}")
    assert str(first.path) not in second.config_file.read_text()
    figures = second.read_metrics()["metrics"]
    anyo("test", f"--run={second.path}")
    assert second.read_metrics()["metrics"] == figures


def test_refused_fit_leaves_the_run_as_it_was(
    capsys: pytest.CaptureFixture[str], anyo: Anyo, tiny: Callable[..., list[str]], tmp_path: Path
) -> None:
    """Another split or size over an existing run is refused, and the run can still be tested."""
    run = RunFolder(tmp_path / "run")
    options = [*tiny(CONFIGS[0].parent / "sasrec.yaml"), f"--run={run.path}"]
    anyo("fit", *options)
    before = run.config_file.read_text()
    assert "split" in refused(capsys, anyo, "fit", *options, "--data.k_core=6")
    assert "size" in refused(capsys, anyo, "fit", *options, "--model.init_args.dim=32")
    assert run.config_file.read_text() == before
    anyo("test", f"--run={run.path}")
    run.best_checkpoint.write_bytes(run.best_checkpoint.read_bytes()[:5000])
    assert "readable checkpoint" in refused(capsys, anyo, "test", f"--run={run.path}")


def test_run_folder_holds_what_it_should(anyo: Anyo, tiny: Callable[..., list[str]], tmp_path: Path) -> None:
    """Configuration, curves, predictions, catalogue, figures; the checkpoint has no weights of the LLM."""
    anyo("fit", *tiny(CONFIGS[0].parent / "e4srec.yaml"), f"--run={tmp_path / 'run'}")
    run = RunFolder(tmp_path / "run")
    predictions = run.read_predictions()
    assert {"user_id", "target_item_id", "rank", "top_item_ids", "history_item_ids", "target_tokens"} <= set(
        predictions.columns
    )
    assert len(run.read_catalogue()) == 16
    assert {"step", "targets", "tokens", "seconds", "val/ndcg@10", "train/loss"} <= set(
        pl.read_csv(run.curves_file).columns
    )
    metrics = json.loads(run.metrics_file.read_text())
    assert {"train_seconds", "tokens", "targets", "flops", "peak_memory_gib", "trainable_parameters"} <= set(
        metrics["cost"]
    )
    assert any(run.path.glob("events.out.tfevents*"))
    keys = torch.load(run.best_checkpoint, weights_only=True)["state_dict"]
    assert not any("base_layer" in key or "embed_tokens" in key for key in keys)


def test_a_run_keeps_its_precision_on_another_machine(
    anyo: Anyo, tiny: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `auto` was is in config.yaml: tested where bfloat16 is slow, a bfloat16 run has the same figures."""
    run = RunFolder(tmp_path / "run")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    anyo("fit", *tiny(CONFIGS[0].parent / "e4srec.yaml"), f"--run={run.path}")
    backbone = yaml.safe_load(run.config_file.read_text())["model"]["init_args"]["backbone"]
    assert backbone["init_args"]["dtype"] == "bfloat16"
    figures = run.read_metrics()["metrics"]
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    anyo("test", f"--run={run.path}")
    assert run.read_metrics()["metrics"] == figures


def test_compare_reads_runs(anyo: Anyo, tiny: Callable[..., list[str]], tmp_path: Path) -> None:
    """Two floors in one markdown table with paired differences; another split is refused."""
    for name in ("popularity", "markov"):
        anyo("fit", *tiny(CONFIGS[0].parent / f"{name}.yaml"))
    table = anyo("compare", tmp_path / "runs", "--baseline", "markov", "--format", "markdown")
    assert "| popularity" in table
    assert "| markov" in table


def test_mistakes_are_one_sentence(
    capsys: pytest.CaptureFixture[str], anyo: Anyo, tiny: Callable[..., list[str]], tmp_path: Path
) -> None:
    """Each names what was expected and what was found, and leaves no run folder behind."""
    floor = tiny(CONFIGS[0].parent / "popularity.yaml")
    sasrec = tiny(CONFIGS[0].parent / "sasrec.yaml")
    typo = tmp_path / "typo.yaml"
    typo.write_text("trainer: {max_epoch: 3}\n")
    wide = tmp_path / "wide.csv"
    wide.write_text("user_id,item_id,timestamp\nu,m1,1\n", encoding="utf-16")
    cut = tmp_path / "cut.csv.gz"
    cut.write_bytes(gzip.compress(b"user_id,item_id,timestamp\n" * 500)[:-20])
    cases = {
        "max_epoch": ["fit", *sasrec, f"--config={typo}"],
        "Expected an option that SASRec has for model, got dimm": ["fit", *sasrec, "--model.init_args.dimm=3"],
        "Expected the name of a class for model, got SASRecc": ["fit", "--model=SASRecc"],
        "Expected data.ties to be one of 'file_order', 'item_id', 'shuffle', got x": ["fit", *sasrec, "--data.ties=x"],
        "Expected data.k_core to be of type int, got few": ["fit", *sasrec, "--data.k_core=few"],
        "Expected UTF-8 text": ["fit", *floor, f"--data.interactions={wide}"],
        "no_such_set": ["fit", f"--config={CONFIGS[0].parent / 'popularity.yaml'}", "--data.source=no_such_set"],
        "person": ["fit", *floor, "--data.columns.user=person"],
        "cut.csv.gz": ["fit", *floor, f"--data.interactions={cut}"],
        "checkpoint": ["test", *sasrec],
        "nothing": ["compare", tmp_path / "nothing"],
        "nowhere.yaml": ["fit", f"--config={tmp_path / 'nowhere.yaml'}"],
        "max_items": ["fit", *sasrec, "--data.max_items=0"],
        "heads": ["fit", *sasrec, "--model.init_args.heads=3"],
        "cutoffs": ["fit", *sasrec, "--metrics.cutoffs=[5]"],
        "learning_rates": ["fit", *sasrec, "--model.init_args.learning_rates={item_encodr: 0.1}"],
        "nosuch": ["fit", *sasrec, f"--run={tmp_path / 'runs' / 'x' / 'version_0'}", "--data.source=nosuch", *NO_FILES],
        "diversity": ["test", *floor, "--metrics.cutoffs=[]", "--metrics.diversity=3"],
        "commands": ["train"],
    }
    for words, arguments in cases.items():
        line = refused(capsys, anyo, *arguments)
        assert words in line or words == "commands", line
    assert not list((tmp_path / "runs").glob("*/version_*"))


def test_foreign_run_is_refused(
    capsys: pytest.CaptureFixture[str], anyo: Anyo, tiny: Callable[..., list[str]], tmp_path: Path
) -> None:
    """The checkpoint of another backbone or split: one sentence, and the run's results stay."""
    run = RunFolder(tmp_path / "run")
    options = [*tiny(CONFIGS[0].parent / "e4srec.yaml"), f"--run={run.path}"]
    anyo("fit", *options)
    before = run.metrics_file.read_bytes()
    assert "backbone" in refused(
        capsys, anyo, "test", f"--run={run.path}", "--model.init_args.backbone.init_args.layers=1"
    )
    assert "split" in refused(capsys, anyo, "test", f"--run={run.path}", "--data.k_core=6")
    assert run.metrics_file.read_bytes() == before

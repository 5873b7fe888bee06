"""The command line, as users type it: every yaml, run folders, resuming, and one clear sentence for each mistake."""

import gzip
import importlib.metadata
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest
import torch
import yaml
from helpers import CONFIGS, Anyo, differing, refused, settings_of, weights

from anyo_lightning.runs import RunFolder

VARIANTS = sorted(CONFIGS.glob("*.yaml"))
NO_FILES = ("--data.interactions=null", "--data.items=null")
Tiny = Callable[..., list[str]]


@pytest.fixture
def tiny(small: list[str], small_llm: list[str], tiny_llm: str, tmp_path: Path) -> Tiny:
    """Options that make a configuration small: the tiny data and LLM, one step."""

    def options(config: Path | str, sasrec: Path | None = None) -> list[str]:
        config = CONFIGS / f"{config}.yaml" if isinstance(config, str) else config
        content = settings_of(config)
        found = [f"--config={config}", *small, "--data.max_items=20", "--trainer.limit_train_batches=1"]
        found.append(f"--trainer.default_root_dir={tmp_path / 'runs'}")
        found.append(f"--trainer.max_epochs={min(content['trainer']['max_epochs'], 1)}")
        settings = content["model"].get("init_args", {})
        encoders = settings.get("encoders", {}).get("init_args", {})
        if "backbone" in encoders:
            found += small_llm
        if "item_backbone" in encoders:
            found += [option.replace("backbone", "item_backbone") for option in small_llm if "backbone" in option]
        if "semantics" in settings:
            found.append(f"--model.semantics.name={tiny_llm}")
        if "item_vectors_from" in encoders:
            found.append(f"--model.encoders.item_vectors_from={sasrec}")
        if "teacher" in settings:
            found.append(f"--model.teacher={sasrec}")
        if "runs" in settings:
            found.append(f"--model.runs=[{sasrec}, {sasrec}]")
        return found

    return options


@pytest.mark.parametrize("config", VARIANTS, ids=lambda path: path.stem)
def test_every_configuration_survives_a_step(
    config: Path, anyo: Anyo, tiny: Tiny, tiny_llm: str, tmp_path: Path
) -> None:
    """Fit ends with a tested run folder, and `test --run` repeats its figures."""
    sasrec = tmp_path / "sasrec"
    if any(option in config.read_text() for option in ("item_vectors_from", "teacher:", "runs:")):
        anyo("fit", *tiny("sasrec"), f"--run={sasrec}")
        anyo("predict", f"--run={sasrec}", "--teach=5")
    if "summarise" in config.read_text():
        files = [option for option in tiny(config) if option.startswith(("--data.interactions", "--data.items"))]
        anyo("augment", *files, f"--llm={tiny_llm}")
    anyo("fit", *tiny(config, sasrec))
    run = RunFolder(tmp_path / "runs" / config.stem / "version_0")
    metrics = run.read_metrics()
    assert metrics["variant"] == config.stem
    assert 0 <= metrics["metrics"]["test/ndcg@10"]["value"] <= 1
    assert run.config_file.is_file()
    trained = settings_of(config)["trainer"]["max_epochs"] != 0
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
    optimizers = [settings_of(path)["model"].get("init_args", {}).get("optimizer") for path in VARIANTS]
    assert len(named := [optimizer for optimizer in optimizers if optimizer]) > 5
    assert all("weight_decay" in optimizer["init_args"] for optimizer in named)


def test_overlays_fit_every_configuration() -> None:
    """There are configurations and overlays, and an overlay has only what all configurations have, or a backbone."""
    overlays = sorted((CONFIGS / "overlays").glob("*.yaml"))
    assert len(VARIANTS) >= 9
    assert {path.stem for path in overlays} >= {"demo", "debug", "gpu"}
    for overlay in overlays:
        allowed = {"trainer", "data", "metrics"} | (
            {"model"} if overlay.stem in ("demo_float32", "fsdp", "quantized", "table") else set()
        )
        assert set(yaml.safe_load(overlay.read_text())) <= allowed


def test_fit_goes_on_exactly_from_the_last_epoch(anyo: Anyo, tiny: Tiny, tmp_path: Path) -> None:
    """Four epochs in two commands end with the weights, counts and curves of four in one, dropout and all.

    The metric never improves after the first epoch (its minimum is watched while it rises), so that best is not last.
    """
    options = [*tiny("sasrec"), "--trainer.max_epochs=4", "--checkpoint.mode=min"]
    options += ["--model.decay=false", "--final_test=false", "--early_stopping.patience=99"]
    whole, parts = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "parts")
    anyo("fit", *options, f"--run={whole.path}")
    anyo("fit", *options, f"--run={parts.path}", "--trainer.max_epochs=2")
    assert torch.load(parts.last_checkpoint, weights_only=True)["epoch"] == 1
    anyo("fit", *options, f"--run={parts.path}")
    states = [torch.load(run.last_checkpoint, weights_only=True) for run in (whole, parts)]
    assert states[0]["global_step"] == states[1]["global_step"] == 4
    assert states[0]["anyo_lightning"]["seen"] == states[1]["anyo_lightning"]["seen"]
    assert not differing(states[0]["state_dict"], states[1]["state_dict"])
    steps = [pl.read_csv(run.curves_file)["step"].to_list() for run in (whole, parts)]
    assert steps == [[1, 2, 3, 4], [1, 2, 3, 4]]


def test_a_run_that_started_from_another_checkpoint_goes_on_from_its_own(
    anyo: Anyo, tiny: Tiny, tmp_path: Path
) -> None:
    """--ckpt_path is for one command: the run's own configuration does not name another run's checkpoint."""
    first, second = RunFolder(tmp_path / "first"), RunFolder(tmp_path / "second")
    options = tiny("sasrec")
    anyo("fit", *options, f"--run={first.path}")
    anyo("fit", *options, f"--run={second.path}", "--trainer.max_epochs=2", f"--ckpt_path={first.last_checkpoint}")
    assert str(first.path) not in second.config_file.read_text()
    figures = second.read_metrics()["metrics"]
    anyo("test", f"--run={second.path}")
    assert second.read_metrics()["metrics"] == figures


def test_refused_fit_leaves_the_run_as_it_was(
    capsys: pytest.CaptureFixture[str], anyo: Anyo, tiny: Tiny, tmp_path: Path
) -> None:
    """Another split or size over an existing run is refused, and the run can still be tested."""
    run = RunFolder(tmp_path / "run")
    options = [*tiny("sasrec"), f"--run={run.path}"]
    anyo("fit", *options)
    before = run.config_file.read_text()
    assert "Expected data.k_core 5" in refused(capsys, anyo, "fit", *options, "--data.k_core=6")
    assert "Expected model.encoders.dim 64" in refused(capsys, anyo, "fit", *options, "--model.encoders.dim=32")
    assert run.config_file.read_text() == before
    anyo("test", f"--run={run.path}")
    run.best_checkpoint.write_bytes(run.best_checkpoint.read_bytes()[:5000])
    assert "readable checkpoint" in refused(capsys, anyo, "test", f"--run={run.path}")


def test_run_folder_holds_what_it_should(anyo: Anyo, tiny: Tiny, tmp_path: Path) -> None:
    """Configuration, curves, predictions, catalogue, figures; the checkpoint has no weights of the LLM."""
    anyo("fit", *tiny("e4srec"), f"--run={tmp_path / 'run'}")
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
    assert not any("base_layer" in key or "embed_tokens" in key for key in weights(run.best_checkpoint))


def test_a_run_keeps_its_precision_on_another_machine(
    anyo: Anyo, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `auto` was is in config.yaml: tested where bfloat16 is slow, a bfloat16 run has the same figures."""
    run = RunFolder(tmp_path / "run")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    anyo("fit", *tiny("e4srec"), f"--run={run.path}")
    encoders = yaml.safe_load(run.config_file.read_text())["model"]["init_args"]["encoders"]
    assert encoders["init_args"]["backbone"]["init_args"]["dtype"] == "bfloat16"
    figures = run.read_metrics()["metrics"]
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)
    anyo("test", f"--run={run.path}")
    assert run.read_metrics()["metrics"] == figures


def test_compare_reads_runs(anyo: Anyo, tiny: Tiny, tmp_path: Path) -> None:
    """Two floors in one markdown table with paired differences; another split is refused."""
    for name in ("popularity", "markov"):
        anyo("fit", *tiny(name))
    table = anyo("compare", tmp_path / "runs", "--baseline", "markov", "--format", "markdown")
    assert "| popularity" in table
    assert "| markov" in table


def test_mistakes_are_one_sentence(capsys: pytest.CaptureFixture[str], anyo: Anyo, tiny: Tiny, tmp_path: Path) -> None:
    """Each names what was expected and what was found, and leaves no run folder behind."""
    floor = tiny("popularity")
    sasrec = tiny("sasrec")
    typo = tmp_path / "typo.yaml"
    typo.write_text("trainer: {max_epoch: 3}\n")
    wide = tmp_path / "wide.csv"
    wide.write_text("user_id,item_id,timestamp\nu,m1,1\n", encoding="utf-16")
    cut = tmp_path / "cut.csv.gz"
    cut.write_bytes(gzip.compress(b"user_id,item_id,timestamp\n" * 500)[:-20])
    cases = {
        "max_epoch": ["fit", *sasrec, f"--config={typo}"],
        "Expected an option that SASRec has for model, got dimm": ["fit", *sasrec, "--model.dimm=3"],
        "Expected an option that IdEncoders has for model.encoders, got dimm": [
            "fit",
            *sasrec,
            "--model.encoders.dimm=3",
        ],
        "Expected the name of a class for model, got SASRecc": ["fit", "--model=SASRecc"],
        "Expected data.ties to be one of 'file_order', 'item_id', 'shuffle', got x": ["fit", *sasrec, "--data.ties=x"],
        "Expected data.k_core to be of type int, got few": ["fit", *sasrec, "--data.k_core=few"],
        "Expected UTF-8 text": ["fit", *floor, f"--data.interactions={wide}"],
        "no_such_set": ["fit", f"--config={CONFIGS / 'popularity.yaml'}", "--data.source=no_such_set"],
        "person": ["fit", *floor, "--data.columns.user=person"],
        "cut.csv.gz": ["fit", *floor, f"--data.interactions={cut}"],
        "checkpoint": ["test", *sasrec],
        "nothing": ["compare", tmp_path / "nothing"],
        "nowhere.yaml": ["fit", f"--config={tmp_path / 'nowhere.yaml'}"],
        "max_items": ["fit", *sasrec, "--data.max_items=0"],
        "a multiple of model.encoders.heads, got 64 and 3": [
            "fit",
            *sasrec,
            "--model.encoders.heads=3",
        ],
        "multiple of model.encoders.heads, got 64 and 5": ["fit", *tiny("sracl_paper"), "--model.encoders.heads=5"],
        "Expected model.temperature to be positive, got 0.0": ["fit", *tiny("llara"), "--model.temperature=0"],
        "cutoffs": ["fit", *sasrec, "--metrics.cutoffs=[5]"],
        "learning_rates": ["fit", *sasrec, "--model.learning_rates={item_encodr: 0.1}"],
        "nosuch": ["fit", *sasrec, f"--run={tmp_path / 'runs' / 'x' / 'version_0'}", "--data.source=nosuch", *NO_FILES],
        "diversity": ["test", *floor, "--metrics.cutoffs=[]", "--metrics.diversity=3"],
        "Expected a command among fit, validate, test, predict, recommend, export, compare, index, data, augment, "
        "serve, sweep, completion, got 'train'": ["train"],
    }
    for words, arguments in cases.items():
        line = refused(capsys, anyo, *arguments)
        assert words in line, line
    assert not list((tmp_path / "runs").glob("*/version_*"))


def test_foreign_run_is_refused(capsys: pytest.CaptureFixture[str], anyo: Anyo, tiny: Tiny, tmp_path: Path) -> None:
    """The checkpoint of another backbone or split: one sentence, and the run's results stay."""
    run = RunFolder(tmp_path / "run")
    options = [*tiny("e4srec"), f"--run={run.path}"]
    anyo("fit", *options)
    before = run.metrics_file.read_bytes()
    line = refused(capsys, anyo, "test", f"--run={run.path}", "--model.encoders.backbone.layers=1")
    assert "Expected model.encoders.backbone.layers 2, with which" in line
    assert "got 1" in line
    assert "Expected data.k_core 5" in refused(capsys, anyo, "test", f"--run={run.path}", "--data.k_core=6")
    assert run.metrics_file.read_bytes() == before


def test_the_seed_of_a_run_is_that_of_its_batches(anyo: Anyo, tiny: Tiny, tmp_path: Path) -> None:
    """`--seed_everything` reaches the data and metrics.json; a seed of the data's own stays its own."""
    options = [*tiny("sasrec"), "--seed_everything=5"]
    for name, more, expected in (("alike", [], 5), ("apart", ["--data.seed=3"], 3)):
        run = RunFolder(tmp_path / name)
        anyo("fit", *options, *more, f"--run={run.path}")
        config = yaml.safe_load(run.config_file.read_text())
        assert (config["seed_everything"], config["data"]["seed"]) == (5, expected)
        assert run.read_metrics()["seed"] == 5
        assert not {"folder", "seed"} & config["metrics"].keys()
        assert config["checkpoint"]["dirpath"] is None
    anyo("test", f"--run={run.path}")
    assert run.read_metrics()["seed"] == 5


def test_help_imports_nothing_heavy() -> None:
    """The commands are listed at once, and `python -m anyo_lightning` is the same command line."""
    script = "import sys; from anyo_lightning.cli.main import main; main(['--help']); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    *shown, modules = done.stdout.splitlines()
    assert "usage: anyo COMMAND [options]" in shown
    heavy = {"torch", "lightning", "transformers", "polars", "numpy", "jsonargparse"}
    assert not heavy & set(modules.split())
    module = subprocess.run([sys.executable, "-m", "anyo_lightning"], capture_output=True, text=True, check=True)
    assert module.stdout.splitlines() == shown


def test_the_version_is_that_of_the_package(anyo: Anyo) -> None:
    """What a report of a mistake names."""
    assert anyo("--version") == f"anyo-lightning {importlib.metadata.version('anyo-lightning')}\n"


def test_a_training_is_quiet_and_imports_what_it_needs(small: list[str], small_llm: list[str], tmp_path: Path) -> None:
    """In a process of its own: Lightning's tips are not shown, and libraries for other purposes are left alone."""
    words = ["fit", f"--config={CONFIGS / 'e4srec.yaml'}", *small, *small_llm, "--data.max_items=20"]
    words += [f"--run={tmp_path / 'run'}", "--trainer.limit_train_batches=1", "--final_test=false"]
    script = f"import sys; from anyo_lightning.cli.main import main; main({words!r}); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    heavy = {"bitsandbytes", "fastapi", "mlflow", "openai", "optuna", "wandb"}
    assert not heavy & set(done.stdout.splitlines()[-1].split())
    assert not [line for line in done.stderr.splitlines() if "Tip" in line or "GPU available" in line or "gemm" in line]


MINE = """
from anyo_lightning import SASRec


class Mine(SASRec):
    def loss(self, states, batch):
        return super().loss(states, batch)[0], {"of_mine": states.sum()}
"""


def test_a_class_in_the_working_directory_is_found(
    capsys: pytest.CaptureFixture[str], anyo: Anyo, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`class_path: my_module.Mine` trains a step; what cannot be imported is one sentence with its name and why."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    for name in ("my_module", "broken_module"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    (tmp_path / "my_module.py").write_text(MINE)
    (tmp_path / "broken_module.py").write_text("import no_such_package\n")
    own = tmp_path / "own.yaml"
    own.write_text("model: {class_path: my_module.Mine, init_args: {encoders: {class_path: IdEncoders}}}\n")
    run = RunFolder(tmp_path / "run")
    options = [*tiny("sasrec")[1:], f"--config={own}"]
    anyo("fit", *options, f"--run={run.path}")
    assert torch.load(run.best_checkpoint, weights_only=True)["anyo_lightning"]["model"] == "Mine"
    assert "train/of_mine" in pl.read_csv(run.curves_file).columns
    cases = {
        "my_module.Yours": "no attribute 'Yours'",
        "my_modul.Mine": "No module named 'my_modul'",
        "broken_module.Mine": "No module named 'no_such_package'",
        "pathlib.Path": "RetrievalModule",
    }
    for path, reason in cases.items():
        own.write_text(f"model: {{class_path: {path}, init_args: {{encoders: {{class_path: IdEncoders}}}}}}\n")
        line = refused(capsys, anyo, "fit", *options)
        assert path in line, line
        assert reason in line, line
        assert len(line) < 300, line


def test_bash_completes_commands_and_options(tmp_path: Path) -> None:
    """The script is sourced by a real shell; an option of a stage, and of a command of our own, are found."""
    script = tmp_path / "anyo.bash"
    command = [sys.executable, "-m", "anyo_lightning", "completion", "bash"]
    script.write_text(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    def completed(*words: str) -> list[str]:
        asked = f"source {script}; COMP_WORDS=({' '.join(words)}); COMP_CWORD={len(words) - 1}; "
        asked += f"_shtab_anyo anyo '{words[-1]}' {words[-2]}; " + 'echo "${COMPREPLY[@]}"'
        shell = ["bash", "-c", asked]
        return subprocess.run(shell, capture_output=True, text=True, check=True).stdout.split()

    assert completed("anyo", "com") == ["compare", "completion"]
    assert completed("anyo", "fit", "--data.max_i") == ["--data.max_items", "--data.max_item_tokens"]
    assert completed("anyo", "compare", "--base") == ["--baseline"]

"""A run says what it did: what may change on it takes effect and is recorded, everything else is refused."""

import contextlib
import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest
import torch
import yaml
from helpers import CONFIGS, Anyo, refused
from lightning.pytorch import LightningModule, Trainer

from anyo_lightning.runs import RunFolder
from anyo_lightning.training.guards import Guards


@pytest.fixture
def fit(anyo: Anyo, tiny_data: tuple[Path, Path]) -> Callable[..., RunFolder]:
    """Trains a small SASRec, or another configuration, in a folder."""

    def run(folder: Path, *words: str, config: str = "sasrec", epochs: int = 2) -> RunFolder:
        files = (f"--data.interactions={tiny_data[0]}", f"--data.items={tiny_data[1]}", "--data.template=null")
        small = ("--model.encoders.dim=16", "--data.batch_tokens=300") if config == "sasrec" else ()
        quiet = ("--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu", f"--trainer.max_epochs={epochs}")
        anyo("fit", f"--config={CONFIGS / config}.yaml", *files, *small, *quiet, *words, f"--run={folder}")
        return RunFolder(folder)

    return run


def content(folder: Path) -> dict[str, bytes]:
    """All files of a folder that a refused command must leave alone; not TensorBoard's."""
    files = [file for file in folder.rglob("*") if file.is_file() and "events" not in file.name]
    return {str(file): file.read_bytes() for file in files}


@pytest.mark.parametrize(
    ("words", "option"),
    [
        (["--model.optimizer.lr=0.1"], "model.optimizer.lr 0.001"),
        (["--model.optimizer.weight_decay=5"], "model.optimizer.weight_decay 0.01"),
        (["--model.optimizer=torch.optim.SGD", "--model.optimizer.lr=0.1"], "model.optimizer.class_path"),
        (['--model.learning_rates={"history_encoder": 0.01}'], "model.learning_rates null"),
        (["--model.encoders.dropout=0.4"], "model.encoders.dropout 0.2"),
        (["--early_stopping.patience=3"], "early_stopping.patience 10"),
        (["--seed_everything=7"], "seed_everything 0"),
        (["--data.max_items=7"], "data.max_items 100"),
        (["--data.k_core=6"], "data.k_core 5"),
        (["--metrics.mask_history=false"], "metrics.mask_history"),
        (["--checkpoint.mode=min"], "checkpoint.mode max"),
        (["--trainer.gradient_clip_val=0.5"], "trainer.gradient_clip_val 1.0"),
    ],
)
def test_what_a_run_was_trained_with_is_refused(
    words: list[str],
    option: str,
    anyo: Anyo,
    capsys: pytest.CaptureFixture[str],
    fit: Callable[..., RunFolder],
    tmp_path: Path,
) -> None:
    """The sentence names the option with both values and --run NEW, and the folder stays as it was."""
    run = fit(tmp_path / "run", epochs=1)
    before = content(run.path)
    sentence = refused(capsys, anyo, "fit", f"--run={run.path}", "--trainer.max_epochs=2", *words)
    assert f"Expected {option}" in sentence
    assert "--run NEW" in sentence
    assert content(run.path) == before


def test_what_may_change_takes_effect_and_is_recorded(
    anyo: Anyo, fit: Callable[..., RunFolder], tmp_path: Path
) -> None:
    """More epochs and another batch size at an epoch's end, without a cosine: in the file of changes, with the step."""
    run = fit(tmp_path / "run", epochs=1)
    steps = torch.load(run.last_checkpoint, weights_only=True)["global_step"]
    anyo("fit", f"--run={run.path}", "--trainer.max_epochs=3", "--data.batch_tokens=100")
    changed = pl.read_csv(run.changes_file, infer_schema=False)
    assert set(changed["option"]) == {"trainer.max_epochs", "data.batch_tokens"}
    assert set(changed["step"]) == {str(steps)}
    config = yaml.safe_load(run.config_file.read_text())
    assert (config["trainer"]["max_epochs"], config["data"]["batch_tokens"]) == (3, 100)
    last = torch.load(run.last_checkpoint, weights_only=True)
    assert last["epoch"] == 2
    assert last["global_step"] > 3 * steps
    assert last["anyo_lightning"]["seen"]["targets"] == pl.read_csv(run.curves_file)["targets"][-1]


def test_a_cosine_is_not_stretched(
    anyo: Anyo, capsys: pytest.CaptureFixture[str], fit: Callable[..., RunFolder], tmp_path: Path
) -> None:
    """A finished run whose learning rate has fallen to zero would start again at a third of it."""
    run = fit(tmp_path / "run", "--model.decay=true")
    for word in ("--trainer.max_epochs=4", "--data.batch_tokens=100"):
        assert "cosine of learning rates" in refused(capsys, anyo, "fit", f"--run={run.path}", word)


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_a_run_is_not_tested_as_another(
    stage: str, anyo: Anyo, capsys: pytest.CaptureFixture[str], fit: Callable[..., RunFolder], tmp_path: Path
) -> None:
    """Another configuration's lengths and seed do not end up in the run's results."""
    run = fit(tmp_path / "run")
    before = content(run.path)
    for word, option in (("--data.max_items=5", "data.max_items 100"), ("--seed_everything=3", "seed_everything 0")):
        assert f"Expected {option}" in refused(capsys, anyo, stage, f"--run={run.path}", word)
    assert content(run.path) == before


def test_a_floor_fitted_again_is_what_its_configuration_says(
    anyo: Anyo, fit: Callable[..., RunFolder], tmp_path: Path
) -> None:
    """EASE in Markov's folder: nothing of Markov is left, and `test` repeats EASE's figures."""
    fit(tmp_path / "run", config="markov", epochs=0)
    run = fit(tmp_path / "run", "--data.k_core=8", config="ease", epochs=0)
    config = yaml.safe_load(run.config_file.read_text())
    assert config["model"]["class_path"].endswith("EASE")
    assert config["data"]["k_core"] == 8
    figures = run.read_metrics()["metrics"]
    anyo("test", f"--run={run.path}")
    assert run.read_metrics()["metrics"] == figures


@pytest.mark.parametrize(
    "words",
    [
        ["--checkpoint.save_top_k=3"],
        ["--checkpoint.save_top_k=-1"],
        ["--checkpoint.filename=ep"],
        ["--checkpoint.save_last=true", "--checkpoint.enable_version_counter=true"],
    ],
)
def test_the_best_checkpoint_is_tested_whatever_else_is_saved(
    words: list[str], fit: Callable[..., RunFolder], tmp_path: Path
) -> None:
    """With a learning rate so high that the last epoch is not the best one."""
    high = "--model.optimizer.lr=0.05"
    plain = fit(tmp_path / "plain", high, epochs=6)
    other = fit(tmp_path / "other", high, *words, epochs=6)
    assert other.read_metrics()["metrics"]["test/ndcg@10"] == plain.read_metrics()["metrics"]["test/ndcg@10"]
    states = [torch.load(run.best_checkpoint, weights_only=True) for run in (plain, other)]
    assert states[0]["global_step"] == states[1]["global_step"]


def test_the_best_checkpoint_survives_a_move(anyo: Anyo, fit: Callable[..., RunFolder], tmp_path: Path) -> None:
    """Resumed elsewhere, a worse epoch does not replace the best one."""
    run = fit(tmp_path / "here", "--model.optimizer.lr=0.05", epochs=5)
    best = torch.load(run.best_checkpoint, weights_only=True)
    score = float(pl.read_csv(run.curves_file)["val/ndcg@10"].max())
    moved = RunFolder(tmp_path / "there" / "moved")
    shutil.move(run.path, moved.path)
    anyo("fit", f"--run={moved.path}", "--trainer.max_epochs=6")
    assert not run.path.exists()
    curves = pl.read_csv(moved.curves_file)
    step = int(curves.filter(pl.col("val/ndcg@10") == curves["val/ndcg@10"].max())["step"][0])
    assert torch.load(moved.best_checkpoint, weights_only=True)["global_step"] == step
    assert step == best["global_step"] or float(curves["val/ndcg@10"].max()) > score


def test_the_last_epoch_is_validated_and_saved(fit: Callable[..., RunFolder], tmp_path: Path) -> None:
    """With a validation in every third of five epochs: after the third and the fifth; each epoch can be resumed."""
    run = fit(tmp_path / "run", "--trainer.check_val_every_n_epoch=3", epochs=5)
    validated = pl.read_csv(run.curves_file).filter(pl.col("val/ndcg@10").is_not_null())
    assert validated["epoch"].to_list() == [2, 4]
    assert torch.load(run.last_checkpoint, weights_only=True)["epoch"] == 4


def test_the_last_epoch_is_validated_where_a_run_resumes_within_it(
    anyo: Anyo, fit: Callable[..., RunFolder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped by SIGTERM after its first step, which Lightning goes on from without starting the epoch again."""
    stopped = Guards.on_train_batch_start

    def stop(self: Guards, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        stopped(self, trainer, pl_module, batch, batch_idx)
        if trainer.current_epoch == 1:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(Guards, "on_train_batch_start", stop)
        with contextlib.suppress(SystemExit):
            fit(tmp_path / "run", "--trainer.check_val_every_n_epoch=3", "--data.batch_tokens=100")
    run = RunFolder(tmp_path / "run")
    steps = torch.load(run.last_checkpoint, weights_only=True)["global_step"]
    assert not run.best_checkpoint.exists()
    anyo("fit", f"--run={run.path}")
    curves = pl.read_csv(run.curves_file)
    assert curves.filter(pl.col("val/ndcg@10").is_not_null())["epoch"].to_list() == [1]
    assert curves["step"][-1] > steps + 1  # it did resume within an epoch
    assert run.finished


def test_validations_counted_in_steps_stay_so_in_the_last_epoch(fit: Callable[..., RunFolder], tmp_path: Path) -> None:
    """Not after as many steps of the epoch."""
    run = fit(tmp_path / "whole", "--data.batch_tokens=100", "--final_test=false")
    last = int(pl.read_csv(run.curves_file)["step"].max())  # of two epochs
    counted = ["--trainer.check_val_every_n_epoch=null", f"--trainer.val_check_interval={last - 1}"]
    run = fit(tmp_path / "counted", "--data.batch_tokens=100", *counted)
    validated = pl.read_csv(run.curves_file).filter(pl.col("val/ndcg@10").is_not_null())
    assert validated["step"].to_list() == [last - 1]
    assert validated["epoch"].to_list() == [1]


def test_patience_0_trains(fit: Callable[..., RunFolder], tmp_path: Path) -> None:
    """It stops at the first epoch without a gain, not before the first one."""
    run = fit(tmp_path / "run", "--early_stopping.patience=0", epochs=3)
    assert pl.read_csv(run.curves_file)["step"][-1] > 0


def test_partial_tests_never_replace_full_ones(anyo: Anyo, fit: Callable[..., RunFolder], tmp_path: Path) -> None:
    """Neither a test of one batch nor a development run; and `1` is one batch, not all of them."""
    few = "--data.evaluation_batch_tokens=100"
    run = fit(tmp_path / "run", few)
    full = run.metrics_file.read_bytes()
    anyo("test", f"--run={run.path}", "--trainer.limit_test_batches=1")
    assert run.metrics_file.read_bytes() == full
    curves = run.curves_file.read_bytes()
    anyo("fit", f"--run={run.path}", "--trainer.fast_dev_run=true")
    assert (run.metrics_file.read_bytes(), run.curves_file.read_bytes()) == (full, curves)
    part = fit(tmp_path / "part", few, "--trainer.limit_test_batches=1", epochs=1)
    assert 0 < part.read_metrics()["protocol"]["rows"] < 40
    anyo("test", f"--run={part.path}", "--trainer.limit_test_batches=1.0")
    assert part.read_metrics()["protocol"]["rows"] == 40


def test_environments_of_training_and_testing_are_kept_apart(
    anyo: Anyo, fit: Callable[..., RunFolder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A test elsewhere does not change where the run was trained."""
    run = fit(tmp_path / "run", epochs=1)
    trained = run.read_metrics()["environment"]["training"]
    elsewhere = json.loads(json.dumps(trained)) | {"commit": "elsewhere"}
    monkeypatch.setattr("anyo_lightning.evaluation.callback.environment", lambda: elsewhere)
    anyo("test", f"--run={run.path}")
    assert run.read_metrics()["environment"] == {"training": trained, "testing": elsewhere}


def test_another_reading_is_refused_by_the_checkpoint(
    anyo: Anyo, capsys: pytest.CaptureFixture[str], fit: Callable[..., RunFolder], tmp_path: Path
) -> None:
    """`init_from` compares what decides a model's function beside its weights, such as how much it reads."""
    run = fit(tmp_path / "run", epochs=1)
    words = [f"--model.init_from={run.path}", "--data.max_items=30"]
    with pytest.raises(SystemExit):
        fit(tmp_path / "other", *words, epochs=1)
    assert "Expected data.max_items 100, with which the checkpoint was trained, got 30" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_a_refused_command_leaves_no_empty_folder(
    anyo: Anyo, capsys: pytest.CaptureFixture[str], tiny_data: tuple[Path, Path], tmp_path: Path
) -> None:
    """Neither `runs/sasrec/version_0` nor `runs/sasrec`."""
    words = [f"--data.interactions={tiny_data[0]}", f"--trainer.default_root_dir={tmp_path / 'runs'}"]
    refused(capsys, anyo, "fit", f"--config={CONFIGS / 'sasrec.yaml'}", *words, "--data.k_core=1000")
    assert list(tmp_path.rglob("*")) in ([], [tmp_path / "runs"])


def test_another_checkpoint_leaves_the_results_alone(anyo: Anyo, fit: Callable[..., RunFolder], tmp_path: Path) -> None:
    """Figures of another run's weights are printed, and are not the run's; nor are its weights resumed otherwise."""
    run = fit(tmp_path / "run", epochs=1)
    other = fit(tmp_path / "other", "--model.optimizer.lr=0.05")
    full = run.metrics_file.read_bytes()
    anyo("test", f"--run={run.path}", f"--ckpt_path={other.best_checkpoint}")
    assert run.metrics_file.read_bytes() == full
    with pytest.raises(SystemExit):
        fit(tmp_path / "new", f"--ckpt_path={other.last_checkpoint}", epochs=3)


def test_fewer_epochs_than_were_trained_are_refused(
    capsys: pytest.CaptureFixture[str], fit: Callable[..., RunFolder], tmp_path: Path
) -> None:
    """With a sentence, and the run's results stay."""
    run = fit(tmp_path / "run", epochs=3)
    results = run.metrics_file.read_bytes()
    with pytest.raises(SystemExit):
        fit(tmp_path / "run", epochs=1)
    assert "Expected trainer.max_epochs of at least" in capsys.readouterr().err
    assert run.metrics_file.read_bytes() == results


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "which has no config.yaml"),
        ("", "got no configuration in it"),
        ("- 1\n", "got no configuration in it"),
        ("a: [\n", "to be YAML, got"),
    ],
)
def test_weights_without_their_configuration_are_refused(
    content: str | None,
    reason: str,
    anyo: Anyo,
    capsys: pytest.CaptureFixture[str],
    fit: Callable[..., RunFolder],
    tmp_path: Path,
) -> None:
    """A config.yaml that is gone, empty or broken says nothing of the checkpoints beside it."""
    run = fit(tmp_path / "run", epochs=1)
    run.config_file.unlink()
    if content is not None:
        run.config_file.write_text(content)
    words = [f"--config={CONFIGS / 'sasrec.yaml'}", f"--run={run.path}"]
    assert reason in refused(capsys, anyo, "fit", *words)


def test_one_batch_is_not_all_of_them(
    anyo: Anyo, capsys: pytest.CaptureFixture[str], fit: Callable[..., RunFolder], tmp_path: Path
) -> None:
    """In Python 1 equals 1.0, and True."""
    run = fit(tmp_path / "run", "--trainer.limit_train_batches=1", epochs=1)
    words = ["fit", f"--run={run.path}", "--trainer.max_epochs=2", "--trainer.limit_train_batches=1.0"]
    assert "Expected trainer.limit_train_batches 1, with" in refused(capsys, anyo, *words)


def test_a_copy_is_a_run_of_its_own(anyo: Anyo, fit: Callable[..., RunFolder], tmp_path: Path) -> None:
    """Its configuration does not name the folder that it was copied from."""
    run = fit(tmp_path / "run", epochs=1)
    before = content(run.path)
    copied = RunFolder(tmp_path / "copied")
    shutil.copytree(run.path, copied.path)
    anyo("fit", f"--run={copied.path}", "--trainer.max_epochs=2")
    assert content(run.path) == before
    assert pl.read_csv(copied.changes_file, infer_schema=False)["option"].to_list() == ["trainer.max_epochs"]


def test_partial_predictions_never_replace_full_ones(anyo: Anyo, fit: Callable[..., RunFolder], tmp_path: Path) -> None:
    """As with results."""
    run = fit(tmp_path / "run", epochs=1)
    anyo("predict", f"--run={run.path}")
    few = ["--trainer.limit_predict_batches=1", "--data.evaluation_batch_tokens=60"]
    anyo("predict", f"--run={run.path}", *few)
    assert len(pl.read_parquet(run.queries_file)) == 40


def test_folders_that_were_made_for_a_refused_run_go_with_it(
    anyo: Anyo, capsys: pytest.CaptureFixture[str], tiny_data: tuple[Path, Path], tmp_path: Path
) -> None:
    """All of them, and no other."""
    (tmp_path / "mine").mkdir()
    words = [f"--data.interactions={tiny_data[0]}", f"--run={tmp_path / 'mine' / 'a' / 'b'}", "--data.k_core=1000"]
    refused(capsys, anyo, "fit", f"--config={CONFIGS / 'sasrec.yaml'}", *words)
    assert list(tmp_path.iterdir()) == [tmp_path / "mine"]
    assert not list((tmp_path / "mine").iterdir())

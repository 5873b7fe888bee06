"""What the commands say at their end."""

import signal
from collections.abc import Callable
from functools import partialmethod
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from helpers import CONFIGS, Anyo
from lightning.pytorch import LightningModule, Trainer

from anyo_lightning.cli.lightning import AnyoCLI
from anyo_lightning.models.sasrec import SASRec
from anyo_lightning.runs import RunFolder
from anyo_lightning.training.guards import Guards

SASREC = [f"--config={CONFIGS / 'sasrec'}.yaml", "--model.encoders.dim=16", "--data.batch_tokens=300"]


def test_a_run_ends_with_its_table(anyo: Anyo, small: list[str], tmp_path: Path) -> None:
    """That of `anyo compare`, and how training went; a test says the same, of another checkpoint its figures alone."""
    run = RunFolder(tmp_path / "sasrec")
    fit = ["fit", *SASREC, *small, f"--run={run.path}"]
    fit += ["--trainer.max_epochs=9", "--model.optimizer.lr=0.0", "--early_stopping.patience=1"]
    said = anyo(*fit)
    table = anyo("compare", run.path)
    assert table in said
    figure = run.read_metrics()["metrics"]["test/ndcg@10"]["value"]
    assert f"{figure:.3f}".lstrip("0") in table
    steps = pl.read_csv(run.curves_file)["step"].max()
    assert f"Trained {steps} steps over 2 epochs, stopped early; best val/ndcg@10: 0." in said
    assert "Trained" not in anyo(*fit)  # there is nothing left to train
    assert said.endswith(f"More figures: {run.metrics_file}\nRun folder: {run.path}\n")
    assert "DataLoader" not in said
    test = ["test", f"--run={run.path}", "--trainer.enable_progress_bar=false"]
    again = anyo(*test)
    assert table in again
    assert "DataLoader" not in again
    other = anyo(*test, "--ckpt_path=last")
    assert table not in other
    assert "test/ndcg@10" in other


@pytest.mark.parametrize("kind", [str, Path])
def test_a_named_checkpoint_is_the_runs_own(
    kind: type[str] | type[Path], anyo: Anyo, small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--ckpt_path=last` is no file in the working directory, whichever of Lightning's types the parser gives."""
    run = RunFolder(tmp_path / "sasrec")
    anyo("fit", *SASREC, *small, "--final_test=false", f"--run={run.path}")
    restored: list[Path] = []
    monkeypatch.setattr(AnyoCLI, "test", partialmethod(with_checkpoint_as, AnyoCLI.test, kind))
    monkeypatch.setattr(SASRec, "restore_from", lambda self, path, **options: restored.append(path))
    anyo("test", f"--run={run.path}", "--ckpt_path=last", "--trainer.enable_progress_bar=false")
    assert restored == [run.last_checkpoint]


def with_checkpoint_as(
    cli: AnyoCLI,
    test: Callable[..., None],
    kind: Callable[[str], object],
    model: SASRec,
    *,
    ckpt_path: object,
    **more: Any,
) -> None:
    """Give a command's checkpoint to its method as this type."""
    test(cli, model, ckpt_path=kind(str(ckpt_path)), **more)


def test_what_is_counted_has_a_table_and_no_epochs(anyo: Anyo, small: list[str], tmp_path: Path) -> None:
    """A floor is not trained."""
    said = anyo("fit", f"--config={CONFIGS / 'popularity'}.yaml", *small, f"--run={tmp_path / 'popularity'}")
    assert anyo("compare", tmp_path / "popularity") in said
    assert "Trained" not in said


@pytest.mark.parametrize("epoch", [0, 1])
def test_ctrl_c_says_how_to_go_on(
    epoch: int,
    anyo: Anyo,
    small: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """From the last epoch's end, if there was one; the command that is named goes on and tests."""
    run = RunFolder(tmp_path / "the run")
    started = Guards.on_train_batch_start

    def interrupt(self: Guards, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        started(self, trainer, pl_module, batch, batch_idx)
        if trainer.current_epoch == epoch:
            signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    try:
        with monkeypatch.context() as patched:
            patched.setattr(Guards, "on_train_batch_start", interrupt)
            with pytest.raises(SystemExit) as stopped:
                anyo("fit", *SASREC, *small, "--trainer.max_epochs=3", f"--run={run.path}")
    finally:
        signal.signal(signal.SIGINT, before)  # Lightning ignores it from then on
    assert stopped.value.code == 1
    said = capsys.readouterr().err
    if epoch == 0:
        assert f"Interrupted: {run.path} has no checkpoint yet" in said
    else:
        assert f"Interrupted: anyo fit --run '{run.path}' goes on from {run.last_checkpoint}" in said
        assert "steps over 3 epochs; best val/ndcg@10" in anyo("fit", f"--run={run.path}")


def test_steps_are_counted_where_training_ends_within_an_epoch(anyo: Anyo, small: list[str], tmp_path: Path) -> None:
    """With `trainer.max_steps`, in the second epoch; and no test is promised where none follows."""
    run = RunFolder(tmp_path / "sasrec")
    anyo("fit", *SASREC, *small, "--final_test=false", f"--run={run.path}")
    steps = pl.read_csv(run.curves_file)["step"].max()
    limit = ["--trainer.max_epochs=3", f"--trainer.max_steps={steps + 1}", "--final_test=false"]
    said = anyo("fit", *SASREC, *small, *limit, f"--run={tmp_path / 'limited'}")
    assert f"Trained {steps + 1} steps over 2 epochs; best val/ndcg@10: 0." in said
    assert "test" not in said

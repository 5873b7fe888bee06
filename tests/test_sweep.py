"""`anyo sweep` on tiny data: trials are kept, the command resumes, bad ones are stopped, the best alone is tested."""

import math
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import psutil
import pytest
from helpers import CONFIGS

from anyo_lightning.cli import sweep as sweeping
from anyo_lightning.cli.main import main
from anyo_lightning.errors import InputError
from anyo_lightning.runs import RunFolder

SPACE = CONFIGS / "spaces" / "sasrec.yaml"
LR = "model.optimizer.init_args.lr"


@pytest.fixture
def options(tiny_data: tuple[Path, Path]) -> list[str]:
    return [
        *(f"--data.interactions={tiny_data[0]}", f"--data.items={tiny_data[1]}", "--data.template=null"),
        *("--trainer.max_epochs=1", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"),
    ]


def study_of(folder: Path) -> optuna.Study:
    return optuna.load_study(study_name="sweep", storage=f"sqlite:///{folder / 'study.db'}")


def space_of(folder: Path, text: str) -> Path:
    file = folder / "space.yaml"
    file.write_text(text)
    return file


def test_a_sweep_goes_on_and_tests_the_best(options: list[str], tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    """One trial, then the second; what the study calls a trial's value is what its run has logged."""
    folder = tmp_path / "sweep"
    for trials in (1, 2):
        words = ["sweep", str(CONFIGS / "sasrec.yaml"), f"--space={SPACE}", f"--run={folder}", f"--trials={trials}"]
        main([*words, "--", *options])
    study = study_of(folder)
    assert [trial.number for trial in study.trials] == [0, 1]
    assert study.trials[0].params != study.trials[1].params  # the second command proposes something else
    for trial in study.trials:
        curves = RunFolder(folder / f"trial_{trial.number}").read_curves()
        assert curves is not None
        assert curves["val/ndcg@10"].max() == trial.value
    best = RunFolder(folder / f"trial_{study.best_trial.number}")
    assert best.read_metrics()["variant"] == "sasrec, tuned"
    said = capfd.readouterr().out
    assert re.search(r"trial 1: lr [\d.e-]+, dropout 0\.\d, max_items \d+: val/ndcg@10 0\.\d{4}, \d+ s\n", said)
    assert f"best of 2: trial {study.best_trial.number}" in said
    with pytest.raises(InputError, match="choose another --run"):
        sweeping.sweep(CONFIGS / "sasrec.yaml", SPACE, folder, trials=3)


def test_the_study_is_written_when_a_trial_was_validated(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However often a trial is looked at, its storage is written and its pruning asked once per validation."""
    calls: list[str] = []

    def noting(name: str) -> Callable[..., Any]:
        own = getattr(optuna.trial.Trial, name)

        def noted(self: optuna.trial.Trial, *arguments: Any) -> Any:
            calls.append(" ".join([name, *(str(one) for one in arguments if name == "set_user_attr")][:2]))
            return own(self, *arguments)

        return noted

    for name in ("report", "should_prune", "set_user_attr"):
        monkeypatch.setattr(optuna.trial.Trial, name, noting(name))
    monkeypatch.setattr(sweeping, "POLL_S", 0.01)
    monkeypatch.setattr(sweeping, "SPENT_S", math.inf)
    options = [word.replace("epochs=1", "epochs=2") for word in options]
    sweeping.sweep(CONFIGS / "sasrec.yaml", SPACE, tmp_path / "sweep", trials=1, options=options)
    counts = Counter(calls)
    assert counts["report"] == 2
    assert counts["should_prune"] <= 2
    assert counts["set_user_attr spent"] <= 2 + 1  # and when it has ended


def test_a_trial_below_the_others_is_stopped(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rate of 1e-12 learns nothing: such a trial is told to stop, and is not the best."""
    monkeypatch.setattr(sweeping, "STARTUP_TRIALS", 1)
    space = space_of(tmp_path, f"{LR}: [1.0e-2, 1.0e-12]")
    options = [word.replace("epochs=1", "epochs=40") for word in options] + ["--early_stopping.patience=200"]
    folder = tmp_path / "sweep"
    folder.mkdir()
    study = optuna.create_study(storage=f"sqlite:///{folder / 'study.db'}", study_name="sweep", direction="maximize")
    for lr in (1e-2, 1e-12):
        study.enqueue_trial({LR: lr})
    sweeping.sweep(CONFIGS / "sasrec.yaml", space, folder, trials=2, options=options)
    assert {trial.params[LR]: trial.state.name for trial in study_of(folder).trials} == {
        1e-2: "COMPLETE",
        1e-12: "PRUNED",
    }
    assert study_of(folder).best_trial.params == {LR: 1e-2}
    assert not RunFolder(folder / "trial_1").finished


def test_a_sweep_that_was_cut_off_resumes_its_trial(options: list[str], tmp_path: Path) -> None:
    """Killed in the middle of a trial, the next command goes on in that trial's folder, with its settings."""
    folder = tmp_path / "sweep"
    options = [word.replace("epochs=1", "epochs=40") for word in options] + ["--early_stopping.patience=200"]
    words = ["sweep", str(CONFIGS / "sasrec.yaml"), f"--space={SPACE}", f"--run={folder}", "--trials=1"]
    process = subprocess.Popen([sys.executable, "-m", "anyo_lightning", *words, "--", *options])
    trial = RunFolder(folder / "trial_0")
    while process.poll() is None and not trial.last_checkpoint.is_file():
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    process.wait()
    cut = study_of(folder).trials[0]
    before = cut.params
    assert cut.user_attrs["spent"] > 0
    main([*words, "--", *options])
    study = study_of(folder)
    assert [trial.state.name for trial in study.trials] == ["FAIL", "COMPLETE"]
    assert study.trials[1].params == before
    assert not (folder / "trial_1").exists()
    assert trial.finished
    curves = trial.read_curves()
    assert curves is not None
    assert curves["epoch"].max() == 39


def test_an_interruption_waits_until_the_study_is_written(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was being written is there, the time taken too, and no process trains on; the trial can be resumed."""
    _interrupt(monkeypatch, optuna.trial.Trial, "report")
    options = [word.replace("epochs=1", "epochs=40") for word in options] + ["--early_stopping.patience=200"]
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        sweeping.sweep(CONFIGS / "sasrec.yaml", SPACE, tmp_path / "sweep", trials=1, options=options)
    assert signal.getsignal(signal.SIGINT) is before
    cut = study_of(tmp_path / "sweep").trials[0]
    assert cut.state.name == "RUNNING"
    assert len(cut.intermediate_values) >= 1
    assert cut.user_attrs["spent"] > 0
    with RunFolder(tmp_path / "sweep" / "trial_0").claimed():  # its process has ended
        pass


def test_a_trial_that_has_ended_is_told_whatever_interrupts(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interruption just then leaves no trial that counts and is trained again."""
    _interrupt(monkeypatch, optuna.study.Study, "tell")
    with pytest.raises(KeyboardInterrupt):
        sweeping.sweep(CONFIGS / "sasrec.yaml", SPACE, tmp_path / "sweep", trials=2, options=options)
    assert [trial.state.name for trial in study_of(tmp_path / "sweep").trials] == ["COMPLETE"]


def test_an_interruption_that_reaches_the_training_too_leaves_the_trial(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Ctrl-C does in a terminal: the trial has not failed, and can be resumed."""
    monkeypatch.setattr(sweeping, "POLL_S", 60)  # the training ends before it is looked at
    folder = tmp_path / "sweep"
    options = [word.replace("epochs=1", "epochs=400") for word in options] + ["--early_stopping.patience=2000"]

    def interrupt() -> None:
        while not RunFolder(folder / "trial_0").last_checkpoint.is_file():
            time.sleep(0.05)
        for process in [*psutil.Process().children(), psutil.Process()]:
            process.send_signal(signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        sweeping.sweep(CONFIGS / "sasrec.yaml", SPACE, folder, trials=1, options=options)
    (cut,) = study_of(folder).trials
    assert cut.state.name == "RUNNING"
    assert cut.user_attrs["spent"] > 0


def test_what_is_ignored_stays_ignored(options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell starts what stands behind `&` in a script with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        _interrupt(monkeypatch, optuna.trial.Trial, "report")
        sweeping.sweep(CONFIGS / "sasrec.yaml", SPACE, tmp_path / "sweep", trials=1, options=options)
    finally:
        signal.signal(signal.SIGINT, before)
    assert [trial.state.name for trial in study_of(tmp_path / "sweep").trials] == ["COMPLETE"]


def _interrupt(monkeypatch: pytest.MonkeyPatch, owner: type, name: str) -> None:
    """Send SIGINT to this process when a method is first called."""
    own = getattr(owner, name)

    def interrupted(*arguments: Any, **options: Any) -> Any:
        monkeypatch.setattr(owner, name, own)
        signal.raise_signal(signal.SIGINT)
        return own(*arguments, **options)

    monkeypatch.setattr(owner, name, interrupted)


def test_the_time_of_trials_that_were_cut_off_is_of_the_budget(tmp_path: Path) -> None:
    """Two hours went into a trial that did not end: none is started when the sweep has one hour."""
    folder = tmp_path / "sweep"
    folder.mkdir()
    study = optuna.create_study(storage=f"sqlite:///{folder / 'study.db'}", study_name="sweep", direction="maximize")
    cut = study.ask()
    cut.set_user_attr("spent", 7200.0)
    study.tell(cut, state=optuna.trial.TrialState.FAIL)
    with pytest.raises(InputError, match="Expected a trial that trains, got 1 that failed"):
        sweeping.sweep(CONFIGS / "sasrec.yaml", SPACE, folder, trials=5, hours=1)


@pytest.mark.parametrize(
    ("text", "options", "sentence"),
    [
        (f"{LR}: 0.1", [], "as a list of choices or {low, high}"),
        (f"{LR}: {{low: 2, high: 1}}", [], "as a list of choices or {low, high}"),
        ("[]", [], "a line per option"),
        ("model.nonsense: [1, 2]", [], "nonsense"),
    ],
)
def test_mistakes(text: str, options: list[str], sentence: str, tmp_path: Path) -> None:
    """One sentence; a refused option ends the sweep at its first trial."""
    with pytest.raises(InputError, match=re.escape(sentence)):
        sweeping.sweep(CONFIGS / "sasrec.yaml", space_of(tmp_path, text), tmp_path / "sweep", options=options)

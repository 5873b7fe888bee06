"""`anyo sweep`: Optuna proposes settings, `anyo fit` trains each in a process of its own, validation decides.

What a sweep is lies in its folder: `study.db`, a run folder `trial_<n>` per trial and what it printed, `trial_<n>.log`.
The training process knows nothing of Optuna: its curves are read from outside, and a trial that is not worth going on
with is told to stop.
"""

import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from anyo_lightning.errors import InputError
from anyo_lightning.runs import RunFolder

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial

MONITOR = "val/ndcg@10"
POLL_S = 0.5
SPENT_S = 60.0  # between notes of the time that a trial takes, where none is validated meanwhile
STARTUP_TRIALS = 5  # that are neither pruned nor proposed by the sampler: as many as Optuna's own pruner has


def sweep(
    config: Path,
    space: Path,
    run: Path,
    *,
    trials: int = 20,
    hours: float | None = None,
    prune: bool = True,
    options: Sequence[str] = (),
) -> None:
    """Search the settings of a variant; the same command, run again, resumes and ends at the same budget.

    Trials are proposed by TPE. One whose validation NDCG@10 is below the median of the others after as many
    validations is stopped. A trial's value is that of its best validation; the best trial alone is tested, at the end.
    For a fair comparison give each variant the same `trials` or `hours`, and say so.

    Args:
        config: The variant's configuration.
        space: Yaml file: for each option a list of choices, or `{low, high}`, with `log: true` or `step`.
        run: Folder of the sweep.
        trials: How many settings are tried, pruned ones and failed ones included.
        hours: Stop starting trials when those there are have taken so long together, whatever came of them.
        prune: Whether trials are stopped early.
        options: Further options of `anyo fit`, for all trials.

    Raises:
        InputError: Optuna is missing, the space cannot be read, the folder holds another sweep or is in use, the first
            trial was refused, or every trial failed.
    """
    if find_spec("optuna") is None:
        raise InputError('Expected optuna for a sweep, got none: pip install ".[sweep]" in the clone')
    if trials < 1 or (hours is not None and hours <= 0):
        raise InputError(f"Expected --trials and --hours to be positive, got {trials} and {hours}")
    distributions = read_space(space)
    if not config.is_file():
        raise InputError(f"Expected a configuration, got no file {config}")
    with RunFolder(run).claimed():
        study = _open(
            run, settings=[config.stem, config.read_text("utf-8"), space.read_text("utf-8"), *options], prune=prune
        )
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # a trial in training ends with the sweep
        common = [f"--config={config}", f"--metrics.variant={config.stem}, tuned", *options]
        while True:
            with _signals_held() as signals:
                if (trial := _next(study, run, distributions, trials=trials, hours=hours)) is None:
                    break
                words = [f"--{name}={_word(value)}" for name, value in trial.params.items()]
                _train(study, trial, run, [*common, *words], signals)
            if not signals:
                print(_said(study.trials[trial.number]), flush=True)
        _finish(study, run)


def read_space(file: Path) -> dict[str, "BaseDistribution"]:
    """What is searched, as Optuna's distributions by the options' names.

    Raises:
        InputError: The file is missing, or is not such a yaml.
    """
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    try:
        content = yaml.safe_load(file.read_text("utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"Expected --space to name a yaml file, got {file}: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict) or not content:
        raise InputError(f"Expected {file} to have a line per option, got {content!r}")
    found: dict[str, BaseDistribution] = {}
    for name, given in content.items():
        try:
            if isinstance(given, list) and all(isinstance(value, str | float | int | None) for value in given):
                found[name] = CategoricalDistribution(given)
            elif all(isinstance(value, int) for value in given.values()):  # True, of log, is one
                found[name] = IntDistribution(**given)
            else:
                limits = {key: float(value) for key, value in given.items() if key != "log"}
                found[name] = FloatDistribution(**limits, log=bool(given.get("log", False)))
        except (TypeError, ValueError, AttributeError):
            raise InputError(
                f"Expected {name} in {file} as a list of choices or {{low, high}} with log or step, got {given!r}"
            ) from None
    return found


def _open(folder: Path, *, settings: list[str], prune: bool) -> "Study":
    """The folder's study, which keeps what it was started with."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        storage=f"sqlite:///{folder / 'study.db'}",
        study_name="sweep",
        direction="maximize",
        load_if_exists=True,
        pruner=optuna.pruners.MedianPruner(n_startup_trials=STARTUP_TRIALS) if prune else optuna.pruners.NopPruner(),
    )
    before = study.user_attrs.setdefault("settings", settings)
    if before != settings:
        raise InputError(f"Expected the sweep that {folder} holds, {before}, got {settings}: choose another --run")
    study.set_user_attr("settings", settings)
    # With one seed a resumed study would propose the same again.
    study.sampler = optuna.samplers.TPESampler(seed=len(study.trials), n_startup_trials=STARTUP_TRIALS)
    return study


def _next(
    study: "Study", run: Path, distributions: dict[str, "BaseDistribution"], *, trials: int, hours: float | None
) -> "Trial | None":
    """The trial to train: one that was cut off with an earlier command, or another while the budget lasts.

    Raises:
        InputError: A trial of a sweep that was killed is still training.
    """
    from optuna.trial import TrialState

    for cut in study.get_trials(states=[TrialState.RUNNING]):  # no other sweep is here: the folder is claimed
        if (folder := _folder(run, cut)).path.is_dir():
            with folder.claimed():
                pass
        study.tell(cut.number, state=TrialState.FAIL)
        study.enqueue_trial(cut.params, user_attrs={"resumes": cut.user_attrs.get("resumes", cut.number)})
    waiting = study.get_trials(states=[TrialState.WAITING])
    done = [trial for trial in study.trials if "seconds" in trial.user_attrs]
    spent = sum(a.get("spent", a.get("seconds", 0.0)) for a in (t.user_attrs for t in study.trials))  # cut off or not
    if not waiting and (len(done) >= trials or (hours is not None and spent >= hours * 3600)):
        return None
    return study.ask(distributions)


def _folder(run: Path, trial: Any) -> RunFolder:
    """A trial's run folder; one that was cut off goes on in its own."""
    return RunFolder(run / f"trial_{trial.user_attrs.get('resumes', trial.number)}")


def _train(study: "Study", trial: "Trial", run: Path, words: list[str], signals: list[int]) -> None:
    """Train a trial in a process of its own until a signal comes, and tell the study what came of it."""
    from optuna.trial import TrialState

    folder, started, told, noted = _folder(run, trial), time.monotonic(), 0, 0.0
    log = folder.path.with_suffix(".log")
    command = [sys.executable, "-m", "anyo_lightning", "fit", *words, f"--run={folder.path}", "--final_test=false"]
    with log.open("a", encoding="utf-8") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        pruned = ended = False
        try:
            while not ended and not signals:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(POLL_S)
                ended = process.returncode is not None  # what it wrote last is read below, too
                validated, spent = _validated(folder)[told:], time.monotonic() - started
                for step, value in enumerate(validated, told):
                    trial.report(value, step)
                told += len(validated)
                if validated or spent - noted >= SPENT_S:  # while it trains: the sweep may be killed
                    trial.set_user_attr("spent", spent)
                    noted = spent
                if validated and not ended and not pruned and trial.should_prune():
                    pruned = True
                    process.terminate()  # a run that is told to stop ends with the files that it has
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
            trial.set_user_attr("spent", time.monotonic() - started)
    if not ended or (signals and process.returncode):  # a terminal's Ctrl-C ends the process, too
        return  # the next command goes on with it
    values = _validated(folder)
    trial.set_user_attr("seconds", trial.user_attrs["spent"])  # now that it has ended
    if pruned:
        study.tell(trial, state=TrialState.PRUNED)
    elif process.returncode or not values:
        last = (log.read_text("utf-8").strip().splitlines() or ["nothing printed"])[-1]
        trial.set_user_attr("reason", last)
        study.tell(trial, state=TrialState.FAIL)
        refused = process.returncode == 2 and not folder.curves_file.is_file()  # before a step was trained
        if refused and not any(other.value is not None for other in study.trials):
            raise InputError(f"Expected options that anyo fit takes, got: {last.removeprefix('anyo: error: ')}")
    else:
        study.tell(trial, max(values))


@contextlib.contextmanager
def _signals_held() -> Iterator[list[int]]:
    """SIGINT and SIGTERM that come meanwhile, raised afterwards: amid a write they would leave the study locked.

    What is ignored stays ignored, here and in a process started meanwhile.
    """
    held: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    before = {number: handler for number, handler in before.items() if handler is not signal.SIG_IGN}
    try:
        for number in before:
            signal.signal(number, lambda number, _: held.append(number))
        yield held
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if held:
            signal.raise_signal(held[0])


def _validated(folder: RunFolder) -> list[float]:
    """The validations of a run so far."""
    curves = folder.read_curves()
    return [] if curves is None or MONITOR not in curves.columns else curves[MONITOR].drop_nulls().to_list()


def _word(value: Any) -> str:
    """A value as the command line takes it."""
    return value if isinstance(value, str) else json.dumps(value)


def _said(trial: "FrozenTrial") -> str:
    """What came of a trial, in one line."""
    chosen = ", ".join(f"{name.rpartition('.')[2]} {_word(value)}" for name, value in trial.params.items())
    came = f"{MONITOR} {trial.value:.4f}" if trial.value is not None else trial.state.name.lower()
    reason = f" ({trial.user_attrs['reason']})" if "reason" in trial.user_attrs else ""
    return f"trial {trial.number}: {chosen}: {came}, {trial.user_attrs['seconds']:.0f} s{reason}"


def _finish(study: "Study", run: Path) -> None:
    """Say which trial is best, and test it."""
    from optuna.trial import TrialState

    if not study.get_trials(states=[TrialState.COMPLETE]):
        raise InputError(
            f"Expected a trial that trains, got {len(study.trials)} that failed: {run}/trial_*.log say why"
        )
    best = study.best_trial
    folder = _folder(run, best)
    print(f"best of {len(study.trials)}: trial {best.number}, {MONITOR} {best.value:.4f}, {best.params}")
    if not folder.finished:
        subprocess.run([sys.executable, "-m", "anyo_lightning", "test", f"--run={folder.path}"], check=True)

"""A sweep: Optuna proposes settings, `anyo fit` trains each, the best epoch's validation NDCG@10 decides.

    python benchmarks/sweep.py configs/sasrec.yaml runs/sweep --trials 20 [options of anyo fit]

Change the search space below. The study is `study.db` in the folder; the same command, run again, resumes it.
Only the best trial is tested, at the end.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import optuna

from anyo_lightning.cli.lightning import MONITOR
from anyo_lightning.runs import RunFolder


def settings(trial: optuna.Trial) -> dict[str, object]:
    """What is searched: any options of the configuration."""
    return {
        "model.optimizer.lr": trial.suggest_float("lr", 3e-4, 3e-3, log=True),
        "model.encoders.dropout": trial.suggest_float("dropout", 0.1, 0.5, step=0.1),
        "data.max_items": trial.suggest_categorical("max_items", [50, 100]),
    }


def main() -> None:
    """Run the trials that are missing, then test the best."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--trials", type=int, default=20)
    options, further = parser.parse_known_args()
    options.folder.mkdir(parents=True, exist_ok=True)

    def objective(trial: optuna.Trial) -> float:
        run = RunFolder(options.folder / f"trial_{trial.number}")
        chosen = [f"--{name}={value}" for name, value in settings(trial).items()]
        anyo("fit", f"--config={options.config}", f"--run={run.path}", "--final_test=false", *chosen, *further)
        curves = run.read_curves()
        assert curves is not None, f"Expected {run.path} to have been trained"
        return float(curves[MONITOR].drop_nulls().max())  # type: ignore[arg-type]

    study = optuna.create_study(
        storage=f"sqlite:///{options.folder / 'study.db'}",
        study_name=options.config.stem,
        direction="maximize",
        load_if_exists=True,
    )
    study.sampler = optuna.samplers.TPESampler(seed=len(study.trials))  # with one seed it would start over each time
    complete = [optuna.trial.TrialState.COMPLETE]
    missing = max(options.trials - len(study.get_trials(states=complete)), 0)
    study.optimize(objective, n_trials=missing, catch=(subprocess.CalledProcessError,))  # settings that diverge
    if not study.get_trials(states=complete):
        sys.exit("sweep: every trial failed")
    best = study.best_trial
    print(f"best of {len(study.trials)}: trial {best.number}, {MONITOR} {best.value:.4f}, {best.params}")
    anyo("test", f"--run={options.folder / f'trial_{best.number}'}")


def anyo(*words: str) -> None:
    """One command of ours in a process of its own."""
    subprocess.run([sys.executable, "-m", "anyo_lightning", *words], check=True)


if __name__ == "__main__":
    main()

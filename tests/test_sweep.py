"""benchmarks/sweep.py on tiny data: trials are kept, the command goes on, the best one alone is tested."""

import subprocess
import sys
from pathlib import Path

import optuna

from anyo_lightning.runs import RunFolder

PROJECT = Path(__file__).parents[1]


def test_a_sweep_goes_on_and_tests_the_best(tiny_data: tuple[Path, Path], tmp_path: Path) -> None:
    """One trial, then the second; what the study calls a trial's value is what its run has logged."""
    folder = tmp_path / "sweep"
    for trials in (1, 2):
        words = [
            *("benchmarks/sweep.py", "configs/sasrec.yaml", str(folder), f"--trials={trials}"),
            *(f"--data.interactions={tiny_data[0]}", f"--data.items={tiny_data[1]}", "--data.template=null"),
            *("--trainer.max_epochs=1", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"),
        ]
        subprocess.run([sys.executable, *words], cwd=PROJECT, check=True)
    study = optuna.load_study(study_name="sasrec", storage=f"sqlite:///{folder / 'study.db'}")
    assert len(study.trials) == 2
    assert study.trials[0].params != study.trials[1].params  # the second command proposes something else
    for trial in study.trials:
        run = RunFolder(folder / f"trial_{trial.number}")
        curves = run.read_curves()
        assert curves is not None
        assert curves["val/ndcg@10"].max() == trial.value
    assert RunFolder(folder / f"trial_{study.best_trial.number}").finished

"""`anyo test --run RUN --output FOLDER`: a run under another protocol, without training twice."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from helpers import CONFIGS, Anyo, refused

from anyo_lightning.runs import RunFolder

MASKED, UNMASKED = "--metrics.mask_history=true", "--metrics.mask_history=false"
SMALL_SASREC = ("--model.encoders.dim=16", "--data.batch_tokens=300")


@pytest.fixture
def fit(anyo: Anyo, small: list[str]) -> Callable[..., RunFolder]:
    """Trains a small SASRec, or another configuration, for an epoch."""

    def run(folder: Path, *words: str, config: str = "sasrec") -> RunFolder:
        own = SMALL_SASREC if config == "sasrec" else ()
        anyo("fit", f"--config={CONFIGS / config}.yaml", *small, *own, *words, f"--run={folder}")
        return RunFolder(folder)

    return run


def content(folder: Path) -> dict[str, bytes]:
    """All files below a folder."""
    return {str(file): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_figures_are_those_of_a_run_under_that_protocol(
    anyo: Anyo, fit: Callable[..., RunFolder], tmp_path: Path
) -> None:
    """Of the same weights; cost and environment of training are the run's, which is left as it was."""
    run = fit(tmp_path / "masked" / "sasrec", MASKED)
    other = fit(tmp_path / "own" / "sasrec", UNMASKED)
    assert run.read_metrics()["metrics"]["test/ndcg@10"] != other.read_metrics()["metrics"]["test/ndcg@10"]
    before = content(run.path)
    output = RunFolder(tmp_path / "unmasked" / "sasrec")
    said = anyo("test", f"--run={run.path}", f"--output={output.path}", UNMASKED)
    assert f"Run folder: {output.path}" in said
    assert content(run.path) == before
    found, expected, trained = (folder.read_metrics() for folder in (output, other, run))
    assert found["metrics"] == expected["metrics"]
    assert found["slices"] == expected["slices"]
    assert output.read_predictions().equals(other.read_predictions())
    assert output.read_catalogue().equals(other.read_catalogue())
    assert (found["variant"], found["seed"], found["split"]) == ("sasrec", 0, trained["split"])
    assert found["protocol"] == expected["protocol"] | {"weights": str(run.path)}
    names = ("train_seconds", "tokens", "targets", "flops", "peak_memory_gib", "checkpoint_bytes", "parameters")
    assert all(found["cost"][name] == trained["cost"][name] for name in names)
    assert found["environment"]["training"] == trained["environment"]["training"]
    config = yaml.safe_load(output.config_file.read_text())
    assert config["metrics"]["mask_history"] is False
    assert not output.checkpoints.exists()


def test_a_table_of_each_protocol(
    anyo: Anyo, capsys: pytest.CaptureFixture[str], fit: Callable[..., RunFolder], tmp_path: Path
) -> None:
    """Seeds are averaged into one row beside a floor's; runs of both protocols still do not compare."""
    runs = [fit(tmp_path / "runs" / f"s{seed}" / "sasrec", f"--seed_everything={seed}", MASKED) for seed in (0, 1)]
    runs.append(fit(tmp_path / "runs" / "markov", MASKED, config="markov"))
    outputs = [tmp_path / "unmasked" / run.path.relative_to(tmp_path / "runs") for run in runs]
    for run, output in zip(runs, outputs, strict=True):
        anyo("test", f"--run={run.path}", f"--output={output}", UNMASKED, "--metrics.cutoffs=[1,10]")
    table = json.loads(anyo("compare", *outputs, "--format=json"))
    assert {row["variant"]: row["seeds"] for row in table["rows"]} == {"sasrec": [0, 1], "markov": [0]}
    assert RunFolder(outputs[0]).read_metrics()["protocol"]["cutoffs"] == [1, 10]
    assert "Expected runs of one protocol" in refused(capsys, anyo, "compare", runs[0].path, outputs[0])


def test_an_output_is_no_place_to_train(
    anyo: Anyo, capsys: pytest.CaptureFixture[str], fit: Callable[..., RunFolder], tmp_path: Path
) -> None:
    """Nor to test again: it has no weights."""
    run, output = fit(tmp_path / "run", MASKED), tmp_path / "output"
    anyo("test", f"--run={run.path}", f"--output={output}", UNMASKED)
    before = content(output)
    assert "which has a test of" in refused(capsys, anyo, "fit", f"--run={output}")
    assert "got no" in refused(capsys, anyo, "test", f"--run={output}")
    assert content(output) == before


def test_what_is_refused(
    anyo: Anyo, capsys: pytest.CaptureFixture[str], fit: Callable[..., RunFolder], tmp_path: Path
) -> None:
    """One sentence each; no folder is made, and none that is there is changed."""
    run, other, new = fit(tmp_path / "run", MASKED), fit(tmp_path / "other", MASKED), tmp_path / "a" / "new"
    before = content(tmp_path)
    mistakes = [
        (["fit", f"--output={new}"], "Expected --output with test and without --probe, got it with fit"),
        (["predict", f"--output={new}"], "got it with predict"),
        (["test", "--probe", f"--output={new}"], "Expected --output with test and without --probe"),
        (["test", f"--output={run.path}", UNMASKED], "a folder without a run or results in it"),
        (["test", f"--output={other.path}", UNMASKED], "a folder without a run or results in it"),
        (["test", f"--output={run.config_file}", UNMASKED], "Expected --output to name a folder, got the file"),
        (["test", f"--output={new}", f"--ckpt_path={other.best_checkpoint}"], "Expected --ckpt_path in"),
        (["test", f"--output={new}", "--data.max_items=7"], "Expected data.max_items 100, with which"),
        (["test", f"--output={new}", "--seed_everything=7"], "Expected seed_everything 0, with which"),
        (["test", f"--output={new}", "--metrics.cutoffs=[0]"], "Expected cutoffs to be one or more positive"),
        (["test", f"--output={new}", "--metrics.index=Flut"], "Expected metrics.index to be a FAISS factory"),
        (["test", UNMASKED], "or give --output FOLDER for such results"),
    ]
    for (stage, *words), sentence in mistakes:
        assert sentence in refused(capsys, anyo, stage, f"--run={run.path}", *words), words
    words = [f"--config={run.config_file}", f"--output={new}"]
    assert "Expected --run beside --output" in refused(capsys, anyo, "test", *words)
    empty = f"--run={tmp_path / 'empty'}"
    assert "Expected --run with a checkpoint or results" in refused(capsys, anyo, "test", empty, *words)
    assert content(tmp_path) == before
    assert not new.parent.exists()

"""`anyo compare --across_splits true`: what moves when ties are drawn again."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from fake_runs import write_run

from anyo_lightning.compare.across_splits import spreads
from anyo_lightning.compare.find_runs import find_runs
from anyo_lightning.compare.table import compare
from anyo_lightning.errors import InputError
from anyo_lightning.runs import RunFolder

METRICS = ["test/hr@10", "test/ndcg@10"]
CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.fixture
def drawn(tmp_path: Path) -> Path:
    """Markov on three splits, the last twice with other seeds, and an older version of the first; SASRec on two."""
    ranks = np.exp(np.random.default_rng(0).uniform(0, np.log(100), 200)).round()
    write_run(tmp_path, "markov", ranks + 50, fingerprint="a", seed=0)
    for fingerprint, seed, step in (("a", 0, 0), ("b", 0, 1), ("c", 0, 2), ("c", 1, 4)):
        write_run(tmp_path, "markov", ranks + step, fingerprint=fingerprint, seed=seed)
    for fingerprint in ("a", "b"):
        write_run(tmp_path, "sasrec", np.maximum(ranks / 2, 1).round(), fingerprint=fingerprint)
    return tmp_path


def test_mean_deviation_and_range_are_over_splits(drawn: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By hand from metrics.json: seeds of one split first, the newest of each, the highest first."""
    first, second = spreads([drawn], METRICS)
    assert (first.variant, second.variant) == ("sasrec", "markov")

    def value(version: int) -> float:
        return float(
            RunFolder(drawn / "markov" / f"version_{version}").read_metrics()["metrics"]["test/hr@10"]["value"]
        )

    expected = [value(1), value(2), (value(3) + value(4)) / 2]
    assert sorted(second.figures["test/hr@10"]) == pytest.approx(sorted(expected))
    assert len(set(expected)) == 3
    compare([drawn], across_splits=True)
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("markov"))
    shown = [f"{figure:.3f}".lstrip("0") for figure in (np.mean(expected), np.std(expected, ddof=1))]
    span = f"{min(expected):.3f} to {max(expected):.3f}".replace("0.", ".")
    assert line.split()[1:4] == ["3", *shown]
    assert span in line
    compare([drawn], across_splits=True, format="markdown", output=drawn / "table.md")
    assert re.search(r"\| markov +\| +3 \|", (drawn / "table.md").read_text())


def test_without_it_splits_are_refused_and_the_newest_counts(drawn: Path) -> None:
    """One version per seed as before; runs of two splits in one table are refused."""
    assert sorted(run.version for run in find_runs(drawn / "markov")[0]) == [3, 4]
    assert sorted(run.version for run in find_runs(drawn / "markov", every_split=True)[0]) == [1, 2, 3, 4]
    with pytest.raises(InputError, match="one split"):
        compare([drawn])


def test_draws_of_one_row_have_read_the_same_files(tmp_path: Path) -> None:
    """Fingerprints differ by the draw, so that they cannot say whether the data are the same: files do."""
    for draw, file in enumerate(("log.csv", "log.csv", "other.csv")):
        run = RunFolder(write_run(tmp_path, "markov", np.arange(200.0) + 1 + draw, fingerprint=f"{draw}"))
        run.config_file.write_text(json.dumps({"data": {"interactions": file, "ties_seed": draw, "seed": draw}}))
    assert sorted(len(line.figures["test/hr@10"]) for line in spreads([tmp_path], METRICS)) == [1, 2]


def test_mistakes_are_refused(drawn: Path) -> None:
    """Another protocol, a baseline, a form that does not exist, a metric that is unknown."""
    for options in ({"baseline": "markov"}, {"format": "json"}, {"slices": True}):
        with pytest.raises(InputError, match="across_splits without"):
            compare([drawn], across_splits=True, **options)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="test/hr@7"):
        compare([drawn], across_splits=True, metrics=["test/hr@7"])
    write_run(drawn, "ease", np.ones(200), history_masked=False)
    with pytest.raises(InputError, match=r"one protocol, got 2\. .*version_1 --across_splits true$"):
        compare([drawn], across_splits=True)


def test_floors_on_ties_drawn_again(
    anyo: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny_data: tuple[Path, Path]
) -> None:
    """The README's loop: each draw has a split, a fingerprint and a folder of its own, and a line sums them up."""
    rows = [line.rsplit(",", 1) for line in tiny_data[0].read_text().splitlines()[1:]]
    tied = tmp_path / "tied.csv"
    tied.write_text("user_id,item_id,timestamp\n" + "".join(f"{row},{int(time) // 4}\n" for row, time in rows))

    def draw(seed: int) -> list[str]:
        return [
            f"--data.interactions={tied}",
            f"--data.items={tiny_data[1]}",
            "--data.ties=shuffle",
            f"--data.ties_seed={seed}",
            f"--trainer.default_root_dir={tmp_path / 'runs'}",
            "--trainer.enable_progress_bar=false",
            "--trainer.accelerator=cpu",
        ]

    for seed in (0, 1, 2):
        anyo("fit", "-c", CONFIGS / "markov.yaml", *draw(seed))
    runs = [RunFolder(tmp_path / "runs" / "markov" / f"version_{version}") for version in range(3)]
    assert len({run.read_metrics()["split"]["fingerprint"] for run in runs}) == 3
    targets = [run.read_predictions(["user_id", "target_item_id"]) for run in runs]
    assert not targets[0].equals(targets[1])
    line = next(
        row for row in anyo("compare", tmp_path / "runs", "--across_splits", "true").splitlines() if "markov" in row
    )
    values = [run.read_metrics()["metrics"]["test/ndcg@10"]["value"] for run in runs]
    assert line.split()[1] == "3"
    assert f"{np.mean(values):.3f}".lstrip("0") in line.split()
    assert np.std(values) > 0
    anyo("fit", "-c", CONFIGS / "popularity.yaml", *draw(0)[:2], *draw(0)[4:])  # ties by file order
    with pytest.raises(SystemExit):
        anyo("compare", tmp_path / "runs", "--across_splits", "true")
    assert "one kind of split" in capsys.readouterr().err

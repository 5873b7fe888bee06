"""`anyo compare`: what it refuses, what it prints, and whether its intervals mean what they say."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from rich.console import Console

from anyo_lightning.compare.render import as_rich
from anyo_lightning.compare.results import load_results
from anyo_lightning.compare.stats import paired_difference
from anyo_lightning.compare.table import compare
from anyo_lightning.errors import InputError
from anyo_lightning.evaluation.intervals import bootstrap_means
from anyo_lightning.evaluation.metrics import user_metrics
from anyo_lightning.runs import RunFolder

USERS = 300


def write_run(
    root: Path,
    variant: str,
    ranks: np.ndarray,
    *,
    seed: int | None = 0,
    fingerprint: str = "00000000000000aa",
    history_masked: bool = True,
    order: np.ndarray | None = None,
    user_prefix: str = "u",
) -> Path:
    """A tested run with these ranks, its predictions in any order."""
    run = RunFolder.new(root, variant)
    by_user = user_metrics(torch.from_numpy(ranks), torch.arange(len(ranks)), [10])
    values = torch.stack(list(by_user.values()), dim=1).numpy()
    low, high = bootstrap_means(values)
    figures = zip(by_user, values.mean(axis=0), low, high, strict=True)
    metrics: dict[str, Any] = {
        f"test/{n}": {"value": float(v), "low": float(a), "high": float(b)} for n, v, a, b in figures
    }
    metrics["test/coverage@10"] = {"value": 0.25, "low": None, "high": None}
    order = np.arange(len(ranks)) if order is None else order
    run.write_predictions(
        pl.DataFrame(
            {
                "user_id": [f"{user_prefix}{user}" for user in order],
                "target_item_id": [f"i{user % 7}" for user in order],
                "rank": ranks[order],
            }
        )
    )
    run.write_metrics(
        {
            "variant": variant,
            "seed": seed,
            "split": {
                "name": "ml-100k",
                "strategy": "leave_one_out",
                "ties": "file_order",
                "fingerprint": fingerprint,
                "counts": {"users": len(ranks), "items": 1349},
            },
            "protocol": {"cutoffs": [10], "history_masked": history_masked, "index": "Flat", "rows": len(ranks)},
            "metrics": metrics,
            "slices": {},
            "cost": {"train_seconds": 90.0, "trainable_parameters": 1_234_567},
            "environment": {},
        }
    )
    return run.path


@pytest.fixture
def ranks() -> np.ndarray:
    """Ranks between 1 and 1,000, many small ones."""
    return np.exp(np.random.default_rng(0).uniform(0, np.log(1000), USERS)).round()


@pytest.fixture
def runs(tmp_path: Path, ranks: np.ndarray) -> Path:
    """Three variants: markov, one that is better for each user, one that is much like markov."""
    write_run(tmp_path, "markov", ranks, seed=None)
    write_run(tmp_path, "e4srec", np.maximum(ranks / 3, 1).round(), order=np.arange(USERS)[::-1].copy())
    write_run(tmp_path, "sasrec", np.roll(ranks, 1))
    return tmp_path


def test_rows_are_best_first_with_intervals_and_paired_differences(runs: Path, ranks: np.ndarray) -> None:
    """Differences are of the same users although files list them in another order; only the clear one is starred."""
    results = load_results([runs], metrics=["test/hr@10", "test/ndcg@10"], baseline="markov")
    assert results.lines[0].variant == "e4srec"
    cells = {line.variant: line.cells["test/hr@10"] for line in results.lines}
    hits, better = ranks <= 10, np.maximum(ranks / 3, 1).round() <= 10
    assert cells["markov"].value == hits.mean()
    assert cells["markov"].difference is None
    difference = cells["e4srec"].difference
    assert difference is not None
    assert difference.value == pytest.approx((better.astype(float) - hits).mean())
    assert difference.clear
    other = cells["sasrec"].difference
    assert other is not None
    assert other.value == pytest.approx(0)
    assert not other.clear


def test_a_metric_at_another_cutoff_is_worked_out_from_the_predictions(runs: Path, ranks: np.ndarray) -> None:
    """hr@50 is not in metrics.json."""
    results = load_results([runs / "markov"], metrics=["test/hr@50"])
    cell = results.lines[0].cells["test/hr@50"]
    assert cell.value == (ranks <= 50).mean()
    assert cell.low is not None
    assert cell.low < cell.value


def test_terminal_table(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Aligned columns, ± intervals, baseline named, costs, and what was compared above."""
    compare([runs], baseline="markov")
    out = capsys.readouterr().out
    assert "ml-100k, leave-one-out, ties by file order: 300 users, 1,349 items, 300 test rows" in out
    assert "vs base: difference to markov" in out
    lines = [line for line in out.splitlines() if line.startswith(("e4srec", "markov", "sasrec"))]
    assert lines[0].startswith("e4srec")
    assert len({line.index("±") for line in lines}) == 1
    assert all("1.5" in line and "1.2M" in line for line in lines)
    markov = next(line for line in lines if line.startswith("markov"))
    assert markov.count("base") == 2
    assert markov.split()[1] == "-"


@pytest.mark.parametrize("width", [80, 120])
def test_terminal_table_fits_and_cuts_nothing(runs: Path, width: int) -> None:
    """At 80 columns intervals go below their figures; no line is longer and no text is cut short."""
    console = Console(width=width, force_terminal=True, color_system=None, record=True, file=io.StringIO())
    console.print(as_rich(load_results([runs], metrics=["test/hr@10", "test/ndcg@10"], baseline="markov"), width=width))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    assert ("\n" + " " * 12 in text) == (width == 80)
    assert all(word in text for word in ("variant", "NDCG@10", "vs base", "minutes", "trained"))


def test_the_best_is_bold_and_a_clear_difference_coloured(runs: Path) -> None:
    """Bold for e4srec's figures alone, green for its differences."""
    console = Console(width=120, force_terminal=True, color_system="standard")
    with console.capture() as capture:
        console.print(as_rich(load_results([runs], metrics=["test/hr@10"], baseline="markov"), width=120))
    e4srec, other = (next(x for x in capture.get().splitlines() if x.startswith(v)) for v in ("e4srec", "sasrec"))
    assert "\x1b[1m" in e4srec
    assert "\x1b[32m" in e4srec
    assert "\x1b[" not in other


def test_markdown_is_an_aligned_table(runs: Path, tmp_path: Path) -> None:
    """As many cells in each line, lines of equal length, the best in bold; written to a file."""
    output = tmp_path / "table.md"
    compare([runs], baseline="markov", format="markdown", metrics=["test/ndcg@10", "test/coverage@10"], output=output)
    table = [line for line in output.read_text().splitlines() if line.startswith("|")]
    assert len(table) == 5
    assert len({len(line) for line in table}) == len({line.count("|") for line in table}) == 1
    assert table[0].split("|")[3].strip() == "NDCG@10"
    assert table[2].split("|")[3].strip().startswith("**.")
    assert ".250" in table[2]


def test_json_holds_everything_in_full(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Values, ends of intervals, differences and costs."""
    compare([runs], baseline="markov", format="json")
    captured = capsys.readouterr()
    content = json.loads(captured.out)
    assert content["baseline"] == "markov"
    best = content["runs"][0]
    assert best["variant"] == "e4srec"
    assert best["cost"]["trainable_parameters"] == 1_234_567
    figure = best["metrics"]["test/ndcg@10"]
    assert figure["low"] < figure["value"] < figure["high"]
    assert figure["difference"]["low"] > 0


def test_runs_of_different_splits_are_refused_and_named(tmp_path: Path, ranks: np.ndarray) -> None:
    """The sentence says which run has which fingerprint, and no output is written."""
    first = write_run(tmp_path, "markov", ranks)
    second = write_run(tmp_path, "sasrec", ranks, fingerprint="00000000000000bb")
    with pytest.raises(InputError, match="Expected runs of one split, got 2") as caught:
        compare([tmp_path], format="json", output=tmp_path / "table.json")
    message = str(caught.value)
    assert "\n" not in message
    assert message.index("00000000000000aa") < message.index(str(first)) < message.index("00000000000000bb")
    assert str(second) in message
    assert not (tmp_path / "table.json").exists()


def test_runs_of_different_protocols_are_refused(tmp_path: Path, ranks: np.ndarray) -> None:
    """History masked and not masked; all rows and some of them."""
    write_run(tmp_path / "a", "markov", ranks)
    write_run(tmp_path / "a", "sasrec", ranks, history_masked=False)
    with pytest.raises(InputError, match=r"runs of one protocol, got 2.*not masked"):
        compare([tmp_path / "a"])
    write_run(tmp_path / "b", "markov", ranks)
    write_run(tmp_path / "b", "sasrec", ranks[:100])
    with pytest.raises(InputError, match=r"runs of one protocol, got 2.*100 rows"):
        compare([tmp_path / "b"])


def test_predictions_of_other_users_are_not_paired(tmp_path: Path, ranks: np.ndarray) -> None:
    """As many rows, but not the same."""
    write_run(tmp_path, "markov", ranks)
    write_run(tmp_path, "sasrec", ranks, user_prefix="v")
    with pytest.raises(InputError, match="to be of the same users and targets"):
        compare([tmp_path], baseline="markov")


def test_a_run_that_was_not_tested_is_passed_over_with_a_sentence(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is named on stderr, the table has the others; with none left it is a mistake."""
    unfinished = RunFolder.new(runs, "anyo")
    unfinished.config_file.write_text("")
    compare([runs], format="json")
    captured = capsys.readouterr()
    assert f"Passed over {unfinished.path}" in captured.err
    assert len(json.loads(captured.out)["runs"]) == 3
    with pytest.raises(InputError, match="at least one tested run"):
        compare([unfinished.path])


def test_a_baseline_must_be_one_of_the_runs(runs: Path, ranks: np.ndarray) -> None:
    """A typo lists what is there; a variant with two seeds asks for the folder; a folder is taken."""
    with pytest.raises(InputError, match="'sasrek', which names 0; the runs are e4srec, markov, sasrec"):
        compare([runs], baseline="sasrek")
    second = write_run(runs, "sasrec", ranks, seed=1)
    both = [runs / "sasrec" / "version_0", second]
    with pytest.raises(InputError, match=r"which names 2; give the folder of one of .*version_0, .*version_1"):
        compare(both, baseline="sasrec")
    results = load_results(both, metrics=["test/hr@10"], baseline=str(second))
    assert [line.is_baseline for line in results.lines] == [line.seed == 1 for line in results.lines]


def test_two_versions_of_one_variant_and_seed_can_be_told_apart(runs: Path, ranks: np.ndarray) -> None:
    """The same variant twice gets the version into its name, and the same folder twice is one row."""
    second = write_run(runs, "sasrec", ranks)
    first = runs / "sasrec" / "version_0"
    results = load_results([first, second, first], metrics=["test/hr@10"])
    assert sorted(line.variant for line in results.lines) == ["sasrec (version_0)", "sasrec (version_1)"]


def test_an_unknown_metric_lists_those_there(runs: Path) -> None:
    """A typo in `metrics`."""
    with pytest.raises(InputError, match=r"Expected metrics to be among test/hr@10.*got 'test/ncdg@10'"):
        compare([runs], metrics=["test/ncdg@10"])


def test_paired_intervals_cover_the_true_difference_and_are_narrower_than_unpaired_ones() -> None:
    """Runs that share most of each user's luck: of 200 samples some 190 intervals hold the true difference of .1."""
    generator = np.random.default_rng(0)
    covered, widths, unpaired = 0, [], []
    for sample in range(200):
        luck = generator.normal(size=250)
        run, baseline = luck + 0.1 + generator.normal(0, 0.3, 250), luck + generator.normal(0, 0.3, 250)
        difference = paired_difference(run, baseline, resamples=1000, seed=sample)
        covered += difference.low <= 0.1 <= difference.high
        widths.append(difference.high - difference.low)
        unpaired.append(np.ptp(bootstrap_means(run[:, None], resamples=200)))
    assert 180 <= covered <= 199
    assert np.mean(widths) < 0.5 * np.mean(unpaired)

"""`anyo compare --slices true`: each slice's figures have paired differences to the baseline of their own."""

import io
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from fake_runs import write_run

from anyo_lightning.compare.results import load_results
from anyo_lightning.compare.stats import paired_differences
from anyo_lightning.compare.table import compare

USERS = 300


@pytest.fixture
def ranks() -> np.ndarray:
    """Ranks between 1 and 1,000, many small ones."""
    return np.exp(np.random.default_rng(0).uniform(0, np.log(1000), USERS)).round()


@pytest.fixture
def runs(tmp_path: Path, ranks: np.ndarray) -> Path:
    """A baseline; a row that is better only where the target is tied, that is for even users; and one much like it."""
    write_run(tmp_path, "markov", ranks, seed=None)
    even = np.arange(USERS) % 2 == 0
    better = np.where(even, np.maximum(ranks / 5, 1).round(), ranks)
    write_run(tmp_path, "e4srec", better, order=np.arange(USERS)[::-1].copy())
    write_run(tmp_path, "sasrec", np.roll(ranks, 2))
    return tmp_path


def test_a_slice_is_compared_with_the_baseline_by_its_own_users(runs: Path, ranks: np.ndarray) -> None:
    """Significant where the row differs, none where it does not; corrected over the two other rows."""
    results = load_results([runs], metrics=["test/hr@10"], baseline="markov").results
    names = [line.variant for line in results.lines]
    tied = {part.name: part.metrics["test/hr@10"] for part in results.slices if part.group == "target tied"}
    even = np.arange(USERS) % 2 == 0
    hits = {"markov": ranks, "e4srec": np.maximum(ranks / 5, 1).round(), "sasrec": np.roll(ranks, 2)}
    hits = {name: (values <= 10)[even].astype(float) for name, values in hits.items()}
    others = [name for name in names if name != "markov"]
    expected = paired_differences(np.stack([hits[name] for name in others], axis=1), hits["markov"])
    found = dict(zip(names, tied["yes"], strict=True))
    assert found["markov"].difference is None
    for name, difference in zip(others, expected, strict=True):
        assert found[name].difference.value == pytest.approx(difference.value)
        assert found[name].difference.p_holm == pytest.approx(difference.p_holm)
    assert found["e4srec"].difference.clear
    unchanged = dict(zip(names, tied["no"], strict=True))["e4srec"].difference
    assert (unchanged.value, unchanged.p) == (0, 1)


def test_slices_show_differences_in_tables_and_files(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Markdown has a column for it, CSV as many as for the whole test set; without a baseline neither has any."""
    compare([runs], baseline="markov", slices=True, format="markdown", metrics=["test/hr@10"])
    out = capsys.readouterr().out
    rows = [line for line in out.splitlines() if line.startswith("|")]
    header = next(line for line in rows if "slice" in line)
    assert [cell.strip() for cell in header.split("|")[1:-1]] == [
        "slice",
        "users",
        "variant",
        "HR@10",
        "vs base",
        "p (d)",
    ]
    tied = rows.index(next(line for line in rows if "target tied: yes" in line))
    of_group = {row.split("|")[3].strip(): row.split("|")[5].strip() for row in rows[tied : tied + 3]}
    assert of_group["markov"] == "base"
    assert of_group["e4srec"].startswith("+")
    assert of_group["e4srec"].endswith("*")
    assert "in each slice by itself" in out
    compare([runs], baseline="markov", format="csv", metrics=["test/hr@10"])
    table = pl.read_csv(io.StringIO(capsys.readouterr().out)).filter(slice="yes", variant="e4srec")
    assert table["difference"].item() > 0
    assert table["difference_p_holm"].item() < 0.05
    compare([runs], slices=True, format="markdown", metrics=["test/hr@10"])
    assert "vs base" not in capsys.readouterr().out

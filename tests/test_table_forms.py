"""`anyo compare` in the terminal, as Markdown, LaTeX, JSON and CSV, and which columns it shows."""

import io
import json
import re
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from fake_runs import METRICS, USERS, spread_ranks, write_run, write_three
from rich.console import Console

from anyo_lightning.compare.costs import COSTS
from anyo_lightning.compare.render import as_rich
from anyo_lightning.compare.results import load_results
from anyo_lightning.compare.table import compare
from anyo_lightning.errors import InputError
from anyo_lightning.runs import RunFolder


@pytest.fixture
def ranks() -> np.ndarray:
    return spread_ranks()


@pytest.fixture
def runs(tmp_path: Path, ranks: np.ndarray) -> Path:
    return write_three(tmp_path, ranks)


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


def ledger(run: Path, **cost: float) -> None:
    """Give a run a ledger, which runs of earlier versions lack."""
    folder = RunFolder(run)
    content = folder.read_metrics()
    folder.write_metrics(content | {"cost": content["cost"] | cost})


def test_the_ledger_is_in_every_form_and_blank_where_a_run_has_none(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One run with a ledger, one of an earlier version, a floor: figures, dashes, null and empty cells; never inf."""
    full = {"tokens": 7_681_932, "targets": 5_208_732, "flops": 8.6e12, "ndcg@10_per_pflop": 14.53}
    ledger(
        runs / "sasrec" / "version_0",
        **full,
        peak_memory_gib=0.738,
        checkpoint_bytes=2_347_196,
        catalogue_encode_seconds=0.00012,
        index_build_seconds=0.0004,
        queries_per_second=123_456.7,
    )
    ledger(runs / "markov" / "version_0", tokens=0, targets=0, trainable_parameters=0)
    compare([runs], format="markdown", columns="all")
    header, _, *rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    names = [cell.strip() for cell in header.split("|")]
    shown = {row.split("|")[1].strip(): dict(zip(names, map(str.strip, row.split("|")), strict=True)) for row in rows}
    assert names[-13:-1] == list(COSTS)
    sasrec = [shown["sasrec"][name] for name in COSTS]
    figures = ["1.5", "7.7M", "5.2M", "0.0086", "14.5", "0.74", "1.2M", "2.35", "0.00012", "0.0004", "123,457", "-"]
    assert sasrec == figures
    assert [shown["e4srec"][name] for name in COSTS] == ["1.5", *"-----", "1.2M", *"-----"]
    assert (shown["markov"]["tokens"], shown["markov"]["ndcg/pflop"], shown["markov"]["trained"]) == ("0", "-", "0")
    compare([runs], format="json")
    content = {row["variant"]: row["cost"] for row in json.loads(capsys.readouterr().out)["rows"]}
    assert {cost.key for cost in COSTS.values()} <= set(content["e4srec"])
    assert content["sasrec"]["flops"] == 8.6e12
    assert content["e4srec"]["flops"] is content["markov"]["ndcg@10_per_pflop"] is None
    compare([runs], format="csv")
    table = pl.read_csv(io.StringIO(capsys.readouterr().out)).filter(pl.col("slice").is_null())
    tokens = dict(table.select("variant", "tokens").iter_rows())
    assert tokens == {"sasrec": 7_681_932, "e4srec": None, "markov": 0}


def test_lists_of_an_approximate_index_are_marked(
    runs: Path, ranks: np.ndarray, capsys: pytest.CaptureFixture[str]
) -> None:
    """Coverage is that of its lists: below a table that shows it, and in JSON and CSV; ranks are exact in any case."""
    write_run(runs, "anyo", ranks, index="IVF64,Flat:nprobe=4")
    note = "Lists, and so coverage, Gini and popularity, of anyo are of an approximate index: IVF64,Flat:nprobe=4."
    compare([runs], metrics=["test/hr@10", "test/coverage@10"])
    assert note in capsys.readouterr().out
    compare([runs])
    assert "approximate" not in capsys.readouterr().out
    compare([runs], format="json")
    indexes = {row["variant"]: row["index"] for row in json.loads(capsys.readouterr().out)["rows"]}
    assert indexes == {"anyo": "IVF64,Flat:nprobe=4", "e4srec": "Flat", "markov": "Flat", "sasrec": "Flat"}
    compare([runs], format="csv", metrics=["test/coverage@10"])
    table = pl.read_csv(io.StringIO(capsys.readouterr().out))
    assert dict(table.select("variant", "index").iter_rows()) == indexes


def test_columns_choose_from_the_ledger(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In the order given, with a note on each; none at all; the default is as narrow as before."""
    ledger(runs / "sasrec" / "version_0", flops=3e15)
    compare([runs], columns=["pflop", "minutes"])
    out = capsys.readouterr().out
    header = next(line for line in out.splitlines() if line.startswith("variant"))
    assert header.split()[-2:] == ["pflop", "minutes"]
    assert "pflop: 10^15 FLOPs of training, counted in a sample of its steps; minutes: of training." in out
    compare([runs], columns=[])
    out = capsys.readouterr().out
    assert next(line for line in out.splitlines() if line.startswith("variant")).split()[-1] == "NDCG@10"
    assert "minutes" not in out
    compare([runs])
    out = capsys.readouterr().out
    assert next(line for line in out.splitlines() if line.startswith("variant")).split()[-2:] == ["minutes", "trained"]
    assert "minutes: of training; trained: number of trained parameters.\n" in out
    with pytest.raises(InputError, match=r"Expected columns to be all, or among minutes, tokens.*got 'flop'"):
        compare([runs], columns=["minutes", "flop"])


@pytest.mark.parametrize("width", [80, 120])
def test_terminal_table_fits_and_cuts_nothing(runs: Path, width: int) -> None:
    """At 80 columns intervals go below their figures; no line is longer and no text is cut short."""
    console = Console(width=width, force_terminal=True, color_system=None, record=True, file=io.StringIO())
    results = load_results([runs], metrics=METRICS, baseline="markov", slices=False).results
    console.print(as_rich(results, width=width))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    assert ("\n" + " " * 12 in text) == (width == 80)
    assert all(word in text for word in ("variant", "NDCG@10", "vs base", "minutes", "trained"))


def test_the_best_is_bold_and_a_clear_difference_coloured(runs: Path) -> None:
    """Bold for e4srec's figures alone, green for its differences."""
    console = Console(width=120, force_terminal=True, color_system="standard")
    with console.capture() as capture:
        console.print(
            as_rich(load_results([runs], metrics=["test/hr@10"], baseline="markov", slices=False).results, width=120)
        )
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
    best = content["rows"][0]
    assert best["variant"] == "e4srec"
    assert best["cost"]["trainable_parameters"] == 1_234_567
    figure = best["metrics"]["test/ndcg@10"]
    assert figure["low"] < figure["value"] < figure["high"]
    assert figure["difference"]["low"] > 0
    assert figure["difference"]["p"] <= figure["difference"]["p_holm"] < 0.05
    tied = next(part for part in content["slices"] if (part["group"], part["name"]) == ("target tied", "yes"))
    assert tied["users"] == USERS / 2
    assert set(tied["metrics"]["test/ndcg@10"]) == {"e4srec", "markov", "sasrec"}


def test_what_is_not_told_from_the_best_is_marked(runs: Path, ranks: np.ndarray) -> None:
    """A variant that is worse for one user only gets the dagger; one far behind does not."""
    nearly = np.maximum(ranks / 3, 1).round()
    nearly[np.argmin(nearly)] = 900
    write_run(runs, "nearly", nearly)
    cells = {
        line.variant: line.cells["test/hr@10"] for line in load_results([runs], metrics=["test/hr@10"]).results.lines
    }
    assert [name for name, cell in cells.items() if cell.best] == ["e4srec"]
    assert [name for name, cell in cells.items() if cell.near_best] == ["nearly"]


def test_latex_has_booktabs_and_escapes_what_latex_reads_as_commands(tmp_path: Path, ranks: np.ndarray) -> None:
    """As many cells in each row; an underscore, a percent sign and a backslash in a name are text."""
    write_run(tmp_path, "markov", ranks)
    write_run(tmp_path, "a_b 50% \\x & #1", np.maximum(ranks / 3, 1).round(), folder="odd")
    write_run(tmp_path, "worse", ranks * 5)
    compare([tmp_path], baseline="markov", format="latex", slices=True, output=tmp_path / "table.tex")
    lines = (tmp_path / "table.tex").read_text().splitlines()
    begin = lines.index(r"\begin{tabular}{lrrrrrrrrr}")
    assert lines[begin + 1] == r"\toprule"
    assert lines[begin + 3] == r"\midrule"
    assert lines[begin + 7] == r"\bottomrule"
    rows = lines[begin + 4 : begin + 7]
    assert all(len(re.split(r"(?<!\\)&", row)) == 10 and row.endswith(r" \\") for row in rows)
    assert rows[0].startswith(r"a\_b 50\% \textbackslash{}x \& \#1 & 1 & \textbf{")
    assert r"$-$." in rows[2]
    assert "±" not in "".join(lines[begin:])
    assert sum(line == r"\end{tabular}" for line in lines) == 2


def test_csv_is_long_and_full(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line per variant and metric, then one per slice; the difference with its p-values."""
    compare([runs], baseline="markov", format="csv")
    table = pl.read_csv(io.StringIO(capsys.readouterr().out))
    whole = table.filter(pl.col("slice").is_null())
    assert whole.height == 3 * 2
    best = whole.row(0, named=True)
    assert (best["variant"], best["best"], best["difference_p_holm"] < 0.05) == ("e4srec", True, True)
    assert table.filter(slice_group="target tied", slice="yes", metric="test/ndcg@10").height == 3

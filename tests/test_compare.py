"""`anyo compare`: what it refuses, what it prints, and which runs share a row."""

import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from fake_runs import write_run
from rich.console import Console

from anyo_lightning.compare.costs import COSTS
from anyo_lightning.compare.render import as_rich
from anyo_lightning.compare.results import load_results
from anyo_lightning.compare.table import compare
from anyo_lightning.errors import InputError
from anyo_lightning.evaluation.slices import TOKEN_BANDS, band
from anyo_lightning.runs import RunFolder

USERS = 300
METRICS = ["test/hr@10", "test/ndcg@10"]


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
    results = load_results([runs], metrics=METRICS, baseline="markov").results
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
    results = load_results([runs / "markov"], metrics=["test/hr@50"]).results
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


def test_runs_of_different_splits_are_refused_and_named(
    tmp_path: Path, ranks: np.ndarray, capsys: pytest.CaptureFixture[str]
) -> None:
    """The sentence says which run has which fingerprint, a table shows both, and no output is written."""
    first = write_run(tmp_path, "markov", ranks)
    second = write_run(tmp_path, "sasrec", ranks, fingerprint="00000000000000bb")
    with pytest.raises(InputError, match="Expected runs of one split, got 2") as caught:
        compare([tmp_path], format="json", output=tmp_path / "table.json")
    side_by_side = capsys.readouterr().err
    assert re.search(r"≠ +fingerprint +00000000000000aa +00000000000000bb", side_by_side)
    message = str(caught.value)
    assert "\n" not in message
    assert message.index("00000000000000aa") < message.index(str(first)) < message.index("00000000000000bb")
    assert str(second) in message
    assert not (tmp_path / "table.json").exists()


def test_folders_may_be_called_anything(tmp_path: Path, ranks: np.ndarray) -> None:
    """What rich reads as markup, such as `[/x]`, does not end the program with a traceback."""
    write_run(tmp_path / "c [bold]", "sasrec", ranks)
    write_run(tmp_path / "d[", "x]", ranks, fingerprint="00000000000000bb")  # ".../d[/x]/version_0"
    with pytest.raises(InputError, match="Expected runs of one split"):
        compare([tmp_path / "c [bold]", tmp_path / "d["])


def test_a_folder_is_no_pattern(tmp_path: Path, ranks: np.ndarray) -> None:
    """`a[1]` is not read as `a1`, which lies beside it."""
    for folder, own in (("a[1]", ranks), ("a1", ranks * 5)):
        run = RunFolder(write_run(tmp_path, folder, own, lists=True, titles=[f"{folder} {n}" for n in range(10)]))
        run.write_curves(pl.DataFrame({"step": [1], "variant": folder}))
    lines = load_results([tmp_path], metrics=["test/hr@7"]).results.lines
    found = {line.variant: line.cells["test/hr@7"].value for line in lines}
    assert found == {"a[1]": (ranks <= 7).mean(), "a1": (ranks * 5 <= 7).mean()}
    run = RunFolder(tmp_path / "a[1]" / "version_0")
    assert run.read_catalogue()["text"][0] == "a[1] 0"
    curves = run.read_curves()
    assert curves is not None
    assert curves["variant"].to_list() == ["a[1]"]


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
    assert len(json.loads(captured.out)["rows"]) == 3
    with pytest.raises(InputError, match="at least one tested run"):
        compare([unfinished.path])


def test_a_baseline_must_be_one_of_the_rows(runs: Path, ranks: np.ndarray) -> None:
    """A typo lists what is there; a variant that is two rows asks which; a folder names the row that holds it."""
    with pytest.raises(InputError, match="'sasrek', which names 0; the runs are e4srec, markov, sasrec"):
        compare([runs], baseline="sasrek")
    second = write_run(runs, "sasrec", ranks)
    both = [runs / "sasrec" / "version_0", second]
    with pytest.raises(InputError, match=r"which names 2; give one of sasrec .version_0., sasrec .version_1."):
        compare(both, baseline="sasrec")
    for name in (str(second), "sasrec (version_1)"):
        results = load_results(both, metrics=["test/hr@10"], baseline=name).results
        assert [line.is_baseline for line in results.lines] == [line.folders == (second,) for line in results.lines]


def test_seeds_are_one_row_with_mean_deviation_and_users_averaged(runs: Path, ranks: np.ndarray) -> None:
    """By hand: the mean of two seeds' means, their standard deviation, and each user's mean against the baseline's."""
    other = np.roll(ranks, 7)
    write_run(runs, "sasrec", other, seed=1)
    results = load_results([runs], metrics=["test/hr@10"], baseline="markov").results
    line = next(line for line in results.lines if line.variant == "sasrec")
    cell, first, second = line.cells["test/hr@10"], np.roll(ranks, 1) <= 10, other <= 10
    assert line.seeds == (0, 1)
    assert cell.by_seed == (first.mean(), second.mean())
    assert cell.value == pytest.approx(np.mean([first.mean(), second.mean()]))
    assert cell.deviation == pytest.approx(np.std([first.mean(), second.mean()], ddof=1))
    averaged = (first + second.astype(float)) / 2
    assert cell.difference is not None
    assert cell.difference.effect_size == pytest.approx(
        (averaged - (ranks <= 10)).mean() / (averaged - (ranks <= 10)).std(ddof=1)
    )
    assert cell.low is not None
    assert cell.high is not None
    assert cell.low < cell.value < cell.high


def test_seeds_of_other_settings_are_rows_of_their_own(runs: Path, ranks: np.ndarray) -> None:
    """The seed, folders and the progress bar do not matter; a learning rate does."""
    config = "seed_everything: {}\ntrainer: {{max_epochs: 3, default_root_dir: runs/{}}}\nmodel: {{lr: {}}}\n"
    for version, (seed, rate) in enumerate([(0, 0.1), (1, 0.1), (2, 0.2)]):
        path = write_run(runs, "anyo", np.roll(ranks, version), seed=seed)
        RunFolder(path).config_file.write_text(config.format(seed, version, rate))
    results = load_results([runs / "anyo"], metrics=["test/hr@10"]).results
    assert {line.variant: line.seeds for line in results.lines} == {
        "anyo (version_0)": (0, 1),
        "anyo (version_2)": (2,),
    }


@pytest.mark.parametrize(
    ("block", "values", "same"),
    [
        ("trainer", [{"limit_val_batches": 2}, {"limit_val_batches": 4}], False),
        ("trainer", [{"callbacks": [{"class_path": "Own", "init_args": {"rate": n}}]} for n in (1, 2)], False),
        ("early_stopping", [{"stopping_threshold": 0.1}, {"stopping_threshold": 0.2}], False),
        ("metrics", [{"index": "Flat"}, {"index": "HNSW32"}], False),
        ("own_block", [{"weight": 1}, {"weight": 2}], False),
        ("metrics", [{"cutoffs": [10], "variant": "anyo"}, {"cutoffs": [5, 10], "variant": None}], True),
        ("trainer", [{"accelerator": "cpu", "logger": False}, {"accelerator": "cuda", "logger": True}], True),
        ("trainer", [{"devices": 1}, {"devices": 8, "num_nodes": 2}], True),
        ("data", [{"num_workers": 0, "micro_batch_tokens": None}, {"num_workers": 4, "micro_batch_tokens": 10}], True),
        ("data", [{"batch_tokens": 100}, {"batch_tokens": 200}], False),
        ("checkpoint", [{"dirpath": "runs/a", "verbose": True}, {"dirpath": "runs/b", "verbose": False}], True),
        ("final_test", [True, False], True),
        ("trainer", [{"precision": None}, {"precision": "32-true"}], True),
        ("trainer", [{"precision": None}, {"precision": "bf16-mixed"}], False),
        ("trainer", [{"check_val_every_n_epoch": 1}, {"check_val_every_n_epoch": 2}], False),
        ("trainer", [{"val_check_interval": 1}, {"val_check_interval": 1.0}], False),
        ("trainer", [{}, {"gradient_clip_val": None, "accumulate_grad_batches": 1}], True),
        ("trainer", [{}, {"accumulate_grad_batches": 2}], False),
        ("metrics", [{}, {"index": "Flat"}], True),
        ("metrics", [{}, {"index": "HNSW32"}], False),
        ("data", [{"max_items": 7, "overlap": 0.5}, {"max_items": 7}], True),
        ("data", [{"max_items": 7, "overlap": 0.0}, {"max_items": 7}], False),
    ],
)
def test_whatever_settings_differ_are_not_averaged(
    tmp_path: Path, ranks: np.ndarray, block: str, values: list[Any], same: bool
) -> None:
    """Also those that a user's own classes have; what changes neither learning nor figures may differ."""
    for seed, value in enumerate(values):
        run = RunFolder(write_run(tmp_path, "anyo", ranks, seed=seed))
        run.config_file.write_text(json.dumps({"seed_everything": seed, "model": {"lr": 0.1}, block: value}))
    lines = load_results([tmp_path], metrics=["test/hr@10"]).results.lines
    assert [line.seeds for line in lines] == ([(0, 1)] if same else [(0,), (1,)])


@pytest.mark.parametrize("teachers", [("sasrec", "sasrec"), ("sasrec", "anyo")])
def test_runs_that_started_from_runs_of_one_variant_are_seeds_of_one_row(
    tmp_path: Path, ranks: np.ndarray, teachers: tuple[str, str]
) -> None:
    """Whatever the folders of those are called."""
    for seed, teacher in enumerate(teachers):
        started_from = write_run(tmp_path / "teachers", teacher, ranks, seed=seed, folder=f"teacher{seed}")
        run = RunFolder(write_run(tmp_path / "runs", "taught", ranks, seed=seed))
        run.config_file.write_text(json.dumps({"model": {"init_from": str(started_from)}}))
    lines = load_results([tmp_path / "runs"], metrics=["test/hr@10"]).results.lines
    assert [line.seeds for line in lines] == ([(0, 1)] if teachers[0] == teachers[1] else [(0,), (1,)])


@pytest.mark.parametrize(
    ("class_path", "options", "same"),
    [
        ("anyo_lightning.E4SRec", {"distillation": 1.0}, True),
        ("anyo_lightning.E4SRec", {"distillation": 0.5}, False),
        ("nowhere.Model", {"distillation": 1.0}, False),
    ],
)
def test_an_option_that_a_run_lacks_is_at_its_default(
    tmp_path: Path, ranks: np.ndarray, class_path: str, options: dict[str, Any], same: bool
) -> None:
    """A run of an earlier version and one that has the option; of a class that is not there no default is known."""
    for seed, init_args in enumerate(({"warmup": 0.1}, {"warmup": 0.1} | options)):
        run = RunFolder(write_run(tmp_path, "anyo", ranks, seed=seed))
        run.config_file.write_text(json.dumps({"model": {"class_path": class_path, "init_args": init_args}}))
    lines = load_results([tmp_path], metrics=["test/hr@10"]).results.lines
    assert [line.seeds for line in lines] == ([(0, 1)] if same else [(0,), (1,)])


@pytest.mark.parametrize(
    ("epochs", "values", "same"),
    [(5, [0.1, 0.2, 0.3, 0.4, 0.5], True), (4, [0.1, 0.5, 0.4, 0.3], True), (4, [0.1, 0.2, 0.5, 0.4], False)],
)
def test_a_time_limit_matters_only_to_a_run_that_it_ended(
    tmp_path: Path, ranks: np.ndarray, epochs: int, values: list[float], same: bool
) -> None:
    """One that trained all of its five epochs, one that lost patience before, and one that did neither."""
    for seed, limit in enumerate((None, "00:01:00:00")):
        run = RunFolder(write_run(tmp_path, "anyo", ranks, seed=seed))
        stopping = {"monitor": "val/ndcg@10", "mode": "max", "patience": 2}
        trainer = {"max_epochs": 5, "max_steps": -1, "max_time": limit}
        run.config_file.write_text(json.dumps({"trainer": trainer, "early_stopping": stopping}))
        run.write_curves(pl.DataFrame({"step": range(epochs), "epoch": range(epochs), "val/ndcg@10": values}))
    lines = load_results([tmp_path], metrics=["test/hr@10"]).results.lines
    assert [line.seeds for line in lines] == ([(0, 1)] if same else [(0,), (1,)])


def items_from(run: RunFolder, file: str) -> None:
    """Give a run a configuration that names a file of items."""
    run.config_file.write_text(json.dumps({"data": {"interactions": "log.csv", "items": file}}))


def test_runs_that_read_other_texts_are_not_averaged(tmp_path: Path, ranks: np.ndarray) -> None:
    """The split's fingerprint is the same; texts decide wherever files lie, and without a catalogue where they lay."""
    runs = []
    for seed, titles in enumerate(("ABCDEFGHIJ", "ABCDEFGHIJ", "ABCDEFGHIX")):
        runs.append(RunFolder(write_run(tmp_path, "anyo", ranks, seed=seed, titles=titles)))
        items_from(runs[-1], f"items{seed}.csv")
    lines = load_results([tmp_path], metrics=["test/hr@10"]).results.lines
    assert [line.seeds for line in lines] == [(0, 1), (2,)]
    for run in runs:
        run.catalogue_file.unlink()
    lines = load_results([tmp_path], metrics=["test/hr@10"]).results.lines
    assert [line.seeds for line in lines] == [(0,), (1,), (2,)]
    for run in runs[1:]:
        items_from(run, "items1.csv")
    lines = load_results([tmp_path], metrics=["test/hr@10"]).results.lines
    assert [line.seeds for line in lines] == [(0,), (1, 2)]


@pytest.mark.parametrize("different", [None, "rate", "first rate", "split", "texts"])
def test_teachers_of_one_name_may_be_several(tmp_path: Path, ranks: np.ndarray, different: str | None) -> None:
    """Their own settings count, and those of the runs that these started from; their seeds and folders do not."""
    for seed in (0, 1):
        first, teacher = (
            RunFolder(
                write_run(
                    tmp_path / "teachers",
                    name,
                    ranks,
                    seed=seed,
                    fingerprint=f"{seed if different == 'split' else 0}",
                    titles="ABCDEFGHIX" if different == "texts" and seed else "ABCDEFGHIJ",
                    folder=f"{name}{seed}",
                )
            )
            for name in ("first", "teacher")
        )
        run = RunFolder(write_run(tmp_path / "runs", "taught", ranks, seed=seed))
        for folder, started_from, rate in ((first, None, "first rate"), (teacher, first, "rate"), (run, teacher, "")):
            model = {"lr": 0.2 if rate == different and seed else 0.1}
            model |= {"distil_from": str(started_from.path)} if started_from else {}
            folder.config_file.write_text(json.dumps({"model": model, "data": {"seed": seed, "items": f"{seed}.csv"}}))
    lines = load_results([tmp_path / "runs"], metrics=["test/hr@10"]).results.lines
    assert [line.seeds for line in lines] == ([(0,), (1,)] if different else [(0, 1)])


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("metrics.json", "{"),
        ("metrics.json", "[]"),
        ("metrics.json", '{"variant": 1}'),
        ("config.yaml", "a: ["),
        ("config.yaml", '{"trainer": {"max_time": "1:00", "max_epochs": "many"}}'),
        ("config.yaml", '{"model": {"init_from": "TEACHER"}}'),
        ("catalogue.parquet", "x"),
    ],
)
def test_a_broken_teacher_does_not_end_a_comparison(tmp_path: Path, ranks: np.ndarray, file: str, text: str) -> None:
    """Nor does one that names itself; runs of that one teacher are seeds of one row."""
    teacher = write_run(tmp_path / "teachers", "sasrec", ranks)
    (teacher / file).write_text(text.replace("TEACHER", str(teacher)))
    for seed in (0, 1):
        run = RunFolder(write_run(tmp_path / "runs", "taught", ranks, seed=seed))
        run.config_file.write_text(json.dumps({"model": {"init_from": str(teacher)}}))
    lines = load_results([tmp_path / "runs"], metrics=["test/hr@10"]).results.lines
    assert [line.seeds for line in lines] == [(0, 1)]


def test_slices_part_the_users_and_match_the_whole(runs: Path, ranks: np.ndarray) -> None:
    """Each group's sizes add up, popularity bands are those that the run counted, and figures are the slices' own."""
    results = load_results([runs], metrics=["test/hr@10"]).results
    groups: dict[str, dict[str, int]] = {}
    for part in results.slices:
        groups.setdefault(part.group, {})[part.name] = part.users
    assert list(groups) == ["target popularity", "history length", "target tied", "target words"]
    assert all(sum(sizes.values()) == USERS for sizes in groups.values())
    user = np.arange(USERS)
    markov = [line.variant for line in results.lines].index("markov")
    masks = {"head": user % 7 >= 5, "unseen": user % 7 == 0, "yes": user % 2 == 0, "1-20": user % 90 < 20}
    for name, mask in masks.items():
        part = next(part for part in results.slices if part.name == name)
        figure = part.metrics["test/hr@10"][markov]
        assert part.users == mask.sum()
        assert figure.value == pytest.approx((ranks[mask] <= 10).mean())
        assert figure.low <= figure.value <= figure.high


def test_slices_are_those_that_all_runs_agree_on(runs: Path, ranks: np.ndarray) -> None:
    """Tokens are known to two of three runs, and one run's texts have other words; a run of an earlier version."""
    tokens = band(np.arange(USERS) % 20 + 1, TOKEN_BANDS)
    for name in ("markov", "sasrec"):
        run = RunFolder(runs / name / "version_0")
        run.write_predictions(run.read_predictions().with_columns(target_tokens_band=tokens))

    def groups(*names: str) -> list[str]:
        results = load_results([runs / name for name in names], metrics=["test/hr@10"]).results
        return list(dict.fromkeys(part.group for part in results.slices))

    known_to_all = ["target popularity", "history length", "target tied", "target words"]
    assert groups("markov", "sasrec") == [*known_to_all, "target tokens"]
    assert groups("markov", "sasrec", "e4srec") == known_to_all
    write_run(runs, "anyo", ranks, titles=["A title of many words"] * 10)
    assert groups("anyo", "sasrec") == known_to_all[:3]
    run = RunFolder(runs / "anyo" / "version_0")
    run.write_predictions(run.read_predictions().drop("target_popularity", "history_band", "target_words_band"))
    assert groups("anyo", "sasrec") == groups("sasrec", "anyo") == ["target tied"]


def test_a_comparison_loads_no_torch(tmp_path: Path, ranks: np.ndarray) -> None:
    """Nor Lightning nor transformers, in any form: a table of finished runs needs none of them."""
    for variant in ("markov", "sasrec"):
        write_run(tmp_path, variant, ranks, lists=True)
    script = f"""
import sys
from pathlib import Path
from anyo_lightning.compare.table import compare
for form in ("rich", "markdown", "latex", "csv", "json", "html"):
    compare([Path({str(tmp_path)!r})], baseline="markov", format=form, output=Path({str(tmp_path / "table")!r}))
print(sorted({{"torch", "lightning", "transformers"}} & set(sys.modules)))
"""
    assert subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout == "[]\n"


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


def test_versions_of_one_folder_may_be_several_variants(runs: Path, ranks: np.ndarray) -> None:
    """`--metrics.variant` gives two versions of `sasrec` names of their own: two rows, each its newest version."""
    for variant, step in (("wide", 2), ("narrow", 3), ("wide", 4)):
        write_run(runs, variant, np.roll(ranks, step), folder="sasrec")
    results = load_results([runs], metrics=["test/hr@10"]).results
    assert sorted(line.variant for line in results.lines) == ["e4srec", "markov", "narrow", "sasrec", "wide"]
    (wide,) = [line for line in results.lines if line.variant == "wide"]
    assert wide.folders == (runs / "sasrec" / "version_3",)


def test_two_versions_of_one_variant_and_seed_can_be_told_apart(runs: Path, ranks: np.ndarray) -> None:
    """The same variant twice gets the version into its name, and the same folder twice is one row."""
    second = write_run(runs, "sasrec", ranks)
    first = runs / "sasrec" / "version_0"
    results = load_results([first, second, first], metrics=["test/hr@10"]).results
    assert sorted(line.variant for line in results.lines) == ["sasrec (version_0)", "sasrec (version_1)"]


def test_an_unknown_metric_lists_those_there(runs: Path) -> None:
    """A typo in `metrics`."""
    with pytest.raises(InputError, match=r"Expected metrics to be among test/hr@10.*got 'test/ncdg@10'"):
        compare([runs], metrics=["test/ncdg@10"])

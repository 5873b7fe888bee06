"""`anyo compare --foreign`: another system's lists as a row, and everything that is wrong with them in one sentence."""

import gzip
import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ir_measures
import numpy as np
import polars as pl
import pytest
from fake_runs import write_run
from helpers import Anyo, MakeData, fit, refused
from ir_measures import AP, nDCG

from anyo_lightning.compare.foreign_files import read_lists
from anyo_lightning.compare.results import Line, load_results
from anyo_lightning.compare.table import compare
from anyo_lightning.data.exchange import write_split
from anyo_lightning.data.strategies import Strategy
from anyo_lightning.encoders.ids import IdEncoders
from anyo_lightning.errors import InputError
from anyo_lightning.evaluation.callback import RetrievalMetrics
from anyo_lightning.evaluation.metrics import EXTRA
from anyo_lightning.models.sasrec import SASRec
from anyo_lightning.runs import RunFolder

USERS = 100
METRICS = ["test/hr@5", "test/ndcg@10"]
Rows = list[tuple[Any, ...]]


@pytest.fixture
def ranks() -> np.ndarray:
    """Ranks between 1 and 40, many small ones."""
    return np.exp(np.random.default_rng(0).uniform(0, np.log(40), USERS)).round()


@pytest.fixture
def runs(tmp_path: Path, ranks: np.ndarray) -> Path:
    """Two tested runs with histories and lists, which do not mask histories: user n has the target n % 7."""
    root = tmp_path / "runs"
    write_run(root, "markov", ranks, lists=True, history_masked=False)
    write_run(root, "sasrec", np.roll(ranks, 1), lists=True, history_masked=False)
    return root


def lists_with(places: np.ndarray, length: int = 10) -> Rows:
    """Lists of user, item, rank (from 1) and score with each user's target at its place, where that is in the list."""
    rows: Rows = []
    for user, place in enumerate(places):
        items = [item for item in range(10) if item != user % 7]
        items.insert(int(place) - 1 if place <= 10 else 10, user % 7)
        kept = [item for item in items if place <= 10 or item != user % 7][:length]
        rows += [(f"u{user}", f"i{item}", rank, 1 / rank) for rank, item in enumerate(kept, 1)]
    return rows


def write(rows: Rows, file: Path, *columns: str) -> str:
    """A CSV file of some of user, item, rank and score."""
    table = pl.DataFrame(rows, schema=["user", "item", "rank", "score"], orient="row")
    table.select(columns or ("user", "item", "rank")).write_csv(file)
    return f"peer={file}"


def line_of(runs: Path, foreign: str | list[str], metrics: list[str], **options: Any) -> Line:
    """The row of the one foreign system."""
    named = [foreign] if isinstance(foreign, str) else foreign
    results = load_results([runs], metrics=metrics, foreign=named, **options).results
    (line,) = [line for line in results.lines if line.list_length is not None]
    return line


FORMS: dict[str, Callable[[pl.DataFrame, Path], object]] = {
    "lists.csv": lambda table, file: table.write_csv(file),
    "lists.csv.gz": lambda table, file: file.write_bytes(gzip.compress(table.write_csv().encode())),
    "lists.tsv": lambda table, file: table.write_csv(file, separator="\t"),
    "lists.parquet": lambda table, file: table.write_parquet(file),
    "lists.jsonl": lambda table, file: table.write_ndjson(file),
    "lists.run": lambda table, file: table.select(
        "user_id", pl.lit("Q0").alias("Q0"), "item_id", "rank", "score", pl.lit("mine").alias("tag")
    ).write_csv(file, separator=" ", include_header=False),
    "tabs.txt": lambda table, file: table.select(
        "user_id", pl.lit("Q0").alias("Q0"), "item_id", "rank", "score", pl.lit("mine").alias("tag")
    ).write_csv(file, separator="\t", include_header=False),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("columns", [("rank",), ("score",), ("rank", "score")])
def test_every_form_gives_the_same_row(
    runs: Path, tmp_path: Path, ranks: np.ndarray, form: str, columns: tuple[str, ...]
) -> None:
    """In any order of lines; a TREC run has both columns."""
    table = pl.DataFrame(lists_with(ranks), schema=["user_id", "item_id", "rank", "score"], orient="row")
    if form.endswith(("run", "txt")):
        columns = ("rank", "score")
    table = table.sample(fraction=1, shuffle=True, seed=0).select("user_id", "item_id", *columns)
    FORMS[form](table, tmp_path / form)
    line = line_of(runs, f"peer={tmp_path / form}", METRICS, baseline="markov")
    assert (line.variant, line.list_length) == ("peer (top 10)", 10)
    assert line.cells["test/hr@5"].value == (ranks <= 5).mean()
    gains = np.where(ranks <= 10, 1 / np.log2(1 + ranks), 0)
    assert line.cells["test/ndcg@10"].value == pytest.approx(gains.mean())
    difference = line.cells["test/ndcg@10"].difference
    assert difference is not None
    assert (difference.value, difference.p) == (0, 1)  # the baseline's own ranks


def test_integer_ids_are_the_ids_of_the_split(tmp_path: Path, ranks: np.ndarray) -> None:
    """Libraries write user 7 as a number where the run has "7"; floating-point numbers lose their `.0`."""
    path = write_run(tmp_path / "runs", "markov", ranks, lists=True, history_masked=False, user_prefix="")
    table = pl.DataFrame(lists_with(ranks), schema=["user", "item", "rank", "score"], orient="row")
    table = table.with_columns(pl.col("user").str.slice(1).cast(pl.Int64))
    for dtype in (pl.Int64, pl.Float64):
        table.with_columns(pl.col("user").cast(dtype)).write_parquet(tmp_path / "lists.parquet")
        line = line_of(path, f"peer={tmp_path / 'lists.parquet'}", ["test/hr@5"])
        assert line.cells["test/hr@5"].value == (ranks <= 5).mean()


def test_a_better_system_is_tested_like_a_run(runs: Path, tmp_path: Path, ranks: np.ndarray) -> None:
    """The same paired tests, corrected over the same rows; it may be the baseline, too."""
    better = np.maximum(ranks / 3, 1).round()
    peer = write(lists_with(better), tmp_path / "lists.csv")
    line = line_of(runs, peer, METRICS, baseline="markov")
    as_run = write_run(runs, "twin", np.where(better <= 10, better, np.inf), history_masked=False)
    results = load_results([runs / "markov", runs / "sasrec", as_run], metrics=METRICS, baseline="markov").results
    (twin,) = [line for line in results.lines if line.variant == "twin"]
    assert line.cells.keys() == twin.cells.keys()
    for metric in METRICS:
        assert line.cells[metric].difference == twin.cells[metric].difference
        assert line.cells[metric].best
        assert line.cells[metric].low == twin.cells[metric].low
    based = load_results([runs / "markov"], metrics=METRICS, foreign=[peer], baseline="peer").results
    assert based.baseline == "peer (top 10)"
    assert based.lines[1].cells["test/hr@5"].difference is not None


def test_metrics_beyond_the_lists_are_left_out_with_the_reason(
    runs: Path, tmp_path: Path, ranks: np.ndarray, capsys: pytest.CaptureFixture[str]
) -> None:
    """In each form of the table; what the lists can show stays, and runs keep their figures."""
    rows = lists_with(ranks, length=5)
    peer = write(rows, tmp_path / "lists.csv")
    metrics = ["test/ndcg@10", "test/hr@5", "test/coverage@10", "test/coverage@5"]
    for run in ("markov", "sasrec"):
        folder = RunFolder(runs / run / "version_0")
        content = folder.read_metrics()
        content["metrics"]["test/coverage@5"] = {"value": 0.5, "low": None, "high": None}
        folder.write_metrics(content)
    line = line_of(runs, peer, metrics)
    assert line.cells.keys() == {"test/hr@5", "test/coverage@5"}
    assert line.cells["test/coverage@5"].value == len({item for _, item, *_ in rows}) / 10
    for form in ("rich", "markdown", "latex"):
        compare([runs], foreign=[peer], metrics=metrics, baseline="markov", slices=True, format=form)  # type: ignore[arg-type]
        out = capsys.readouterr().out
        assert "peer: lists of another system, beyond which nothing counts as found." in out
        assert "peer (top 5) without NDCG@10, Coverage@10: its lists are known to 5 places." in out
    compare([runs], foreign=[peer], metrics=metrics, format="markdown")
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert rows[-1].split("|")[1].strip() == "peer (top 5)"  # no figure in the first column: last
    assert rows[-1].split("|")[3].strip() == "-"
    compare([runs], foreign=[peer], metrics=metrics, format="json")
    row = json.loads(capsys.readouterr().out)["rows"][-1]
    assert (row["list_length"], row["metrics"].keys()) == (5, line.cells.keys())
    assert row["left_out"]["test/ndcg@10"] == "its lists are known to 5 places"
    compare([runs], foreign=[peer], metrics=metrics, format="csv")
    table = pl.read_csv(io.StringIO(capsys.readouterr().out), infer_schema_length=None)
    assert set(table.filter(variant="peer (top 5)")["metric"]) == set(line.cells)


def test_items_beyond_a_short_list_and_users_without_one_are_not_found(
    runs: Path, tmp_path: Path, ranks: np.ndarray
) -> None:
    """A list of two items is one that has ended; three users without a list are counted in the row's name."""
    rows = [row for row in lists_with(ranks) if row[0] not in ("u3", "u50", "u51") and (row[0] != "u9" or row[2] <= 2)]
    line = line_of(runs, write(rows, tmp_path / "lists.csv"), ["test/hr@10", "test/coverage@10"])
    assert line.variant == "peer (top 10, 3 of 100 users without a list)"
    found = ranks <= 10
    found[[3, 50, 51]] = False
    found[9] = ranks[9] <= 2
    assert line.cells["test/hr@10"].value == found.mean()


def test_scores_that_tie_share_the_middle_of_their_places(runs: Path, tmp_path: Path) -> None:
    """Ten items with one score have rank 5.5 each; scores decide where there is a rank as well."""
    rows = [(user, item, rank, 0.5) for user, item, rank, _ in lists_with(np.ones(USERS))]
    for columns, found in (
        (("user", "item", "score"), 0),
        (("user", "item", "rank", "score"), 0),
        (("user", "item", "rank"), 1),
    ):
        line = line_of(runs, write(rows, tmp_path / "lists.csv", *columns), ["test/hr@5", "test/hr@6"])
        assert (line.cells["test/hr@5"].value, line.cells["test/hr@6"].value) == (found, 1)


@pytest.mark.parametrize("length", [10, 7])
def test_items_of_the_history_do_not_compete_where_runs_mask_them(
    tmp_path: Path, ranks: np.ndarray, length: int
) -> None:
    """By hand; a target in its own history stays; full lists are known to what is left of the shortest of them."""
    path = write_run(tmp_path / "runs", "markov", ranks, lists=True, history_masked=True)
    predictions = RunFolder(path).read_predictions()
    short = predictions.with_columns(pl.col("history_item_ids").list.head(3))
    RunFolder(path).write_predictions(short)
    rows = lists_with(ranks, length)
    line = line_of(path, write(rows, tmp_path / "lists.csv"), ["test/hr@4", "test/hr@3", "test/mrr@4"])
    lists: dict[str, list[str]] = {}
    for user, item, *_ in rows:
        lists.setdefault(user, []).append(item)
    expected, left, returns = [], [], 0
    for user, target, history in short.select("user_id", "target_item_id", "history_item_ids").iter_rows():
        returns += target in history
        free = [item for item in lists[user] if item == target or item not in history]
        left.append(len(free))
        expected.append(1 + free.index(target) if target in free else np.inf)
    assert 0 < returns < USERS
    known = min(free for free, of in zip(left, lists.values(), strict=True) if len(of) == length)
    assert line.list_length == known
    place = np.array(expected)
    assert line.cells["test/hr@3"].value == (place <= 3).mean()
    assert ("test/hr@4" in line.cells) == (known >= 4)
    removed = len(rows) - sum(left)
    assert line.note.endswith(f"; {removed} items of histories in them were left out.")


def test_one_longer_list_does_not_make_the_others_complete(tmp_path: Path, ranks: np.ndarray) -> None:
    """All but one user have lists of 7, of which masking takes some: what is known of them is what is left."""
    path = write_run(tmp_path / "runs", "markov", ranks, lists=True, history_masked=True)
    predictions = RunFolder(path).read_predictions()
    RunFolder(path).write_predictions(predictions.with_columns(pl.col("history_item_ids").list.head(3)))
    rows = lists_with(ranks, 7)
    line = line_of(path, write(rows, tmp_path / "lists.csv"), ["test/hr@3"])
    listed = {item for user, item, *_ in rows if user == "u0"}
    extra = next(f"i{item}" for item in range(10) if f"i{item}" not in listed)
    longer = line_of(path, write([*rows, ("u0", extra, 8, 0.1)], tmp_path / "longer.csv"), ["test/hr@3"])
    assert longer.list_length == line.list_length < 7


def test_lists_of_histories_alone_are_refused(tmp_path: Path, ranks: np.ndarray) -> None:
    """Where histories are masked and one user's full list has nothing else."""
    path = write_run(tmp_path / "runs", "markov", ranks, lists=True, history_masked=True)
    peer = write(lists_with(ranks, length=3), tmp_path / "lists.csv")
    with pytest.raises(InputError, match=r"Expected lists without items of the users' histories in .*lists.csv"):
        line_of(path, peer, METRICS)


def test_files_of_one_name_are_seeds_of_one_row(runs: Path, tmp_path: Path, ranks: np.ndarray) -> None:
    """Means over them, with their deviation, known to the shorter of the two."""
    peers = [write(lists_with(np.roll(ranks, step), 10 - step), tmp_path / f"{step}.csv") for step in (0, 1)]
    line = line_of(runs, peers, ["test/hr@5"])
    assert (line.variant, len(line.seeds)) == ("peer (top 9)", 2)
    cell = line.cells["test/hr@5"]
    assert cell.by_seed == ((ranks <= 5).mean(), (np.roll(ranks, 1) <= 5).mean())
    assert cell.deviation is not None


def change(rows: Rows, number: int, **values: Any) -> Rows:
    """The rows with one of them changed."""
    names = ("user", "item", "rank", "score")
    row = tuple(values.get(name, old) for name, old in zip(names, rows[number], strict=True))
    return [*rows[:number], row, *rows[number + 1 :]]


MISTAKES: dict[str, tuple[Callable[[Rows], Rows], tuple[str, ...], str]] = {
    "unknown users": (
        lambda rows: [*rows, *(("v7", f"i{n}", n, 1.0) for n in range(3)), ("v8", "i1", 1, 1.0)],
        ("user", "item", "rank"),
        "Expected the users that have a test target (u0, u1, u2, …) in FILE, got 2 others (v7, v8)",
    ),
    "unknown items": (
        lambda rows: change(change(rows, 3, item="i77"), 30, item="i78"),
        ("user", "item", "rank"),
        "Expected items of the split (i0, i1, i2, …) in FILE, got 2 others (i77, i78)",
    ),
    "an item twice": (
        lambda rows: change(rows, 3, item=rows[4][1]),
        ("user", "item", "rank"),
        "Expected each item once in a user's list in FILE, got item ITEM of user u0 2 times (1 such users)",
    ),
    "a rank twice": (
        lambda rows: change(rows, 3, rank=5),
        ("user", "item", "rank", "score"),
        "Expected each rank once in a user's list in FILE, got rank 5 of user u0 2 times (1 such users)",
    ),
    "a score that is no number": (
        lambda rows: change(rows, 3, score=float("nan")),
        ("user", "item", "score"),
        "Expected a number as score in FILE, got 'NaN' in row 4 (1 such rows)",
    ),
    "a rank against its score": (
        lambda rows: change(rows, 3, score=5.0),
        ("user", "item", "rank", "score"),
        "Expected scores in FILE that fall as ranks grow, got a higher score at rank 4 than before it, in the list of "
        "user u0 (1 such users): leave one of the two columns out",
    ),
    "neither rank nor score": (
        lambda rows: rows,
        ("user", "item"),
        "Expected column score or rank in FILE, got the columns user, item",
    ),
    "no user": (
        lambda rows: rows,
        ("item", "rank"),
        "Expected column user or user_id in FILE, got the columns item, rank",
    ),
    "a missing item": (
        lambda rows: change(rows, 3, item=None),
        ("user", "item", "rank"),
        "Expected a value of item in each row of FILE, got none in row 4 (1 such rows)",
    ),
    "no rows": (lambda rows: rows[:0], ("user", "item", "rank"), "Expected rows in FILE, got an empty table"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_sentence(
    anyo: Anyo, capsys: pytest.CaptureFixture[str], runs: Path, tmp_path: Path, ranks: np.ndarray, mistake: str
) -> None:
    """Exit code 2, and no table is written."""
    spoil, columns, sentence = MISTAKES[mistake]
    rows = lists_with(ranks)
    peer = write(spoil(rows), tmp_path / "lists.csv", *columns)
    output = tmp_path / "table.md"
    said = refused(capsys, anyo, "compare", runs, "--foreign", peer, "--format=markdown", f"--output={output}")
    expected = sentence.replace("FILE", str(tmp_path / "lists.csv")).replace("ITEM", rows[4][1])
    assert said == f"anyo: error: {expected}"
    assert not output.exists()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--foreign", "lists.csv"], "Expected foreign to be NAME=FILE, got 'lists.csv'"),
        (["--foreign", "=lists.csv"], "Expected foreign to be NAME=FILE, got '=lists.csv'"),
        (["--foreign", "markov=LISTS"], "Expected a name for foreign that no run has, got 'markov'"),
        (["--foreign", "a=LISTS", "--foreign", "a=LISTS"], "Expected each file of foreign a once, got LISTS twice"),
        (["--foreign", "a=nowhere.csv"], "Expected a file at nowhere.csv, got nothing there"),
        (["--foreign", "a=LISTS", "--across_splits", "true"], "Expected across_splits without baseline, slices and"),
    ],
)
def test_names_and_files_that_are_refused(
    anyo: Anyo,
    capsys: pytest.CaptureFixture[str],
    runs: Path,
    tmp_path: Path,
    ranks: np.ndarray,
    words: list[str],
    sentence: str,
) -> None:
    """Before anything is read, or as soon as it is."""
    file = str(tmp_path / "lists.csv")
    write(lists_with(ranks), tmp_path / "lists.csv")
    said = refused(capsys, anyo, "compare", runs, *(word.replace("LISTS", file) for word in words))
    assert said.startswith(f"anyo: error: {sentence.replace('LISTS', file)}")


def test_what_is_no_trec_run_is_refused(tmp_path: Path) -> None:
    """An id with a blank, by its line; a file of another kind, by its ending."""
    (tmp_path / "b.run").write_text("u1 i1 1\n")
    with pytest.raises(InputError, match=r"to be a TREC run \(user Q0 item rank score tag\) or to end in csv, .*'run'"):
        read_lists(tmp_path / "b.run")
    (tmp_path / "a.run").write_text("u1 Q0 i1 1 0.5 me\nu1 Q0 i 2 2 0.4 me\n")
    with pytest.raises(InputError, match=r"Expected 6 fields in line 2 of .*a.run, got 7"):
        read_lists(tmp_path / "a.run")


def test_the_option_may_be_given_several_times(anyo: Anyo, runs: Path, tmp_path: Path, ranks: np.ndarray) -> None:
    """Two systems beside two runs, by the command line."""
    words = []
    for name in ("one", "two"):
        words += ["--foreign", write(lists_with(ranks), tmp_path / f"{name}.csv").replace("peer", name)]
    out = anyo("compare", runs, *words, "--format=json")
    names = {row["variant"] for row in json.loads(out)["rows"]}
    assert names == {"markov", "sasrec", "one (top 10)", "two (top 10)"}


def test_the_page_has_the_row(runs: Path, tmp_path: Path, ranks: np.ndarray) -> None:
    """Its lists in the cases; a rank that is not known is null, and so is a slice's figure that cannot be."""
    peer = write(lists_with(ranks, length=5), tmp_path / "lists.csv")
    compare([runs], foreign=[peer], metrics=METRICS, format="html", output=tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    content = json.loads(text.split('id="data">')[1].split("</script>")[0])
    row = [variant["label"] for variant in content["variants"]].index("peer (top 5)")
    assert content["variants"][row]["cells"].keys() == {"test/hr@5"}
    part = content["slices"][0]["metrics"]
    assert part["test/ndcg@10"][row] is None
    assert part["test/hr@5"][row] is not None
    ranked = {case["user"]: case["ranks"][row] for case in content["cases"]["rows"]}
    assert ranked == {f"u{user}": rank if rank <= 5 else None for user, rank in enumerate(ranks)}
    case = content["cases"]["rows"][0]
    assert len(case["lists"][row]) == 5


def test_lists_load_no_torch(runs: Path, tmp_path: Path, ranks: np.ndarray) -> None:
    """As little as runs do."""
    peer = write(lists_with(ranks), tmp_path / "lists.csv")
    script = f"""
import sys
from pathlib import Path
from anyo_lightning.compare.table import compare
compare([Path({str(runs)!r})], foreign=[{peer!r}], output=Path({str(tmp_path / "table")!r}))
print(sorted({{"torch", "lightning", "transformers"}} & set(sys.modules)))
"""
    assert subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout == "[]\n"


@pytest.mark.parametrize(
    ("strategy", "masked"), [("leave_one_out", True), ("leave_one_out", False), ("global_time", False)]
)
def test_a_runs_own_lists_give_its_own_figures(
    make_data: MakeData, tmp_path: Path, strategy: Strategy, masked: bool
) -> None:
    """A trained run's predictions as a foreign file: each figure that lists can give, to the bit, and its interval."""
    data = make_data(strategy=strategy)
    run = RunFolder(tmp_path / "runs" / "sasrec" / "version_0")
    model = SASRec(IdEncoders(dim=16))
    trainer = fit(model, data, tmp_path / "training", epochs=1)
    metrics = RetrievalMetrics(cutoffs=[1, 2, 5], top_k=8, extra=EXTRA, mask_history=masked, folder=run.path)
    trainer.callbacks = [metrics]  # type: ignore[attr-defined]
    trainer.test(model, data, verbose=False)
    rows = (
        run.read_predictions()
        .unique("user_id", keep="first", maintain_order=True)
        .select("user_id", item_id="top_item_ids", score="top_scores")
        .explode("item_id", "score")
    )
    rows.write_csv(tmp_path / "lists.csv")
    stored = run.read_metrics()["metrics"]
    names = [name for name in stored if "/ild@" not in name]
    line = line_of(run.path, f"peer={tmp_path / 'lists.csv'}", [*stored, "test/map@8", "test/hr@9"])
    assert line.list_length == 8
    for name in names:
        cell = line.cells[name]
        assert cell.value == stored[name]["value"], name
        ends = [stored[name]["low"], stored[name]["high"]]
        assert [cell.low, cell.high] == (ends if None in ends else pytest.approx(ends, rel=1e-12)), name
    assert line.left_out == {
        "test/ild@2": "lists cannot give it",
        "test/ild@5": "lists cannot give it",
        "test/hr@9": "its lists are known to 8 places",
    }


def test_trec_tools_give_our_figures(make_data: MakeData, tmp_path: Path) -> None:
    """The qrels of `anyo data --output` and a TREC run, read by ir-measures, against the same run file in our table."""
    data = make_data()
    write_split(data.split, tmp_path / "split")
    qrels = list(ir_measures.read_trec_qrels(str(tmp_path / "split" / "test.qrels")))
    random = np.random.default_rng(0)
    lines = []
    for user in dict.fromkeys(qrel.query_id for qrel in qrels):
        items = random.permutation(data.split.item_ids)[:10]
        lines += [f"{user} Q0 {item} {place} {9.5 - place} random" for place, item in enumerate(items)]
    (tmp_path / "random.run").write_text("\n".join(lines) + "\n")
    run = RunFolder(tmp_path / "runs" / "sasrec" / "version_0")
    model = SASRec(IdEncoders(dim=16))
    trainer = fit(model, data, tmp_path / "training", epochs=1)
    trainer.callbacks = [RetrievalMetrics(mask_history=False, folder=run.path)]  # type: ignore[attr-defined]
    trainer.test(model, data, verbose=False)
    theirs = ir_measures.calc_aggregate(
        [nDCG @ 10, AP @ 10, nDCG @ 3], qrels, ir_measures.read_trec_run(str(tmp_path / "random.run"))
    )
    line = line_of(run.path, f"random={tmp_path / 'random.run'}", ["test/ndcg@10", "test/map@10", "test/ndcg@3"])
    assert line.cells["test/ndcg@10"].value == pytest.approx(theirs[nDCG @ 10]) != 0
    assert line.cells["test/map@10"].value == pytest.approx(theirs[AP @ 10])
    assert line.cells["test/ndcg@3"].value == pytest.approx(theirs[nDCG @ 3])

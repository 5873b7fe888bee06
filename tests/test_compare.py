"""`anyo compare`: differences of paired users, what it refuses or passes over, slices."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from fake_runs import METRICS, USERS, spread_ranks, write_run, write_three

from anyo_lightning.compare.results import load_results
from anyo_lightning.compare.table import compare
from anyo_lightning.errors import InputError
from anyo_lightning.evaluation.slices import TOKEN_BANDS, band
from anyo_lightning.runs import RunFolder


@pytest.fixture
def ranks() -> np.ndarray:
    return spread_ranks()


@pytest.fixture
def runs(tmp_path: Path, ranks: np.ndarray) -> Path:
    return write_three(tmp_path, ranks)


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
    assert f": anyo compare {first}; " in message
    assert message.endswith(f": anyo compare {second}")
    assert not (tmp_path / "table.json").exists()


def test_one_split_of_files_of_two_names_is_one(tmp_path: Path, ranks: np.ndarray) -> None:
    """The fingerprint decides; the name of the file is a caption."""
    write_run(tmp_path, "markov", ranks)
    renamed = RunFolder(write_run(tmp_path, "sasrec", ranks + 1))
    metrics = renamed.read_metrics()
    renamed.write_metrics(metrics | {"split": metrics["split"] | {"name": "copy"}})
    results = load_results([tmp_path], metrics=METRICS).results
    assert len(results.lines) == 2
    assert results.split["name"] == "ml-100k"


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
    """A typo lists what is there; a variant that is two rows asks which; a run's or a variant's folder names it."""
    assert load_results([runs], metrics=["test/hr@10"], baseline=str(runs / "sasrec")).results.baseline == "sasrec"
    with pytest.raises(InputError, match=r"rows e4srec, markov, sasrec, or .*, got 'sasrek'"):
        compare([runs], baseline="sasrek")
    second = write_run(runs, "sasrec", ranks)
    both = [runs / "sasrec" / "version_0", second]
    with pytest.raises(
        InputError, match=r"'sasrec', which names 2: give one of sasrec .version_0., sasrec .version_1."
    ):
        compare(both, baseline="sasrec")
    for name in (str(second), "sasrec (version_1)"):
        results = load_results(both, metrics=["test/hr@10"], baseline=name).results
        assert [line.is_baseline for line in results.lines] == [line.folders == (second,) for line in results.lines]


def test_a_baseline_may_be_a_class_of_models(runs: Path, ranks: np.ndarray) -> None:
    """`markov` names the run `mk` of `Markov` where no row is called so, and asks where two are."""
    both = [runs / "e4srec", *(write_run(runs / "named", name, ranks) for name in ("mk", "own"))]
    for folder, model in zip(both[1:], ("anyo_lightning.models.floors.Markov", "EASE"), strict=True):
        RunFolder(folder).config_file.write_text(f"model: {{class_path: {model}}}")
    for name in ("markov", "Markov"):
        assert load_results(both, metrics=["test/hr@10"], baseline=name).results.baseline == "mk"
    RunFolder(both[2]).config_file.write_text("model: {class_path: Markov}")
    with pytest.raises(InputError, match="'markov', which names 2: give one of mk, own"):
        load_results(both, metrics=["test/hr@10"], baseline="markov")


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
from collections.abc import Callable
from pathlib import Path
from anyo_lightning.compare.table import compare
for form in ("rich", "markdown", "latex", "csv", "json", "html"):
    compare([Path({str(tmp_path)!r})], baseline="markov", format=form, output=Path({str(tmp_path / "table")!r}))
print(sorted({{"torch", "lightning", "transformers"}} & set(sys.modules)))
"""
    assert subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout == "[]\n"


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


def test_folders_that_are_called_alike_below_one_folder_all_count(tmp_path: Path, ranks: np.ndarray) -> None:
    """`c3/a/sasrec` and `c3/b/sasrec` in `anyo compare c3` are the rows of `anyo compare c3/a c3/b`."""
    for parent, step in (("a", 0), ("b", 1)):
        version = write_run(tmp_path / "c3" / parent, "sasrec", np.roll(ranks, step))
        for file in version.iterdir():
            file.rename(version.parent / file.name)
        version.rmdir()
    both = load_results([tmp_path / "c3" / "a", tmp_path / "c3" / "b"], metrics=["test/hr@10"]).results
    together = load_results([tmp_path / "c3"], metrics=["test/hr@10"]).results
    assert len(together.lines) == 2
    assert {line.variant for line in together.lines} == {line.variant for line in both.lines}
    assert len({line.variant for line in together.lines}) == 2


def test_an_older_version_with_other_settings_has_a_row(
    tmp_path: Path, ranks: np.ndarray, capsys: pytest.CaptureFixture[str]
) -> None:
    """Dropout decides the figures, the number of workers does not; an older version of another split is named."""
    versions = (("00", 0.3, 0), ("aa", 0.1, 0), ("aa", 0.5, 0), ("aa", 0.1, 2))
    for step, (fingerprint, dropout, workers) in enumerate(versions):
        run = RunFolder(write_run(tmp_path, "sasrec", np.roll(ranks, step), fingerprint=fingerprint))
        settings = {"model": {"encoders": {"dropout": dropout}}, "data": {"num_workers": workers}}
        run.config_file.write_text(json.dumps(settings))
    compare([tmp_path], format="json")
    captured = capsys.readouterr()
    rows = {row["variant"] for row in json.loads(captured.out)["rows"]}
    assert rows == {"sasrec (version_2)", "sasrec (version_3)"}
    oldest = tmp_path / "sasrec" / "version_0"
    assert captured.err == f"Passed over {oldest}: a newer version is of another split\n"


def test_an_unknown_metric_lists_those_there(runs: Path) -> None:
    """A typo in `metrics`."""
    with pytest.raises(InputError, match=r"Expected metrics to be among test/hr@10.*got 'test/ncdg@10'"):
        compare([runs], metrics=["test/ncdg@10"])


@pytest.mark.parametrize("words", [["hr@3"], ["test/hr@3"], ["[hr@3]"], ["[test/hr@3]"]])
def test_a_metric_may_be_a_bare_name(words: list[str], runs: Path, anyo: Callable[..., str]) -> None:
    """Beside a list of names, and with or without `test/`, on the command line."""
    assert "HR@3" in anyo("compare", runs, "--metrics", *words)


def test_an_unknown_metric_says_what_else_there_is(runs: Path) -> None:
    """Rank metrics at any cutoff are worked out."""
    with pytest.raises(InputError, match=r"coverage@10, or one of hr, .*map.* at another k; got 'test/hrr@10'"):
        compare([runs], metrics="hrr@10")

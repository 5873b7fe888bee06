"""`anyo recommend`: the lists of the run's own test, what may be listed, items given by text, what is refused."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from helpers import CONFIGS, Anyo, refused
from polars.testing import assert_frame_equal
from torch.testing import assert_close

from anyo_lightning import Recommender
from anyo_lightning.cli.main import main
from anyo_lightning.encoders.items import FrozenTextItems, further_text_vectors
from anyo_lightning.encoders.whitening import whitening
from anyo_lightning.errors import InputError
from anyo_lightning.llm.text_vectors import frozen_vectors
from anyo_lightning.runs import RunFolder
from anyo_lightning.serving.given_files import read_histories
from anyo_lightning.serving.titles import TitleMatcher

Runs = Callable[..., Path]


def lists_of(table: pl.DataFrame) -> list[list[str]]:
    """The items of each list."""
    lists: list[list[str]] = table.group_by("history", maintain_order=True).agg("item_id")["item_id"].to_list()
    return lists


TEXTS = ["e4srec", "e4srec_vectors", "anyo_vectors_hybrid", "unisrec", "llara", "hllm"]


@pytest.mark.parametrize("name", ["sasrec", "markov", "popularity", "ease", *TEXTS])
def test_lists_and_scores_are_those_of_the_runs_test(name: str, run_of: Runs) -> None:
    """Bit-identical for all test users at once, equal to rounding for one alone; the run's folder stays as it was."""
    run = RunFolder(run_of(name))
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    predictions = run.read_predictions()
    recommender = Recommender.load(run.path, device="cpu")
    histories = predictions["history_item_ids"].to_list()
    found = recommender.recommend(histories, k=20)
    assert lists_of(found) == predictions["top_item_ids"].to_list()
    assert found["score"].to_list() == predictions["top_scores"].explode().to_list()
    alone = recommender.recommend(histories[7:8], k=20)
    assert_close(torch.tensor(alone["score"].to_list()), torch.tensor(predictions["top_scores"][7].to_list()))
    assert found.columns == ["history", "rank", "item_id", "title", "score"]
    assert before == {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}


def test_what_was_seen_is_hidden_as_in_the_runs_test(run_of: Runs) -> None:
    """With `metrics.mask_history` the test leaves histories out, but for targets that are in them; so do lists."""
    run = RunFolder(run_of("sasrec", "--metrics.mask_history=true"))
    predictions = run.read_predictions()
    recommender = Recommender.load(run.path, device="cpu")
    fresh = predictions.filter(~pl.col("target_item_id").is_in(pl.col("history_item_ids")))  # others may be listed
    assert 5 < len(fresh) < len(predictions)
    found = recommender.recommend(fresh["history_item_ids"].to_list(), k=20)
    assert lists_of(found) == fresh["top_item_ids"].to_list()
    shown = recommender.recommend(fresh["history_item_ids"].to_list(), k=16, hide_seen=False)
    assert len(shown) == 16 * len(fresh)


@pytest.mark.parametrize("index", ["Flat", "HNSW8", "IVF4,Flat:nprobe=4"])
@pytest.mark.filterwarnings("ignore:.*clustering")
def test_allowed_and_blocked_items_are_exact(index: str, run_of: Runs) -> None:
    """Lists are the whole order without what may not be listed: of full length as long as there are enough items."""
    recommender = Recommender.load(run_of("sasrec"), device="cpu", index=index)
    history = ["m1", "m5", "m6"]
    (order,) = lists_of(recommender.recommend([history], k=16, hide_seen=False))
    assert sorted(order) == sorted(recommender.item_ids)
    allowed, blocked = order[-6:], [order[-5], order[0]]
    (few,) = lists_of(recommender.recommend([history], k=4, hide_seen=False, allow=allowed, block=blocked))
    assert few == [item for item in order[-6:] if item != order[-5]][:4]
    (all_left,) = lists_of(recommender.recommend([history], k=10, hide_seen=True, allow=allowed))
    assert all_left == [item for item in order[-6:] if item not in history]
    (rest,) = lists_of(recommender.recommend([history], k=3, hide_seen=False, block=order[:5]))
    assert rest == order[5:8]
    nothing = recommender.recommend([history, ["m2"]], k=3, hide_seen=True, allow=["m2"])
    assert nothing["history"].to_list() == [0]


@pytest.mark.parametrize("name", ["sasrec", "markov", "ease", "unisrec"])
def test_similar_items_are_those_of_the_highest_cosine(name: str, run_of: Runs) -> None:
    """By numpy over all vectors; the item itself is not listed."""
    recommender = Recommender.load(run_of(name), device="cpu")
    vectors = recommender.vectors.to_dense().numpy().astype(np.float64)
    directions = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-30)
    cosines = directions @ directions[3]
    cosines[3] = -np.inf
    found = recommender.similar(["m3"], k=5)
    assert "m3" not in found["item_id"]
    expected = np.sort(cosines)[::-1][:5]
    np.testing.assert_allclose(found["score"].to_numpy(), expected, atol=1e-6)
    np.testing.assert_allclose([cosines[int(item[1:])] for item in found["item_id"]], expected, atol=1e-6)


def test_a_known_users_history_is_whole(run_of: Runs, tiny_data: tuple[Path, Path]) -> None:
    """Training, validation and test, in the order of time; a typed history needs no user."""
    recommender = Recommender.load(run_of("sasrec"), device="cpu")
    rows = pl.read_csv(tiny_data[0]).filter(pl.col("user_id") == "u3").sort("timestamp")
    assert recommender.history("u3") == rows["item_id"].to_list()
    read = recommender.recommend([recommender.history("u3")], k=3)
    assert_frame_equal(read, recommender.recommend([rows["item_id"].to_list()], k=3))


def test_a_history_longer_than_any_of_the_data_is_read_to_its_end(run_of: Runs) -> None:
    """Only its latest items, as many as the longest history of the data has: positions go no further."""
    recommender = Recommender.load(run_of("e4srec"), device="cpu")
    latest = recommender.history("u3")
    (long,) = lists_of(recommender.recommend([recommender.item_ids * 50 + latest], k=5, hide_seen=False))
    (longer,) = lists_of(recommender.recommend([recommender.item_ids * 90 + latest], k=5, hide_seen=False))
    assert long == longer


@pytest.mark.parametrize("name", TEXTS)
def test_an_item_given_by_the_text_of_another_has_its_text_vector(name: str, run_of: Runs) -> None:
    """Its vector is the other's without what is known of that one beside its text; histories read it as the other."""
    recommender = Recommender.load(run_of(name), device="cpu")
    before = recommender.vectors.clone()
    old = recommender.recommend([["m3"], ["m1", "m3"]], k=16, hide_seen=False)
    items = pl.DataFrame({"item_id": ["n1", "n2"], "title": ["Get Shorty (1995)", "Heat (1995)"]})
    recommender.add_items(items)
    assert_close(recommender.vectors[:16], before, rtol=0, atol=0)
    assert recommender.item_ids[16:] == ["n1", "n2"]
    expected = before[3]
    if isinstance(encoder := recommender.model.item_encoder, FrozenTextItems) and encoder.residual is not None:
        assert encoder.residual.weight[3].abs().max() > 0  # trained, and not a part of what follows
        expected = encoder.projector(encoder.vectors[3])
    assert_close(recommender.vectors[16], expected, rtol=0, atol=1e-5)
    assert (recommender.vectors[17] - recommender.vectors[:17]).abs().amax(1).min() > 1e-3
    again = recommender.recommend([["n1"], ["m1", "n1"]], k=16, hide_seen=False, block=["n1", "n2"])
    assert_frame_equal(again, old, rel_tol=1e-4, abs_tol=1e-5)
    (listed,) = lists_of(recommender.recommend([["n2", "m1"]], k=18, hide_seen=False))
    assert {"n1", "n2"} < set(listed)
    assert recommender.find("heat") == "n2"


@pytest.mark.parametrize("name", ["e4srec_vectors", "llara"])
def test_items_may_be_added_one_after_another(name: str, run_of: Runs) -> None:
    """Statistics of texts are those of the catalogue that was trained on, whatever has been added since."""
    both, one = (Recommender.load(run_of(name), device="cpu") for _ in range(2))
    items = pl.DataFrame({"item_id": ["n1", "n2"], "title": ["Heat (1995)", "Alien (1979), by Ridley Scott"]})
    both.add_items(items)
    one.add_items(items[:1])
    one.add_items(items[1:])
    assert_close(one.vectors, both.vectors)
    histories = [["n1", "m2", "n2"]]
    assert lists_of(one.recommend(histories, hide_seen=False)) == lists_of(both.recommend(histories, hide_seen=False))


def test_new_texts_are_whitened_by_the_trained_catalogue(run_of: Runs) -> None:
    """By hand: `(raw vector - mean) · rotation` with the catalogue's mean and rotation."""
    recommender = Recommender.load(run_of("e4srec_vectors"), device="cpu")
    (backbone,) = recommender.model.backbones
    texts = recommender.data.split.item_texts
    recommender.add_items(pl.DataFrame({"item_id": ["n"], "title": ["Heat (1995)"]}))
    options = {"pooling": "mean", "max_tokens": recommender.data.max_item_tokens}
    mean, rotation = whitening(frozen_vectors(backbone, texts, **options))
    raw = frozen_vectors(backbone, ["Heat (1995)"], **options).double()
    held = recommender.model.item_encoder.vectors
    assert_close(held[16:], ((raw - mean) @ rotation).float())
    with pytest.raises(InputError, match="same vectors of the catalogue's texts as the checkpoint holds"):
        further_text_vectors(backbone, ["Heat"], recommender.data, pooling="mean", held=held.flip(0))


@pytest.mark.parametrize("name", ["sasrec", "markov", "popularity"])
def test_runs_that_know_items_by_their_interactions_take_no_texts(name: str, run_of: Runs) -> None:
    recommender = Recommender.load(run_of(name), device="cpu")
    with pytest.raises(InputError, match="whose items are read as texts"):
        recommender.add_items(pl.DataFrame({"item_id": ["n"], "title": ["Heat"]}))
    assert len(recommender.item_ids) == 16


@pytest.mark.parametrize(
    ("items", "sentence"),
    [
        ({"item_id": ["n1", "n2"], "title": ["Heat", " "]}, "a text for each new item.*1 of 2 without .n2"),
        ({"item_id": ["n1"], "name": ["Heat"]}, "a text for each new item.*columns item_id, name"),
        ({"item_id": ["m1"], "title": ["Heat"]}, "that the catalogue has not, got 1 others .m1"),
        ({"item_id": ["n", "n"], "title": ["Heat", "Alien"]}, "that differ, got 1"),
        ({"item_id": [None], "title": ["Heat"]}, "an id for each new item"),
        ({"title": ["Heat"]}, "a column item_id"),
    ],
)
def test_new_items_are_checked_before_anything_is_added(
    items: dict[str, list[str]], sentence: str, run_of: Runs
) -> None:
    recommender = Recommender.load(run_of("e4srec_vectors"), device="cpu")
    with pytest.raises(InputError, match=sentence):
        recommender.add_items(pl.DataFrame(items))
    assert len(recommender.item_ids) == len(recommender.model.item_encoder.vectors) == 16


FILMS = [
    "Heat",
    "Godfather, The",
    "Alien",
    "Aliens",
    "Sabrina",
    "Sabrina",
    "Terminator 2: Judgment Day",
    "Seven (Se7en)",
]
YEARS = [1995, 1972, 1979, 1986, 1954, 1995, 1991, 1995]


@pytest.mark.parametrize(
    ("typed", "item"),
    [
        *(("Heat", 0), ("heat (1995)", 0), ("The Godfather", 1), ("the godfahter", 1), ("ALIEN", 2), ("Aliens", 3)),
        *(("Sabrina", 5), ("Sabrina (1954)", 4), ("terminator 2", 6), ("Seven", 7), ("Se7en Seven", 7)),
    ],
)
def test_typed_titles_are_understood(typed: str, item: int) -> None:
    """Case, articles, years and small mistakes do not matter; of two of one name the one that is had more is meant."""
    texts = [f"{title} ({year}), Drama" for title, year in zip(FILMS, YEARS, strict=True)]
    matcher = TitleMatcher(FILMS, texts, np.array([1, 1, 1, 1, 2, 3, 1, 1]))
    assert matcher.find(typed) == item


@pytest.mark.parametrize(
    ("typed", "near"), [("Alien 3", "'Alien'"), ("Terminator", "'Terminator 2"), ("Her", "'Heat'"), ("?!", "none")]
)
def test_other_titles_are_not(typed: str, near: str) -> None:
    texts = [f"{title} ({year}), Drama" for title, year in zip(FILMS, YEARS, strict=True)]
    matcher = TitleMatcher([*FILMS, "Terminator 3"], [*texts, "Terminator 3 (2003)"], np.ones(9))
    with pytest.raises(InputError, match="Expected a title of the catalogue, got") as error:
        matcher.find(typed)
    assert near in str(error.value)


def test_histories_are_read_from_every_form(tmp_path: Path) -> None:
    """Lines of interactions in the order of the file, or a list per line."""
    rows = pl.DataFrame({"who": [2, 1, 2, 2], "film": ["a", "b", "c", "a"]})
    lists = pl.DataFrame({"who": [2, 1], "film": [["a", "c", "a"], ["b"]]})
    rows.write_csv(tmp_path / "rows.csv")
    rows.write_parquet(tmp_path / "rows.parquet")
    lists.write_parquet(tmp_path / "lists.parquet")
    lists.write_ndjson(tmp_path / "lists.jsonl")
    for name in ("rows.csv", "rows.parquet", "lists.parquet", "lists.jsonl"):
        found = read_histories(tmp_path / name, user_column="who", item_column="film")
        assert found == (["2", "1"], [["a", "c", "a"], ["b"]])


def test_files_hold_the_lists_of_all_runs(anyo: Anyo, run_of: Runs, tmp_path: Path) -> None:
    """Every form holds the same lines, those of the Python API."""
    runs = [run_of("sasrec"), run_of("markov")]
    histories = {"user_id": ["a", "b"], "item_id": [["m1", "m2"], ["m5"]]}
    pl.DataFrame(histories).write_parquet(tmp_path / "histories.parquet")
    options = [f"--run={runs[0]}", f"--run={runs[1]}", f"--histories={tmp_path / 'histories.parquet'}", "--k=3"]
    for ending in ("parquet", "jsonl", "csv"):
        anyo("recommend", *options, f"--output={tmp_path / 'made' / f'lists.{ending}'}")
    found = pl.read_parquet(tmp_path / "made" / "lists.parquet")
    assert_frame_equal(pl.read_ndjson(tmp_path / "made" / "lists.jsonl", schema=found.schema), found)
    assert_frame_equal(pl.read_csv(tmp_path / "made" / "lists.csv", schema=found.schema), found)
    assert found.columns == ["run", "user_id", "rank", "item_id", "title", "score"]
    assert found["user_id"].to_list() == ["a"] * 3 + ["b"] * 3 + ["a"] * 3 + ["b"] * 3
    for number, run in enumerate(runs):
        own = Recommender.load(run, device="cpu").recommend(histories["item_id"], k=3)
        mine = found[6 * number : 6 * number + 6]
        assert mine["run"].unique().to_list() == [str(run)]
        assert_frame_equal(mine.select("rank", "item_id", "title", "score"), own.drop("history"))


def test_the_terminal_shows_titles_side_by_side(anyo: Anyo, run_of: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    """What was understood goes to stderr, lists with their runs' names to stdout."""
    runs = [str(run_of("sasrec")), str(run_of("markov"))]
    capsys.readouterr()
    main(["recommend", "--run", *runs, "--titles=toy story; Bab", "--k=16"])
    shown = capsys.readouterr()
    assert "'toy story' is understood as m0: Toy Story (1995)" in shown.err
    assert shown.err.count("'Bab' is understood as m7") == 1
    lines = shown.out.splitlines()
    assert lines[1].split()[0::2] == runs
    assert len([line for line in lines if "GoldenEye (1995)" in line]) in (1, 2)
    assert sum(line.count("GoldenEye (1995)") for line in lines) == 2
    assert "u3 has had" in _err(capsys, "--run", run_of("sasrec"), "--user", "u3", "u4")
    assert "1 of 1 lists have fewer than 3 items" in _err(
        capsys, "--run", run_of("sasrec"), "--titles=Babe", "--k=3", "--allow", _ids(run_of("sasrec"), ["m1", "m7"])
    )
    assert "Babe (1995)" in anyo("recommend", "--run", run_of("sasrec"), "--like", "toy story", "--k=15")


def _ids(folder: Path, ids: list[str]) -> Path:
    path = folder.parent / f"{'_'.join(ids)}.csv"
    path.write_text("\n".join(["item_id", *ids]) + "\n")
    return path


def _err(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    main(["recommend", *map(str, words)])
    return capsys.readouterr().err


def test_new_items_of_a_file_are_listed(anyo: Anyo, run_of: Runs, tmp_path: Path) -> None:
    """And may be typed."""
    (tmp_path / "new.csv").write_text("item_id,title,year\nn1,Heat,1995\nn2,Alien,1979\n")
    run = run_of("e4srec_vectors")
    out = anyo(
        "recommend", f"--run={run}", "--titles=Heat; Babe", "--k=18", f"--items={tmp_path / 'new.csv'}", "--seen=show"
    )
    assert "Alien" in out


def test_items_that_a_catalogue_lacks_are_left_out_of_a_files_histories(
    run_of: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And counted; the rest is read."""
    path, out = tmp_path / "histories.csv", tmp_path / "lists.csv"
    path.write_text("user_id,item_id\na,m1\na,x9\na,m2\n")
    said = _err(capsys, "--run", run_of("markov"), "--histories", path, "--output", out)
    assert "since the run's catalogue lacks them: x9 (1 in all)" in said
    own = Recommender.load(run_of("markov")).recommend([["m1", "m2"]])
    assert pl.read_csv(out)["item_id"].to_list() == own["item_id"].to_list()


def test_mistakes_are_named_and_nothing_is_written(
    anyo: Anyo, run_of: Runs, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """One sentence each, exit code 2."""
    run, out, there = run_of("sasrec"), tmp_path / "out.csv", tmp_path / "there.csv"
    there.write_text("")
    empty, lists = tmp_path / "empty.jsonl", tmp_path / "unknown.csv"
    empty.write_text('{"user_id": "a", "item_id": ["m1"]}\n{"user_id": "b", "item_id": []}\n')
    lists.write_text("user_id,item_id\na,m1\nb,x1\n")
    new = tmp_path / "new.csv"
    new.write_text("item_id,title\nn1,Heat\n")
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.yaml").write_text(RunFolder(run).config_file.read_text())
    of_run = f"--run={run}"
    for words, sentence in [
        ((of_run,), "one of --user, --titles, --histories, --like, got none"),
        ((of_run, "--user=u1", "--titles=Babe"), "got --user and --titles"),
        ((of_run, "--user=u41"), "one of the 40 users of interactions, got u41; near it are u"),
        ((of_run, "--titles=Babe; Gold Finger"), "got 'Gold Finger'; the nearest are 'GoldenEye (1995)'"),
        ((of_run, "--titles= ; "), "titles with semicolons between them"),
        ((of_run, "--like=Nowhere Man"), "a title of the catalogue, got 'Nowhere Man'"),
        ((of_run, f"--histories={empty}"), "at least one item in each history"),
        ((of_run, f"--histories={lists}"), "1 of 2 without (b)"),
        ((of_run, f"--histories={tmp_path / 'none.csv'}"), "none.csv"),
        ((of_run, "--user=u1", "--k=0"), "k to be positive"),
        ((of_run, "--user=u1", f"--allow={_ids(run, ['m1', 'y7', 'y8'])}"), "2 of 3 that are not in it (y7, y8; near"),
        ((of_run, "--user=u1", f"--block={_ids(run, ['z1'])}"), "list of blocked items, got 1 of 1"),
        ((of_run, "--user=u1", f"--items={new}"), "whose items are read as texts to add items by their texts"),
        ((f"--run={run_of('popularity')}", "--like=m1"), "whose item vectors can be compared, got Popularity"),
        ((of_run, "--user=u1", "--device=gpu7"), "a device of this machine such as cpu or cuda:0, got gpu7"),
        ((of_run, "--user=u1", "--device=cuda:99"), "a device of this machine such as cpu or cuda:0, got cuda:99"),
        ((f"--run={tmp_path / 'nowhere'}", "--user=u1"), "which has no config.yaml"),
        ((f"--run={bare}", "--user=u1"), "Expected a checkpoint, got no file"),
    ]:
        assert sentence in refused(capsys, anyo, "recommend", *words, f"--output={out}"), words
        assert not out.exists()
    assert "does not exist, got" in refused(capsys, anyo, "recommend", of_run, "--user=u1", f"--output={there}")
    assert "to end in .parquet" in refused(capsys, anyo, "recommend", of_run, "--user=u1", f"--output={out}.xlsx")
    assert there.read_text() == ""


def test_the_python_api_refuses_what_it_cannot_read(run_of: Runs) -> None:
    recommender = Recommender.load(run_of("sasrec"), device="cpu")
    for histories, sentence in [
        ([["m1"], []], "at least one item in history 1, got none"),
        ([["m1", "x"]], "got 1 of 2 that are not in it"),
        (["m1"], "a list of item ids as history 0"),
    ]:
        with pytest.raises(InputError, match=sentence):
            recommender.recommend(histories)
    assert recommender.recommend([]).is_empty()


def test_the_readmes_script_recommends(
    run_of: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With titles of the tiny data in the place of MovieLens's."""
    section = (CONFIGS.parent / "README.md").read_text().split("\n## Recommend\n")[1].split("\n## ")[0]
    script = section.split("```python\n")[1].split("```")[0]
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    (tmp_path / "runs" / "demo" / "sasrec").symlink_to(run_of("sasrec"))
    monkeypatch.chdir(tmp_path)
    for shown, tiny in {'"Heat"': '"Copycat"', '"Alien"': '"Babe"', '"10"': '"u10"'}.items():
        assert script.count(shown) == 1
        script = script.replace(shown, tiny)
    exec(compile(script, "README.md", "exec"), {})
    assert "item_id" in capsys.readouterr().out

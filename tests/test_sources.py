"""Readers: every published form gives the same tables, every bad file one clear sentence."""

import gzip
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from polars.testing import assert_frame_equal

from anyo_lightning.data import sources
from anyo_lightning.data.datamodule import RecDataModule
from anyo_lightning.data.item_texts import item_texts
from anyo_lightning.data.sources import Columns, Source, load_source, read_files
from anyo_lightning.disk import file_sha256
from anyo_lightning.errors import InputError

ROWS = [("u1", "i2", 5, 20), ("u1", "i1", 3, 10), ("u2", "i1", 4, 30)]
INTERACTIONS = pl.DataFrame(ROWS, schema=["user_id", "item_id", "rating", "timestamp"], orient="row")
ITEMS = pl.DataFrame({"item_id": ["i1", "i2"], "title": ["Käse, mild", 'A "B"'], "year": ["1995", None]})


def write(path: Path, content: str | bytes) -> Path:
    """Write text or bytes, gzipped when the name says so."""
    data = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def write_table(table: pl.DataFrame, path: Path) -> Path:
    """Write a table in the form of the file's ending."""
    match path.name.removesuffix(".gz").rpartition(".")[2]:
        case "csv":
            return write(path, table.write_csv())
        case "tsv":
            return write(path, table.write_csv(separator="\t"))
        case "jsonl":
            return write(path, table.write_ndjson())
        case _:
            table.write_parquet(path)
            return path


def refused(expected: str, call: Callable[[], object]) -> None:
    """Assert that the call ends in one line that holds the expected words."""
    with pytest.raises(InputError, match=expected) as caught:
        call()
    assert "\n" not in str(caught.value)


def expect(source: Source, texts: list[str]) -> None:
    """Assert that a source holds the interactions above, in file order, with these item texts."""
    table = source.interactions.select("user_id", "item_id", "timestamp")
    assert table.rows() == [(user, item, moment) for user, item, _, moment in ROWS]
    assert table.schema["timestamp"].is_numeric()
    assert source.interactions["rating"].to_list() == [5.0, 3.0, 4.0]
    by_item = dict(zip(source.items["item_id"], item_texts(source.items, source.template), strict=True))
    assert [by_item["i1"], by_item["i2"]] == texts


@pytest.mark.parametrize("ending", ["csv", "csv.gz", "tsv", "tsv.gz", "jsonl", "jsonl.gz", "parquet"])
def test_files_of_every_form_give_the_same_tables(tmp_path: Path, ending: str) -> None:
    """The form of a file does not matter, nor do further columns or the names of the columns."""
    names = {"user_id": "who", "item_id": "what", "rating": "stars", "timestamp": "when"}
    interactions = write_table(INTERACTIONS.rename(names).with_columns(noise=pl.lit("x")), tmp_path / f"log.{ending}")
    items = write_table(ITEMS.rename({"item_id": "what"}), tmp_path / f"items.{ending}")
    columns = Columns(user="who", item="what", timestamp="when", rating="stars")
    source = read_files(interactions, items, columns=columns)
    assert source.name == "log"
    assert source.interactions.columns == ["user_id", "item_id", "timestamp", "rating"]
    expect(source, ["Käse, mild (1995)", 'A "B"'])


def test_numeric_ids_dates_and_lists_from_parquet(tmp_path: Path) -> None:
    """Ids that pandas turned into floats lose the .0, dates become seconds, lists are joined."""
    moments = pl.Series(["1970-01-01 00:00:01.5", "1970-01-02 00:00:00"]).str.to_datetime()
    interactions = pl.DataFrame({"user_id": [1, 2], "item_id": [7.0, 8.0], "timestamp": moments})
    items = pl.DataFrame({"item_id": [7, 8], "year": [1995.0, None], "tags": [["a", "b"], []], "x": [{"k": 1}] * 2})
    source = read_files(
        write_table(interactions, tmp_path / "a.parquet"), write_table(items, tmp_path / "b.parquet"), columns=Columns()
    )
    assert source.interactions.rows() == [("1", "7", 1.5), ("2", "8", 86400.0)]
    assert source.items.rows() == [("7", "1995", "a, b"), ("8", None, "")]


def test_files_without_a_catalogue(tmp_path: Path) -> None:
    """Without a catalogue file, the items are those of the interactions, in order of appearance."""
    source = read_files(write_table(INTERACTIONS, tmp_path / "log.csv"), None, columns=Columns())
    assert source.items.to_dict(as_series=False) == {"item_id": ["i2", "i1"]}
    assert item_texts(source.items, source.template) == ["", ""]


def test_recbole_folder(tmp_path: Path) -> None:
    """Atomic files: types in the header are cut off, quotes are ordinary characters."""
    write(tmp_path / "x.inter", "user_id:token\titem_id:token\trating:float\ttimestamp:float\n" + _lines("\t"))
    write(tmp_path / "x.item", 'item_id:token\tmovie_title:token_seq\tclass:token_seq\ni1\t"Cheese\tfood\ni2\tA\t\n')
    expect(load_source(tmp_path), ['"Cheese, food', "A"])


def test_recbole_benchmark_files_become_a_split_column(tmp_path: Path) -> None:
    """Ready-made train, valid and test files are read as one table."""
    for stage in ("train", "valid", "test"):
        write(tmp_path / f"x.{stage}.inter", "user_id:token\titem_id:token\ttimestamp:float\nu\ti\t1\n")
    write(tmp_path / "x.item", "item_id:token\ni\n")
    assert sorted(load_source(tmp_path).interactions["split"]) == ["test", "train", "valid"]


def test_movielens_100k_folder(tmp_path: Path) -> None:
    """GroupLens's own ML-100K: Latin-1, one flag per genre, the year in the title."""
    write(tmp_path / "u.data", _lines("\t"))
    flags = ["0"] * 19
    flags[5] = flags[16] = "1"
    rows = [
        ["i1", "Käse, Der (1995)", "01-Jan-1995", "", "http://x", *flags],
        ["i2", "unknown", "", "", "", "1", *["0"] * 18],
    ]
    write(tmp_path / "u.item", "\n".join("|".join(row) for row in rows).encode("latin-1"))
    expect(load_source(tmp_path), ["Käse, Der (1995), Comedy, Thriller", "unknown"])


@pytest.mark.parametrize("encoding", ["latin-1", "utf8"])
def test_movielens_1m_folder(tmp_path: Path, encoding: str) -> None:
    """ML-1M and ML-10M: fields between double colons, a single colon may be in a title."""
    write(tmp_path / "ratings.dat", _lines("::"))
    write(tmp_path / "movies.dat", "i1::Käse: 2 (1995)::Comedy|War\ni2::A::\n".encode(encoding))
    expect(load_source(tmp_path), ["Käse: 2 (1995), Comedy, War", "A"])


def test_movielens_latest_folder(tmp_path: Path) -> None:
    """The CSV form, with its placeholder for no genres."""
    write(tmp_path / "ratings.csv", "userId,movieId,rating,timestamp\n" + _lines(","))
    write(
        tmp_path / "movies.csv", 'movieId,title,genres\ni1,"A, The (1995) ",X|Y\ni2,B (2006-2007),(no genres listed)\n'
    )
    expect(load_source(tmp_path), ["A, The (1995), X, Y", "B (2006)"])


@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize("year", [2014, 2018, 2023])
def test_amazon_folder(tmp_path: Path, year: int, ending: str) -> None:
    """Reviews and metadata of the three releases; 2014's metadata are Python literals, not JSON."""
    names = ("user_id", "parent_asin", "rating") if year == 2023 else ("reviewerID", "asin", "overall")
    when = "timestamp" if year == 2023 else "unixReviewTime"
    reviews = [{**dict(zip(names, row, strict=False)), when: row[3], "images": []} for row in ROWS]
    categories = {
        2014: ("categories", [["Cheese", "It's"], ["Cheese", "Mild"]]),
        2018: ("category", ["Cheese", "It's", "Mild"]),
    }
    field, values = categories.get(year, ("categories", ["Cheese", "It's", "Mild"]))
    items = [
        {names[1]: "i1", "title": "A &amp; B", field: values, "price": 3.5, "details": {"x": [1]}},
        {names[1]: "i2", "title": 'C "D"', field: [], "price": None},
        {names[1]: "unused", "title": "E"},
    ]
    dump = repr if year == 2014 else json.dumps
    write(tmp_path / f"Food.json{ending}", "".join(json.dumps(row) + "\n" for row in reviews))
    write(tmp_path / f"meta_Food.json{ending}", "".join(dump(row) + "\n" for row in items))
    source = load_source(tmp_path)
    expect(source, ["A & B, Cheese, It's, Mild", 'C "D"'])
    assert source.items.height == 2


def test_amazon_metadata_with_gaps_and_repetitions(tmp_path: Path) -> None:
    """The published metadata are imperfect: counted in a warning, not refused."""
    rows = [{"user_id": user, "parent_asin": item, "rating": rating, "timestamp": t} for user, item, rating, t in ROWS]
    write(tmp_path / "X.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    write(tmp_path / "meta_X.jsonl", '{"parent_asin":"i1","title":"first"}\n{"parent_asin":"i1","title":"second"}\n')
    with pytest.warns(UserWarning, match=r"1 rows .*repeat|lacks 1 of 2 items of the interactions \(i2\)") as caught:
        source = load_source(tmp_path)
    assert len(caught) == 2
    expect(source, ["first", ""])


def test_amazon_text_is_text(tmp_path: Path) -> None:
    """Titles in brackets stay, lists and objects are joined with their characters, HTML is read as what it shows."""
    items = [
        {"title": "[2 Pack] Cable, 6ft", "description": ["Line\nbreak", "Line\nbreak", "b\u00e9"], "features": []},
        {
            "title": "Caf&eacute; &#34;A&#34; &reg; &amp;amp; <b>B</b><br/>C &lt;3 <vector> AT&T",
            "details": {"a": ["x"]},
        },
        {"title": "{Kit} Soap", "description": "[not a list", "details": {"W": {"H": 1, "none": None}, "x": True}},
        {"title": "4", "description": "[1] plain", "features": ["f", 'q"']},
    ]
    items = [{"parent_asin": f"i{number}"} | item for number, item in enumerate(items)]
    reviews = [
        {"user_id": "u", "parent_asin": f"i{number}", "rating": 1, "timestamp": number} for number in range(len(items))
    ]
    for name, rows in (("X.jsonl", reviews), ("meta_X.jsonl", items)):
        write(tmp_path / name, "".join(json.dumps(row) + "\n" for row in rows))
    catalogue = load_source(tmp_path).items
    texts = item_texts(catalogue, "{title}")
    assert texts == ["[2 Pack] Cable, 6ft", 'Café "A" ® & B C <3 <vector> AT&T', "{Kit} Soap", "4"]
    assert catalogue["description"].to_list() == ["Line\nbreak, bé", None, "[not a list", "[1] plain"]
    assert catalogue["features"].to_list() == ["", None, None, 'f, q"']
    assert catalogue["details"].to_list() == [None, "a: x", "W: H: 1, x: True", None]


@pytest.mark.parametrize("year", [2014, 2018, 2023])
def test_amazon_folders_in_brackets_are_not_patterns(tmp_path: Path, year: int) -> None:
    """The folder's own files are read."""
    for name, user in (("a[1]", "u"), ("a1", "wrong")):
        (folder := tmp_path / name).mkdir()
        names = ("user_id", "parent_asin", "rating", "timestamp")
        if year < 2023:
            names = ("reviewerID", "asin", "overall", "unixReviewTime")
        write(folder / "X.jsonl", json.dumps(dict(zip(names, [user, "i", 1, 1], strict=True))))
        write(folder / "meta_X.jsonl", (repr if year == 2014 else json.dumps)({names[1]: "i", "title": "T"}))
    assert load_source(tmp_path / "a[1]").interactions["user_id"].to_list() == ["u"]


def test_json_arrays_and_python_dictionaries(tmp_path: Path) -> None:
    """An array, Steam's lines of Python, and the same as JSON lines are the same tables."""
    users = [{"user_id": user, "item_id": item, "rating": rating, "timestamp": t} for user, item, rating, t in ROWS]
    items = [{"item_id": "i1", "title": "Käse", "tags": ["a", "it's"]}, {"item_id": "i2", "title": None, "tags": []}]
    forms: dict[str, Callable[[list[dict[str, object]]], str]] = {
        "lines": lambda rows: "\n".join(map(json.dumps, rows)) + "\n\n",
        "array": lambda rows: "\n" + json.dumps(rows, indent=1),
        "python": lambda rows: "\n\n".join(map(repr, rows)),
        "python2": lambda rows: "\n".join(repr(row).replace("'user_id'", "u'user_id'") for row in rows),
    }
    for name, dump in forms.items():
        for ending in ("json", "jsonl.gz"):
            log, catalogue = write(tmp_path / f"{name}.{ending}", dump(users)), write(tmp_path / "i.json", dump(items))
            source = read_files(log, catalogue, columns=Columns(rating="rating"))
            expect(source, ["Käse", ""])
            assert source.items["tags"].to_list() == ["a, it's", ""]
    marked = write(tmp_path / "marked.jsonl", "\ufeff" + forms["lines"](users))
    assert read_files(marked, None, columns=Columns()).interactions.height == 3
    mixed = write(tmp_path / "mixed.json", "{'item_id': 'i1', 'price': 4.99}\n{'item_id': 'i2', 'price': 'Free'}\n")
    assert read_files(log, mixed, columns=Columns()).items["price"].to_list() == ["4.99", "Free"]


def test_dates_as_text(tmp_path: Path) -> None:
    """ISO dates are seconds since 1970, with or without a time or a zone; as Parquet has them."""
    for dates, seconds in {
        ("1970-01-02", "1970-01-01"): [86400, 0],
        ("1970-01-01 00:00:01", "1970-01-01 00:00:02.5"): [1, 2.5],
        ("1970-01-01T00:00:01Z", "1970-01-01T02:00:00+02:00"): [1, 0],
    }.items():
        table = pl.DataFrame({"user_id": ["u", "u"], "item_id": ["i", "j"], "timestamp": dates})
        for ending in ("csv", "jsonl"):
            source = read_files(write_table(table, tmp_path / f"x.{ending}"), None, columns=Columns())
            assert source.interactions["timestamp"].to_list() == seconds
    bad = write(tmp_path / "bad.csv", "user_id,item_id,timestamp\nu,i,1970-01-01\nu,j,1970-01-02\nu,k,soon\n")
    refused(
        "an ISO date as timestamp in .*bad.csv, got 'soon' in row 3", lambda: read_files(bad, None, columns=Columns())
    )


def test_moments_closer_than_a_microsecond_stay_apart(tmp_path: Path) -> None:
    """Nanoseconds are kept as integers, from Parquet and from text; durations count like dates."""
    fine = pl.Series(["2024-01-01T00:00:00.123456789", "2024-01-01T00:00:00.123456790"])
    forms = {
        "a.parquet": fine.str.to_datetime(time_unit="ns"),
        "a.csv": fine,
        "b.parquet": fine.str.to_datetime(time_unit="ns").to_physical().cast(pl.UInt64),
        "c.csv": pl.Series(["1704067200123456789", "1704067200123456790"]),
    }
    for name, moments in forms.items():
        table = pl.DataFrame({"user_id": ["u", "u"], "item_id": ["i", "j"], "timestamp": moments})
        source = read_files(write_table(table, tmp_path / name), None, columns=Columns())
        assert source.interactions["timestamp"].to_list() == [1704067200123456789, 1704067200123456790]
    spans = pl.Series([1500, 2000]).cast(pl.Duration("ms"))
    table = pl.DataFrame({"user_id": ["u", "u"], "item_id": ["i", "j"], "timestamp": spans})
    source = read_files(write_table(table, tmp_path / "d.parquet"), None, columns=Columns())
    assert source.interactions["timestamp"].to_list() == [1.5, 2.0]


def test_ids_of_every_kind(tmp_path: Path) -> None:
    """Large unsigned integers stay as they are; floating-point numbers that stand for several ids are refused."""
    large = pl.Series([2**64 - 1, 2**64 - 2], dtype=pl.UInt64)
    table = pl.DataFrame({"user_id": large, "item_id": ["i", "j"], "timestamp": [1, 2]})
    source = read_files(write_table(table, tmp_path / "a.parquet"), None, columns=Columns())
    assert source.interactions["user_id"].to_list() == ["18446744073709551615", "18446744073709551614"]
    for number, values in enumerate(([2.0**53], [2.0**24], [float("inf")], [1e300])):
        dtype = pl.Float32 if number == 1 else pl.Float64
        bad = table[:1].with_columns(user_id=pl.Series(values, dtype=dtype))
        path = write_table(bad, tmp_path / f"b{number}.parquet")
        refused(
            "user_id in .* as integers or text, got floating", lambda p=path: read_files(p, None, columns=Columns())
        )
    log = write(tmp_path / "c.csv", "user_id,item_id,timestamp\n1.0,2.0,3.0\n")  # pandas, where a value was missing
    items = write(tmp_path / "i.csv", "Item,Title,Release Year\n2,T,1950.0\n3,U,\n")
    source = read_files(log, items, columns=Columns(catalogue_item="Item"))
    assert source.interactions.rows() == [("1", "2", 3.0)]
    assert item_texts(source.items, source.template) == ["T (1950)", "U"]


def test_the_order_of_the_file_instead_of_timestamps(tmp_path: Path) -> None:
    """Without a column of timestamps the rows' numbers stand for them, and the source says so."""
    log = write(tmp_path / "x.csv", "user_id,item_id\nu,b\nu,a\n")
    source = read_files(log, None, columns=Columns(timestamp=None))
    assert source.interactions.rows() == [("u", "b", 0), ("u", "a", 1)]
    assert not source.timed


def test_options_of_files_are_never_ignored(tmp_path: Path) -> None:
    """Columns, a catalogue or a folder beside what does not read them are refused."""
    log = write_table(INTERACTIONS, tmp_path / "log.csv")
    for options, expected in [
        ({"columns": Columns(user="who")}, "data.interactions beside data.columns.user who, got no file"),
        ({"columns": Columns(timestamp=None)}, "data.interactions beside data.columns.timestamp None, got no file"),
        ({"columns": Columns(separator=";")}, "data.interactions beside data.columns.separator ;, got no file"),
        ({"items": log}, "data.interactions beside data.items .*log.csv, got no file"),
        ({"interactions": log, "source": str(tmp_path)}, "data.source or data.interactions, got both"),
    ]:
        refused(expected, lambda o=options: RecDataModule(**o).read())
    assert RecDataModule(interactions=log).read().interactions.height == 3


def _lines(separator: str) -> str:
    return "".join(separator.join(str(value) for value in row) + "\n" for row in ROWS)


def test_unknown_source_and_unknown_folder(tmp_path: Path) -> None:
    """The sentence lists the names, or what the folder holds."""
    refused("source to be one of ml-100k, ml-1m or a folder, got 'ml-100'", lambda: load_source("ml-100"))
    write(tmp_path / "notes.md", "hello")
    refused("RecBole, MovieLens or Amazon files in .*, got notes.md", lambda: load_source(tmp_path))
    refused("give files as interactions and items", lambda: load_source(tmp_path / "notes.md"))


def test_missing_column_lists_those_there(tmp_path: Path) -> None:
    """A misnamed column is named, with the ones that are there."""
    for ending in ("csv", "parquet", "jsonl"):
        path = write_table(INTERACTIONS, tmp_path / f"log.{ending}")
        expected = "column uid in .*, got the columns user_id, item_id, rating, timestamp"
        refused(expected, lambda path=path: read_files(path, None, columns=Columns(user="uid")))
    write(tmp_path / "x.inter", "user_id:token\titem_id:token\nu\ti\n")
    refused("column timestamp in .*x.inter, got the columns user_id, item_id", lambda: load_source(tmp_path))


@pytest.mark.parametrize("value", ["yesterday", "", "nan", "2024-01-01", "inf", "18446744073709551615x"])
def test_timestamps_must_be_numbers(tmp_path: Path, value: str) -> None:
    """The sentence shows the first bad value and its row."""
    path = write(tmp_path / "log.csv", f"user_id,item_id,timestamp\nu,i,1\nu,j,{value}\nu,k,3.5\n")
    refused(
        r"a number as timestamp in .*log.csv, got .* in row 2 \(1 ", lambda: read_files(path, None, columns=Columns())
    )


def test_ids_must_be_there_and_a_catalogue_with_gaps_is_told(tmp_path: Path) -> None:
    """Empty ids are refused; of repeated catalogue rows the first counts, and lacking ones are kept without text."""
    gap = write(tmp_path / "gap.csv", "user_id,item_id,timestamp\nu,i,1\n,i,2\n")
    refused("a value of user_id in each row .* none in row 2", lambda: read_files(gap, None, columns=Columns()))
    log = write_table(INTERACTIONS, tmp_path / "log.csv")
    items = write(tmp_path / "items.csv", "item_id,title\ni1,first\ni3,x\ni1,second\n")
    with pytest.warns(UserWarning, match=r"1 rows .*repeat|lacks 1 of 2 items of the interactions \(i2\)") as caught:
        source = read_files(log, items, columns=Columns())
    assert len(caught) == 2
    assert source.items.rows() == [("i1", "first"), ("i3", "x"), ("i2", None)]
    other = write(tmp_path / "other.csv", "item_id,title\n1,a\n2,b\n")
    refused(
        r"items of the interactions \(i2, i1\) in .*other.csv, got others \(1, 2\)",
        lambda: read_files(log, other, columns=Columns()),
    )


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz", "a.tsv", "a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_empty_files(tmp_path: Path, name: str) -> None:
    """No bytes, no rows, no file: each is said."""
    path = tmp_path / name
    refused("a file at .*, got nothing there", lambda: read_files(path, None, columns=Columns()))
    path.write_bytes(b"")
    refused("rows in .*, got an empty file", lambda: read_files(path, None, columns=Columns()))
    write_table(INTERACTIONS.clear(), path)
    refused("rows in .*, got an empty", lambda: read_files(path, None, columns=Columns()))


def test_other_encodings_and_other_content(tmp_path: Path) -> None:
    """Latin-1 text, a broken line, an unknown ending, a file that is not Parquet."""
    log = write_table(INTERACTIONS, tmp_path / "log.csv")
    latin = "item_id,title\ni1,Käse\n".encode("latin-1")
    for path, content, expected in [
        ("a.csv", latin, "UTF-8 text in .*a.csv"),
        ("a.csv.gz", latin, "UTF-8 text in .*a.csv.gz"),
        ("a.jsonl", '{"item_id":"Käse"}\n'.encode("latin-1"), "UTF-8 text in .*a.jsonl"),
        ("b.jsonl", '{"item_id":1}\n{"item_id":\n', "well-formed file at .*b.jsonl"),
        ("b.csv", "item_id,title\ni1,a,b,c\n", "2 fields in line 2 of .*b.csv, got 4"),
        ("b.parquet", "item_id,title\n" * 9, "well-formed file at .*b.parquet"),
        ("b.xlsx", "PK", "b.xlsx to end in csv, tsv, parquet, jsonl or json, got 'xlsx'"),
    ]:
        file = write(tmp_path / path, content)
        refused(expected, lambda file=file: read_files(log, file, columns=Columns()))
    nested = write_table(pl.DataFrame({"user_id": [["u"]], "item_id": ["i"], "timestamp": [1]}), tmp_path / "n.parquet")
    refused("one value per row as user_id in .*, got List", lambda: read_files(nested, None, columns=Columns()))
    (tmp_path / "empty").mkdir()
    refused("a folder of .parquet files", lambda: read_files(tmp_path / "empty", None, columns=Columns()))


@pytest.mark.parametrize("form", ["u.data", "ratings.dat"])
def test_movielens_folders_with_bad_files(tmp_path: Path, form: str) -> None:
    """A missing catalogue file and a file with fewer fields are named."""
    write(tmp_path / form, _lines("\t" if form == "u.data" else "::"))
    refused("a file at .*(u.item|movies.dat), got nothing there", lambda: load_source(tmp_path))
    write(tmp_path / "u.item", "i1|A\n")
    write(tmp_path / "movies.dat", "i1::A::x\ni2::A::x\n")
    write(tmp_path / form, "1 2 3\n")
    refused(
        "4 fields in line 1 of .*(u.data|ratings.dat), got 1",
        lambda: load_source(tmp_path),
    )


def test_a_2014_metadata_line_that_is_no_dictionary(tmp_path: Path) -> None:
    """The line's number is in the sentence."""
    write(tmp_path / "X.json", '{"reviewerID":"u","asin":"i","overall":1,"unixReviewTime":1}\n')
    write(tmp_path / "meta_X.json", "{'asin': 'i'}\n{'asin': open}\n")
    refused("a dictionary in line 2 of .*meta_X.json", lambda: load_source(tmp_path))


def test_amazon_folders_with_bad_files(tmp_path: Path) -> None:
    """No reviews, two files of reviews, an empty one, misnamed fields."""
    write(tmp_path / "meta_X.jsonl.gz", '{"parent_asin":"i","title":"t"}\n')
    refused("one file with reviews and one meta_ file in .*, got meta_X.jsonl.gz", lambda: load_source(tmp_path))
    reviews = write(tmp_path / "X.jsonl.gz", "")
    refused("rows in .*X.jsonl.gz, got an empty file", lambda: load_source(tmp_path))
    write(reviews, '{"user_id":"u","parent_asin":"i","rating":1,"time":1}\n')
    refused("column timestamp in .*, got the columns user_id, parent_asin, rating, time", lambda: load_source(tmp_path))
    write(tmp_path / "Y.jsonl", "{}\n")
    refused("got X.jsonl.gz, Y.jsonl, meta_X.jsonl.gz", lambda: load_source(tmp_path))


RANDOM = np.random.default_rng(0)
LARGE = pl.DataFrame(
    {
        "user_id": RANDOM.integers(0, 2**40, 500).astype(str),
        "item_id": RANDOM.integers(0, 2**40, 500).astype(str),
        "timestamp": np.arange(500),
    }
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 0.999), form=st.sampled_from(["csv", "jsonl"]))
def test_a_truncated_gzip_is_never_read(tmp_path: Path, share: float, form: str) -> None:
    """Wherever a compressed file breaks off, it is refused in one line."""
    whole = gzip.compress((LARGE.write_csv() if form == "csv" else LARGE.write_ndjson()).encode())
    path = tmp_path / f"log.{form}.gz"
    path.write_bytes(whole[: int(share * len(whole))])
    refused("truncated|empty|well-formed", lambda: read_files(path, None, columns=Columns()))


WORDS = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), max_size=8)
IDS = WORDS.filter(bool)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(st.tuples(IDS, IDS, st.integers(-(2**60), 2**60)), min_size=1, max_size=8),
    form=st.sampled_from(["csv", "tsv.gz", "jsonl", "jsonl.gz", "parquet"]),
)
def test_any_text_survives_every_form(tmp_path: Path, rows: list[tuple[str, str, int]], form: str) -> None:
    """Quotes, separators, spaces and any script: what is written is what is read, in order."""
    table = pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row")
    path = write_table(table, tmp_path / f"log.{form}")
    assert_frame_equal(read_files(path, None, columns=Columns()).interactions, table)


@pytest.mark.data
def test_ml_100k_is_fetched_once_and_repaired(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The terms are printed when fetched; damaged files are put aside, not deleted, and fetched again."""
    monkeypatch.setenv("ANYO_CACHE", str(tmp_path))
    source = load_source("ml-100k")
    assert (source.interactions.height, source.items.height) == (100_000, 1682)
    assert "no redistribution" in capsys.readouterr().err
    load_source("ml-100k")
    assert capsys.readouterr().err == ""
    damaged = next(tmp_path.rglob("ml-100k.inter"))
    damaged.write_bytes(damaged.read_bytes()[:1000])
    with pytest.warns(UserWarning, match="ml-100k is damaged: kept as ml-100k.damaged-1"):
        assert load_source("ml-100k").interactions.height == 100_000
    assert (damaged.parent.parent / "ml-100k.damaged-1" / "ml-100k.inter").stat().st_size == 1000


def test_ml_1m_is_fetched_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the address that is GroupLens's, here of a small archive of the same form; the terms are printed once."""
    with zipfile.ZipFile(tmp_path / "ml-1m.zip", "w") as archive:
        archive.writestr("ml-1m/ratings.dat", _lines("::"))
        archive.writestr("ml-1m/movies.dat", "i1::Käse: 2 (1995)::Comedy|War\ni2::A::\n".encode("latin-1"))
        archive.writestr("ml-1m/README", "")
    monkeypatch.setenv("ANYO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sources, "ML_1M", (tmp_path / "ml-1m.zip").as_uri())
    refused("file:.* to have SHA-256 a6898adb", lambda: load_source("ml-1m"))
    monkeypatch.setattr(sources, "ML_1M_SHA256", file_sha256(tmp_path / "ml-1m.zip"))
    expect(load_source("ml-1m"), ["Käse: 2 (1995), Comedy, War", "A"])
    assert "no redistribution" in capsys.readouterr().err
    (tmp_path / "ml-1m.zip").unlink()
    load_source("ml-1m")
    assert capsys.readouterr().err == ""


@pytest.mark.data
def test_a_wheel_with_other_content_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wheel whose SHA-256 differs is named, and nothing of it is kept."""
    monkeypatch.setenv("ANYO_CACHE", str(tmp_path))
    monkeypatch.setattr(sources, "ML_100K_WHEEL_SHA256", "0" * 64)
    refused("recbole==1.2.1 to have SHA-256 0000", lambda: load_source("ml-100k"))
    assert list(tmp_path.rglob("*.inter")) == list(tmp_path.rglob("*.whl")) == []


@pytest.mark.filterwarnings("ignore:.*have no text")
def test_python_may_give_strings_and_a_dictionary(tmp_path: Path) -> None:
    """As docs/python.md does: files as strings, columns as a dictionary, positions as numbers."""
    rows = "".join(f"u{user},i{item},{item}\n" for user in range(6) for item in range(6))
    (tmp_path / "ratings.csv").write_text("user_id,item_id,time\n" + rows)
    (tmp_path / "bare.csv").write_text(rows)
    cases: list[tuple[str, Any]] = [
        ("ratings.csv", {"timestamp": "time"}),
        ("bare.csv", {"user": 0, "item": 1, "timestamp": 2}),
        ("ratings.csv", Columns(timestamp=None)),
    ]
    for name, columns in cases:
        data = RecDataModule(interactions=str(tmp_path / name), columns=columns)
        data.setup("fit")
        assert data.split.users == 6
    mistakes: list[tuple[Any, str]] = [
        ({"time": "time"}, "Expected columns to be among user, .* got 'time'"),
        ("time", "Expected columns to be a dictionary with user, .* got 'time'"),
    ]
    for columns, sentence in mistakes:
        with pytest.raises(InputError, match=sentence):
            RecDataModule(interactions="ratings.csv", columns=columns)

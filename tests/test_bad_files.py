"""What people give by mistake: each bad file or option ends with exit code 2 and one sentence, never a traceback."""

import gzip
import io
import json
import re
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import polars as pl
import pytest

from anyo_lightning.cli.main import main

LOG = "user_id,item_id,timestamp\nu,i,1\nu,j,2\nu,i,3\n"
USER, NO_USER = pl.Series("user_id", ["u", "v"]), {"item_id": ["i", "j"], "timestamp": [1, 2]}


def parquet(**columns: object) -> bytes:
    """Interactions as Parquet, with these columns instead of the good ones."""
    file = io.BytesIO()
    pl.DataFrame({"user_id": USER, **NO_USER} | columns).write_parquet(file)
    return file.getvalue()


def numbers(cases: Sequence[object]) -> list[str]:
    """Names of cases whose bytes hold the time at which they were packed."""
    return [str(number) for number in range(len(cases))]


def zipped(**files: str) -> bytes:
    """A zip archive; the names' underscores stand for dots."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in files.items():
            archive.writestr(name.replace("_", "."), content)
    return file.getvalue()


# name of the file, its content, further options, the sentence
INTERACTIONS: list[tuple[str, str | bytes | None, str, str]] = [
    # files
    ("x.csv", None, "", "Expected a file at .*x.csv, got nothing there"),
    ("x.csv", "", "", "Expected rows in .*x.csv, got an empty file"),
    ("x.csv", "\n\n", "", "Expected rows in .*x.csv, got an empty file"),
    ("x.csv", "user_id,item_id,timestamp\n", "", "Expected rows in .*x.csv, got an empty table"),
    ("x.jsonl", "\n\n", "", "Expected rows in .*x.jsonl, got an empty file"),
    ("x.json", "[]", "", "Expected rows in .*x.json, got an empty file"),
    ("x.xlsx", b"PK\x03\x04", "", "Expected .*x.xlsx to end in csv, tsv, parquet, jsonl or json, got 'xlsx'"),
    ("log", LOG, "", "Expected .*log to end in csv, tsv, parquet, jsonl or json, got"),
    ("x.parquet", LOG, "", "Expected a readable, well-formed file at .*x.parquet"),
    ("x.parquet", parquet()[:-20], "", "Expected a readable, well-formed file at .*x.parquet"),
    ("x.csv.gz", gzip.compress(LOG.encode() * 99)[:-20], "", "Expected a complete file at .*x.csv.gz, got a truncated"),
    ("x.csv.gz", b"\x1f\x8bnot gzip at all", "", "Expected a (readable, well-formed|complete) file at .*x.csv.gz"),
    ("x.zip", b"not a zip", "", "Expected a readable, well-formed file at .*x.zip"),
    ("x.zip", zipped(a_csv=LOG, b_csv=LOG), "", "Expected one file in .*x.zip, got a.csv, b.csv"),
    ("x.zip", zipped(a_doc=LOG), "", "Expected .*x.zip to end in csv, tsv, parquet, jsonl or json, got 'doc'"),
    ("x.zip", zipped(a_csv=""), "", "Expected rows in .*x.zip, got an empty file"),
    # encodings
    ("x.csv", LOG.encode("utf-16"), "", "Expected UTF-8 text in .*x.csv, got UTF-16"),
    ("x.csv", LOG.replace("u", "ü").encode("latin-1"), "", "Expected UTF-8 text in .*x.csv, got other bytes"),
    ("x.csv", (LOG + '"ü","i",1\n').encode("latin-1"), "", "Expected UTF-8 text in .*x.csv, got other bytes"),
    ("x.jsonl", '{"user_id":"ü"}\n'.encode("latin-1"), "", "Expected UTF-8 text in .*x.jsonl, got other bytes"),
    ("x.json", '[{"user_id":"ü"}]'.encode("latin-1"), "", "Expected UTF-8 text in .*x.json, got other bytes"),
    ("x.jsonl", "{'user_id':'ü'}\n".encode("latin-1"), "", "Expected UTF-8 text in .*x.jsonl, got other bytes"),
    # form
    ("x.csv", LOG + "w,i\n", "", "Expected 3 fields in line 5 of .*x.csv, got 2"),
    ("x.csv", LOG + "w,i,1,9\n", "", "Expected 3 fields in line 5 of .*x.csv, got 4"),
    ("x.csv", LOG + '"w,i,1\n', "", "Expected well-formed quotes in line 5 of .*x.csv, got: unexpected end of data"),
    ("x.csv", LOG + 'w,"i" 1,1\n', "", "Expected well-formed quotes in line 5 of .*x.csv, got: ',' expected"),
    ("x.csv", LOG.replace("item_id", "user_id"), "", "Expected each column once in .*x.csv, got user_id repeatedly"),
    ("x.tsv", LOG, "", "Expected column user_id, item_id, timestamp in .*x.tsv, got the columns user_id,item_id"),
    ("x.csv", LOG.replace(",", ";"), "", "Expected column user_id, .*x.csv, got the columns user_id;item_id"),
    ("x.csv", "\0\0\0\0\n\0\0", "", "Expected column user_id, item_id, timestamp in .*x.csv"),
    ("x.jsonl", '{"user_id":1}\n{"user_id":\n', "", "Expected a readable, well-formed file at .*x.jsonl"),
    ("x.jsonl", '{"user_id":1}\n[1]\n', "", "Expected a readable, well-formed file at .*x.jsonl"),
    ("x.jsonl", '"text"\n', "", "Expected a readable, well-formed file at .*x.jsonl"),
    ("x.json", '[{"user_id":1},', "", "Expected a readable, well-formed file at .*x.json"),
    ("x.json", "[1, 2]", "", "Expected a readable, well-formed file at .*x.json"),
    (
        "x.json",
        '{"data": [{"user_id": 1}]}',
        "",
        "Expected column user_id, item_id, timestamp in .*x.json, got .* data",
    ),
    ("x.json", "{'user_id': 1}\n{'user_id': open}\n", "", "Expected a dictionary in line 2 of .*x.json, got \"{'user"),
    ("x.json", "{'user_id': 1}\n" + "[" * 100_000, "", "Expected a dictionary in line 2 of .*x.json"),
    ("x.csv", LOG.replace("\n", "\r"), "", "Expected a readable, well-formed file at .*x.csv, got: new-line character"),
    # columns
    ("x.csv", LOG, "--columns.user who", "Expected column who in .*x.csv, got the columns user_id, item_id, timestamp"),
    (
        "x.csv",
        LOG.replace("timestamp", "time"),
        "",
        "got the columns user_id, item_id, time: name it with data.columns.timestamp time; "
        "data.columns.timestamp null takes the order of the file",
    ),
    (
        "x.csv",
        "u,i,t\n1,2,3\n",
        "--columns.user u",
        "u, i, t: name it with data.columns.item and data.columns.timestamp;",
    ),
    ("x.csv", LOG.replace(",", ";"), "", "got the columns user_id;item_id;timestamp: data.columns.separator ';' would"),
    ("x.csv", LOG.replace(",", "\t"), "", r"data.columns.separator [$]'.t' would part them"),
    ("x.tsv", LOG, "", "got the columns user_id,item_id,timestamp: data.columns.separator ',' would part them"),
    (
        "x.csv",
        "1,10,881250949\n1,11,881250950\n",
        "",
        "got the columns 1, 10, 881250949: where there is no header, give positions from 0, such as "
        "data.columns.user 0, data.columns.item 1, data.columns.timestamp 2",
    ),
    ("x.parquet", parquet(), "--columns.rating stars", "Expected column stars in .*x.parquet, got the columns user_id"),
    ("x.csv", LOG, "--columns.user 0 --columns.item 1 --columns.timestamp 7", "Expected column 7 in .*x.csv, got the"),
    (
        "x.csv",
        LOG,
        "--columns.user 0 --columns.item 1 --columns.timestamp 2",
        "Expected a number as 2 .*'timestamp' in r",
    ),
    (
        "x.csv",
        LOG,
        "--columns.separator ::",
        "Expected data.columns.separator to be one character such as ';', got '::'",
    ),
    ("x.csv", LOG, "--columns.separator ;", "Expected column user_id, item_id, timestamp in .*x.csv, got the columns"),
    (
        "x.csv",
        LOG,
        "--columns.timestamp null --strategy global_time",
        "Expected data.columns.timestamp for data.strateg",
    ),
    ("x.csv", LOG, "--rating_threshold 3", "Expected data.columns.rating for data.rating_threshold 3.0, got none"),
    ("x.csv", LOG, "--source other", "Expected data.source or data.interactions, got both: other"),
    # values
    ("x.csv", LOG + ",i,1\n", "", r"Expected a value of user_id in each row of .*x.csv, got none in row 4 \(1 such"),
    ("x.csv", LOG + "w,i,now\n", "", "Expected a number as timestamp in .*x.csv, got 'now' in row 4"),
    ("x.csv", LOG + "w,i,nan\n", "", "Expected a number as timestamp in .*x.csv, got 'nan' in row 4"),
    ("x.csv", LOG + "w,i,\n", "", "Expected a number as timestamp in .*x.csv, got None in row 4"),
    (
        "x.csv",
        LOG + "w,i,1700000000.123456701\nw,j,1700000000.123456702\n",
        "",
        "Expected numbers of at most 15 digits as timestamp in .*x.csv",
    ),
    (
        "x.csv",
        "user_id,item_id,timestamp\nu,i,2024-01-01\nu,j,2024-13-01\n",
        "",
        "Expected an ISO date as timestamp in",
    ),
    (
        "x.parquet",
        parquet(user_id=[1e300, 1.0]),
        "",
        "Expected user_id in .*x.parquet as integers or text, got flo",
    ),
    (
        "x.parquet",
        parquet(user_id=[2.0**53, 1.0]),
        "",
        "Expected user_id in .* floating-point numbers too large to tell ids apart: 90071992547",
    ),
    ("x.parquet", parquet(user_id=[None, 1.5]), "", "Expected a value of user_id in each row .* none in row 1"),
    ("x.parquet", parquet(user_id=[None, None]), "", "Expected a value of user_id in each row .* none in row 1"),
    ("x.parquet", parquet(user_id=[["u"], ["v"]]), "", "Expected one value per row as user_id in .*, got List"),
    ("x.parquet", parquet(user_id=[{"a": 1}] * 2), "", "Expected one value per row as user_id in .*, got Struct"),
    ("x.parquet", parquet(user_id=[b"u", b"\xff"]), "", "Expected text or numbers as user_id in .*, got Binary"),
    (
        "x.parquet",
        parquet(user_id=USER.str.len_chars().cast(pl.Duration("us"))),
        "",
        "Expected text or .*, got Duration",
    ),
    (
        "x.parquet",
        parquet(timestamp=pl.Series([2**64 - 1, 1], dtype=pl.UInt64)),
        "",
        "Expected a number as timestamp in",
    ),
    ("x.parquet", parquet(timestamp=[True, False]), "", "Expected a number as timestamp in .*, got True in row 1"),
    ("x.parquet", parquet(timestamp=[1.0, float("inf")]), "", "Expected a number as timestamp in .*, got inf in row 2"),
    ("x.parquet", parquet(timestamp=[1, None]), "", "Expected a number as timestamp in .*, got None in row 2"),
    ("x.parquet", parquet(timestamp=[[1], [2]]), "", "Expected one value per row as timestamp in .*, got List"),
    (
        "x.parquet",
        parquet(timestamp=pl.Series([1, 2]).cast(pl.Time)),
        "",
        "Expected a number as timestamp in .*parquet",
    ),
    (
        "x.jsonl",
        '{"user_id":"u","item_id":["i"],"timestamp":1}\n',
        "",
        "Expected one value per row as item_id in .*List",
    ),
]

CATALOGUES: list[tuple[str, str | bytes | None, str, str]] = [
    ("c.csv", None, "", "Expected a file at .*c.csv, got nothing there"),
    ("c.csv", "id,title\ni,T\n", "", "Expected column item_id in .*c.csv, got the columns id, title"),
    ("c.csv", "id,title\ni,T\n", "", "got the columns id, title: name it with data.columns.catalogue_item$"),
    ("c.csv", "item_id,title\n1,T\n2,U\n", "", r"Expected items of the interactions \(i, j\) in .*c.csv, got others"),
    ("c.csv", "item_id,title\ni,T\n,U\n", "", "Expected a value of item_id in each row of .*c.csv, got none in row 2"),
    ("c.csv", 'item_id,title\ni,"T\n', "", "Expected well-formed quotes in line 2 of .*c.csv"),
    ("c.csv", 'item_id,title\ni,"\nj,"\n', "", "Expected the quote in line 2 of .*c.csv to close there, got one that"),
    (
        "c.csv",
        "item_id,title\ni,T\nj,U\n",
        "--template {name}",
        r"use columns of the catalogue \(item_id, title\), got name",
    ),
    ("c.csv", "item_id,title\ni,T\nj,U\n", "--template {title", "Expected an item text template such as"),
    (
        "c.csv",
        "item_id,title\ni,T\n",
        "--columns.catalogue_item asin",
        "Expected column asin in .*c.csv, got the columns",
    ),
]


@pytest.fixture
def refuse(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run `anyo data`, which must exit with 2 and print one line, and return that."""

    def run(*arguments: object) -> str:
        with pytest.raises(SystemExit) as ended:
            main(["data", *map(str, arguments)])
        assert ended.value.code == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line]
        return line

    return run


@pytest.mark.parametrize(("name", "content", "options", "sentence"), INTERACTIONS, ids=numbers(INTERACTIONS))
def test_bad_interactions(
    tmp_path: Path, refuse: Callable[..., str], name: str, content: str | bytes | None, options: str, sentence: str
) -> None:
    """Files, encodings, forms, columns and values."""
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    line = refuse("--interactions", path, "--k_core", 0, *options.split())
    assert line.startswith("anyo: error: ")
    _matches(sentence, line)


@pytest.mark.parametrize(("name", "content", "options", "sentence"), CATALOGUES, ids=numbers(CATALOGUES))
def test_bad_catalogues(
    tmp_path: Path, refuse: Callable[..., str], name: str, content: str | bytes | None, options: str, sentence: str
) -> None:
    """The same beside good interactions."""
    log, path = tmp_path / "log.csv", tmp_path / name
    log.write_text(LOG)
    if content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    _matches(sentence, refuse("--interactions", log, "--items", path, "--k_core", 0, *options.split()))


FOLDERS: list[tuple[dict[str, str], str]] = [
    ({}, "Expected RecBole, MovieLens or Amazon files in .*, got an empty folder"),
    ({"notes.md": "x"}, "Expected RecBole, MovieLens or Amazon files in .*, got notes.md"),
    ({"x.inter": "user_id:token\nu\n"}, "Expected column item_id, timestamp in .*x.inter, got the columns user_id"),
    ({"x.inter": "a:token\tb\n1\t2\t3\n"}, "Expected 2 fields in line 2 of .*x.inter, got 3"),
    ({"u.data": "1\t2\t3\n"}, "Expected .*4 fields in line 1 of .*u.data, got 3"),
    ({"ratings.dat": "1::2::3::4\n", "movies.dat": "1::T\n"}, "Expected 3 fields in line 1 of .*movies.dat, got 2"),
    ({"ratings.csv": "userId\n1\n", "movies.csv": "movieId\n1\n"}, "Expected column movieId, rating, timestamp in"),
    ({"meta_x.json": "{}"}, "Expected one file with reviews and one meta_ file in .*, got meta_x.json"),
    ({"x.json": json.dumps({"a": 1}), "meta_x.json": "{}"}, "Expected column user_id, .*, got the columns a"),
]


@pytest.mark.parametrize(("files", "sentence"), FOLDERS)
def test_bad_folders(tmp_path: Path, refuse: Callable[..., str], files: dict[str, str], sentence: str) -> None:
    """Folders of no published form, and published forms with bad files."""
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    _matches(sentence, refuse("--source", tmp_path))


def _matches(sentence: str, line: str) -> None:
    assert re.search(sentence, line), line

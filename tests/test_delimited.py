"""Delimited text: quotes, blank lines, separators and files without a header; no row is lost without a word."""

import csv
import io
import zipfile
from pathlib import Path

import polars as pl
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from anyo_lightning.data.delimited import read_delimited
from anyo_lightning.data.sources import Columns, load_source, read_files
from anyo_lightning.data.tables import read_table
from anyo_lightning.errors import InputError


def rows(path: Path, content: str, **options: object) -> list[tuple[str | None, ...]]:
    """What is read from a file of this content."""
    path.write_text(content, newline="")
    return read_table(path, required=(), **options).rows()  # type: ignore[arg-type]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("quote", ["", '"'])
def test_blank_lines_are_left_out(tmp_path: Path, end: str, quote: str) -> None:
    """Before the header, between rows and at the end; a row of empty fields is a row."""
    lines = ["", "a,b", "", f"{quote}1{quote},2", "", ",", "3,4", "", ""]
    empty = "" if quote else None
    assert rows(tmp_path / "x.csv", end.join(lines)) == [("1", "2"), (empty, empty), ("3", "4")]
    assert rows(tmp_path / "y.csv", end.join(["a", "1", "", "2", ""])) == [("1",), ("2",)]


def test_blank_lines_of_published_forms(tmp_path: Path) -> None:
    """RecBole's and MovieLens's files, too."""
    (tmp_path / "x.inter").write_text("user_id:token\titem_id:token\ttimestamp:float\n\nu\ti\t1\n\n")
    (tmp_path / "x.item").write_text("item_id:token\n\ni\n\n")
    assert load_source(tmp_path).interactions.rows() == [("u", "i", 1)]
    table = read_delimited(
        _written(tmp_path / "m.dat", "1::A: b::X\n\n2::B::\n\n"), separator="::", columns=list("abc")
    )
    assert table.rows() == [("1", "A: b", "X"), ("2", "B", "")]


def _written(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_quotes_that_add_up(tmp_path: Path) -> None:
    """Separators, line ends and doubled quotes inside quotes, in both forms; a quote within a word is a character."""
    for ending, separator in (("csv", ","), ("tsv", "\t")):
        content = f'a{separator}b\n1{separator}"x{separator}""y""\nz"\n"2"{separator}LP 12" Vinyl\n'
        assert rows(tmp_path / f"x.{ending}", content) == [("1", f'x{separator}"y"\nz'), ("2", 'LP 12" Vinyl')]


def test_stray_quotes_in_tab_separated_files_are_text(tmp_path: Path) -> None:
    """Where each line adds up by itself, no quote swallows a row."""
    for values in (['"', "x", '"'], ['"A" and B', "x", '"C"'], ["x", "y", '"'], ['12" "x"', '"', "b"]):
        content = "a\tb\n" + "".join(f"{number}\t{value}\n" for number, value in enumerate(values))
        assert [row[1] for row in rows(tmp_path / "x.tsv", content)] == values


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("x.csv", 'a,b\n1,"x\n2,y\n3,z\n', "well-formed quotes in line 2 of .*x.csv, got: unexpected end of data"),
        ("x.csv", 'a,b\n0,q\n1,"x" y\n2,y\n', "well-formed quotes in line 3 of .*x.csv, got: ',' expected after '\"'"),
        ("x.csv", 'a,b\n1,"\n2,y\n3,"\n', "the quote in line 2 of .*x.csv to close there, got one that swallows rows"),
        ("x.csv", 'a,b\n1,"x"\n2\n', "2 fields in line 3 of .*x.csv, got 1"),
        ("x.csv", 'a,b\n\n1,"x\ny"\n2,y,z\n', "2 fields in line 5 of .*x.csv, got 3"),
        ("x.tsv", 'a\tb\n1\t"x\n2\ty\tz\n', "well-formed quotes in line 2 of .*x.tsv"),
        ("x.tsv", "a\tb\n1\tx\n2\n", "2 fields in line 3 of .*x.tsv, got 1"),
    ],
)
def test_rows_that_do_not_add_up_are_refused(tmp_path: Path, name: str, content: str, expected: str) -> None:
    """The sentence has the line where it begins."""
    with pytest.raises(InputError, match=expected):
        rows(tmp_path / name, content)


PIECES = st.text(st.sampled_from('a" ,;\t'), max_size=4)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=st.lists(PIECES, min_size=1, max_size=6), ending=st.sampled_from(["csv", "tsv"]))
@example(values=['"', "a", '"'], ending="csv")
@example(values=['a"', '"a', "a"], ending="csv")
def test_malformed_quotes_never_lose_a_row(tmp_path: Path, values: list[str], ending: str) -> None:
    """Whatever stands in a field as it is, each line becomes a row, or the file is refused."""
    separator = "," if ending == "csv" else "\t"
    values = [value.replace(separator, "") for value in values]
    content = f"n{separator}text{separator}end\n" + "".join(
        f"{number}{separator}{value}{separator}.\n" for number, value in enumerate(values)
    )
    try:
        found = rows(tmp_path / f"x.{ending}", content)
    except InputError:
        assert ending == "csv"  # a tab-separated file whose lines add up is always read
        return
    assert [(row[0], row[2]) for row in found] == [(str(number), ".") for number in range(len(values))]
    for value, (_, text, _) in zip(values, found, strict=True):
        assert (text or "") in {value, value[1:-1].replace('""', '"')}


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    values=st.lists(st.text(st.sampled_from('a",;\t\n'), max_size=6), min_size=1, max_size=5),
    separator=st.sampled_from([",", "\t", ";"]),
    policy=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
)
def test_what_a_writer_quotes_is_read_back_or_refused(
    tmp_path: Path, values: list[str], separator: str, policy: int
) -> None:
    """Text with line ends, separators and quotes as Python's own writer quotes it."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter=separator, quoting=policy, lineterminator="\n")  # type: ignore[arg-type]
    writer.writerows([["n", "text"], *([str(n), value] for n, value in enumerate(values))])
    try:
        found = rows(tmp_path / "x.csv", text.getvalue(), separator=separator)
    except InputError:
        assert any("\n" in value for value in values)  # lines within a quote that look like rows themselves
        return
    if separator != "\t" or not any("\n" in value for value in values):
        assert [(row[0], row[1] or "") for row in found] == [(str(n), value) for n, value in enumerate(values)]


def test_positions_in_files_without_a_header(tmp_path: Path) -> None:
    """Gowalla's check-ins, MovieLens's `u.data` and a catalogue with its own position."""
    log = _written(tmp_path / "x.txt", "0\t2010-10-19T23:55:27Z\t30.2\t22847\n0\t2010-10-18T22:17:43Z\t30.3\t420315\n")
    items = _written(tmp_path / "items.tsv", "Place A\t22847\nPlace B\t420315\n")
    columns = Columns(user="0", item="3", catalogue_item="1", timestamp="1")
    source = read_files(log, items, columns=columns)
    assert source.interactions.rows() == [("0", "22847", 1287532527.0), ("0", "420315", 1287440263.0)]
    assert source.items.rows() == [("22847", "Place A"), ("420315", "Place B")]
    assert source.template == "{0}"
    quoted = _written(tmp_path / "q.csv", '"a, b",i,1\n')
    assert read_files(quoted, None, columns=Columns(user="0", item="1", timestamp="2")).interactions.rows() == [
        ("a, b", "i", 1)
    ]
    with pytest.raises(InputError, match=r"column 9 in .*x.txt, got the columns 0, 1, 2, 3"):
        read_files(log, None, columns=Columns(user="9", item="3", timestamp="1"))


def test_other_separators(tmp_path: Path) -> None:
    """Semicolons and bars; with a separator, any ending will do; several characters are refused."""
    content = 'user_id;item_id;timestamp\nu;"i;1";1\n'
    for name in ("x.csv", "x.data"):
        source = read_files(_written(tmp_path / name, content), None, columns=Columns(separator=";"))
        assert source.interactions.rows() == [("u", "i;1", 1)]
    log = _written(tmp_path / "y.csv", "u|i|1\n")
    columns = Columns(user="0", item="1", timestamp="2", separator="|")
    assert read_files(log, None, columns=columns).interactions.rows() == [("u", "i", 1)]
    for separator in ("::", "", "é", "a", '"'):
        with pytest.raises(InputError, match=r"data.columns.separator to be one character such as ';', got"):
            read_files(log, None, columns=Columns(separator=separator))


def test_headers(tmp_path: Path) -> None:
    """A mark of byte order and blanks around names are cut off, a name twice is refused, one without gets its place."""
    assert read_table(_written(tmp_path / "x.csv", b'\xef\xbb\xbf"a", b ,\n1,2,3\n'), required=["a", "b"]).columns == [
        "a",
        "b",
        "2",
    ]
    with pytest.raises(InputError, match=r"each column once in .*y.csv, got a repeatedly"):
        rows(tmp_path / "y.csv", "a,b,a\n1,2,3\n")


def test_zip_archives_and_folders_of_parquet(tmp_path: Path) -> None:
    """One file in an archive is read by its own ending; the parts of a folder are one table in the order of names."""
    table = pl.DataFrame({"user_id": ["u", "v"], "item_id": ["i", "j"], "timestamp": [1, 2]})
    for name, content in {"a.csv": table.write_csv(), "a.jsonl": table.write_ndjson()}.items():
        with zipfile.ZipFile(tmp_path / f"{name}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(f"folder/{name}", content)
            archive.writestr(f"__MACOSX/{name}", "")
        assert read_files(tmp_path / f"{name}.zip", None, columns=Columns()).interactions.equals(table)
    parts = tmp_path / "parts"
    (parts / "day=2").mkdir(parents=True)
    table[:1].write_parquet(parts / "a.parquet")
    table[1:].write_parquet(parts / "day=2" / "b.parquet")
    _written(parts / "_SUCCESS", "")
    assert read_files(parts, None, columns=Columns()).interactions.equals(table)
    with zipfile.ZipFile(tmp_path / "two.zip", "w") as archive:
        archive.writestr("a.csv", "")
        archive.writestr("b.csv", "")
    with pytest.raises(InputError, match=r"one file in .*two.zip, got a.csv, b.csv"):
        read_files(tmp_path / "two.zip", None, columns=Columns())


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "json", "parquet"])
def test_paths_are_never_patterns(tmp_path: Path, ending: str) -> None:
    """A file in brackets is that file, not the one that the pattern would find."""
    for name, user in (("a[1]", "u"), ("a1", "wrong")):
        table = pl.DataFrame({"user_id": [user], "item_id": ["i"], "timestamp": [1]})
        path = tmp_path / f"{name}.{ending}"
        match ending:
            case "csv" | "tsv":
                table.write_csv(path, separator="," if ending == "csv" else "\t")
            case "parquet":
                table.write_parquet(path)
            case _:
                table.write_ndjson(path)
    source = read_files(tmp_path / f"a[1].{ending}", None, columns=Columns())
    assert source.interactions["user_id"].to_list() == ["u"]

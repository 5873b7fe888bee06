"""Another system's top-k lists, as a file holds them: one line per user and item, with a score or a rank.

Scores decide where there are any, since ranks hide ties, as in trec_eval; a rank that contradicts its score is refused.
"""

from pathlib import Path

import polars as pl

from anyo_lightning.data.delimited import read_delimited
from anyo_lightning.data.files import content, explaining, first_line
from anyo_lightning.data.schema import first_few
from anyo_lightning.data.tables import FORMATS, SEPARATORS, read_table
from anyo_lightning.data.values import identifiers, numbers
from anyo_lightning.errors import InputError

TREC_FIELDS = ("user", "Q0", "item", "rank", "score", "tag")
ENDINGS = (*SEPARATORS, "parquet", "jsonl", "ndjson", "json")
NAMES = {"user": ("user", "user_id"), "item": ("item", "item_id")}


def read_lists(path: Path) -> pl.DataFrame:
    """Read lists from CSV, TSV, Parquet or JSON lines (also in .gz, .zip), or from a TREC run file.

    A TREC run is known by its second field, `Q0`: `user Q0 item rank score tag`, with one blank or tab between fields.
    Other files have the columns user (or user_id), item (or item_id), and score or rank or both.

    Args:
        path: The file.

    Returns:
        `user_id`, `item_id` (strings) and `key` (a Float64, the lower the better; equal for items that tie); rows in
        the file's order.

    Raises:
        InputError: The file cannot be read; a column is missing; an id is missing; a score or a rank is no finite
            number; a user has an item twice or two items at one rank; ranks contradict scores.
    """
    table = _read_trec(path) if _is_trec(path) else _read_columns(path)
    _refuse_twice(table, "item_id", path)
    if "rank" in table.columns:
        _refuse_twice(table, "rank", path)
    if "score" not in table.columns:
        return table.select("user_id", "item_id", key="rank")
    if "rank" in table.columns:
        _refuse_contradiction(table, path)
    return table.select("user_id", "item_id", key=-pl.col("score"))


def _is_trec(path: Path) -> bool:
    if path.is_dir() or path.suffix.lower() == ".parquet":
        return False
    with explaining(path):
        fields = first_line(content(path)[1]).split()
    return len(fields) == len(TREC_FIELDS) and fields[1].upper() == "Q0"


def _read_trec(path: Path) -> pl.DataFrame:
    with explaining(path):
        separator = "\t" if "\t" in first_line(content(path)[1]) else " "
    return _typed(read_delimited(path, separator=separator, columns=TREC_FIELDS), path)


def _read_columns(path: Path) -> pl.DataFrame:
    with explaining(path):
        ending = "parquet" if path.is_dir() else content(path)[0].rpartition(".")[2].lower()
    if ending not in ENDINGS:
        raise InputError(
            f"Expected {path} to be a TREC run ({' '.join(TREC_FIELDS)}) or to end in {FORMATS}, got {ending!r}"
        )
    table = read_table(path, required=())
    for name, spellings in NAMES.items():
        found = [column for column in spellings if column in table.columns]
        if not found:
            there = ", ".join(table.columns)
            raise InputError(f"Expected column {' or '.join(spellings)} in {path}, got the columns {there}")
        table = table.rename({found[0]: name}) if found[0] != name else table
    if not {"score", "rank"} & set(table.columns):
        raise InputError(f"Expected column score or rank in {path}, got the columns {', '.join(table.columns)}")
    return _typed(table, path)


def _typed(table: pl.DataFrame, path: Path) -> pl.DataFrame:
    """Ids as strings, scores and ranks as numbers."""
    columns = [identifiers(table[name], path).alias(f"{name}_id") for name in NAMES]
    columns += [numbers(table[n], path).cast(pl.Float64).alias(n) for n in ("score", "rank") if n in table.columns]
    return pl.DataFrame(columns)


def _refuse_twice(table: pl.DataFrame, name: str, path: Path) -> None:
    """Refuse lists in which something is there more than once."""
    twice = table.filter(pl.struct("user_id", name).is_duplicated())
    if twice.height:
        user, value = twice.row(0, named=True)["user_id"], twice[name][0]
        what = f"item {value}" if name == "item_id" else f"rank {value:g}"
        users = twice["user_id"].n_unique()
        raise InputError(
            f"Expected each {name.removesuffix('_id')} once in a user's list in {path}, got {what} of user {user} "
            f"{twice.filter(user_id=user).filter(pl.col(name) == value).height} times ({users} such users)"
        )


def _refuse_contradiction(table: pl.DataFrame, path: Path) -> None:
    """Refuse lists whose scores rise where ranks fall."""
    by_rank = table.sort("user_id", "rank")
    rises = by_rank.filter(pl.col("score").diff().over("user_id") > 0)
    if rises.height:
        raise InputError(
            f"Expected scores in {path} that fall as ranks grow, got a higher score at rank {rises['rank'][0]:g} than "
            f"before it, in the list of user {rises['user_id'][0]} ({rises['user_id'].n_unique()} such users): leave "
            "one of the two columns out"
        )


def refuse_unknown(found: pl.Series, known: pl.Series, what: str, path: Path) -> None:
    """Refuse ids that the split lacks.

    Args:
        found: In the lists.
        known: In the split.
        what: What they are, for the sentence.
        path: The file.

    Raises:
        InputError: With their number, some of them, and some of those that there are.
    """
    unknown = found.unique(maintain_order=True)
    unknown = unknown.filter(~unknown.is_in(known.unique().implode()))
    if len(unknown):
        raise InputError(
            f"Expected {what} ({first_few(known.unique(maintain_order=True))}) in {path}, got {len(unknown):,} others "
            f"({first_few(unknown)})"
        )

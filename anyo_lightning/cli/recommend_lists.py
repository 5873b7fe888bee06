"""`anyo recommend`: whose lists are asked for, what was understood, and where they go."""

import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Literal

import polars as pl
from rich.console import Console
from rich.progress import track

from anyo_lightning.data.schema import first_few
from anyo_lightning.errors import InputError
from anyo_lightning.serving.best_lists import check_length
from anyo_lightning.serving.given_files import known_only, read_histories, read_ids, read_items
from anyo_lightning.serving.recommender import Recommender
from anyo_lightning.serving.shown_lists import check_output, list_table, write_lists

HISTORIES = 1024  # that are read before the bar moves
WIDTH_OF_A_FILE = 160
Say = Callable[[str], None]
LATEST = 3  # titles of a user's history that are shown


def recommend_lists(
    run: list[Path],
    *,
    user: list[str] | None = None,
    titles: str | None = None,
    histories: Path | None = None,
    like: str | None = None,
    k: int = 10,
    seen: Literal["auto", "hide", "show"] = "auto",
    allow: Path | None = None,
    block: Path | None = None,
    items: Path | None = None,
    output: Path | None = None,
    user_column: str = "user_id",
    item_column: str = "item_id",
    device: str | None = None,
) -> None:
    """Print or write top lists of finished runs.

    Args:
        run: Run folders.
        user: Users of the run's data.
        titles: A history as titles, oldest first, with semicolons between them: "Heat; Alien".
        histories: File with histories (CSV, TSV, Parquet, JSON lines): a line per interaction, in the order of time, or
            a line per history with a list of items.
        like: Item, by its id or its title, whose most similar items are listed.
        k: Length of the lists.
        seen: Whether items of the history are listed: `show` or `hide`; `auto` does what the run's evaluation did.
        allow: File with the ids of the only items that may be listed.
        block: File with the ids of items that are never listed.
        items: File with items that the run has not seen: their ids, and the columns of the run's item texts.
        output: File for the lists (.parquet, .jsonl, .csv) instead of the terminal; one that exists is refused.
        user_column: Column with the user in the file of histories.
        item_column: Column with the item in all these files.
        device: Where the model computes, such as `cpu` or `cuda:0`; by default the first GPU if there is one.

    Raises:
        InputError: Nothing, or several things, are asked for; a user, title or id is unknown; a file cannot be read or
            is there already; or a run cannot be restored.
    """
    asked = {"--user": user, "--titles": titles, "--histories": histories, "--like": like}
    given = [name for name, value in asked.items() if value is not None]
    if len(given) != 1:
        raise InputError(f"Expected one of {', '.join(asked)}, got {' and '.join(given) or 'none'}")
    check_length(k)
    if output is not None:
        check_output(output)
    of_file = None if histories is None else read_histories(histories, user_column=user_column, item_column=item_column)
    allowed = None if allow is None else read_ids(allow, item_column=item_column)
    blocked = [] if block is None else read_ids(block, item_column=item_column)
    new = None if items is None else read_items(items, item_column=item_column)
    hides = None if seen == "auto" else seen == "hide"
    found, owner = [], "user_id" if like is None else "like_item_id"
    say = cache(partial(print, file=sys.stderr))  # once, where several runs say the same
    for folder in run:
        recommender = Recommender.load(folder, device=device)
        if new is not None:
            recommender.add_items(new)
        if like is not None:
            names = [_item(like, recommender, say)]
            lists = recommender.similar(names, k, allow=allowed, block=blocked)
        else:
            if user is not None:
                names, read = user, [_of_user(one, recommender, say) for one in user]
            elif titles is not None:
                names, read = [titles], [_typed(titles, recommender, say)]
            else:
                assert of_file is not None
                names, read = of_file[0], _known(*of_file, recommender, say)
            parts = [read[start : start + HISTORIES] for start in range(0, len(read), HISTORIES)]
            bar = track(parts, "Recommending", console=Console(stderr=True), transient=True, disable=len(parts) < 2)
            tables = [recommender.recommend(part, k, hide_seen=hides, allow=allowed, block=blocked) for part in bar]
            lists = pl.concat(
                table.with_columns(pl.col("history") + number * HISTORIES) for number, table in enumerate(tables)
            )
        _say_if_short(lists, len(names), k, say)
        owners = pl.Series(owner, names, pl.String).gather(lists["history"])
        found.append(lists.with_columns(owners, pl.lit(str(folder)).alias("run")))
    everything = pl.concat(found)
    if output is not None:
        write_lists(everything.select("run", owner, "rank", "item_id", "title", "score"), output)
        say(f"Wrote the lists of {len(names):,} histories to {output}")
        return
    console = Console() if sys.stdout.isatty() else Console(width=WIDTH_OF_A_FILE)
    of_history = {int(part["history"][0]): part for part in everything.partition_by("history")}
    for number, name in enumerate(names):
        console.print(list_table(of_history.get(number, everything.clear()), name=name))


def _of_user(user: str, recommender: Recommender, say: Say) -> list[str]:
    """The history of a user of the run's data."""
    history = recommender.history(user)
    latest = [recommender.titles[number] for number in recommender.numbers(history[-LATEST:], "the history")]
    say(f"{user} has had {len(history)} items, at last {', '.join(latest)}")
    return history


def _typed(titles: str, recommender: Recommender, say: Say) -> list[str]:
    """The items that typed titles mean."""
    typed = [title.strip() for title in titles.split(";") if title.strip()]
    if not typed:
        raise InputError(f"Expected titles with semicolons between them for --titles, got {titles!r}")
    return [_found(title, recommender, say) for title in typed]


def _item(wanted: str, recommender: Recommender, say: Say) -> str:
    """An item by its id, or else by its title."""
    if wanted not in recommender.item_ids:
        return _found(wanted, recommender, say)
    say(f"{wanted}: {recommender.texts[recommender.item_ids.index(wanted)]}")
    return wanted


def _found(title: str, recommender: Recommender, say: Say) -> str:
    item = recommender.find(title)
    say(f"{title!r} is understood as {item}: {recommender.texts[recommender.item_ids.index(item)]}")
    return item


def _known(users: list[str], histories: list[list[str]], recommender: Recommender, say: Say) -> list[list[str]]:
    """The histories of a file without the items that the catalogue lacks, which are counted.

    Raises:
        InputError: Nothing is left of some.
    """
    read, missing = known_only(histories, set(recommender.item_ids))
    empty = [user for user, items in zip(users, read, strict=True) if not items]
    if empty:
        raise InputError(
            f"Expected an item of the run's catalogue in each history of --histories, got {len(empty)} of {len(read)} "
            f"without ({first_few(pl.Series(empty))})"
        )
    if missing:
        say(f"Left out, since the run's catalogue lacks them: {first_few(pl.Series(missing))} ({len(missing)} in all)")
    return read


def _say_if_short(lists: pl.DataFrame, histories: int, k: int, say: Say) -> None:
    """Say of how many histories fewer than k items may be listed."""
    lengths = lists["history"].value_counts()["count"]
    if short := histories - int((lengths == k).sum()):
        say(f"{short} of {histories} lists have fewer than {k} items: no others may be listed")

"""A split as files for other libraries: CSV, TREC qrels, and what is what.

Whoever trains on train.csv (or on train.csv and validation.csv) and writes lists for the users of test.qrels has used
exactly our split; `anyo compare --foreign` puts the lists beside our runs.
"""

import json
from pathlib import Path

import polars as pl

from anyo_lightning.data.splits import STAGE_NAMES, Split, Stage
from anyo_lightning.data.summary import write_parquet
from anyo_lightning.disk import renamed_to

QREL_STAGES: tuple[Stage, ...] = ("validation", "test")
README = """\
The split {fingerprint} of {name} ({strategy}, ties by {ties}), written by `anyo data --output`.

train.csv, validation.csv, test.csv
    user_id, item_id, timestamp: each user's interactions oldest first, ties in the split's order. A stage's histories
    are all interactions of the earlier stages: the test's have those of train.csv and validation.csv.
validation.qrels, test.qrels
    The (user, item) pairs that are ranked, as TREC has them: `user 0 item 1`, each once; users whose history would be
    empty are left out. {qrels}
split.json
    Name, strategy, ties, fingerprint and counts of the split.
interactions.parquet, items.parquet
    The same interactions with their stage as `split`, and all items with their texts.

To compare another system with runs on this split, rank all {items:,} items for each user of test.qrels and write its
first ten or more as CSV, Parquet or JSON lines (user_id, item_id, and score or rank) or as a TREC run.
{masked}

    anyo compare runs --foreign NAME=FILE
"""


def write_split(split: Split, folder: Path) -> None:
    """Write a split for other libraries, each file under a temporary name first.

    TREC's files have blanks between fields, so that there are no qrels where an id has one; README.txt says so.

    Args:
        split: The split.
        folder: Gets `train.csv`, `validation.csv`, `test.csv`, `validation.qrels`, `test.qrels`, `split.json`,
            `README.txt`, and what `write_parquet` writes.
    """
    write_parquet(split, folder)
    user_ids, item_ids = (pl.Series(ids, dtype=pl.String) for ids in (split.user_ids, split.item_ids))
    interactions = pl.DataFrame(
        {
            "user_id": user_ids[split.user_of_interaction],
            "item_id": item_ids[split.items],
            "timestamp": split.timestamps,
        }
    )
    for number, stage in enumerate(STAGE_NAMES):
        with renamed_to(folder / f"{stage}.csv") as unfinished:
            interactions.filter(split.stages == number).write_csv(unfinished)
    blanks = any(ids.str.contains(r"\s").any() for ids in (user_ids, item_ids))
    for stage in QREL_STAGES:
        file = folder / f"{stage}.qrels"
        if blanks:
            file.unlink(missing_ok=True)  # of an earlier split
            continue
        queries = split.queries(stage)
        pairs = pl.DataFrame({"user": user_ids[queries.user], "zero": 0, "item": item_ids[queries.target], "one": 1})
        with renamed_to(file) as unfinished:
            pairs.unique(maintain_order=True).write_csv(
                unfinished, separator=" ", include_header=False, quote_style="never"
            )
    about = {
        "name": split.name,
        "strategy": split.strategy,
        "ties": split.ties,
        "fingerprint": split.fingerprint,
        "counts": split.counts,
    }
    repeated = any(split.repeated_targets(stage) for stage in QREL_STAGES)
    masked = "in, since some targets are among them" if repeated else "out"
    readme = README.format(
        **about,
        items=split.catalogue_size,
        qrels="Not written here, since an id has a blank." if blanks else "",
        masked=f"By default the runs {'do not mask' if repeated else 'mask'} histories: leave their items {masked}.",
    )
    for name, text in (("split.json", json.dumps(about, indent=2, ensure_ascii=False) + "\n"), ("README.txt", readme)):
        with renamed_to(folder / name) as unfinished:
            unfinished.write_text("\n".join(line.rstrip() for line in text.split("\n")), encoding="utf-8")

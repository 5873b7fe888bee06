"""Is it the texts? Writes a file of items in which each has another's texts: what a model gains by it, is not language.

    python benchmarks/permuted_texts.py items.csv permuted.csv --item item_id

A permuted text is still a code by which a model can tell an item from others, so that a row trained on it has the same
parameters, the same sizes and the same distribution of vectors; only what a text says of its item is gone.
"""

import argparse
from pathlib import Path

import polars as pl


def permuted(items: pl.DataFrame, *, item: str, seed: int) -> pl.DataFrame:
    """Items with the other columns of randomly drawn rows, each row's once."""
    texts = items.drop(item).sample(fraction=1.0, shuffle=True, seed=seed)
    return pl.concat([items.select(item), texts], how="horizontal").select(items.columns)


def main() -> None:
    """Reads one file, writes the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("items", type=Path, help="CSV of items")
    parser.add_argument("output", type=Path, help="CSV to write")
    parser.add_argument("--item", default="item_id", help="the column of ids, which stays in place")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    items = pl.read_csv(options.items, infer_schema=False)
    permuted(items, item=options.item, seed=options.seed).write_csv(options.output)


if __name__ == "__main__":
    main()

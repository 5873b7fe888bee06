"""Vectors of the items' texts for RecTools' UniSRec: those that configs/unisrec.yaml reads, before they are whitened.

Runs in this project's environment; the language model embeds each text once.
"""

import argparse
from pathlib import Path

import numpy as np
import polars as pl

from anyo_lightning.llm.language_model import LLM
from anyo_lightning.llm.text_vectors import frozen_vectors


def main() -> None:
    """Write `vectors`, whose row i is that of the item with the id i, zero where there is none."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("split", type=Path, help="folder of anyo data --output")
    options.add_argument("output", type=Path, help="file to write, .npy")
    given = options.parse_args()
    items = pl.read_parquet(given.split / "items.parquet")
    found = frozen_vectors(LLM(layers=None, lora=None).load(), items["text"].to_list(), pooling="mean", max_tokens=48)
    ids = items["item_id"].cast(pl.Int64).to_numpy()
    vectors = np.zeros((ids.max() + 1, found.shape[1]), dtype=np.float32)
    vectors[ids] = found.numpy()
    np.save(given.output, vectors)


if __name__ == "__main__":
    main()

"""`anyo data`: what was read and how it is split, with the tokens of an LLM counted."""

from pathlib import Path

import numpy as np

from anyo_lightning.data.datamodule import RecDataModule
from anyo_lightning.data.exchange import write_split
from anyo_lightning.data.summary import print_summary, summarise
from anyo_lightning.errors import InputError
from anyo_lightning.llm.aliases import load_tokenizer


def describe_data(dataset: RecDataModule, *, tokenizer: str, output: Path | None) -> None:
    """Print what was read and how it is split; write it as files for other libraries.

    Args:
        dataset: The data module.
        tokenizer: The LLM whose tokens are counted.
        output: Folder for the split: Parquet, CSV, TREC qrels, README.txt; None writes none.

    Raises:
        InputError: When the data or the tokenizer cannot be read.
    """
    source = dataset.read()
    dataset.setup("fit")
    load = load_tokenizer(tokenizer)

    def count_tokens(texts: list[str]) -> np.ndarray:
        return np.array([len(ids) + 1 for ids in load(texts, add_special_tokens=False)["input_ids"]])  # + separator

    print_summary(summarise(dataset.split, source, count_tokens, dataset.max_tokens))
    if output is not None:
        try:
            write_split(dataset.split, output)
        except OSError as error:
            raise InputError(f"Expected --output to name a folder that can be written, got {output}: {error}") from None

"""How much cheaper one pass over a history is than one sample per prefix, for the same targets of the same users.

    python benchmarks/supervision.py [--users 8] [--layers 3]

Trains both ways on the first users' training sequences of ML-100K with the real LLM and prints seconds, tokens and the
ratio. `last` reads each prefix from its start: about n/2 times the tokens, and attention on top.
"""

import argparse
import time

import numpy as np
import torch

from anyo_lightning.data.batches import HistoryDataset
from anyo_lightning.data.datamodule import RecDataModule
from anyo_lightning.data.sampler import TokenBudgetBatches
from anyo_lightning.data.windows import Supervision, training_windows
from anyo_lightning.encoders.text import TextEncoders
from anyo_lightning.llm.language_model import LLM
from anyo_lightning.models.e4srec import E4SRec


def main() -> None:
    """Print a line for each supervision and the ratio of their times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=8)
    parser.add_argument("--layers", type=int, default=3)
    options = parser.parse_args()
    torch.manual_seed(0)
    data = RecDataModule(template="{movie_title}", max_items=50, max_tokens=1024)
    data.setup("fit")
    lora = {"r": 32, "lora_alpha": 64, "target_modules": "all-linear"}
    model = E4SRec(TextEncoders(LLM(layers=options.layers, lora=lora)))
    data.read_for(model)
    model.prepare(data)
    model.train()
    seconds = {supervision: epoch(model, data, supervision, options.users) for supervision in ("all", "last")}
    print(f"ratio last / all: {seconds['last'] / seconds['all']:.1f}")


def epoch(model: E4SRec, data: RecDataModule, supervision: Supervision, users: int) -> float:
    """Seconds for forward and backward over each target of the first users, once."""
    assert data.tokens is not None
    windows = training_windows(
        data.split, data.tokens.lengths, max_items=50, max_length=1024, supervision=supervision, overlap=0
    )
    kept = np.flatnonzero(windows.user < users)
    dataset = HistoryDataset.training(data.split, windows, data.tokens)
    cut = TokenBudgetBatches(windows.length[kept], budget=6000, seed=0).batches()
    loss, _ = model.loss(model(batch := dataset[kept[cut[0]]]), batch)  # warm-up
    loss.backward()
    targets = tokens = 0
    started = time.perf_counter()
    for rows in cut:
        batch = dataset[kept[rows]]
        loss, _ = model.loss(model(batch), batch)
        loss.backward()
        targets, tokens = targets + len(batch.targets), tokens + batch.token_count
    seconds = time.perf_counter() - started
    print(f"{supervision:>4}: {targets} targets, {tokens} tokens, {seconds:.1f} s", flush=True)
    return seconds


if __name__ == "__main__":
    main()

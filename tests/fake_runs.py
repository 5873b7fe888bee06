"""Run folders as `anyo test` leaves them, from ranks alone."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from anyo_lightning.evaluation.intervals import bootstrap_means
from anyo_lightning.evaluation.metrics import user_metrics
from anyo_lightning.evaluation.slices import HISTORY_BANDS, WORD_BANDS, band, popularity_band
from anyo_lightning.runs import RunFolder

COUNTS = np.array([0, 1, 2, 3, 4, 5, 6, 1, 1, 2, 2])  # of training interactions

USERS = 300
METRICS = ["test/hr@10", "test/ndcg@10"]


def write_run(
    root: Path,
    variant: str,
    ranks: np.ndarray,
    *,
    seed: int | None = 0,
    fingerprint: str = "00000000000000aa",
    history_masked: bool = True,
    order: np.ndarray | None = None,
    user_prefix: str = "u",
    folder: str | None = None,
    lists: bool = False,
    index: str = "Flat",
    titles: Sequence[str] = tuple("ABCDEFGHIJ"),
) -> Path:
    """A tested run with these ranks, its predictions in any order.

    User n has the target n % 7 with as many training interactions, tied if n is even, and a history of n % 90 + 1.
    Heads are the targets 5 and 6, tails 1 and 2.
    """
    run = RunFolder.new(root, folder or variant)
    by_user = user_metrics(ranks, np.arange(len(ranks)), [10])
    values = np.stack(list(by_user.values()), axis=1)
    low, high = bootstrap_means(values)
    figures = zip(by_user, values.mean(axis=0), low, high, strict=True)
    metrics: dict[str, Any] = {
        f"test/{n}": {"value": float(v), "low": float(a), "high": float(b)} for n, v, a, b in figures
    }
    metrics["test/coverage@10"] = {"value": 0.25, "low": None, "high": None}
    order = np.arange(len(ranks)) if order is None else order
    words = np.array([len(title.split()) for title in titles])
    columns: dict[str, Any] = {
        "user_id": [f"{user_prefix}{user}" for user in order],
        "target_item_id": [f"i{user % 7}" for user in order],
        "rank": ranks[order],
        "history_length": order % 90 + 1,
        "target_count": order % 7,
        "target_popularity": popularity_band(order % 7, COUNTS),
        "history_band": band(order % 90 + 1, HISTORY_BANDS),
        "target_tied": order % 2 == 0,
        "target_words_band": band(words[order % 7], WORD_BANDS),
        "target_tokens_band": None,
    }
    if lists:
        columns["top_item_ids"] = [_top_list(user % 7, rank) for user, rank in zip(order, ranks[order], strict=True)]
        columns["history_item_ids"] = [[f"i{(user + step) % 10}" for step in range(user % 90 + 1)] for user in order]
    run.write_predictions(pl.DataFrame(columns))
    run.write_catalogue(pl.DataFrame({"item_id": [f"i{item}" for item in range(len(titles))], "text": list(titles)}))
    run.write_metrics(
        {
            "variant": variant,
            "seed": seed,
            "split": {
                "name": "ml-100k",
                "strategy": "leave_one_out",
                "ties": "file_order",
                "fingerprint": fingerprint,
                "counts": {"users": len(ranks), "items": 1349},
            },
            "protocol": {"cutoffs": [10], "history_masked": history_masked, "index": index, "rows": len(ranks)},
            "metrics": metrics,
            "slices": {},
            "cost": {"train_seconds": 90.0, "trainable_parameters": 1_234_567},
            "environment": {},
        }
    )
    return run.path


def _top_list(target: int, rank: float) -> list[str]:
    """Ten items with the target at its rank, if that is among the first ten."""
    others = [item for item in range(10) if item != target]
    place = int(rank) - 1
    return [f"i{item}" for item in ([*others[:place], target, *others[place:]] if place < 10 else others)]


def spread_ranks() -> np.ndarray:
    """A rank for each of `USERS` between 1 and 1,000, many small ones."""
    return np.exp(np.random.default_rng(0).uniform(0, np.log(1000), USERS)).round()


def write_three(folder: Path, ranks: np.ndarray) -> Path:
    """Three variants, in `folder`: markov, one that is better for each user, one that is much like markov."""
    write_run(folder, "markov", ranks, seed=None)
    write_run(folder, "e4srec", np.maximum(ranks / 3, 1).round(), order=np.arange(USERS)[::-1].copy())
    write_run(folder, "sasrec", np.roll(ranks, 1))
    return folder

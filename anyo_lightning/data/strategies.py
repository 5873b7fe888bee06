"""Which interactions are for training, validation and test: leave-one-out, global time, ratio by time, or a column."""

from typing import Literal

import numpy as np
import polars as pl
from jaxtyping import Int8

from anyo_lightning.errors import InputError

Strategy = Literal["leave_one_out", "global_time", "ratio", "column"]
Settings = dict[str, object]

TRAIN, VALIDATION, TEST = 0, 1, 2
STAGE_NAMES = {
    **dict.fromkeys(("train", "training", "0"), TRAIN),
    **dict.fromkeys(("validation", "valid", "val", "dev", "1"), VALIDATION),
    **dict.fromkeys(("test", "testing", "2"), TEST),
}


def assign_stages(
    ordered: pl.DataFrame,
    *,
    strategy: Strategy,
    ratios: tuple[float, float],
    times: tuple[float, float] | None,
    quantiles: tuple[float, float],
) -> tuple[Int8[np.ndarray, "interactions"], Settings]:
    """The stage of each interaction.

    Leave-one-out and ratio leave users with fewer than 3 interactions wholly to training.

    Args:
        ordered: `user` and `timestamp`, user by user and oldest first; for `column` also `split`.
        strategy: The rule.
        ratios: For `ratio`, the shares of validation and test in each user's history, at least one interaction each.
        times: For `global_time`, the first timestamps of validation and of test.
        quantiles: For `global_time` without `times`, the shares of interactions before them.

    Returns:
        0 train, 1 validation, 2 test for each row, and the settings that decided it, for the fingerprint.

    Raises:
        InputError: When an option is out of range, the source has no split column or other values in it, or a stage
            is left without interactions.
    """
    settings: Settings = {"strategy": strategy}
    match strategy:
        case "leave_one_out":
            lengths, from_end = _positions(ordered)
            stages = _last(lengths, from_end, np.ones_like(lengths), np.ones_like(lengths))
        case "ratio":
            validation, test = ratios
            if not (validation > 0 and test > 0 and validation + test < 1):
                raise InputError(f"Expected data.ratios to be positive with a sum below 1, got {validation} and {test}")
            settings["ratios"] = [validation, test]
            lengths, from_end = _positions(ordered)
            stages = _last(lengths, from_end, _share(lengths, validation), _share(lengths, test))
        case "global_time":
            start, end = _times(ordered["timestamp"], quantiles) if times is None else times
            if not start < end:
                raise InputError(f"Expected data.times to start validation before test, got {start} and {end}")
            settings["times"] = [start, end]
            moments = ordered["timestamp"].to_numpy()
            stages = (moments >= start).astype(np.int8) + (moments >= end)
        case "column":
            stages = _named(ordered)
        case _:
            raise InputError(f"Expected data.strategy leave_one_out, global_time, ratio or column, got {strategy!r}")
    for name, stage in (("training", TRAIN), ("validation", VALIDATION), ("test", TEST)):
        if not (stages == stage).any():
            raise InputError(f"Expected data.strategy {strategy} to leave interactions for {name}, got none")
    return stages.astype(np.int8), settings


def _positions(ordered: pl.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """For each interaction, the number of its user's interactions and how many of them come after it."""
    users = ordered["user"].to_numpy()
    starts = np.flatnonzero(np.diff(users, prepend=-1))
    lengths = np.diff(starts, append=len(users))
    ends = np.repeat(starts + lengths, lengths)
    return np.repeat(lengths, lengths), ends - 1 - np.arange(len(users))


def _last(lengths: np.ndarray, from_end: np.ndarray, validation: np.ndarray, test: np.ndarray) -> np.ndarray:
    stages = (from_end < test).astype(np.int8) + (from_end < validation + test)
    return np.where(lengths < 3, TRAIN, stages)


def _share(lengths: np.ndarray, ratio: float) -> np.ndarray:
    return np.maximum(1, np.floor(lengths * ratio + 1e-9)).astype(np.int64)  # 0.29 * 100 is a little below 29


def _times(timestamps: pl.Series, quantiles: tuple[float, float]) -> tuple[float, float]:
    start, end = quantiles
    if not 0 < start < end < 1:
        raise InputError(f"Expected data.quantiles to increase between 0 and 1, got {start} and {end}")
    moments = np.sort(timestamps.to_numpy())
    return float(moments[int(start * len(moments))]), float(moments[int(end * len(moments))])


def _named(ordered: pl.DataFrame) -> np.ndarray:
    if "split" not in ordered.columns:
        raise InputError("Expected data.columns.split to name a column for data.strategy column, got none")
    names = ordered["split"].str.strip_chars().str.to_lowercase()
    stages = names.replace_strict(STAGE_NAMES, default=None, return_dtype=pl.Int8)
    if stages.null_count():
        other = ordered["split"].filter(stages.is_null()).unique(maintain_order=True).head(3).to_list()
        raise InputError(f"Expected train, validation or test in the split column, got {', '.join(other)}")
    return stages.to_numpy()

"""From interactions to a split: rating threshold, k-core, ties, four strategies, fingerprint.

Inside, users are 0 … users-1 in the order of their first interaction in the file, items are 0 … catalogue-1 in the
order of the catalogue file, and there is no padding id. Ties: the last two interactions of 44% of ML-100K's users
share a timestamp, so that their order is a choice, named in the split and part of its fingerprint.
"""

import hashlib
import json
import warnings
from dataclasses import dataclass
from typing import Literal

import numpy as np
import polars as pl
from jaxtyping import Bool, Int8, Int32, Int64
from rich.console import Console

from anyo_lightning.data.filtering import Duplicates, Ties, filtered, in_order
from anyo_lightning.data.item_texts import item_texts
from anyo_lightning.data.schema import Source, first_few
from anyo_lightning.data.strategies import TRAIN, VALIDATION, Settings, Strategy, assign_stages
from anyo_lightning.errors import InputError

__all__ = ["Queries", "Split", "Strategy", "Ties", "make_split"]

Stage = Literal["validation", "test"]

LARGE_TABLE_ROWS = 500_000  # about a second of sorting
STAGE_NAMES = ("train", "validation", "test")
MISSING = -1  # an empty place in a list of items or users: no id


@dataclass(frozen=True, eq=False)
class Queries:
    """The (user, target) rows of one stage, sorted by user and position.

    A row's history is all of the user's interactions of earlier stages, oldest first: the same for each of a user's
    targets. It is a span of the split's `items`, not a copy: do not write into it.
    """

    user: Int64[np.ndarray, "rows"]
    target: Int32[np.ndarray, "rows"]
    tied: Bool[np.ndarray, "rows"]
    history_start: Int64[np.ndarray, "rows"]
    history_end: Int64[np.ndarray, "rows"]
    items: Int32[np.ndarray, "interactions"]
    without_history: int

    def __len__(self) -> int:
        """The number of rows."""
        return len(self.user)

    def history(self, row: int) -> Int32[np.ndarray, "history"]:
        """The items that the user of a row had before the stage, oldest first."""
        return self.items[self.history_start[row] : self.history_end[row]]

    @property
    def history_lengths(self) -> Int64[np.ndarray, "rows"]:
        """The number of items in each row's history, at least 1."""
        return np.asarray(self.history_end - self.history_start)


@dataclass(frozen=True, eq=False)
class Split:
    """Who had what, when, and what it is for. Interactions lie user by user, oldest first."""

    name: str
    strategy: str
    ties: str
    user_ids: np.ndarray  # strings, (users,)
    item_ids: np.ndarray  # strings, (catalogue,)
    item_texts: list[str]
    offsets: Int64[np.ndarray, "offsets"]
    items: Int32[np.ndarray, "interactions"]
    stages: Int8[np.ndarray, "interactions"]  # 0 train, 1 validation, 2 test; never decreasing within a user
    tied: Bool[np.ndarray, "interactions"]  # shares its timestamp with another interaction of the same user
    timestamps: np.ndarray  # Int64 or Float64, (interactions,)
    fingerprint: str

    @property
    def users(self) -> int:
        """The number of users."""
        return len(self.user_ids)

    @property
    def catalogue_size(self) -> int:
        """The number of items."""
        return len(self.item_ids)

    @property
    def interactions(self) -> int:
        """The number of interactions, of all stages."""
        return len(self.items)

    @property
    def user_of_interaction(self) -> Int64[np.ndarray, "interactions"]:
        """The user of each interaction."""
        return np.repeat(np.arange(self.users), np.diff(self.offsets))

    @property
    def counts(self) -> dict[str, int]:
        """The figures that every table of this split carries."""
        validation, test = self.queries("validation"), self.queries("test")
        return {
            "users": self.users,
            "items": self.catalogue_size,
            "interactions": self.interactions,
            "training_interactions": int((self.stages == TRAIN).sum()),
            "validation_targets": len(validation),
            "test_targets": len(test),
            "validation_targets_without_history": validation.without_history,
            "test_targets_without_history": test.without_history,
            "tied_interactions": int(self.tied.sum()),
            "items_without_training": int((self.training_counts() == 0).sum()),
        }

    def training_counts(self) -> Int64[np.ndarray, "catalogue"]:
        """The number of training interactions of each item."""
        return np.bincount(self.items[self.stages == TRAIN], minlength=self.catalogue_size).astype(np.int64)

    def repeated_targets(self, stage: Stage, *, at_once: bool = False) -> int:
        """The number of a stage's targets that are in their own history: items that the user comes back to.

        Args:
            stage: `validation` or `test`.
            at_once: Count those alone that are there with the same timestamp: one row that is in the file twice.
        """
        number = STAGE_NAMES.index(stage)
        pairs = self.user_of_interaction * self.catalogue_size + self.items
        columns = {"pair": pairs} | ({"timestamp": self.timestamps} if at_once else {})
        targets, histories = (
            pl.DataFrame({name: values[of] for name, values in columns.items()})
            for of in (self.stages == number, self.stages < number)
        )
        return targets.join(histories, on=list(columns), how="semi").height

    def training_history(self, user: int) -> Int32[np.ndarray, "history"]:
        """The user's training items, oldest first; a view: do not write into it."""
        start, end = self.offsets[user : user + 2]
        return self.items[start : start + np.searchsorted(self.stages[start:end], VALIDATION)]

    def queries(self, stage: Stage) -> Queries:
        """The rows to rank in a stage; those whose history would be empty are left out and counted.

        Args:
            stage: `validation` or `test`; the histories of `test` include the validation items.

        Returns:
            One row per target.
        """
        number = STAGE_NAMES.index(stage)
        rows = np.flatnonzero(self.stages == number)
        users = self.user_of_interaction[rows]
        earlier = np.concatenate([[0], np.cumsum(self.stages < number)])
        start = self.offsets[users]
        end = start + earlier[self.offsets[users + 1]] - earlier[start]
        kept = end > start
        rows, users, start, end = rows[kept], users[kept], start[kept], end[kept]
        return Queries(
            user=users,
            target=self.items[rows],
            tied=self.tied[rows],
            history_start=start,
            history_end=end,
            items=self.items,
            without_history=int((~kept).sum()),
        )


def make_split(
    source: Source,
    *,
    template: str | None = None,
    duplicates: Duplicates = "keep",
    k_core: int = 5,
    rating_threshold: float | None = None,
    ties: Ties = "file_order",
    ties_seed: int = 0,
    strategy: Strategy = "leave_one_out",
    ratios: tuple[float, float] = (0.1, 0.1),
    times: tuple[float, float] | None = None,
    quantiles: tuple[float, float] = (0.8, 0.9),
) -> Split:
    """Filter, order and split the interactions of a source.

    Args:
        source: What was read.
        template: Item text with `{column}` fields; by default the source's own.
        duplicates: Which of the interactions that are equal in all columns are kept: all, the first or the last one.
        k_core: Every user and every item left has at least this many interactions (iterated); 0 keeps all.
        rating_threshold: Keep only interactions rated at least this; `None` keeps all.
        ties: Order of a user's interactions with equal timestamps: as in the file, by item id, or shuffled.
        ties_seed: Seed of the shuffle.
        strategy: `leave_one_out` (last item test, the one before validation), `global_time` (two points in time for
            all users), `ratio` (the last shares of each user's history), or `column` (the source's `split`).
        ratios: For `ratio`, the shares of validation and test.
        times: For `global_time`, the first timestamps of validation and of test.
        quantiles: For `global_time` without `times`, the shares of interactions before validation and before test.

    Returns:
        The split, the same for the same arguments on any machine.

    Raises:
        InputError: When an option is out of range, the catalogue lacks items of the interactions, ratings to threshold
            are missing, fewer than 3 interactions are left, or a stage would be empty.
    """
    if strategy == "global_time" and not source.timed:
        raise InputError("Expected data.columns.timestamp for data.strategy global_time, got null")
    console = Console(stderr=True, quiet=source.interactions.height < LARGE_TABLE_ROWS)
    with console.status(f"Splitting {source.interactions.height:,} interactions"):
        table, user_ids = filtered(source, duplicates=duplicates, rating_threshold=rating_threshold, k_core=k_core)
        table, tied = in_order(table, source.items["item_id"], ties=ties, seed=ties_seed)
        stages, stage_settings = assign_stages(
            table, strategy=strategy, ratios=ratios, times=times, quantiles=quantiles
        )
    order = _stages_in_order(table["user"].to_numpy(), stages)
    user, item = (table[name].to_numpy()[order] for name in ("user", "item"))
    starts = np.flatnonzero(np.append(True, user[1:] != user[:-1]))
    kept = np.bincount(item, minlength=source.items.height) > 0
    renumbered = np.cumsum(kept, dtype=np.int32) - 1
    item_rows = source.items.filter(kept)
    settings: Settings = {
        "k_core": k_core,
        "rating_threshold": rating_threshold,
        "ties": f"shuffle {ties_seed}" if ties == "shuffle" else ties,
        **({} if duplicates == "keep" else {"duplicates": duplicates}),
        **({} if source.timed else {"timestamps": "file order"}),
        **stage_settings,
    }
    arrays = {
        "offsets": np.append(starts, len(user)).astype(np.int64),
        "items": renumbered[item].astype(np.int32, copy=False),
        "stages": stages[order],
        "tied": tied[order],
    }
    kept_user_ids, item_ids = user_ids[user[starts]].to_numpy(), item_rows["item_id"].to_numpy()
    return Split(
        name=source.name,
        strategy=strategy,
        ties=ties,
        user_ids=kept_user_ids,
        item_ids=item_ids,
        item_texts=_texts(item_rows, source.template if template is None else template),
        timestamps=table["timestamp"].to_numpy()[order],
        fingerprint=_fingerprint(settings, [kept_user_ids, item_ids], list(arrays.values())),
        **arrays,
    )


def placeholder(item_id: str) -> str:
    """What stands for the text of an item without text."""
    return f"item {item_id}"


def _stages_in_order(users: np.ndarray, stages: np.ndarray) -> np.ndarray:
    """The order that puts each user's training before validation before test; only a split column needs it."""
    disordered = (np.diff(stages) < 0) & (np.diff(users) == 0)
    if not disordered.any():
        return np.arange(len(users))
    warnings.warn(
        f"The split column puts later interactions into earlier stages for {len(np.unique(users[1:][disordered]))} "
        "users: histories are ordered by stage first, and the figures are not free of leaks.",
        stacklevel=3,
    )
    return np.lexsort((stages, users))


def _texts(items: pl.DataFrame, template: str) -> list[str]:
    texts = item_texts(items, template)
    empty = [row for row, text in enumerate(texts) if not text]
    if empty:
        ids = items["item_id"]
        warnings.warn(
            f"{len(empty)} of {len(texts)} items have no text ({first_few(ids[empty])}): "
            "'item' and the item's id are read instead.",
            stacklevel=3,
        )
        for row in empty:
            texts[row] = placeholder(ids[row])
    return texts


def _fingerprint(settings: Settings, ids: list[np.ndarray], arrays: list[np.ndarray]) -> str:
    """A hash over the settings, the ids and who had what, in which order, for which stage; texts are not in it."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for names in ids:
        digest.update(json.dumps(names.tolist()).encode())
    for array in arrays:
        digest.update(array.astype(array.dtype.newbyteorder("<")).tobytes())
    return digest.hexdigest()[:16]

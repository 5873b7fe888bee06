"""The test rows that all runs of a table share, and each run's ranks of them in one order."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
from jaxtyping import Bool, Float, Int

from anyo_lightning.compare.variants import TestedRun, Variant
from anyo_lightning.errors import InputError
from anyo_lightning.evaluation.metrics import EXTRA_RANK_METRICS, RANK_METRICS

KEYS = ["user_id", "target_item_id"]
FUNCTIONS = RANK_METRICS | EXTRA_RANK_METRICS


@dataclass(frozen=True, eq=False)
class SharedRows:
    """Users and targets of the first run, and the ranks of every variant's runs."""

    keys: pl.DataFrame
    user: Int[np.ndarray, "rows"]
    ranks: tuple[tuple[Float[np.ndarray, "rows"], ...], ...]  # for each variant, for each of its seeds

    @classmethod
    def read(cls, variants: Sequence[Variant]) -> "SharedRows":
        """Read the predictions of all runs.

        Raises:
            InputError: A run's predictions are missing, or of other users and targets than the first run's.
        """
        first = variants[0].runs[0]
        keys = first.folder.read_predictions(KEYS)
        user_ids = pl.Enum(keys["user_id"].unique(maintain_order=True))  # in the run's order, as its own intervals are
        user = keys["user_id"].cast(user_ids).to_physical().cast(pl.Int64).to_numpy()
        ranks = tuple(tuple(_ranks(run, keys, first) for run in variant.runs) for variant in variants)
        return cls(keys, user, ranks)

    @property
    def users(self) -> int:
        """Number of users; fewer than rows where users have several targets."""
        return 1 + int(self.user.max())

    def values(self, metric: str, mask: Bool[np.ndarray, "rows"] | None = None) -> Float[np.ndarray, "users variants"]:
        """A rank metric of each user and variant, the mean over its seeds.

        Args:
            metric: As in metrics.json, one that `is_rank_metric`.
            mask: The rows that count; users without one are left out.
        """
        means = [np.mean([self._of_run(ranks, metric, mask) for ranks in of_seeds], axis=0) for of_seeds in self.ranks]
        return np.stack(means, axis=1)

    def by_seed(self, variant: int, metric: str) -> list[float]:
        """A rank metric of each of a variant's runs."""
        return [float(self._of_run(ranks, metric, None).mean()) for ranks in self.ranks[variant]]

    def _of_run(self, ranks: np.ndarray, metric: str, mask: np.ndarray | None) -> np.ndarray:
        name, _, cutoff = metric.removeprefix("test/").partition("@")
        user = self.user
        if mask is not None:
            ranks, user = ranks[mask], user[mask]
        if self.users == len(self.user):  # one row per user: no need to gather, and the order is nobody's business
            user = np.arange(len(user))
        return FUNCTIONS[name](ranks, user, int(cutoff))


def is_rank_metric(metric: str) -> bool:
    """Whether ranks alone give the metric, at any cutoff: `test/hr@3`, `test/recall@50`, `test/map@10`."""
    name, _, cutoff = metric.removeprefix("test/").partition("@")
    return metric.startswith("test/") and name in FUNCTIONS and cutoff.isdigit() and int(cutoff) > 0


def in_order(rows: pl.DataFrame, keys: pl.DataFrame) -> pl.DataFrame:
    """Rows in the order of the keys; those of other users or targets are left out."""
    if rows.select(KEYS).equals(keys):
        return rows
    return keys.join(rows, on=KEYS, how="inner", maintain_order="left")


def _ranks(run: TestedRun, keys: pl.DataFrame, first: TestedRun) -> np.ndarray:
    """A run's ranks in the order of the keys."""
    found = run.folder.read_predictions([*KEYS, "rank"])
    ordered = in_order(found, keys)
    if not len(found) == len(ordered) == len(keys):
        raise InputError(
            f"Expected the predictions of {run.folder.path} and of {first.folder.path} to be of the same "
            f"users and targets, got {len(found)} and {len(keys)} rows that differ"
        )
    return ordered["rank"].to_numpy()

"""Token-budget batches: rows of similar length, shuffled by seed and epoch, the same for any number of processes."""

import zlib
from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler


class TokenBudgetBatches(Sampler[list[int]]):
    """Batches of rows of similar length, of at most `budget` padded tokens each, shuffled by seed and epoch.

    In training a batch is one optimiser step of all processes: which rows it holds, and the order of the steps, do not
    depend on how many there are. Its rows are dealt out in order of their (jittered) lengths, one row per process, in
    alternating directions, so that the shares of a step differ by at most one row. Where a batch has fewer rows than
    there are processes, some get an empty list. In evaluation (`seed=None`) each process takes every `world_size`-th
    batch whole; the last may come twice, so that all take equally many.

    Args:
        lengths: (rows,) tokens, or items without text.
        budget: Most padded tokens a batch. A row longer than the budget is a batch of its own.
        seed: Seed of the shuffle; None keeps one fixed order, by length (evaluation).
        epoch: The epoch whose shuffle it is.
        rank: This process.
        world_size: Number of processes.
    """

    JITTER = 0.03  # how far, as a share of a row's length, the shuffle may move it among rows of other lengths

    def __init__(
        self,
        lengths: np.ndarray,
        *,
        budget: int,
        seed: int | None,
        epoch: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.lengths, self.seed, self.epoch = np.asarray(lengths), seed, epoch
        self.rank, self.world_size = rank, world_size
        self.skip = 0
        self.cuts = _cut(np.sort(self.lengths), budget / (1 + self.JITTER) if seed is not None else budget)

    @property
    def signature(self) -> int:
        """A number that other rows, budgets or seeds do not have."""
        return zlib.crc32(repr((self.seed, self.cuts.tolist(), self.lengths.tolist())).encode())

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch's shuffle (Lightning calls this)."""
        self.epoch = epoch

    def resume(self, batches: int) -> None:
        """Resume within an epoch: the next iteration leaves out this process's first `batches` batches."""
        self.skip = batches

    def batches(self) -> list[np.ndarray]:
        """This process's share of each of the epoch's batches, in order; none when there are no rows."""
        if not len(self.lengths):
            return []
        if self.seed is None:
            cut = np.split(np.argsort(self.lengths, kind="stable"), self.cuts)
            own = cut[self.rank :: self.world_size]
            return own if len(own) == len(self) else [*own, cut[-1]]
        # The p-th smallest jittered length is at most 1 + JITTER times the p-th smallest length, so that batches
        # cut where the sorted lengths fill budget / (1 + JITTER) never exceed the budget, whatever the shuffle.
        random = np.random.default_rng([self.seed, self.epoch])
        jittered = self.lengths * (1 + self.JITTER * random.random(len(self.lengths)))
        steps = np.split(np.argsort(jittered, kind="stable"), self.cuts)
        return [_share(steps[i], self.rank, self.world_size) for i in random.permutation(len(steps))]

    @property
    def last_is_repeated(self) -> bool:
        """Whether this process's last evaluation batch is another's, too, so that all have equally many."""
        return self.seed is None and len(range(self.rank, len(self.cuts) + 1, self.world_size)) < len(self)

    def __iter__(self) -> Iterator[list[int]]:
        skip, self.skip = self.skip, 0
        for rows in self.batches()[skip:]:
            yield rows.tolist()

    def __len__(self) -> int:
        count = len(self.cuts) + 1 if len(self.lengths) else 0
        return count if self.seed is not None else -(-count // self.world_size)


def _share(rows: np.ndarray, rank: int, world_size: int) -> np.ndarray:
    """The rows of a process: one of each run of `world_size` neighbours, every other run dealt backwards."""
    places = np.arange(len(rows))
    run, place = places // world_size, places % world_size
    share: np.ndarray = rows[np.where(run % 2, world_size - 1 - place, place) == rank]
    return share


def _cut(lengths: np.ndarray, budget: float) -> np.ndarray:
    """Where to cut sorted lengths so that no batch, padded to its longest row, exceeds the budget."""
    cuts, begin = [0], 0
    while begin < len(lengths):
        most = lengths[begin : begin + int(budget // max(lengths[begin], 1)) + 1]  # padded size = last * count
        begin += max(int(np.searchsorted(most * np.arange(1, len(most) + 1), budget, side="right")), 1)
        cuts.append(begin)
    return np.array(cuts[1:-1], dtype=np.int64)

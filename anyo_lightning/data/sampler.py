"""Token-budget batches: rows of similar length together, shuffled by seed and epoch, the same cuts on every process."""

import zlib
from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from anyo_lightning.errors import InputError


class TokenBudgetBatches(Sampler[list[int]]):
    """Batches of rows of similar length, of at most `budget` padded tokens each, shuffled by seed and epoch.

    Several processes train on one global batch per step: the rows are put in order of their (jittered) lengths, each
    run of `world_size` neighbours is dealt out, one row per process, in alternating directions, and the deal is cut
    into batches. So all processes take equally many steps, no row is left out or repeated, and the lengths of a step's
    batches differ little. In evaluation (`seed=None`) the batches are the same for any number of processes, and each
    takes every `world_size`-th; the last may come twice, so that all take equally many.

    Args:
        lengths: (rows,) tokens, or items without text.
        budget: Most padded tokens a batch. A row longer than the budget is a batch of its own. With several
            processes, if two of the shortest rows do not fit, the batch of the shortest may hold two all the same.
        seed: Seed of the shuffle; None keeps one fixed order, by length (evaluation).
        epoch: The epoch whose shuffle it is.
        rank: This process.
        world_size: Number of processes.

    Raises:
        InputError: When there are fewer rows to train on than processes.
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
        if seed is not None and 0 < len(self.lengths) < world_size:
            raise InputError(f"Expected at least {world_size} training windows, one a process, got {len(lengths)}")
        # Fewer than world_size rows of length 0 fill up the deal; they are taken out again when it is done.
        self.fillers = -len(self.lengths) % world_size if seed is not None else 0
        ordered = np.concatenate([np.zeros(self.fillers, dtype=np.int64), np.sort(self.lengths, kind="stable")])
        longest = ordered[world_size - 1 :: world_size] if seed is not None else ordered
        self.cuts = _cut(longest, budget / (1 + self.JITTER) if seed is not None else budget)
        if self.fillers and len(self.cuts) and self.cuts[0] == 1:
            self.cuts = self.cuts[1:]  # otherwise a process would have a filler for its only row

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
        """This process's batches of the epoch, in order; none when there are no rows."""
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
        order = np.concatenate([np.full(self.fillers, -1), np.argsort(jittered, kind="stable")])
        deal = order.reshape(-1, self.world_size)
        deal[1::2] = deal[1::2, ::-1]
        dealt = [rows[rows >= 0] for rows in np.split(deal[:, self.rank], self.cuts)]
        return [dealt[i] for i in random.permutation(len(dealt))]

    def padding_share(self) -> float:
        """The share of padded positions that hold no token, over an epoch of this process."""
        batches = self.batches()
        padded = sum(int(self.lengths[rows].max()) * len(rows) for rows in batches)
        return 1 - float(sum(self.lengths[rows].sum() for rows in batches)) / padded

    def __iter__(self) -> Iterator[list[int]]:
        skip, self.skip = self.skip, 0
        for rows in self.batches()[skip:]:
            yield rows.tolist()

    def __len__(self) -> int:
        count = len(self.cuts) + 1 if len(self.lengths) else 0
        return count if self.seed is not None else -(-count // self.world_size)


def _cut(lengths: np.ndarray, budget: float) -> np.ndarray:
    """Where to cut sorted lengths so that no batch, padded to its longest row, exceeds the budget."""
    cuts, begin = [0], 0
    while begin < len(lengths):
        most = lengths[begin : begin + int(budget // max(lengths[begin], 1)) + 1]  # padded size = last * count
        begin += max(int(np.searchsorted(most * np.arange(1, len(most) + 1), budget, side="right")), 1)
        cuts.append(begin)
    return np.array(cuts[1:-1], dtype=np.int64)

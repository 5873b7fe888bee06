"""Counting floors: nothing is trained, and each is an inner product all the same.

They count when the data are known, in every stage, need no checkpoint and have nothing to fit.
"""

import itertools
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from anyo_lightning.data.batches import HistoryBatch
from anyo_lightning.data.datamodule import RecDataModule
from anyo_lightning.data.splits import Split
from anyo_lightning.errors import InputError
from anyo_lightning.evaluation.callback import RetrievalMetrics
from anyo_lightning.evaluation.metrics import ndcg
from anyo_lightning.evaluation.ranking import mid_ranks
from anyo_lightning.internals import trainer_of
from anyo_lightning.models.base import RetrievalModule

LARGEST_CATALOGUE = 30_000  # one-hot item vectors take catalogue² floats: 3.6 GB


class Popularity(RetrievalModule):
    """Score = log(1 + training count of the item): the query is 1, an item's vector its log count."""

    trained = False

    def __init__(self) -> None:
        super().__init__()

    def make_encoders(self, data: RecDataModule, saved: Any) -> tuple[nn.Module, nn.Module]:
        """Count the items."""
        counts = torch.from_numpy(data.split.training_counts())
        return Constant(), CountedItems(counts.float().log1p()[:, None])


@dataclass(frozen=True)
class Transitions:
    """How a Markov floor counts and asks.

    Args:
        window: Transitions from an item to each of the next `window` items, weighted 1 / gap.
        counts: `raw`, or `log1p` of each weighted count.
        power: Each row is divided by its sum to this power: 1 gives probabilities, 0 leaves counts.
        recent: Number of latest items of the history that ask.
        decay: The k-th latest item (k = 0, 1, …) asks with weight decay^k.
    """

    window: int = 5
    counts: Literal["raw", "log1p"] = "raw"
    power: float = 1.0
    recent: int = 10
    decay: float = 0.7


class Markov(RetrievalModule):
    """Score = Σ_k decay^k · T[k-th latest item, item]: item vectors are one-hot, the query is that sum of rows.

    Args:
        transitions: How to count and ask.
        tuned: Choose window, counts, power and decay by validation NDCG@10 over `CHOICES` instead.
    """

    trained = False

    def __init__(self, *, transitions: Transitions = Transitions(), tuned: bool = False) -> None:
        super().__init__()
        self.transitions, self.tuned = transitions, tuned

    def make_encoders(self, data: RecDataModule, saved: Any) -> tuple[nn.Module, nn.Module]:
        """Count transitions in the training sequences; tune if `tuned`."""
        _refuse_large(data.split)
        if self.tuned:
            self.transitions = _best_transitions(data, masked=self._tested_masked(data.split))
        matrix = transition_matrix(data.split, self.transitions)
        histories = RecentRows(matrix, recent=self.transitions.recent, decay=self.transitions.decay)
        return histories, CountedItems(torch.eye(data.split.catalogue_size))

    def _tested_masked(self, split: Split) -> bool:
        """Whether the Trainer's metrics leave histories out; without any, what they would do by default."""
        trainer = trainer_of(self)
        callbacks = [] if trainer is None else trainer.callbacks  # type: ignore[attr-defined]
        metrics = next((c for c in callbacks if isinstance(c, RetrievalMetrics)), RetrievalMetrics())
        return metrics.masks_history(split)


class EASE(RetrievalModule):
    """Score = x·B with x the set of the history's items and B the closed-form item-item regression.

    `P = (XᵀX + λI)⁻¹`, `B_ij = -P_ij / P_jj` off the diagonal and 0 on it.

    Args:
        penalty: λ, the L2 penalty.

    Reference: Steck, Embarrassingly Shallow Autoencoders for Sparse Data, WWW 2019 (arXiv 1905.03375), eq. 8.
    """

    trained = False

    def __init__(self, *, penalty: float = 500.0) -> None:
        super().__init__()
        self.penalty = penalty

    def make_encoders(self, data: RecDataModule, saved: Any) -> tuple[nn.Module, nn.Module]:
        """Solve for B."""
        split = data.split
        _refuse_large(split)
        interactions = torch.zeros(split.users, split.catalogue_size, dtype=torch.float64)
        for user in range(split.users):
            interactions[user, torch.from_numpy(split.training_history(user)).long()] = 1
        gram = interactions.T @ interactions + self.penalty * torch.eye(split.catalogue_size, dtype=torch.float64)
        inverse = torch.linalg.inv(gram)
        weights = (-inverse / inverse.diagonal()).fill_diagonal_(0)
        return SetRows(weights.float()), CountedItems(torch.eye(split.catalogue_size))


class Constant(nn.Module):
    """The same query, 1, for everyone."""

    def forward(self, batch: HistoryBatch) -> Float[Tensor, "targets 1"]:
        """Ones."""
        return torch.ones(int(batch.target_mask.sum()), 1, device=batch.item_ids.device)


class CountedItems(nn.Module):
    """Fixed item vectors, recounted rather than kept in a checkpoint.

    Args:
        vectors: (catalogue, dim).
    """

    vectors: Tensor

    def __init__(self, vectors: Float[Tensor, "catalogue dim"]) -> None:
        super().__init__()
        self.register_buffer("vectors", vectors, persistent=False)

    def forward(self, item_ids: Int[Tensor, " items"]) -> Float[Tensor, "items dim"]:
        """The vectors of these items."""
        return self.vectors[item_ids]


class RecentRows(nn.Module):
    """For each supervised boundary, the decayed sum of the matrix's rows of the latest items.

    Args:
        matrix: (catalogue, catalogue).
        recent: Number of latest items.
        decay: Weight of an item relative to the one after it.
    """

    matrix: Tensor

    def __init__(self, matrix: Float[Tensor, "catalogue catalogue"], *, recent: int, decay: float) -> None:
        super().__init__()
        self.register_buffer("matrix", matrix, persistent=False)
        self.recent, self.decay = recent, decay

    def forward(self, batch: HistoryBatch) -> Float[Tensor, "targets catalogue"]:
        """The decayed sums."""
        rows, last = batch.target_mask.nonzero(as_tuple=True)
        back = torch.arange(self.recent, device=last.device)
        places = last[:, None] - back
        weights = self.decay**back * (places >= 0)
        items = batch.item_ids[rows[:, None], places.clamp(min=0)]
        return torch.stack([w @ self.matrix[i] for w, i in zip(weights.float(), items, strict=True)])


class SetRows(nn.Module):
    """For each supervised boundary, the sum of the matrix's rows of all items up to it, each once.

    Args:
        matrix: (catalogue, catalogue).
    """

    matrix: Tensor

    def __init__(self, matrix: Float[Tensor, "catalogue catalogue"]) -> None:
        super().__init__()
        self.register_buffer("matrix", matrix, persistent=False)

    def forward(self, batch: HistoryBatch) -> Float[Tensor, "targets catalogue"]:
        """The sums."""
        rows, last = batch.target_mask.nonzero(as_tuple=True)
        held = torch.zeros(len(rows), len(self.matrix), device=last.device)
        for i, (row, end) in enumerate(zip(rows.tolist(), last.tolist(), strict=True)):
            held[i, batch.item_ids[row, : end + 1]] = 1
        return held @ self.matrix


def transition_matrix(split: Split, transitions: Transitions) -> Float[Tensor, "catalogue catalogue"]:
    """Weighted, transformed and normalised counts of transitions in the training sequences."""
    size = split.catalogue_size
    counts = torch.zeros(size * size, dtype=torch.float64)
    training = torch.from_numpy(split.items).long()
    eligible = torch.from_numpy((split.stages == 0).copy())
    user = torch.from_numpy(split.user_of_interaction)
    for gap in range(1, min(transitions.window, len(training) - 1) + 1):
        pairs = eligible[:-gap] & eligible[gap:] & (user[:-gap] == user[gap:])
        places = training[:-gap][pairs] * size + training[gap:][pairs]
        counts.index_add_(0, places, torch.full((len(places),), 1 / gap, dtype=torch.float64))
    matrix = counts.view(size, size)
    if transitions.counts == "log1p":
        matrix = matrix.log1p()
    return (matrix / matrix.sum(1, keepdim=True).clamp(min=1e-12) ** transitions.power).float()


CHOICES = {
    "window": (1, 3, 5, 10),
    "counts": ("raw", "log1p"),
    "power": (0.0, 0.5, 1.0),
    "decay": (0.5, 0.7, 0.8, 0.9),
}


def _best_transitions(data: RecDataModule, *, masked: bool) -> Transitions:
    """The choice with the highest validation NDCG@10, the first one in a tie; histories masked or not."""
    queries, size = data.queries("validation"), data.split.catalogue_size
    target = torch.from_numpy(queries.target).long()
    seen = torch.zeros(len(queries), size, dtype=torch.bool)
    for row in range(len(queries)):
        seen[row, torch.from_numpy(queries.history(row)).long()] = True
    recent = 20
    best, best_value = Transitions(), -1.0
    for window, counts, power in itertools.product(CHOICES["window"], CHOICES["counts"], CHOICES["power"]):
        base = Transitions(window=int(window), counts=counts, power=float(power), recent=recent)  # type: ignore[arg-type]
        matrix = transition_matrix(data.split, base)
        for decay in CHOICES["decay"]:
            weights = torch.zeros(len(queries), size)
            for row in range(len(queries)):
                latest = torch.from_numpy(queries.history(row)[::-1][:recent].copy()).long()
                weights[row].index_add_(0, latest, float(decay) ** torch.arange(len(latest), dtype=torch.float32))
            ranks = mid_ranks(weights @ matrix, target, seen if masked else None)
            value = float(ndcg(ranks.numpy(), queries.user, 10).mean())
            if value > best_value:
                best, best_value = Transitions(base.window, base.counts, base.power, recent, float(decay)), value
    return best


def _refuse_large(split: Split) -> None:
    if split.catalogue_size > LARGEST_CATALOGUE:
        raise InputError(
            f"Expected at most {LARGEST_CATALOGUE} items for a floor with one-hot vectors, got {split.catalogue_size}"
        )

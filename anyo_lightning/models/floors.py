"""Counting floors: nothing is trained, and each is an inner product all the same.

They count when the data are known, in every stage, need no checkpoint and have nothing to fit. A query of `Markov` and
`EASE` is a sparse vector over the catalogue, how much each item of the history asks; an item's vector is what each item
says for it. Both stay on the CPU.
"""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy import sparse
from torch import Tensor, nn

from anyo_lightning.data.batches import HistoryBatch
from anyo_lightning.data.datamodule import RecDataModule
from anyo_lightning.data.splits import Split
from anyo_lightning.errors import InputError
from anyo_lightning.evaluation.callback import RetrievalMetrics
from anyo_lightning.evaluation.scores import as_torch
from anyo_lightning.internals import trainer_of
from anyo_lightning.models.base import RetrievalModule
from anyo_lightning.models.transitions import USUAL, Transitions, best_transitions, transition_matrix

LARGEST_CATALOGUE = 30_000  # of EASE, which holds two matrices of catalogue² in float64 while it solves: 14.4 GB


class Popularity(RetrievalModule):
    """Score = log(1 + training count of the item): the query is 1, an item's vector its log count."""

    trained = False

    def __init__(self) -> None:
        super().__init__()

    def make_encoders(self, data: RecDataModule, saved: Any) -> tuple[nn.Module, nn.Module]:
        """Count the items."""
        counts = torch.from_numpy(data.split.training_counts())
        return Constant(), CountedItems(counts.float().log1p()[:, None])


class Markov(RetrievalModule):
    """Score = Σ_k decay^k · T[k-th latest item, item]: an item's vector is its column of T, the query has the decays.

    Args:
        transitions: How to count and ask.
        tuned: Choose window, counts, power and decay by validation NDCG@10 over `CHOICES` instead.
    """

    trained = False

    def __init__(self, *, transitions: Transitions = USUAL, tuned: bool = False) -> None:
        super().__init__()
        self.transitions, self.tuned = transitions, tuned

    def make_encoders(self, data: RecDataModule, saved: Any) -> tuple[nn.Module, nn.Module]:
        """Count transitions in the training sequences; tune if `tuned`."""
        if self.tuned:
            masked = self._tested_masked(data.split)
            self.transitions = best_transitions(data.split, data.queries("validation"), masked=masked)
        size, settings = data.split.catalogue_size, self.transitions
        histories = RecentItems(size, recent=settings.recent, decay=settings.decay)
        return histories, SparseItems(transition_matrix(data.split, settings))

    def encode_catalogue(self) -> Float[Tensor, "catalogue catalogue"]:
        """The columns of T, sparse."""
        items = self.item_encoder
        assert isinstance(items, SparseItems)
        return items.vectors

    def _tested_masked(self, split: Split) -> bool:
        """Whether the Trainer's metrics leave histories out; without one, what the model was told, or the default."""
        if self.history_masked is not None:
            return self.history_masked
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
        """Solve for B.

        Raises:
            InputError: The catalogue is larger than `LARGEST_CATALOGUE`, or the penalty too small to solve with.
        """
        size = data.split.catalogue_size
        if size > LARGEST_CATALOGUE:
            raise InputError(f"Expected at most {LARGEST_CATALOGUE} items for EASE, which inverts them, got {size}")
        return SetOfItems(size), DenseItems(regression(data.split, self.penalty))

    def encode_catalogue(self) -> Float[Tensor, "catalogue catalogue"]:
        """The columns of B."""
        items = self.item_encoder
        assert isinstance(items, DenseItems)
        return items.weights.T


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


class SparseItems(nn.Module):
    """Columns of a sparse matrix as item vectors; not a buffer, so that it stays on the CPU.

    Args:
        matrix: (catalogue, catalogue), from the item that asks to the item that is asked for.
    """

    def __init__(self, matrix: sparse.csr_array) -> None:
        super().__init__()
        self.vectors = as_torch(matrix).t().coalesce()

    def forward(self, item_ids: Int[Tensor, " items"]) -> Float[Tensor, "items catalogue"]:
        """The vectors of these items, sparse."""
        return self.vectors.index_select(0, item_ids.cpu())


class DenseItems(nn.Module):
    """Columns of a dense matrix as item vectors; not a buffer, so that it stays on the CPU.

    Args:
        weights: (catalogue, catalogue), from the item that asks to the item that is asked for.
    """

    def __init__(self, weights: Float[Tensor, "catalogue catalogue"]) -> None:
        super().__init__()
        self.weights = weights

    def forward(self, item_ids: Int[Tensor, " items"]) -> Float[Tensor, "items catalogue"]:
        """The vectors of these items."""
        return self.weights[:, item_ids.cpu()].T


class RecentItems(nn.Module):
    """For each supervised boundary, decay^k at the k-th latest item (k = 0, 1, …), sparse.

    Args:
        catalogue_size: Width of the queries.
        recent: Number of latest items.
        decay: Weight of an item relative to the one after it.
    """

    def __init__(self, catalogue_size: int, *, recent: int, decay: float) -> None:
        super().__init__()
        self.catalogue_size, self.recent, self.decay = catalogue_size, recent, decay

    def forward(self, batch: HistoryBatch) -> Float[Tensor, "targets catalogue"]:
        """The decays, summed where an item occurs more than once."""
        batch = batch.to("cpu")
        rows, last = batch.target_mask.nonzero(as_tuple=True)
        places = last[:, None] - torch.arange(self.recent)
        query, back = (places >= 0).nonzero(as_tuple=True)
        items = batch.item_ids[rows[query], places[query, back]]
        return _sparse_queries(query, items, self.decay ** back.float(), (len(rows), self.catalogue_size))


class SetOfItems(nn.Module):
    """For each supervised boundary, 1 at every item up to it, sparse.

    Args:
        catalogue_size: Width of the queries.
    """

    def __init__(self, catalogue_size: int) -> None:
        super().__init__()
        self.catalogue_size = catalogue_size

    def forward(self, batch: HistoryBatch) -> Float[Tensor, "targets catalogue"]:
        """Ones, also where an item occurs more than once."""
        batch = batch.to("cpu")
        rows, last = batch.target_mask.nonzero(as_tuple=True)
        query, place = (torch.arange(batch.item_ids.shape[1]) <= last[:, None]).nonzero(as_tuple=True)
        items = batch.item_ids[rows[query], place]
        once = _sparse_queries(query, items, torch.ones(len(items)), (len(rows), self.catalogue_size))
        return torch.sparse_coo_tensor(
            once.indices(), once.values().clamp(max=1), once.shape, is_coalesced=True, check_invariants=True
        )


def _sparse_queries(query: Tensor, items: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    return torch.sparse_coo_tensor(torch.stack([query, items]), values, shape, check_invariants=True).coalesce()


def regression(split: Split, penalty: float) -> Float[Tensor, "catalogue catalogue"]:
    """EASE's B, by Cholesky's factor of XᵀX + λI in float64."""
    size = split.catalogue_size
    training = split.stages == 0
    pairs = np.unique(split.user_of_interaction[training] * size + split.items[training])
    held = sparse.csr_array((np.ones(len(pairs)), (pairs // size, pairs % size)), shape=(split.users, size))
    factor = torch.from_numpy((held.T @ held).toarray())
    factor.diagonal().add_(penalty)
    try:
        factor = torch.linalg.cholesky(factor)
    except RuntimeError as error:  # torch.linalg.LinAlgError
        raise InputError(f"Expected model.penalty to be so large that EASE can be solved, got {penalty}") from error
    inverse = torch.cholesky_inverse(factor)
    del factor
    return inverse.div_(-inverse.diagonal().clone()).fill_diagonal_(0).float()

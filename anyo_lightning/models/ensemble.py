"""An ensemble: finished runs as one model, their logits added in one inner product."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from anyo_lightning.data.batches import HistoryBatch
from anyo_lightning.data.datamodule import RecDataModule
from anyo_lightning.errors import InputError
from anyo_lightning.llm.evaluation_mode import evaluating
from anyo_lightning.models.base import RetrievalModule
from anyo_lightning.models.parts import ONE_ITEM
from anyo_lightning.models.restored_run import RestoredRun, restore_run
from anyo_lightning.runs import RunFolder

SUMMED = ("train_seconds", "tokens", "targets", "flops", "trainable_parameters")  # of the members' ledgers


class Ensemble(RetrievalModule):
    """Score = Σ_r w_r · logit_r over finished runs of one split; nothing is trained.

    A run's logit is the inner product in the softmax over items of its loss, its temperature included. With softmax p_r
    of run r, ranking by the sum is ranking by `Π_r p_r^{w_r}`: for positive weights, by the runs' weighted geometric
    mean. It is one inner product: a state is the runs' scaled states side by side, an item's vector the runs' vectors
    side by side, so that the index and all that rests on it work as for one run. The results are of the runs' weights
    as they are then: a test, prediction or recommendation with others is refused.

    Args:
        runs: Folders of the runs, at least two. Their data may be read in other ways (texts, lengths), but are of the
            same split; each reads as much of a history as it was trained on.
        weights: w, one per run; None: 1 each. A negative one takes a run's logit away: of `Popularity`, for targets
            that are rarer, or unseen in training (post-hoc logit adjustment).

    Raises:
        InputError: When there are less than two runs, weights are not as many, one is zero or not finite, or none is
            positive.

    Reference: Fox and Shaw, Combination of Multiple Searches (TREC-2, 1994), CombSUM; Hinton, Training Products of
        Experts by Minimizing Contrastive Divergence (2002), eq. 1; Menon et al., Long-tail Learning via Logit
        Adjustment (ICLR 2021, arXiv 2007.07314), eq. 9.
    """

    trained = False

    def __init__(self, runs: list[Path], *, weights: list[float] | None = None) -> None:
        super().__init__()
        if len(runs) < 2:
            raise InputError(f"Expected model.runs to name at least two runs, got {len(runs)}")
        weights = [1.0] * len(runs) if weights is None else weights
        if len(weights) != len(runs) or not all(weight and math.isfinite(weight) for weight in weights):
            raise InputError(f"Expected model.weights to be {len(runs)} finite numbers other than zero, got {weights}")
        if max(weights) < 0:
            raise InputError(f"Expected at least one of model.weights to be positive, got {weights}")
        self.runs, self.weights = runs, weights

    def make_encoders(self, data: RecDataModule, saved: Mapping[str, Tensor] | None) -> tuple[nn.Module, nn.Module]:
        """The runs' best checkpoints.

        Raises:
            InputError: A run is not tested, cannot be restored, is an ensemble itself, of another split or not trained
                to rank items, reads longer histories than are given to it, or has sparse vectors.
        """
        for folder in self.runs:
            if folder.is_dir() and not RunFolder(folder).finished:
                raise InputError(f"Expected model.runs to name tested runs, got {folder}, which is not")
        members = [Member(folder, restore_run(folder, device=self.build_device), data) for folder in self.runs]
        return MemberStates(members, self.weights), MemberVectors(members)

    def cost(self) -> dict[str, float]:
        """What the runs have trained, all together."""
        ledgers = [RunFolder(folder).read_metrics()["cost"] for folder in self.runs]
        summed = {
            name: sum(ledger[name] for ledger in ledgers)
            for name in SUMMED
            if all(ledger.get(name) is not None for ledger in ledgers)
        }
        return super().cost() | summed


class Member(nn.Module):
    """A finished run that encodes histories and items as in its own evaluation.

    Args:
        folder: Run folder.
        run: What it holds.
        data: The ensemble's.
    """

    def __init__(self, folder: Path, run: RestoredRun, data: RecDataModule) -> None:
        super().__init__()
        own, given = run.data.split.fingerprint, data.split.fingerprint
        if own != given:
            raise InputError(f"Expected {folder} to be a run on the same split, {given}, got {own}")
        if isinstance(run.model, Ensemble):
            raise InputError(f"Expected runs that are no ensembles, got {folder}: name its own runs")
        if run.model.trained and run.data.max_items > data.max_items:
            raise InputError(
                f"Expected data.max_items of at least {run.data.max_items}, which {folder} reads, got {data.max_items}"
            )
        self.run, self.model = run, run.model
        self.scale = self.model.logit_scale()
        if self.model.encode_histories(ONE_ITEM).is_sparse:
            raise InputError(f"Expected runs with dense vectors in an ensemble, got {folder}, whose are sparse")

    def forward(self, histories: Sequence[np.ndarray]) -> Float[Tensor, "histories dim"]:
        """The state after each history, scaled so that its inner products are logits."""
        with self.run.as_evaluated(), torch.no_grad():
            states = self.model.encode_in_batches(histories, budget=self.run.data.batch_tokens)
        return self.scale * states.float()

    def vectors(self, item_ids: Int[Tensor, " items"]) -> Float[Tensor, "items dim"]:
        """The vectors of these items."""
        with evaluating(self.model), torch.no_grad():
            return self.model.encode_items(item_ids.to(self.model.device))


class MemberStates(nn.Module):
    """`[w_1 · states of run 1, w_2 · states of run 2, …]` at each supervised boundary."""

    def __init__(self, members: Sequence[Member], weights: Sequence[float]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.weights = list(weights)

    def forward(self, batch: HistoryBatch) -> Float[Tensor, "targets dim"]:
        """Each run reads the items up to each boundary by itself."""
        items = batch.on_cpu.item_ids.cpu().numpy()
        places = zip(*(place.tolist() for place in batch.on_cpu.target_places), strict=True)
        histories = [items[row, : column + 1] for row, column in places]
        found = zip(self.weights, self.members, strict=True)
        device = batch.item_ids.device
        return torch.cat([weight * member(histories).to(device) for weight, member in found], dim=1)


class MemberVectors(nn.Module):
    """`[vector of run 1, vector of run 2, …]` of each item."""

    def __init__(self, members: Sequence[Member]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, item_ids: Int[Tensor, " items"]) -> Float[Tensor, "items dim"]:
        """The vectors of these items."""
        members = cast("Iterable[Member]", self.members)
        return torch.cat([member.vectors(item_ids).to(item_ids.device) for member in members], dim=1)

"""Anyo: the baseline. LLM, projector, inner product, sampled softmax."""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from anyo_lightning.data.batches import HistoryBatch
from anyo_lightning.data.datamodule import RecDataModule
from anyo_lightning.encoders.base import Encoders
from anyo_lightning.losses import inclusion_probabilities, sampled_softmax, systematic_sample
from anyo_lightning.models.base import RetrievalModule
from anyo_lightning.models.checks import check_positive


class Anyo(RetrievalModule):
    """Sampled softmax with shared negatives and logQ correction.

    Args:
        encoders: How histories and items are encoded; `TextEncoders` in the baseline.
        negatives: Items sampled in each step, shared by all targets.
        popularity: Negatives are drawn in proportion to their training count to this power; 0 is uniform.
        shared_negatives: Whether all processes of a step draw the same negatives (then their gradient is that of one
            process), or each its own (more distinct negatives).
        training: What `RetrievalModule` takes.
    """

    masks = True

    def __init__(
        self,
        encoders: Encoders,
        *,
        negatives: int = 512,
        popularity: float = 0.5,
        shared_negatives: bool = True,
        **training: Any,
    ) -> None:
        super().__init__(encoders, **training)
        check_positive(negatives=negatives)
        self.negatives, self.popularity, self.shared_negatives = negatives, popularity, shared_negatives

    def build(self, data: RecDataModule) -> None:
        """The chance of each item to be a negative."""
        counts = torch.from_numpy(data.split.training_counts())[self.training_items].double()
        self.probabilities = inclusion_probabilities(counts**self.popularity, self.negatives)
        self.candidates = self.training_items.clone()  # stays on the CPU, where the sample is drawn

    def loss(
        self, states: Float[Tensor, "targets dim"], batch: HistoryBatch
    ) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
        """Sampled softmax; the items of the batch are encoded once each."""
        sample = systematic_sample(self.probabilities, generator=self.shared_random if self.shared_negatives else None)
        log_expected = self.probabilities[sample].log().float().to(states.device, non_blocking=True)
        negatives = self.candidates[sample]
        # Which items are distinct is found on the CPU: asked for that, torch would wait for the GPU.
        items = torch.cat([batch.on_cpu.targets.cpu(), negatives]).numpy()
        distinct, place = (
            torch.from_numpy(found).to(states.device, non_blocking=True)
            for found in np.unique(items, return_inverse=True)
        )
        own = self.owned(batch.on_cpu.user, negatives) if self.mask_history else None
        negatives = negatives.to(states.device, non_blocking=True)
        vectors = self.encode_items(distinct).index_select(0, place)
        accidental = batch.targets[:, None] == negatives
        if own is not None:
            accidental |= own.to(states.device, non_blocking=True)[batch.target_places[0]]
        loss = sampled_softmax(
            states,
            vectors[: len(states)],
            vectors[len(states) :],
            accidental=accidental,
            log_expected=log_expected,
        )
        return self.global_mean(loss, len(states)), {}

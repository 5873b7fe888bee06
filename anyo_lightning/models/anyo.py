"""Anyo: the baseline. LLM, projector, inner product, sampled softmax."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from anyo_lightning.data.batches import HistoryBatch
from anyo_lightning.data.datamodule import RecDataModule
from anyo_lightning.encoders.text import Reads, text_encoders
from anyo_lightning.llm.backbone import Backbone
from anyo_lightning.llm.text_vectors import Pooling
from anyo_lightning.losses import inclusion_probabilities, sampled_softmax, systematic_sample
from anyo_lightning.models.base import BackboneCallable, RetrievalModule


class Anyo(RetrievalModule):
    """Text history, frozen text items, sampled softmax with shared negatives and logQ correction.

    Args:
        backbone: Loads the LLM.
        reads: `texts`: the LLM reads the items' texts. `vectors`: it reads one vector an item, the frozen embedding
            of its text through a linear layer: a fraction of the tokens. `both`: texts, each ending in that vector.
        dim: Width of item vectors.
        pooling: How the frozen LLM's states of an item's text become its vector.
        hidden: Width of the item projector's hidden layer; None for a linear projector.
        id_residual: Add a free row to each item's text vector.
        negatives: Items sampled in each step, shared by all targets.
        popularity: Negatives are drawn in proportion to their training count to this power; 0 is uniform.
        shared_negatives: Whether all processes of a step draw the same negatives (then their gradient is that of one
            process), or each its own (more distinct negatives).
        dropout: On the states before the projector and on the items' projected vectors.
        input_dropout: On the item vectors that the LLM reads.
        training: What `RetrievalModule` takes.
    """

    def __init__(
        self,
        *,
        backbone: BackboneCallable = Backbone,
        reads: Reads = "texts",
        dim: int = 128,
        pooling: Pooling = "mean",
        hidden: int | None = None,
        id_residual: bool = False,
        negatives: int = 512,
        popularity: float = 0.5,
        shared_negatives: bool = True,
        dropout: float = 0.1,
        input_dropout: float = 0.1,
        **training: Any,
    ) -> None:
        super().__init__(**training)
        self.make_backbone, self.reads, self.dim, self.pooling = backbone, reads, dim, pooling
        self.hidden, self.id_residual = hidden, id_residual
        self.dropout, self.input_dropout = dropout, input_dropout
        self.negatives, self.popularity, self.shared_negatives = negatives, popularity, shared_negatives

    def build(self, data: RecDataModule) -> None:
        """Text for text; the chance of each item to be a negative."""
        backbone = self.load_backbone(self.make_backbone, data, reads_text=self.reads != "vectors")
        self.history_encoder, self.item_encoder = text_encoders(
            backbone,
            data,
            reads=self.reads,
            dim=self.dim,
            pooling=self.pooling,
            hidden=self.hidden,
            id_residual=self.id_residual,
            dropout=self.dropout,
            input_dropout=self.input_dropout,
        )
        counts = torch.from_numpy(data.split.training_counts())[self.training_items].double()
        self.probabilities = inclusion_probabilities(counts**self.popularity, self.negatives)

    def loss(
        self, states: Float[Tensor, "targets dim"], batch: HistoryBatch
    ) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
        """Sampled softmax; the items of the batch are encoded once each."""
        sample = systematic_sample(self.probabilities, generator=self.shared_random if self.shared_negatives else None)
        log_expected = self.probabilities[sample].log().float().to(states.device)
        negatives = self.training_items[sample.to(states.device)]
        distinct, place = torch.unique(torch.cat([batch.targets, negatives]), return_inverse=True)
        vectors = self.item_encoder(distinct).float()[place]
        loss = sampled_softmax(
            states,
            vectors[: len(states)],
            vectors[len(states) :],
            accidental=batch.targets[:, None] == negatives,
            log_expected=log_expected,
        )
        return self.global_mean(loss, len(states)), {}

"""Anyo: the baseline. LLM, projector, inner product, sampled softmax."""

from pathlib import Path

import torch
from jaxtyping import Float
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor

from anyo_lightning.data.batches import HistoryBatch
from anyo_lightning.data.datamodule import RecDataModule
from anyo_lightning.encoders.backbone import Backbone
from anyo_lightning.encoders.cache import Pooling
from anyo_lightning.encoders.history import Reads, llm_history
from anyo_lightning.encoders.items import frozen_text_items, text_vectors
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
        dropout: On the states before the projector and on the items' projected vectors.
        input_dropout: On the item vectors that the LLM reads.
        optimizer: Makes the optimizer.
        learning_rates: Learning rates by the start of a parameter's name.
        warmup: Share of the steps over which learning rates rise.
        decay: Whether they then fall to zero by a cosine, or stay.
        init_from: Run folder whose best weights this run starts from.
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
        dropout: float = 0.1,
        input_dropout: float = 0.1,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        learning_rates: dict[str, float] | None = None,
        warmup: float = 0.05,
        decay: bool = True,
        init_from: Path | None = None,
    ) -> None:
        super().__init__(
            optimizer=optimizer, learning_rates=learning_rates, warmup=warmup, decay=decay, init_from=init_from
        )
        self.make_backbone, self.dim, self.pooling = backbone, dim, pooling
        self.hidden, self.id_residual = hidden, id_residual
        self.reads, self.dropout, self.input_dropout = reads, dropout, input_dropout
        self.negatives, self.popularity = negatives, popularity

    def build(self, data: RecDataModule) -> None:
        """Text for text; the chance of each item to be a negative."""
        backbone = self.load_backbone(self.make_backbone, data, reads_text=self.reads != "vectors")
        vectors = text_vectors(backbone, data, pooling=self.pooling)
        self.item_encoder = frozen_text_items(
            vectors, data, dim=self.dim, id_residual=self.id_residual, dropout=self.dropout, hidden=self.hidden
        )
        self.history_encoder = llm_history(
            backbone,
            reads=self.reads,
            item_vectors=vectors,
            dim=self.dim,
            dropout=self.dropout,
            input_dropout=self.input_dropout,
            supervision=data.supervision,
        )
        counts = torch.from_numpy(data.split.training_counts())[self.training_items].double()
        self.probabilities = inclusion_probabilities(counts**self.popularity, self.negatives)

    def loss(
        self, states: Float[Tensor, "targets dim"], batch: HistoryBatch
    ) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
        """Sampled softmax; the items of the batch are encoded once each."""
        sample = systematic_sample(self.probabilities)
        log_expected = self.probabilities[sample].log().float().to(states.device)
        negatives = self.training_items[sample.to(states.device)]
        distinct, place = torch.unique(torch.cat([batch.targets, negatives]), return_inverse=True)
        vectors = self.item_encoder(distinct).float()[place]
        return sampled_softmax(
            states,
            vectors[: len(states)],
            vectors[len(states) :],
            accidental=batch.targets[:, None] == negatives,
            log_expected=log_expected,
        ), {}

"""SASRec: the id baseline that must be beaten."""

from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from anyo_lightning.data.batches import HistoryBatch
from anyo_lightning.data.datamodule import RecDataModule
from anyo_lightning.encoders.history import IdHistory
from anyo_lightning.encoders.items import IdItems
from anyo_lightning.errors import InputError
from anyo_lightning.losses import full_softmax
from anyo_lightning.models.base import RetrievalModule


class SASRec(RetrievalModule):
    """A small causal transformer over item ids, trained by the full softmax at every position.

    The paper trains by binary cross-entropy with one negative; the full softmax is far better and is what current
    comparisons call SASRec.

    Args:
        dim: Width of item vectors and states.
        layers: Transformer layers.
        heads: Attention heads.
        dropout: On embeddings, attention and feed-forward.
        tied: Whether input and output embeddings are one table, as in the paper.
        label_smoothing: Share of the target's probability that is spread over all items.
        training: What `RetrievalModule` takes.

    Reference: Kang and McAuley, ICDM 2018 (arXiv 1808.09781); Klenitskiy and Vasilev, RecSys 2023 (arXiv 2309.07602).
    """

    def __init__(
        self,
        *,
        dim: int = 64,
        layers: int = 2,
        heads: int = 2,
        dropout: float = 0.2,
        tied: bool = True,
        label_smoothing: float = 0.0,
        **training: Any,
    ) -> None:
        super().__init__(**training)
        self.dim, self.layers, self.heads, self.dropout = dim, layers, heads, dropout
        self.tied, self.label_smoothing = tied, label_smoothing

    def build(self, data: RecDataModule) -> None:
        """A table of embeddings, a transformer over it (or over its own)."""
        if self.dim % self.heads:
            raise InputError(f"Expected dim to be a multiple of heads, got {self.dim} and {self.heads}")
        head, read = (nn.Embedding(data.split.catalogue_size, self.dim) for _ in range(2))
        for embedding in (head, read):
            nn.init.normal_(embedding.weight, std=0.02)
        self.item_encoder = IdItems(head)
        self.history_encoder = IdHistory(
            head if self.tied else read,
            max_items=data.max_items,
            layers=self.layers,
            heads=self.heads,
            dropout=self.dropout,
        )

    def loss(
        self, states: Float[Tensor, "targets dim"], batch: HistoryBatch
    ) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
        """Full softmax."""
        vectors, targets = self.training_vectors(), self.training_targets(batch)
        loss = full_softmax(states, vectors, targets, label_smoothing=self.label_smoothing)
        return self.global_mean(loss, len(states)), {}

"""E4SRec: the LLM reads a history, its last hidden state meets all items in a full softmax."""

from pathlib import Path

import torch
from jaxtyping import Float
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn

from anyo_lightning.data.batches import HistoryBatch
from anyo_lightning.data.datamodule import RecDataModule
from anyo_lightning.encoders.backbone import Backbone, load_tokenizer
from anyo_lightning.encoders.cache import Pooling
from anyo_lightning.encoders.history import ItemTokenHistory, TextHistory
from anyo_lightning.encoders.items import IdItems, frozen_text_items
from anyo_lightning.encoders.projector import Projector
from anyo_lightning.losses import full_softmax
from anyo_lightning.models import checkpoints
from anyo_lightning.models.base import BackboneCallable, RetrievalModule


class E4SRec(RetrievalModule):
    """Full softmax cross-entropy over the catalogue, with LoRA.

    Two readings. By default, as its users describe it, the LLM reads the items' *texts*, and items are vectors of
    their frozen text embedding (`e4srec.yaml`; with `id_residual` `e4srec_hybrid.yaml`). With `item_vectors_from` it is
    what the paper and its code do (`e4srec_paper.yaml`): ids only, frozen SASRec item vectors through a linear layer
    (eq. 3) between a prompt and a response marker, a free linear head over all items (eq. 5), no text at all.
    What differs from the code in both: every target is supervised once, the empty history is no sample, and pads
    never lie between instruction and items.

    Args:
        backbone: Loads the LLM.
        dim: Width of item vectors; the linear projector maps the hidden state to it.
        pooling: How the frozen LLM's states of an item's text become its vector.
        id_residual: Add a free row to each item's text vector.
        item_vectors_from: Run folder of a trained SASRec whose item vectors the LLM reads in the place of text.
        prompt: Text before the items, with `item_vectors_from`.
        response: Text after the items, with `item_vectors_from` and `supervision: last`.
        dropout: On the states before the projector.
        label_smoothing: Share of the target's probability that is spread over all items.
        optimizer: Makes the optimizer.
        learning_rates: Learning rates by the start of a parameter's name.
        warmup: Share of the steps over which learning rates rise.
        init_from: Run folder whose best weights this run starts from.

    Reference: Li et al., E4SRec (arXiv 2312.02443).
    """

    def __init__(
        self,
        *,
        backbone: BackboneCallable = Backbone,
        dim: int = 256,
        pooling: Pooling = "mean",
        id_residual: bool = False,
        item_vectors_from: Path | None = None,
        prompt: str = "The user has liked these items, oldest first:\n",
        response: str = "\n### Response:",
        dropout: float = 0.0,
        label_smoothing: float = 0.0,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        learning_rates: dict[str, float] | None = None,
        warmup: float = 0.05,
        init_from: Path | None = None,
    ) -> None:
        super().__init__(optimizer=optimizer, learning_rates=learning_rates, warmup=warmup, init_from=init_from)
        self.make_backbone, self.dim, self.pooling, self.id_residual = backbone, dim, pooling, id_residual
        self.item_vectors_from, self.prompt, self.response = item_vectors_from, prompt, response
        self.dropout, self.label_smoothing = dropout, label_smoothing

    def build(self, data: RecDataModule) -> None:
        """Text for text, or SASRec's vectors for a free head."""
        paper = self.item_vectors_from is not None
        backbone = self.load_backbone(self.make_backbone, data, reads_text=not paper)
        projector = Projector(backbone.hidden_size, self.dim, dropout=self.dropout)
        if self.item_vectors_from is None:
            self.history_encoder: nn.Module = TextHistory(backbone, projector=projector, supervision=data.supervision)
            self.item_encoder: nn.Module = frozen_text_items(
                backbone, data, dim=self.dim, pooling=self.pooling, id_residual=self.id_residual
            )
            return
        tokenizer = load_tokenizer(*backbone.source)
        self.history_encoder = ItemTokenHistory(
            backbone,
            item_vectors=checkpoints.item_vectors(self.item_vectors_from, data.split),
            projector=projector,
            prompt=tokenizer(self.prompt, add_special_tokens=False)["input_ids"],
            response=tokenizer(self.response, add_special_tokens=False)["input_ids"],
            supervision=data.supervision,
        )
        head = nn.Embedding(data.split.catalogue_size, self.dim)
        nn.init.normal_(head.weight, std=0.02)
        self.item_encoder = IdItems(head)

    def loss(
        self, states: Float[Tensor, "targets dim"], batch: HistoryBatch
    ) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
        """Full softmax over the items that occur in training (eq. 6)."""
        vectors, targets = self.training_vectors(), self.training_targets(batch)
        return full_softmax(states, vectors, targets, label_smoothing=self.label_smoothing), {}

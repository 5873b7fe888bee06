"""E4SRec: the LLM reads a history, its last hidden state meets all items in a full softmax."""

from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from anyo_lightning.data.batches import HistoryBatch
from anyo_lightning.data.datamodule import RecDataModule
from anyo_lightning.encoders.items import IdItems
from anyo_lightning.encoders.text import PROMPT, RESPONSE, Reads, llm_history, text_encoders
from anyo_lightning.errors import InputError
from anyo_lightning.llm.backbone import Backbone
from anyo_lightning.llm.text_vectors import Pooling
from anyo_lightning.losses import full_softmax
from anyo_lightning.models import identity
from anyo_lightning.models.base import BackboneCallable, RetrievalModule


class E4SRec(RetrievalModule):
    """Full softmax cross-entropy over the catalogue, with LoRA.

    As its users describe it, the LLM reads the items' *texts*, and items are vectors of their frozen text embedding
    (`e4srec.yaml`; with `id_residual` `e4srec_hybrid.yaml`); with `reads: vectors` it reads each item's text vector in
    one position (`e4srec_vectors.yaml`). With `item_vectors_from` it is what the paper and its code do
    (`e4srec_paper.yaml`): ids only, frozen SASRec item vectors through a linear layer (eq. 3) between a prompt and a
    response marker, a free linear head over all items (eq. 5), no text at all. What differs from the code in all of
    them: every target is supervised once, the empty history is no sample, and pads never lie between instruction and
    items. And the head of (eq. 5) goes through `dim`: the state is normalised and projected before it meets the items'
    free rows, which makes the paper's hidden-by-items matrix one of rank `dim`.

    Args:
        backbone: Loads the LLM.
        reads: `texts`: the LLM reads the items' texts. `vectors`: it reads one vector an item, the frozen embedding
            of its text through a linear layer: a fraction of the tokens. `both`: texts, each ending in that vector.
        dim: Width of item vectors.
        pooling: How the frozen LLM's states of an item's text become its vector.
        hidden: Width of the item projector's hidden layer; None for a linear projector.
        id_residual: Add a free row to each item's text vector.
        item_vectors_from: Run folder of a trained SASRec whose item vectors the LLM reads in the place of text. There
            is no text then, and no `reads`, `pooling`, `hidden` or `id_residual`.
        prompt: Text before the item vectors.
        response: Text after the item vectors with `supervision: last`.
        dropout: On the states before the projector and on the items' projected vectors.
        input_dropout: On the item vectors that the LLM reads.
        label_smoothing: Share of the target's probability that is spread over all items.
        training: What `RetrievalModule` takes.

    Raises:
        InputError: When `item_vectors_from` is given together with an option of text.

    Reference: Li et al., E4SRec (arXiv 2312.02443).
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
        item_vectors_from: Path | None = None,
        prompt: str = PROMPT,
        response: str = RESPONSE,
        dropout: float = 0.1,
        input_dropout: float = 0.1,
        label_smoothing: float = 0.0,
        **training: Any,
    ) -> None:
        super().__init__(**training)
        if item_vectors_from is not None and (reads, pooling, hidden, id_residual) != ("texts", "mean", None, False):
            raise InputError("Expected no reads, pooling, hidden or id_residual with item_vectors_from: it has no text")
        self.make_backbone, self.dim, self.pooling = backbone, dim, pooling
        self.hidden, self.id_residual = hidden, id_residual
        self.item_vectors_from, self.prompt, self.response = item_vectors_from, prompt, response
        self.reads, self.dropout, self.input_dropout = reads, dropout, input_dropout
        self.label_smoothing = label_smoothing

    def build(self, data: RecDataModule) -> None:
        """Text for text, or SASRec's vectors for a free head."""
        paper = self.item_vectors_from is not None
        backbone = self.load_backbone(self.make_backbone, data, reads_text=self.reads != "vectors" and not paper)
        if self.item_vectors_from is None:
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
            return
        injected = (self.restored or {}).get("history_encoder.injection.item_vectors")
        if injected is None:
            read = identity.item_vectors(self.item_vectors_from, data.split)
            injected = (read - read.mean(0)) / read.std()
        head = nn.Embedding(data.split.catalogue_size, self.dim)
        nn.init.normal_(head.weight, std=0.1)
        self.item_encoder = IdItems(head)
        self.history_encoder = llm_history(
            backbone,
            reads="vectors",
            item_vectors=injected,
            of_texts=False,
            dim=self.dim,
            prompt=self.prompt,
            response=self.response,
            dropout=self.dropout,
            input_dropout=self.input_dropout,
            supervision=data.supervision,
        )

    def loss(
        self, states: Float[Tensor, "targets dim"], batch: HistoryBatch
    ) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
        """Full softmax over the items that occur in training (eq. 6)."""
        vectors, targets = self.training_vectors(), self.training_targets(batch)
        loss = full_softmax(states, vectors, targets, label_smoothing=self.label_smoothing)
        return self.global_mean(loss, len(states)), {}

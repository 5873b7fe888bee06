"""Item encoders: item ids in, one vector per item out."""

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from anyo_lightning.data.datamodule import RecDataModule
from anyo_lightning.encoders.projector import Projector, UnitLength
from anyo_lightning.encoders.whitening import whiten
from anyo_lightning.llm.backbone import Backbone
from anyo_lightning.llm.text_vectors import Pooling, frozen_vectors


class IdItems(nn.Module):
    """A free row per item: an untied linear head over all items, or SASRec's tied one when the embedding is shared.

    An item without a training interaction keeps the row that it was initialised with: nothing is known of it, and
    its figures in a cold-start slice say so.

    Args:
        embedding: (catalogue, dim) rows.
    """

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        self.embedding = embedding

    def forward(self, item_ids: Int[Tensor, " items"]) -> Float[Tensor, "items dim"]:
        """The rows of these items."""
        rows: Tensor = self.embedding(item_ids)
        return rows


class FrozenTextItems(nn.Module):
    """`projector(frozen text vector) + linear(known vector) + free row`, the latter two only where asked for.

    The residual starts at zero and stays zero for items without a training interaction, whose vector is that of their
    text alone: such items can be scored.

    Args:
        vectors: (catalogue, width) text embeddings of the frozen LLM, pooled and whitened.
        projector: Maps them to the items' space.
        trained: (catalogue,) True where an item has a training interaction.
        id_residual: Whether to add a free row per item.
        dropout: On the projected text vectors.
        known: (catalogue, width) vectors of what another run knows of each item beside its text; zero where nothing.
        unit_length: Whether the sum is scaled to length 1.
    """

    texts_in = "vectors"
    vectors: Tensor
    trained: Tensor

    def __init__(
        self,
        vectors: Float[Tensor, "catalogue width"],
        *,
        projector: Projector,
        trained: Bool[Tensor, " catalogue"],
        id_residual: bool = False,
        dropout: float = 0.0,
        known: Float[Tensor, "catalogue other"] | None = None,
        unit_length: bool = False,
    ) -> None:
        super().__init__()
        self.projector = projector
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("vectors", vectors)
        self.register_buffer("trained", trained)
        self.register_buffer("known", known)
        dim = projector(self.vectors[:1]).shape[1]
        self.known_projector = None if known is None else Projector(known.shape[1], dim, norm=False, gain=0.1)
        self.length = UnitLength() if unit_length else nn.Identity()
        self.residual: nn.Embedding | None = None
        if id_residual:
            self.residual = nn.Embedding(len(vectors), dim)
            nn.init.zeros_(self.residual.weight)

    def forward(self, item_ids: Int[Tensor, " items"]) -> Float[Tensor, "items dim"]:
        """The vectors of these items."""
        vectors: Tensor = self.projector(self.vectors[item_ids])
        if self.known_projector is not None:
            vectors = vectors + self.known_projector(self.get_buffer("known")[item_ids])
        vectors = self.dropout(vectors)
        if self.residual is not None:
            vectors = vectors + self.residual(item_ids) * self.trained[item_ids, None]
        scaled: Tensor = self.length(vectors)
        return scaled


def text_vectors(
    backbone: Backbone, data: RecDataModule, *, pooling: Pooling, adapted: bool = False
) -> Float[Tensor, "catalogue width"]:
    """The frozen backbone's vectors of the catalogue's texts (LoRA off), whitened; embedded once and cached.

    Args:
        backbone: The LLM.
        data: The data module, set up.
        pooling: How a text's states become one vector.
        adapted: With LoRA on as it is now: of a backbone that starts from a fine-tuned one.
    """
    found = frozen_vectors(
        backbone, data.split.item_texts, pooling=pooling, max_tokens=data.max_item_tokens, adapted=adapted
    )
    return whiten(found)

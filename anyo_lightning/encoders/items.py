"""Item encoders: item ids in, one vector per item out."""

from collections.abc import Sequence
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from anyo_lightning.data.datamodule import RecDataModule
from anyo_lightning.encoders.base import ItemsByText
from anyo_lightning.encoders.projector import Projector, UnitLength
from anyo_lightning.encoders.whitening import whiten, whitening
from anyo_lightning.errors import InputError
from anyo_lightning.llm.backbone import Backbone
from anyo_lightning.llm.text_vectors import Pooling, frozen_vectors

SAME = 0.9  # mean cosine of vectors that differ in rounding alone; those of two models have one near 0
ROUNDING = 0.05  # share of their size by which vectors may differ that a backbone in bfloat16 has made twice


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

    def add_items(self, items: ItemsByText) -> None:
        """Take further items: of each its text's vector, and nothing else that is known of it."""
        self.vectors = with_rows(self.vectors, items.vectors)
        self.trained = with_rows(self.trained, self.trained.new_zeros(items.count))
        if self.known_projector is not None:
            known = self.get_buffer("known")
            self.register_buffer("known", with_rows(known, known.new_zeros(items.count, known.shape[1])))
        if self.residual is not None:
            self.residual = with_zeros(self.residual, items.count)


def with_rows(held: Float[Tensor, "items ..."], more: Float[Tensor, "more ..."] | None) -> Float[Tensor, "both ..."]:
    """What is held of items, and what is held of further ones behind it, on its device and in its dtype."""
    assert more is not None, "what this part holds of items was not read of the further ones"
    return torch.cat([held, more.to(held)])


def with_zeros(table: nn.Embedding, count: int) -> nn.Embedding:
    """A table of the same rows and further ones of zeros, not to be trained."""
    rows = table.weight.detach()
    longer = nn.Embedding(len(rows) + count, rows.shape[1])
    longer.weight = nn.Parameter(with_rows(rows, rows.new_zeros(count, rows.shape[1])), requires_grad=False)
    return longer


def text_vectors(
    backbone: Backbone, data: RecDataModule, *, pooling: Pooling, adapted: bool = False
) -> Float[Tensor, "catalogue width"]:
    """The frozen backbone's vectors of the catalogue's texts (LoRA off), whitened; embedded once and cached.

    Where a trained model meets a catalogue that it was not trained on, vectors are centred by that catalogue's own
    mean, then rotated and scaled by the trained one's covariance. What all texts of a catalogue share says nothing of
    an item, but puts every history where the model has never been; directions and their scales are what its weights
    have learned to read. UniSRec takes all statistics from each domain, but trains there afterwards, as a run with
    `init_from` does here. NDCG@10 of one UniSRec run (MiniLM, titles) from ML-100K, this way, by all of the trained
    catalogue's statistics, and by all of the other's: .0084, .0055, .0034 on Amazon Beauty; .0067, .0072, .0080 on
    ML-1M, where they are close.

    Args:
        backbone: The LLM.
        data: The data module, set up.
        pooling: How a text's states become one vector.
        adapted: With LoRA on as it is now: of a backbone that starts from a fine-tuned one.

    Raises:
        InputError: The vectors of the trained catalogue's texts are not those that the model was trained with.
    """
    embed = partial(frozen_vectors, backbone, pooling=pooling, max_tokens=data.max_item_tokens, adapted=adapted)
    found, trained = embed(data.split.item_texts), data.trained_texts
    if trained is None or trained.vectors is None:
        return whiten(found)
    by = embed(trained.texts)
    alike = F.cosine_similarity(whiten(by), trained.vectors.to(by), dim=1).mean()
    if alike < SAME:
        raise InputError(
            "Expected the language model that made the run's text vectors, with the LoRA that it had then, got one "
            f"whose vectors have a mean cosine of {alike:.2f} to them"
        )
    return whiten(found, by=by)


def further_text_vectors(
    backbone: Backbone,
    texts: Sequence[str],
    data: RecDataModule,
    *,
    pooling: Pooling,
    held: Float[Tensor, "items width"],
) -> Float[Tensor, "texts width"]:
    """What `text_vectors` would have given for texts outside of the catalogue: whitened by the catalogue's statistics.

    A checkpoint holds the catalogue's vectors whitened, and not by what: the statistics are taken again from its texts,
    whose vectors the cache usually has.

    Args:
        backbone: The LLM.
        texts: Any texts.
        data: The data module, set up, with the catalogue that was trained on.
        pooling: How a text's states become one vector.
        held: The vectors that the model holds, those of the catalogue first.

    Raises:
        InputError: When the catalogue's vectors come out otherwise than the model holds them: they were made by a
            fine-tuned language model, or by another version of a library.
    """

    def raw(of: Sequence[str]) -> Tensor:
        return frozen_vectors(backbone, of, pooling=pooling, max_tokens=data.max_item_tokens).double()

    catalogue = raw(data.split.item_texts)
    mean, rotation = whitening(catalogue)
    own = held[: len(catalogue)].to(catalogue)
    distance = float(((catalogue - mean) @ rotation - own).norm() / own.norm())
    if not distance < ROUNDING:
        raise InputError(
            "Expected to make the same vectors of the catalogue's texts as the checkpoint holds, to add items, got "
            f"others (they differ by {distance:.0%}): the run started from a fine-tuned language model, or its data or "
            "model has changed"
        )
    return ((raw(texts) - mean) @ rotation).float()

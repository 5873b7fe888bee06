"""`AdaptedTextEncoders`: frozen text vectors, a mixture-of-experts adaptor, then SASRec's transformer (UniSRec)."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from anyo_lightning.data.datamodule import RecDataModule
from anyo_lightning.encoders.base import (
    Encoders,
    ItemsByText,
    check_dropout,
    check_frozen,
    check_sizes,
    settings_of_dropped,
)
from anyo_lightning.encoders.id_history import IdHistory
from anyo_lightning.encoders.items import further_text_vectors, text_vectors, with_rows, with_zeros
from anyo_lightning.encoders.projector import UnitLength
from anyo_lightning.llm.language_model import LLM
from anyo_lightning.llm.text_vectors import Pooling


class MoEAdaptor(nn.Module):
    """`Σ_k g_k · W_k (dropout(x) - b_k)`, with gates `g = softmax(x·W_g)`, or `softmax(x·W_g + ε · s)` while training.

    The scale of the gates' noise is learned, `s = softplus(x·W_n) + .01`, and ε is normal, for each input and expert.

    Args:
        width: Width of the inputs.
        dim: Width of the outputs.
        experts: How many whitening networks are mixed.
        dropout: On the inputs of the experts.
        noise: Whether gates are noisy while training.

    Reference: Hou et al., Towards Universal Sequence Representation Learning for Recommender Systems, KDD 2022
    (arXiv 2206.05941), eq. 1 to 4.
    """

    def __init__(self, width: int, dim: int, *, experts: int, dropout: float, noise: bool = True) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.maps = nn.Parameter(torch.randn(experts, dim, width) * 0.02)
        self.means = nn.Parameter(torch.zeros(experts, width))
        self.gate = nn.Parameter(torch.zeros(width, experts))
        self.noise = nn.Parameter(torch.zeros(width, experts)) if noise else None

    def forward(self, vectors: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows dim"]:
        """The adapted vectors."""
        logits = vectors @ self.gate
        if self.training and self.noise is not None:
            logits = logits + torch.randn_like(logits) * (F.softplus(vectors @ self.noise) + 1e-2)
        experts, dim, width = self.maps.shape
        shift = torch.einsum("kdw,kw->kd", self.maps, self.means)  # W(x - b) = Wx - Wb: one product for all experts
        mapped = F.linear(self.dropout(vectors), self.maps.view(experts * dim, width)).view(
            *vectors.shape[:-1], experts, dim
        )
        return torch.einsum("...k,...kd->...d", logits.softmax(-1), mapped - shift)


class AdaptedItems(nn.Module):
    """`adaptor(text vector) + row`: the row only with `ids`, and only of items that occur in training.

    Args:
        vectors: (catalogue, width) frozen vectors of the items' texts.
        adaptor: Maps them to the items' space.
        dim: Width of that space.
        trained: (catalogue,) True where an item has a training interaction.
        ids: Whether items have a free row, too.
    """

    texts_in = "vectors"
    vectors: Tensor
    trained: Tensor

    def __init__(
        self, vectors: Float[Tensor, "catalogue width"], *, adaptor: MoEAdaptor, dim: int, trained: Tensor, ids: bool
    ) -> None:
        super().__init__()
        self.adaptor = adaptor
        self.register_buffer("vectors", vectors)
        self.register_buffer("trained", trained)
        self.rows: nn.Embedding | None = None
        if ids:
            self.rows = nn.Embedding(len(vectors), dim)
            nn.init.normal_(self.rows.weight, std=0.02)

    def forward(self, item_ids: Int[Tensor, "*items"]) -> Float[Tensor, "*items dim"]:
        """The embeddings of these items."""
        vectors: Tensor = self.adaptor(self.vectors[item_ids])
        if self.rows is not None:
            vectors = vectors + self.rows(item_ids) * self.trained[item_ids].unsqueeze(-1)
        return vectors

    def add_items(self, items: ItemsByText) -> None:
        """Take further items, known by their texts alone."""
        self.vectors = with_rows(self.vectors, items.vectors)
        self.trained = with_rows(self.trained, self.trained.new_zeros(items.count))
        if self.rows is not None:
            self.rows = with_zeros(self.rows, items.count)


class AdaptedTextEncoders(Encoders):
    """UniSRec's: an item's embedding is its adapted text vector, histories go through RecBole's SASRec.

    States and item vectors have unit length. The text vectors are whitened before the adaptor, whose own whitening
    networks start from small random maps. The paper pre-trains adaptor and transformer on other domains first; here
    they start at the data set at hand.

    Args:
        backbone: The frozen LLM that embeds the items' texts; `lora` is refused.
        pooling: How the states of a text become one vector.
        dim: Width of states and item vectors.
        layers: Transformer layers.
        heads: Attention heads.
        dropout: On embeddings, attention and feed-forward.
        experts: How many whitening networks the adaptor mixes.
        adaptor_dropout: On the text vectors.
        adaptor_noise: Whether the adaptor's gates are noisy in training, as in the paper.
        ids: Add a free row to each trained item (the paper's transductive setting); otherwise text alone (inductive).

    Raises:
        InputError: When a size is not positive, a share is outside [0, 1), `dim` is not a multiple of `heads`, or the
            backbone has LoRA.

    Reference: Hou et al., KDD 2022 (arXiv 2206.05941).
    """

    texts = frozenset({"histories", "items"})
    unit_length = True
    item_rows = ("*.rows.weight",)
    text_rows = ("*.vectors",)
    trains_only = (*Encoders.trains_only, "adaptor_dropout", "adaptor_noise")

    def __init__(
        self,
        backbone: LLM,
        *,
        pooling: Pooling = "mean",
        dim: int = 64,
        layers: int = 2,
        heads: int = 2,
        dropout: float = 0.5,
        experts: int = 8,
        adaptor_dropout: float = 0.2,
        adaptor_noise: bool = True,
        ids: bool = False,
    ) -> None:
        check_sizes(dim=dim, layers=layers, heads=heads, experts=experts)
        check_dropout(dropout=dropout, adaptor_dropout=adaptor_dropout)
        check_frozen(backbone)
        self.backbone, self.pooling, self.dim, self.layers, self.heads = backbone, pooling, dim, layers, heads
        self.dropout, self.experts, self.ids = dropout, experts, ids
        self.adaptor_dropout, self.adaptor_noise = adaptor_dropout, adaptor_noise

    def frozen_settings(self, data: RecDataModule) -> dict[str, str]:
        """The language model that is dropped, and the length at which items' texts were cut."""
        return settings_of_dropped(self.backbone, data)

    def build(
        self, data: RecDataModule, *, device: torch.device, saved: Mapping[str, Tensor] | None = None
    ) -> tuple[nn.Module, nn.Module]:
        """One adaptor for both sides; the LLM is gone afterwards, and not loaded where a checkpoint has its vectors."""
        vectors = (saved or {}).get("item_encoder.0.vectors")
        if vectors is None:
            vectors = text_vectors(self.backbone.load(device), data, pooling=self.pooling).cpu()
        adaptor = MoEAdaptor(
            vectors.shape[1], self.dim, experts=self.experts, dropout=self.adaptor_dropout, noise=self.adaptor_noise
        )
        items = AdaptedItems(
            vectors,
            adaptor=adaptor,
            dim=self.dim,
            trained=torch.from_numpy(data.split.training_counts() > 0),
            ids=self.ids,
        )
        history = IdHistory(
            items,
            dim=self.dim,
            max_items=data.max_items,
            layers=self.layers,
            heads=self.heads,
            dropout=self.dropout,
            body="recbole",
        )
        return nn.Sequential(history, UnitLength()), nn.Sequential(items, UnitLength())

    def read_items(
        self,
        texts: Sequence[str],
        read: Sequence[str],
        *,
        data: RecDataModule,
        history_encoder: nn.Module,
        item_encoder: nn.Module,
        device: torch.device,
    ) -> ItemsByText:
        """The vectors of their texts, of the LLM that is loaded for this alone."""
        held = next(part.vectors for part in item_encoder.modules() if isinstance(part, AdaptedItems))
        backbone = self.backbone.load(device)
        vectors = further_text_vectors(backbone, texts, data, pooling=self.pooling, held=held)
        return ItemsByText(len(texts), vectors=vectors)

"""`TextStartEncoders`: SASRec whose table of items starts from vectors of their texts, or keeps a part of each."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from anyo_lightning import distributed
from anyo_lightning.data.datamodule import RecDataModule
from anyo_lightning.encoders.base import check_frozen, settings_of_dropped
from anyo_lightning.encoders.id_history import Body, Positions
from anyo_lightning.encoders.ids import FREE_STD, IdEncoders
from anyo_lightning.encoders.whitening import leading_components
from anyo_lightning.errors import InputError
from anyo_lightning.llm.language_model import LLM
from anyo_lightning.llm.text_vectors import Pooling, frozen_vectors

FROZEN_STD = 0.1  # of frozen entries, for good


class SplitItems(nn.Module):
    """`[text vector, row]`: frozen dimensions beside trained ones, which are zero for items that nobody trained on.

    Args:
        text: (catalogue, frozen) the frozen dimensions.
        dim: Width of both together.
        trained: (catalogue,) True where an item has a training interaction.
    """

    texts_in = "text"
    text: Tensor
    trained: Tensor

    def __init__(
        self, text: Float[Tensor, "catalogue frozen"], *, dim: int, trained: Bool[Tensor, " catalogue"]
    ) -> None:
        super().__init__()
        self.register_buffer("text", text)
        self.register_buffer("trained", trained)
        self.rows: nn.Embedding | None = None
        if dim > text.shape[1]:
            self.rows = nn.Embedding(len(text), dim - text.shape[1])
            nn.init.normal_(self.rows.weight, std=FREE_STD)

    def forward(self, item_ids: Int[Tensor, "*items"]) -> Float[Tensor, "*items dim"]:
        """The vectors of these items."""
        text = self.text[item_ids]
        if self.rows is None:
            return text
        return torch.cat([text, self.rows(item_ids) * self.trained[item_ids].unsqueeze(-1)], dim=-1)


class TextStartEncoders(IdEncoders):
    """`IdEncoders` whose item table starts as the principal components of the items' whitened text vectors.

    - `frozen: 0`: all of the table is trained. An item without a training interaction keeps its start.
    - `frozen: k`: the first k dimensions stay the first k components of the text, and the others are a free row, zero
      for items without a training interaction: these are read and scored by their text alone.

    The LLM embeds the catalogue before training and is gone then. Where texts have fewer components than `dim`, as
    those of a catalogue with fewer items do, the other dimensions of the table start at random, as in `IdEncoders`.

    Args:
        backbone: The frozen LLM that embeds the items' texts; `lora` is refused.
        pooling: How the states of a text become one vector.
        frozen: How many dimensions of the table stay the text's.
        scale: Standard deviation of the dimensions that come from texts. None: that of free entries, .02, where all of
            the table is trained (on ML-100K it learns faster from there than from .1); .1 where they are frozen, which
            is what trained tables of SASRec end at (.09 on ML-100K, .12 on ML-1M), since these dimensions never grow.
        dim: Width of states and item vectors.
        layers: Transformer layers.
        heads: Attention heads.
        dropout: On embeddings, attention and feed-forward.
        tied: Whether input and output embeddings are one table, as in the paper.
        body: The layers of the `paper`, or those of `recbole`, DuoRec, ICSRec and SRA-CL (`IdHistory`).
        positions: Whether positions count from the `start` of what is read, as in the paper, or from its `end`.

    Raises:
        InputError: When a size is not positive, `dim` is not a multiple of `heads`, `dropout` is outside [0, 1),
            `frozen` is not between 0 and `dim`, `scale` is not positive, or the backbone has LoRA.

    Reference: Boz et al., Improving Sequential Recommendations with LLMs (arXiv 2402.01339), for the start; Hu et al.,
    AlphaFuse, SIGIR 2025 (arXiv 2504.19218), for frozen and trained dimensions side by side.
    """

    trains_only = (*IdEncoders.trains_only, "texts")
    item_rows = ("*.embedding.weight", "*.rows.weight")  # frozen dimensions are of one catalogue's components

    def __init__(
        self,
        backbone: LLM,
        *,
        pooling: Pooling = "mean",
        frozen: int = 0,
        scale: float | None = None,
        dim: int = 64,
        layers: int = 2,
        heads: int = 2,
        dropout: float = 0.2,
        tied: bool = True,
        body: Body = "paper",
        positions: Positions = "start",
    ) -> None:
        super().__init__(
            dim=dim, layers=layers, heads=heads, dropout=dropout, tied=tied, body=body, positions=positions
        )
        if not 0 <= frozen <= dim:
            raise InputError(f"Expected model.encoders.frozen between 0 and model.encoders.dim {dim}, got {frozen}")
        if scale is None:
            scale = FROZEN_STD if frozen else FREE_STD
        if scale <= 0:
            raise InputError(f"Expected model.encoders.scale to be positive, got {scale}")
        check_frozen(backbone)
        self.backbone, self.pooling, self.frozen, self.scale = backbone, pooling, frozen, scale
        # A table that is all trained has a start from texts, but holds none.
        self.texts = frozenset({"histories", "items"}) if frozen else frozenset()

    def frozen_settings(self, data: RecDataModule) -> dict[str, str]:
        """The language model that is dropped, and the length at which items' texts were cut."""
        return settings_of_dropped(self.backbone, data)

    def tables(self, data: RecDataModule, device: torch.device, saved: Mapping[str, Tensor]) -> Sequence[nn.Module]:
        """The LLM is not loaded where a checkpoint has what came of it."""
        text = saved.get("item_encoder.text" if self.frozen else "item_encoder.embedding.weight")
        if text is None:
            text = self.components(data, device)
        return [self._table(text, data) for _ in range(1 if self.tied else 2)]

    def components(self, data: RecDataModule, device: torch.device) -> Float[Tensor, "catalogue components"]:
        """The leading components of the texts, of standard deviation `scale`: as many as are frozen, or up to `dim`.

        Raises:
            InputError: Fewer than `frozen` can be told apart.
        """
        backbone = self.backbone.load(device)
        vectors = frozen_vectors(backbone, data.split.item_texts, pooling=self.pooling, max_tokens=data.max_item_tokens)
        found = self.scale * leading_components(vectors, self.frozen or self.dim)
        if found.shape[1] < self.frozen:
            raise InputError(
                f"Expected model.encoders.frozen at most {found.shape[1]}, the components of {len(found)} items' texts "
                f"with {vectors.shape[1]} dimensions, got {self.frozen}"
            )
        # Machines round differently, and components of nearly the same size turn into each other: one decides.
        found = found.to(device)
        distributed.take_from_first(found)
        return found.cpu()

    def _table(self, text: Tensor, data: RecDataModule) -> nn.Module:
        """A table with these dimensions first."""
        if self.frozen:
            return SplitItems(text, dim=self.dim, trained=torch.from_numpy(data.split.training_counts() > 0))
        table = nn.Embedding(data.split.catalogue_size, self.dim)
        nn.init.normal_(table.weight, std=FREE_STD)
        with torch.no_grad():
            table.weight[:, : text.shape[1]] = text
        return table

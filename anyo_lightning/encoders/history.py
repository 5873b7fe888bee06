"""History encoders: a `HistoryBatch` in, the states at its supervised item boundaries out."""

from collections.abc import Sequence
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn

from anyo_lightning.data.batches import HistoryBatch
from anyo_lightning.encoders.backbone import Backbone
from anyo_lightning.encoders.projector import Projector
from anyo_lightning.errors import InputError


class HistoryEncoder(Protocol):
    """What every variant has: states of a batch, in the order of `batch.targets`."""

    def __call__(self, batch: HistoryBatch) -> Float[Tensor, "targets dim"]:
        """The states at the supervised boundaries."""
        ...


class TextHistory(nn.Module):
    """The LLM reads the items' texts, one after another; the state is taken at each item's separator token.

    A causal backbone needs no attention mask: rows are right-padded, so that no real token sees a pad. A
    bidirectional backbone sees the items that it should predict, so that it allows `supervision: last` only.

    Args:
        backbone: The LLM.
        projector: Maps its states to the items' space.
        supervision: As in the DataModule.

    Raises:
        InputError: For a bidirectional backbone with `supervision: all`.
    """

    def __init__(self, backbone: Backbone, *, projector: Projector, supervision: str) -> None:
        super().__init__()
        if not backbone.causal and supervision != "last":
            raise InputError(
                f"Expected data.supervision last for the bidirectional {backbone.identity['name']}, got {supervision}"
            )
        self.backbone = backbone
        self.projector = projector

    def forward(self, batch: HistoryBatch) -> Float[Tensor, "targets dim"]:
        """States at the supervised boundaries."""
        return self.projector(self.raw_states(batch))

    def raw_states(self, batch: HistoryBatch) -> Float[Tensor, "targets hidden"]:
        """The LLM's states at the supervised boundaries, before the projector."""
        assert batch.token_ids is not None
        assert batch.boundaries is not None
        mask = None
        if not self.backbone.causal:
            lengths = batch.boundaries.amax(1, keepdim=True) + 1
            mask = torch.arange(batch.token_ids.shape[1], device=lengths.device) < lengths
        states = self.backbone(batch.token_ids, attention_mask=mask)
        rows, items = batch.target_mask.nonzero(as_tuple=True)
        return states[rows, batch.boundaries[rows, items]].float()


class ItemTokenHistory(nn.Module):
    """The LLM reads a prompt, then one vector an item: `Linear(item vector)` in the place of a token's embedding.

    With `supervision: last` a response marker follows the items and its last state is the query, as in the paper;
    otherwise the state is taken at each item's position.

    Args:
        backbone: The LLM, causal.
        item_vectors: (catalogue, width) frozen vectors of the items, such as a trained SASRec's.
        projector: Maps the LLM's states to the items' space.
        prompt: Token ids before the items.
        response: Token ids after the items, with `supervision: last`.
        supervision: As in the DataModule.

    Reference: E4SRec (arXiv 2312.02443), section 3.2.
    """

    item_vectors: Tensor

    def __init__(
        self,
        backbone: Backbone,
        *,
        item_vectors: Float[Tensor, "catalogue width"],
        projector: Projector,
        prompt: Sequence[int],
        response: Sequence[int],
        supervision: str,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.projector = projector
        self.injection = nn.Linear(item_vectors.shape[1], backbone.hidden_size)
        self.register_buffer("item_vectors", item_vectors)
        self.register_buffer("prompt", torch.tensor(prompt), persistent=False)
        self.register_buffer("response", torch.tensor(response), persistent=False)
        self.supervision = supervision

    def forward(self, batch: HistoryBatch) -> Float[Tensor, "targets dim"]:
        """States at the supervised boundaries."""
        return self.projector(self.raw_states(batch))

    def raw_states(self, batch: HistoryBatch) -> Float[Tensor, "targets hidden"]:
        """The LLM's states at the supervised boundaries, before the projector."""
        prompt, response = self.get_buffer("prompt"), self.get_buffer("response")
        items = self.injection(self.item_vectors[batch.item_ids])
        size = len(items)
        before = self.backbone.embed(prompt).to(items.dtype).expand(size, -1, -1)
        positions = len(prompt) + torch.arange(items.shape[1], device=items.device).expand(size, -1)
        embeddings = torch.cat([before, items], dim=1)
        if self.supervision == "last":
            # The marker follows each history's own last item: it overwrites padding, and pads come last.
            counts = batch.item_mask.sum(1)
            after = self.backbone.embed(response).to(items.dtype).expand(size, -1, -1)
            embeddings = torch.cat([embeddings, torch.zeros_like(after)], dim=1)
            places = len(prompt) + counts[:, None] + torch.arange(len(response), device=items.device)
            embeddings = embeddings.scatter(1, places[..., None].expand_as(after), after)
            positions = places[:, -1:].expand(-1, items.shape[1])
        states = self.backbone(input_embeddings=embeddings)
        rows, columns = batch.target_mask.nonzero(as_tuple=True)
        return states[rows, positions[rows, columns]].float()


class IdHistory(nn.Module):
    """SASRec's encoder: item embeddings plus positions through a small causal transformer; no LLM.

    Positions count from the window's first item. Pre-norm layers, GELU, as in current implementations (the paper's
    are post-norm with ReLU).

    Args:
        embedding: The item embeddings, (catalogue, dim); may be shared with `IdItems`.
        max_items: The longest history.
        layers: Transformer layers.
        heads: Attention heads.
        dropout: On embeddings, attention and feed-forward.

    Reference: Kang and McAuley, Self-Attentive Sequential Recommendation, ICDM 2018 (arXiv 1808.09781).
    """

    def __init__(self, embedding: nn.Embedding, *, max_items: int, layers: int, heads: int, dropout: float) -> None:
        super().__init__()
        dim = embedding.embedding_dim
        self.embedding = embedding
        self.position = nn.Parameter(torch.zeros(max_items, dim))
        nn.init.normal_(self.position, std=0.02)
        self.dropout = nn.Dropout(dropout)
        layer = nn.TransformerEncoderLayer(
            dim, heads, 4 * dim, dropout, activation="gelu", batch_first=True, norm_first=True
        )
        self.transformer = nn.TransformerEncoder(layer, layers, norm=nn.LayerNorm(dim), enable_nested_tensor=False)

    def forward(self, batch: HistoryBatch) -> Float[Tensor, "targets dim"]:
        """States at the supervised boundaries."""
        length = batch.item_ids.shape[1]
        inputs = self.dropout(self.embedding(batch.item_ids) + self.position[:length])
        causal = nn.Transformer.generate_square_subsequent_mask(length, device=inputs.device, dtype=inputs.dtype)
        states: Tensor = self.transformer(inputs, mask=causal, is_causal=True)
        return states[batch.target_mask]

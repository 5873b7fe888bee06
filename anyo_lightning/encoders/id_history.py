"""`IdHistory`: SASRec's history encoder, a small causal transformer and no LLM."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from anyo_lightning.data.batches import HistoryBatch

Body = Literal["paper", "recbole"]
Positions = Literal["start", "end"]


class IdHistory(nn.Module):
    """SASRec's encoder: item embeddings plus positions through a small causal transformer; no LLM.

    Layers are torch's, post-norm, four times as wide inside as the states (the SASRec paper: once). A hidden item is
    its position alone.

    - `paper`: item embeddings are scaled by `sqrt(dim)`; ReLU; dropout inside the feed-forward block, too.
    - `recbole`: item plus position goes through a LayerNorm before its dropout; GELU; no dropout inside the
      feed-forward block; all weights start at N(0, .02). RecBole's SASRec, and the body of DuoRec, ICSRec and SRA-CL.

    Args:
        embedding: Item ids in, (..., dim) embeddings out; may be shared with the item encoder.
        dim: Width of embeddings and states.
        max_items: The longest history.
        layers: Transformer layers.
        heads: Attention heads.
        dropout: On embeddings, attention and feed-forward.
        body: `paper` or `recbole`.
        positions: Whether positions count from the window's `start`, as in the paper, or from its `end`, as in code
            that pads on the left.

    Reference: Kang and McAuley, Self-Attentive Sequential Recommendation, ICDM 2018 (arXiv 1808.09781); Zhao et al.,
    RecBole, CIKM 2021 (arXiv 2011.01731).
    """

    def __init__(
        self,
        embedding: nn.Module,
        *,
        dim: int,
        max_items: int,
        layers: int,
        heads: int,
        dropout: float,
        body: Body = "paper",
        positions: Positions = "start",
    ) -> None:
        super().__init__()
        self.embedding = embedding
        self.positions = positions
        self.position = nn.Parameter(torch.zeros(max_items, dim))
        nn.init.normal_(self.position, std=0.02)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(dim, eps=1e-12) if body == "recbole" else None
        activation = "relu" if body == "paper" else "gelu"
        layer = nn.TransformerEncoderLayer(dim, heads, 4 * dim, dropout, activation, batch_first=True)
        self.transformer = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        for parameter in self.transformer.parameters():  # torch copies one layer: without this all start the same
            if parameter.ndim == 2:
                if body == "paper":
                    nn.init.xavier_uniform_(parameter)
                else:
                    nn.init.normal_(parameter, std=0.02)
        if body == "recbole":
            for block in self.transformer.layers:
                assert isinstance(block, nn.TransformerEncoderLayer)
                nn.init.zeros_(block.linear1.bias)
                nn.init.zeros_(block.linear2.bias)
                block.dropout.p = 0.0
                block.norm1.eps = block.norm2.eps = 1e-12

    def forward(self, batch: HistoryBatch) -> Float[Tensor, "targets dim"]:
        """States at the supervised boundaries."""
        length = batch.item_ids.shape[1]
        embedded = self.embedding(batch.item_ids)
        if self.norm is None:
            embedded = embedded * embedded.shape[-1] ** 0.5
        if batch.hidden is not None:
            embedded = embedded.masked_fill(batch.hidden[..., None], 0)
        position = self.position[:length]
        if self.positions == "end":  # the last item has position 0; pads, which nothing sees, have any
            back = batch.item_mask.sum(1, keepdim=True) - 1 - torch.arange(length, device=embedded.device)
            position = F.embedding(back.clamp(min=0), self.position)
        inputs = embedded + position
        inputs = self.dropout(inputs if self.norm is None else self.norm(inputs))
        causal = nn.Transformer.generate_square_subsequent_mask(length, device=inputs.device, dtype=inputs.dtype)
        states: Tensor = self.transformer(inputs, mask=causal, is_causal=True)
        return states[batch.target_places]

"""`IdEncoders`: SASRec's, a small causal transformer over item ids and a table of item embeddings; no LLM."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from anyo_lightning.data.datamodule import RecDataModule
from anyo_lightning.encoders.base import Encoders, check_dropout, check_sizes
from anyo_lightning.encoders.id_history import Body, IdHistory, Positions
from anyo_lightning.encoders.items import IdItems

FREE_STD = 0.02  # of free entries at the start


class IdEncoders(Encoders):
    """A table of item embeddings, and a transformer over it or over a table of its own.

    Args:
        dim: Width of states and item vectors.
        layers: Transformer layers.
        heads: Attention heads.
        dropout: On embeddings, attention and feed-forward.
        tied: Whether input and output embeddings are one table, as in the paper.
        body: The layers of the `paper`, or those of `recbole`, DuoRec, ICSRec and SRA-CL (`IdHistory`).
        positions: Whether positions count from the `start` of what is read, as in the paper, or from its `end`.

    Raises:
        InputError: When a size is not positive, `dim` is not a multiple of `heads`, or `dropout` is outside [0, 1).

    Reference: Kang and McAuley, Self-Attentive Sequential Recommendation, ICDM 2018 (arXiv 1808.09781).
    """

    texts = frozenset()
    item_rows: tuple[str, ...] = ("*.embedding.weight",)

    def __init__(
        self,
        *,
        dim: int = 64,
        layers: int = 2,
        heads: int = 2,
        dropout: float = 0.2,
        tied: bool = True,
        body: Body = "paper",
        positions: Positions = "start",
    ) -> None:
        check_sizes(dim=dim, layers=layers, heads=heads)
        check_dropout(dropout=dropout)
        self.dim, self.layers, self.heads, self.dropout, self.tied = dim, layers, heads, dropout, tied
        self.body, self.positions = body, positions

    def build(
        self, data: RecDataModule, *, device: torch.device, saved: Mapping[str, Tensor] | None = None
    ) -> tuple[IdHistory, nn.Module]:
        """One table for both sides, or one each."""
        tables = self.tables(data, device, saved or {})
        history = IdHistory(
            tables[-1],
            dim=self.dim,
            max_items=data.max_items,
            layers=self.layers,
            heads=self.heads,
            dropout=self.dropout,
            body=self.body,
            positions=self.positions,
        )
        return history, IdItems(tables[0]) if isinstance(tables[0], nn.Embedding) else tables[0]

    def tables(self, data: RecDataModule, device: torch.device, saved: Mapping[str, Tensor]) -> Sequence[nn.Module]:
        """The items' table and the histories', which are one where they are tied: small random rows.

        Args:
            data: As in `build`.
            device: As in `build`.
            saved: As in `build`.
        """
        tables = [nn.Embedding(data.split.catalogue_size, self.dim) for _ in range(1 if self.tied else 2)]
        for table in tables:
            nn.init.normal_(table.weight, std=FREE_STD)
        return tables

"""Pooling of texts that an LLM reads: the mean of the states at the pooled tokens."""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from anyo_lightning.errors import InputError
from anyo_lightning.llm.backbone import Backbone


class PooledReader(nn.Module):
    """Reads rows of tokens and takes the mean of the states at the pooled tokens: EOS, or tokens added for this.

    Added tokens have trained embeddings of their own, which start near that of EOS; the LLM's table stays frozen.

    Args:
        backbone: The LLM, causal.
        end: Token id of EOS.
        added_tokens: How many tokens to add; 0 pools EOS.

    Raises:
        InputError: For a bidirectional backbone.
    """

    def __init__(self, backbone: Backbone, *, end: int, added_tokens: int = 0) -> None:
        super().__init__()
        if not backbone.causal:
            raise InputError(f"Expected a causal backbone for EOS pooling, got {backbone.identity['name']}")
        self.backbone = backbone
        self.end = end
        self.count = max(added_tokens, 1)
        self.added: nn.Parameter | None = None
        if added_tokens:
            start = backbone.embed(torch.tensor([end], device=backbone.device)).detach().float()
            noise = torch.randn(added_tokens, backbone.hidden_size, device=start.device) * start.std()
            self.added = nn.Parameter(start + 0.1 * noise)

    def forward(
        self,
        token_ids: Int[Tensor, "rows tokens"],
        pooled: Int[Tensor, "rows texts count"],
        *,
        attention_mask: Bool[Tensor, "rows tokens tokens"] | None = None,
        position_ids: Int[Tensor, "rows tokens"] | None = None,
    ) -> Float[Tensor, "rows texts width"]:
        """The pooled states, float32.

        Args:
            token_ids: Right-padded; EOS at the pooled places.
            pooled: Where the pooled tokens of each vector are.
            attention_mask: As the backbone takes it.
            position_ids: As the backbone takes them.
        """
        rows = torch.arange(len(token_ids), device=token_ids.device)[:, None, None]
        options: dict[str, Any] = {
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "read": (rows, pooled),
        }
        if self.added is None:
            states = self.backbone(token_ids, **options)
        else:
            embeddings = self.backbone.embed(token_ids).float()
            embeddings = embeddings.index_put((rows, pooled), self.added.expand(*pooled.shape, -1))
            states = self.backbone(input_embeddings=embeddings, **options)
        return states.float().mean(2)

"""Pooling of texts that an LLM reads: states at pooled tokens, and what becomes of them before they are compared."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from anyo_lightning.encoders.backbone import Backbone
from anyo_lightning.encoders.projector import whitening
from anyo_lightning.errors import InputError


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


class Whitened(nn.Module):
    """`(x - mean) · W`, so that the states have covariance 1; mean and W are measured once, before training.

    The raw EOS states of all texts point in nearly one direction (SmolLM2's first 3 layers: mean cosine .997), so
    that their cosines say nothing until training has removed what they share.
    """

    mean: Tensor
    rotation: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("rotation", torch.eye(width))

    def forward(self, states: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows width"]:
        """Whiten the last dimension."""
        return (states - self.mean) @ self.rotation

    @property
    def measured(self) -> bool:
        """Whether the statistics have been taken, here or in a checkpoint."""
        return not torch.equal(self.rotation, torch.eye(len(self.rotation), device=self.rotation.device))

    @torch.no_grad()
    def measure(self, encode: Callable[[], Tensor]) -> None:
        """Take the statistics of the states that reach this module while `encode` runs."""
        seen: list[Tensor] = []
        with self.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])):
            encode()
        mean, rotation = whitening(torch.cat(seen))
        self.mean.copy_(mean)
        self.rotation.copy_(rotation)


class UnitLength(nn.Module):
    """`x / |x|`, so that inner products are cosines."""

    def forward(self, vectors: Float[Tensor, "*rows dim"]) -> Float[Tensor, "*rows dim"]:
        """Normalise the last dimension."""
        return F.normalize(vectors, dim=-1)


def padded(rows: list[np.ndarray], padding: int) -> tuple[Int[Tensor, "rows tokens"], Int[Tensor, " rows"]]:
    """Rows of tokens as one tensor, padded on the right, and their lengths."""
    lengths = np.array([len(row) for row in rows])
    token_ids = np.full((len(rows), int(lengths.max())), padding, dtype=np.int64)
    token_ids[np.arange(token_ids.shape[1]) < lengths[:, None]] = np.concatenate(rows)
    return torch.from_numpy(token_ids), torch.from_numpy(lengths)

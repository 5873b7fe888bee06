"""A prefix that all rows share is read once: one row of all tokens, in which every row's own tokens see it.

`prefix, row` for each of R rows costs R·(P + n) tokens; `prefix, row, row, ...` as one row costs P + R·n, with
positions P … P + n - 1 in each row. All of a layer but attention works on each token alone; attention is told of the
layout (`llm/attention.py`) and gives each row the prefix's keys and values, so that gradients flow into them from all.
Nothing is cached between layers or passes: recomputed activations, adapted and shared-out weights work as ever.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PretrainedConfig

from anyo_lightning.internals import attention_of

# Models whose layers work on each token alone but for attention, which they call with all options that they are given.
FAMILIES = ("gemma", "gemma3_text", "granite", "llama", "mistral", "olmo2", "qwen2", "qwen3", "smollm3")


@dataclass(frozen=True)
class Packed:
    """A prefix and the rows behind it as one row.

    Attributes:
        prefix: Its tokens.
        rows: How many rows follow.
        tokens: Those of each row, padding included.
    """

    prefix: int
    rows: int
    tokens: int

    def embeddings(
        self, prefix: Float[Tensor, "prefix hidden"], rows: Float[Tensor, "rows tokens hidden"]
    ) -> Float[Tensor, "1 all hidden"]:
        """All tokens in one row."""
        return torch.cat([prefix.to(rows.dtype), rows.flatten(0, 1)])[None]

    def positions(self, device: torch.device) -> Int[Tensor, "1 all"]:
        """Each token's position behind the prefix."""
        own = self.prefix + torch.arange(self.tokens, device=device)
        return torch.cat([torch.arange(self.prefix, device=device), own.repeat(self.rows)])[None]

    def places(
        self, rows: Int[Tensor, "*read"], columns: Int[Tensor, "*read"]
    ) -> tuple[Int[Tensor, "*read"], Int[Tensor, "*read"]]:
        """Where in the one row a row's token is."""
        places = self.prefix + rows * self.tokens + columns
        return torch.zeros_like(places), places

    def unpack(self, states: Float[Tensor, "1 all hidden"]) -> Float[Tensor, "rows tokens hidden"]:
        """The rows' own states."""
        return states[0, self.prefix :].view(self.rows, self.tokens, -1)


def can_share(model: torch.nn.Module, tokens: int) -> bool:
    """Whether a model can be told to share a prefix: its family, its attention, no window shorter than a row.

    Args:
        model: A transformers model.
        tokens: Of the prefix and the longest row.
    """
    config: PretrainedConfig = model.config
    window = getattr(config, "sliding_window", None)
    return config.model_type in FAMILIES and attention_of(model) == "auto" and (window is None or tokens <= window)

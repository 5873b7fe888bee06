"""One LLM upon another: the item LLM makes a vector of each text, the user LLM reads a history of these vectors."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from anyo_lightning.data.datamodule import RecDataModule
from anyo_lightning.encoders.base import Encoders, ItemsByText, check_dropout, check_sizes
from anyo_lightning.encoders.history import PROMPT, RESPONSE, ItemTokenHistory, input_layer, prompt_length
from anyo_lightning.encoders.live import LiveTextItems
from anyo_lightning.encoders.pooling import PooledReader
from anyo_lightning.encoders.projector import Projector, UnitLength
from anyo_lightning.encoders.whitening import Whitened
from anyo_lightning.llm.backbone import Backbone
from anyo_lightning.llm.language_model import LLM


class LiveInjection(nn.Module):
    """`Linear(dropout(LayerNorm(whitened(LLM(item text)))))`: an item, encoded in each call, for the user LLM to read.

    Each distinct item of a call is encoded once, with the item LLM's gradients.

    Args:
        items: The item encoder, whose states are read.
        whitened: What its head does with them first.
        backbone: The user LLM.
        dropout: On the item vectors.
    """

    def __init__(self, items: LiveTextItems, *, whitened: nn.Module, backbone: Backbone, dropout: float = 0.0) -> None:
        super().__init__()
        width = items.reader.backbone.hidden_size
        self.items, self.whitened = items, whitened
        self.norm, self.dropout = nn.LayerNorm(width), nn.Dropout(dropout)
        self.linear = input_layer(width, backbone)

    def tokens_of(self, item_ids: Int[Tensor, "*items"]) -> int:
        """Tokens that are read to encode these items in a step."""
        return self.items.token_count(torch.unique(item_ids))

    def forward(
        self, item_ids: Int[Tensor, "*items"], hidden: Bool[Tensor, "*items"] | None = None
    ) -> Float[Tensor, "*items width"]:
        """The input embeddings of these items; that of a hidden one is the layer's bias alone."""
        distinct, places = torch.unique(item_ids, return_inverse=True)
        vectors = self.dropout(self.norm(self.whitened(self.items.states(distinct, within=True)))[places])
        if hidden is not None:
            vectors = vectors.masked_fill(hidden[..., None], 0)
        embeddings: Tensor = self.linear(vectors)
        return embeddings


class HierarchicalEncoders(Encoders):
    """Two LLMs, trained together: an item's vector is its text's EOS state, and histories are read as such vectors.

    Item vectors and states are projected and have length 1. With a frozen item LLM, histories are read as by
    `TextEncoders` with `reads: vectors`.

    What differs from the paper: its LLMs are trained in full, a prompt stands before each item's text and a trained
    token after it, and the item LLM's state is at once what the user LLM reads and what is ranked. Here the LLMs have
    LoRA, the state is whitened by statistics measured before training, and a map of its own leads to each of the two,
    since raw EOS states of all texts point in nearly one direction. Histories are read behind a prompt.

    Args:
        backbone: The user LLM, causal.
        item_backbone: The item LLM, causal; it may be smaller.
        dim: Width of states and item vectors.
        hidden: Width of the item projector's hidden layer; None for a linear projector.
        whiten: Whiten the item LLM's states.
        dropout: On states and item vectors before their projectors.
        input_dropout: On the item vectors that the user LLM reads.
        self_prompt: Text after an item's text, before EOS.
        pooled_tokens: Tokens added after an item's text, whose last states are pooled by their mean; 0 pools EOS.

    Raises:
        InputError: When a share is outside [0, 1), or a size is not positive.

    Reference: Chen et al., HLLM: Enhancing Sequential Recommendations via Hierarchical Large Language Models for Item
    and User Modeling (arXiv 2409.12740), section 3.
    """

    texts = frozenset({"histories", "items"})
    unit_length = True

    def __init__(
        self,
        backbone: LLM,
        *,
        item_backbone: LLM,
        dim: int = 128,
        hidden: int | None = None,
        whiten: bool = True,
        dropout: float = 0.1,
        input_dropout: float = 0.1,
        self_prompt: str = "",
        pooled_tokens: int = 0,
    ) -> None:
        check_dropout(dropout=dropout, input_dropout=input_dropout)
        check_sizes(dim=dim, hidden=hidden, pooled_tokens=pooled_tokens)
        self.backbone, self.item_backbone = backbone, item_backbone
        self.dim, self.hidden, self.whiten = dim, hidden, whiten
        self.dropout, self.input_dropout = dropout, input_dropout
        self.self_prompt, self.pooled_tokens = self_prompt, pooled_tokens

    def row_tokens(self, data: RecDataModule) -> int:
        """Those of `ItemTokenHistory`."""
        return prompt_length(self.backbone, PROMPT, RESPONSE, data.supervision)

    def frozen_settings(self, data: RecDataModule) -> dict[str, str]:
        """The length at which items' texts are cut."""
        return {"data.max_item_tokens": str(data.max_item_tokens)}

    def build(
        self, data: RecDataModule, *, device: torch.device, saved: Mapping[str, Tensor] | None = None
    ) -> tuple[ItemTokenHistory, LiveTextItems]:
        """Both LLMs; the `Whitened` part has still to be measured: `measure_whitening`."""
        backbone, item_backbone = self.backbone.load(device), self.item_backbone.load(device)
        backbone.check_positions(data.longest_history() + self.row_tokens(data), "data.max_items")
        tokens = self.item_backbone.item_tokens(data.split.item_texts, max_tokens=data.max_item_tokens)
        item_backbone.check_token_ids(int(tokens.token_ids.max()))
        prompt = self.item_backbone.tokens(self.self_prompt)
        behind = len(prompt) + max(self.pooled_tokens, 1) - 1
        item_backbone.check_positions(int(tokens.lengths.max()) + behind, "data.max_item_tokens")
        width = item_backbone.hidden_size
        whitened = Whitened(width) if self.whiten else nn.Identity()
        projector = Projector(width, self.dim, hidden=self.hidden, dropout=self.dropout, norm=not self.whiten)
        items = LiveTextItems(
            PooledReader(item_backbone, end=tokens.separator, added_tokens=self.pooled_tokens),
            tokens=tokens,
            prompt=prompt,
            head=nn.Sequential(whitened, projector, UnitLength()),
            held_tokens=lambda: data.held_tokens,
        )
        history = ItemTokenHistory(
            backbone,
            injection=LiveInjection(items, whitened=whitened, backbone=backbone, dropout=self.input_dropout),
            projector=nn.Sequential(Projector(backbone.hidden_size, self.dim, dropout=self.dropout), UnitLength()),
            prompt=self.backbone.tokens(PROMPT),
            response=self.backbone.tokens(RESPONSE),
            supervision=data.supervision,
        )
        return history, items

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
        """Their tokens, which both sides read."""
        tokens = self.item_backbone.item_tokens(texts, max_tokens=data.max_item_tokens)
        return ItemsByText(len(texts), item_tokens=tokens)

"""History encoders by an LLM: a `HistoryBatch` in, the states at its supervised item boundaries out."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from anyo_lightning.data.batches import HistoryBatch
from anyo_lightning.data.datamodule import RecDataModule
from anyo_lightning.encoders.base import ItemsByText
from anyo_lightning.encoders.items import with_rows
from anyo_lightning.errors import InputError
from anyo_lightning.llm.backbone import Backbone
from anyo_lightning.llm.language_model import LLM

PROMPT = "The user has liked these items, oldest first:"
RESPONSE = "\n### Response:"


class Injection(nn.Module):
    """`Linear(dropout(item vector))`: an item's frozen vector as an input embedding of the LLM.

    It starts as large as the token embeddings among which the LLM was trained.

    Args:
        item_vectors: (catalogue, width) frozen vectors of the items.
        backbone: The LLM.
        dropout: On the item vectors.
        of_texts: Whether they are vectors of the items' texts.
    """

    item_vectors: Tensor

    def __init__(
        self,
        item_vectors: Float[Tensor, "catalogue width"],
        *,
        backbone: Backbone,
        dropout: float = 0.0,
        of_texts: bool = True,
    ) -> None:
        super().__init__()
        self.texts_in = "item_vectors" if of_texts else None
        self.register_buffer("item_vectors", item_vectors)
        self.dropout = nn.Dropout(dropout)
        self.linear = input_layer(item_vectors.shape[1], backbone, size=item_vectors.square().mean().sqrt())

    def forward(
        self, item_ids: Int[Tensor, "*items"], hidden: Bool[Tensor, "*items"] | None = None
    ) -> Float[Tensor, "*items width"]:
        """The input embeddings of these items; that of a hidden one is the layer's bias alone."""
        vectors = self.dropout(self.item_vectors[item_ids])
        if hidden is not None:
            vectors = vectors.masked_fill(hidden[..., None], 0)
        embeddings: Tensor = self.linear(vectors)
        return embeddings

    def add_items(self, items: ItemsByText) -> None:
        """Take further items: their texts' vectors, or zeros where this holds what is known beside texts."""
        held = self.item_vectors
        self.item_vectors = with_rows(
            held, items.vectors if self.texts_in else held.new_zeros(items.count, held.shape[1])
        )


def input_layer(width: int, backbone: Backbone, *, size: Tensor | float = 1.0) -> nn.Linear:
    """A linear layer whose outputs start as large as an LLM's token embeddings.

    Args:
        width: Of its inputs.
        backbone: The LLM.
        size: Root mean square of its inputs.
    """
    layer = nn.Linear(width, backbone.hidden_size)
    sample = backbone.embed(torch.arange(min(1000, backbone.embedding_rows), device=backbone.device))
    growth = sample.detach().float().square().mean().sqrt() / size
    nn.init.normal_(layer.weight, std=float(growth) * width**-0.5)
    nn.init.zeros_(layer.bias)
    return layer


@runtime_checkable
class ReadsItems(Protocol):
    """An injection that reads items' texts in each call."""

    def tokens_of(self, item_ids: Int[Tensor, "*items"]) -> int:
        """Tokens that are read to inject these items."""
        ...


class Injections(nn.ModuleList):
    """The sum of several `Injection`s: an item as its text's vector and another run's at once."""

    def forward(
        self, item_ids: Int[Tensor, "*items"], hidden: Bool[Tensor, "*items"] | None = None
    ) -> Float[Tensor, "*items width"]:
        """The input embeddings of these items; those of hidden ones are the layers' biases alone."""
        return torch.stack([injection(item_ids, hidden) for injection in self]).sum(0)


class TextHistory(nn.Module):
    """The LLM reads the items' texts, one after another; the state is taken at each item's separator token.

    A causal backbone needs no attention mask: rows are right-padded, so that no real token sees a pad. A
    bidirectional backbone sees the items that it should predict, so it allows `supervision: last` only.

    Args:
        backbone: The LLM.
        projector: Maps its states to the items' space.
        supervision: As in the DataModule.
        injection: Replaces each separator's embedding by the item's vector; None keeps the token's own.

    Raises:
        InputError: For a bidirectional backbone with `supervision: all`.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        projector: nn.Module,
        supervision: str,
        injection: Injection | Injections | None = None,
    ) -> None:
        super().__init__()
        if not backbone.causal and supervision != "last":
            raise InputError(
                f"Expected data.supervision last for the bidirectional {backbone.identity['name']}, got {supervision}"
            )
        self.backbone = backbone
        self.projector = projector
        self.injection = injection

    def forward(self, batch: HistoryBatch) -> Float[Tensor, "targets dim"]:
        """States at the supervised boundaries."""
        assert batch.token_ids is not None
        assert batch.boundaries is not None
        mask = None
        if not self.backbone.causal:
            lengths = batch.boundaries.amax(1, keepdim=True) + 1
            mask = torch.arange(batch.token_ids.shape[1], device=lengths.device) < lengths
        targets, boundaries = batch.target_places
        read = targets, batch.boundaries[targets, boundaries]
        if self.injection is None:
            states = self.backbone(batch.token_ids, attention_mask=mask, read=read)
        else:
            rows, items = batch.item_places
            hidden = None if batch.hidden is None else batch.hidden[rows, items]
            injected = self.injection(batch.item_ids[rows, items], hidden)
            embeddings = self.backbone.embed(batch.token_ids).to(injected.dtype)
            embeddings = embeddings.index_put((rows, batch.boundaries[rows, items]), injected)
            states = self.backbone(input_embeddings=embeddings, attention_mask=mask, read=read)
        return self.projector(states.float())


class ItemTokenHistory(nn.Module):
    """The LLM reads a prompt, then one injected vector per item.

    With `supervision: last` a response marker follows the items and its last state is the query, as in the paper;
    otherwise the state is taken at each item's position. The prompt is read once for all rows of a batch, where the
    backbone can (`Backbone.shares_prefix`).

    Args:
        backbone: The LLM, causal.
        injection: Makes input embeddings of items.
        projector: Maps the LLM's states to the items' space.
        prompt: Token ids before the items.
        response: Token ids after the items, with `supervision: last`.
        supervision: As in the DataModule.

    Raises:
        InputError: For a bidirectional backbone, which would see the items that it should predict.

    Reference: E4SRec (arXiv 2312.02443), section 3.2.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        injection: nn.Module,
        projector: nn.Module,
        prompt: Sequence[int],
        response: Sequence[int],
        supervision: str,
    ) -> None:
        super().__init__()
        if not backbone.causal:
            raise InputError(f"Expected a causal backbone to read item vectors, got {backbone.identity['name']}")
        self.backbone = backbone
        self.injection = injection
        self.projector = projector
        self.register_buffer("prompt", torch.tensor(prompt, dtype=torch.long), persistent=False)
        self.register_buffer("response", torch.tensor(response, dtype=torch.long), persistent=False)
        self.supervision = supervision

    def tokens_read(self, batch: HistoryBatch, cut: Sequence[np.ndarray] | None = None) -> int:
        """A batch's tokens, with one prompt in each part where it is shared, and what is read to inject its items."""
        rows, items = batch.item_ids.shape
        cut = [np.arange(rows)] if cut is None else cut
        prompt = len(self.get_buffer("prompt"))
        response = len(self.get_buffer("response")) if self.supervision == "last" else 0
        found = batch.token_count
        if self.backbone.shares_prefix(prompt + items + response):
            found -= prompt * max(rows - max(len(cut), 1), 0)
        if isinstance(self.injection, ReadsItems):
            found += sum(self.injection.tokens_of(batch.on_cpu.of_rows(part).item_ids) for part in cut)
        return found

    def forward(self, batch: HistoryBatch) -> Float[Tensor, "targets dim"]:
        """States at the supervised boundaries."""
        prompt, response = self.get_buffer("prompt"), self.get_buffer("response")
        items = self.injection(batch.item_ids, batch.hidden)
        positions = torch.arange(items.shape[1], device=items.device).expand(len(items), -1)
        if self.supervision == "last":
            # The marker follows each history's own last item: it overwrites padding, so that pads come last.
            counts = batch.item_mask.sum(1)
            after = self.backbone.embed(response).to(items.dtype).expand(len(items), -1, -1)
            places = counts[:, None] + torch.arange(len(response), device=items.device)
            items = torch.cat([items, torch.zeros_like(after)], dim=1)
            items = items.scatter(1, places[..., None].expand_as(after), after)
            positions = places[:, -1:].expand_as(positions)
        rows, columns = batch.target_places
        states = self.backbone(
            input_embeddings=items, prefix=self.backbone.embed(prompt), read=(rows, positions[rows, columns])
        )
        projected: Tensor = self.projector(states.float())
        return projected


def prompt_length(llm: LLM, prompt: str, response: str, supervision: str) -> int:
    """The tokens that `ItemTokenHistory` reads of each history beside its items.

    Args:
        llm: The LLM.
        prompt: Text before the items.
        response: Text after them, with `supervision: last`.
        supervision: As in the DataModule.
    """
    return len(llm.tokens(prompt)) + (len(llm.tokens(response)) if supervision == "last" else 0)


def check_histories(backbone: Backbone, data: RecDataModule, *, behind: int = 0) -> None:
    """Refuse, before anything is trained, histories that an LLM cannot read.

    Args:
        backbone: The LLM.
        data: The data module, set up, with tokens.
        behind: Tokens behind each history.

    Raises:
        InputError: A token has no embedding, or a history is longer than the LLM's positions.
    """
    assert data.tokens is not None, "without a Trainer, call data.read_for(model) before model.prepare(data)"
    backbone.check_token_ids(int(data.tokens.token_ids.max()))
    backbone.check_positions(data.longest_history() + behind, "data.max_tokens")

"""`TextEncoders`: the LLM reads histories, and items are frozen vectors of their texts."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from anyo_lightning.data.datamodule import RecDataModule
from anyo_lightning.data.tokens import ItemTokenStore
from anyo_lightning.encoders.base import Encoders, ItemsByText, check_dropout, check_sizes, language_model_in
from anyo_lightning.encoders.history import (
    PROMPT,
    RESPONSE,
    Injection,
    Injections,
    ItemTokenHistory,
    TextHistory,
    check_histories,
    prompt_length,
)
from anyo_lightning.encoders.items import FrozenTextItems, further_text_vectors, text_vectors
from anyo_lightning.encoders.projector import Projector, UnitLength
from anyo_lightning.encoders.vectors import item_vectors, standardised
from anyo_lightning.llm.language_model import LLM
from anyo_lightning.llm.lora import start_lora
from anyo_lightning.llm.text_vectors import Pooling

Reads = Literal["texts", "vectors", "both"]


class TextEncoders(Encoders):
    """States of an LLM that reads the history's texts; an item is its text's frozen vector, projected.

    Args:
        backbone: The LLM, of both sides.
        reads: `texts`: the LLM reads the items' texts. `vectors`: it reads one vector per item, the frozen embedding
            of its text through a linear layer: a fraction of the tokens. `both`: texts, each ending in that vector.
        dim: Width of states and item vectors.
        pooling: How the frozen LLM's states of an item's text become its vector.
        hidden: Width of the item projector's hidden layer; None for a linear projector.
        id_residual: Add a free row to each item's text vector.
        unit_length: Whether states and item vectors have length 1, for `E4SRec` with a temperature.
        item_vectors_from: Run folder of a trained SASRec, or of any run with free item rows: its vectors are read
            beside the texts' (with `reads: vectors` and `both`), and are a part of the items. A checkpoint holds
            them: a trained run no longer needs the folder.
        dropout: On the states before the projector and on the items' projected vectors.
        input_dropout: On the item vectors that the LLM reads.
    """

    texts = frozenset({"histories", "items"})
    item_rows = ("*.residual.weight",)
    run_rows = ("*.known", "*.injection.1.item_vectors")
    text_rows = ("item_encoder.vectors", "*.injection.item_vectors", "*.injection.0.item_vectors")

    def __init__(
        self,
        backbone: LLM,
        *,
        reads: Reads = "texts",
        dim: int = 128,
        pooling: Pooling = "mean",
        hidden: int | None = None,
        id_residual: bool = False,
        unit_length: bool = False,
        item_vectors_from: Path | None = None,
        dropout: float = 0.1,
        input_dropout: float = 0.1,
    ) -> None:
        check_dropout(dropout=dropout, input_dropout=input_dropout)
        check_sizes(dim=dim, hidden=hidden)
        self.backbone, self.reads, self.dim, self.pooling = backbone, reads, dim, pooling
        self.hidden, self.id_residual, self.item_vectors_from = hidden, id_residual, item_vectors_from
        self.unit_length = unit_length
        self.dropout, self.input_dropout = dropout, input_dropout

    def item_tokens(self, data: RecDataModule) -> ItemTokenStore | None:
        """Tokens, unless vectors alone are read."""
        if self.reads == "vectors":
            return None
        return self.backbone.item_tokens(data.texts_read, max_tokens=data.max_item_tokens)

    def row_tokens(self, data: RecDataModule) -> int:
        """Those of `ItemTokenHistory`; none with texts."""
        if self.reads != "vectors":
            return 0
        return prompt_length(self.backbone, PROMPT, RESPONSE, data.supervision)

    def frozen_settings(self, data: RecDataModule) -> dict[str, str]:
        """The length at which items' texts were cut."""
        return {"data.max_item_tokens": str(data.max_item_tokens)}

    def build(
        self, data: RecDataModule, *, device: torch.device, saved: Mapping[str, Tensor] | None = None
    ) -> tuple[TextHistory | ItemTokenHistory, FrozenTextItems]:
        """One LLM for both sides; the texts' vectors are embedded once and cached."""
        backbone = self.backbone.load(device)
        if self.reads == "vectors":
            backbone.check_positions(data.longest_history() + self.row_tokens(data), "data.max_items")
        else:
            check_histories(backbone, data)
        vectors = (saved or {}).get("item_encoder.vectors")
        if vectors is None:
            fine_tuned = language_model_in(saved or {})
            if fine_tuned:
                start_lora(backbone, fine_tuned)
            vectors = text_vectors(backbone, data, pooling=self.pooling, adapted=bool(fine_tuned))
        trained = torch.from_numpy(data.split.training_counts() > 0)
        known = (saved or {}).get("item_encoder.known")
        if known is None and self.item_vectors_from is not None:
            known = standardised(item_vectors(self.item_vectors_from, data.split)) * trained[:, None]
        items = FrozenTextItems(
            vectors,
            projector=Projector(vectors.shape[1], self.dim, hidden=self.hidden, norm=False, gain=0.1),
            trained=trained,
            id_residual=self.id_residual,
            dropout=self.dropout,
            known=known,
            unit_length=self.unit_length,
        )
        projector: nn.Module = Projector(backbone.hidden_size, self.dim, dropout=self.dropout, scale=self.dim**-0.5)
        if self.unit_length:
            projector = nn.Sequential(projector, UnitLength())
        if self.reads == "texts":
            return TextHistory(backbone, projector=projector, supervision=data.supervision), items
        injection: Injection | Injections = Injection(vectors, backbone=backbone, dropout=self.input_dropout)
        if known is not None:
            beside = Injection(known, backbone=backbone, dropout=self.input_dropout, of_texts=False)
            injection = Injections([injection, beside])
        if self.reads == "both":
            return TextHistory(backbone, projector=projector, supervision=data.supervision, injection=injection), items
        return ItemTokenHistory(
            backbone,
            injection=injection,
            projector=projector,
            prompt=self.backbone.tokens(PROMPT),
            response=self.backbone.tokens(RESPONSE),
            supervision=data.supervision,
        ), items

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
        """The vectors of their texts, and where histories are read as text, their tokens."""
        assert isinstance(history_encoder, TextHistory | ItemTokenHistory)
        assert isinstance(item_encoder, FrozenTextItems)
        tokens = None
        if self.reads != "vectors":
            tokens = self.backbone.item_tokens(read, max_tokens=data.max_item_tokens)
        vectors = further_text_vectors(
            history_encoder.backbone, texts, data, pooling=self.pooling, held=item_encoder.vectors
        )
        return ItemsByText(len(texts), history_tokens=tokens, vectors=vectors)

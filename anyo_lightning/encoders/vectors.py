"""`VectorEncoders`: the LLM reads the item vectors of another run, and items are free rows."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from anyo_lightning.checkpoint_io import METADATA, describe_catalogue, read
from anyo_lightning.data.datamodule import RecDataModule
from anyo_lightning.data.splits import Split
from anyo_lightning.encoders.base import Encoders, check_dropout
from anyo_lightning.encoders.history import PROMPT, RESPONSE, Injection, ItemTokenHistory, prompt_length
from anyo_lightning.encoders.items import IdItems
from anyo_lightning.encoders.projector import Projector
from anyo_lightning.errors import InputError
from anyo_lightning.llm.language_model import LLM


class VectorEncoders(Encoders):
    """E4SRec's: a prompt, then SASRec's frozen vector of each item through a linear layer; no text is read.

    The head over all items goes through `dim`: the state is normalised and projected before it meets the items' free
    rows, which makes the paper's hidden-by-items matrix one of rank `dim`.

    Args:
        backbone: The LLM.
        item_vectors_from: Run folder of a trained SASRec, or of any run with free item rows. A checkpoint holds the
            vectors: a trained run no longer needs the folder.
        dim: Width of states and of the items' free rows.
        prompt: Text before the item vectors.
        response: Text after them with `data.supervision last`.
        dropout: On the states before the projector.
        input_dropout: On the item vectors that the LLM reads.

    Reference: Li et al., E4SRec (arXiv 2312.02443), eq. 3 and 5.
    """

    texts = frozenset()
    item_rows = ("*.embedding.weight",)
    run_rows = ("*.injection.item_vectors",)

    def __init__(
        self,
        backbone: LLM,
        *,
        item_vectors_from: Path,
        dim: int = 128,
        prompt: str = PROMPT,
        response: str = RESPONSE,
        dropout: float = 0.1,
        input_dropout: float = 0.1,
    ) -> None:
        check_dropout(dropout=dropout, input_dropout=input_dropout)
        self.backbone, self.item_vectors_from, self.dim = backbone, item_vectors_from, dim
        self.prompt, self.response = prompt, response
        self.dropout, self.input_dropout = dropout, input_dropout

    def row_tokens(self, data: RecDataModule) -> int:
        """Prompt and response marker."""
        return prompt_length(self.backbone, self.prompt, self.response, data.supervision)

    def build(
        self, data: RecDataModule, *, device: torch.device, saved: Mapping[str, Tensor] | None = None
    ) -> tuple[ItemTokenHistory, IdItems]:
        """The vectors are centred and scaled to variance 1; a checkpoint's are taken as they are."""
        backbone = self.backbone.load(device)
        backbone.check_positions(data.longest_history() + self.row_tokens(data), "data.max_items")
        injected = (saved or {}).get("history_encoder.injection.item_vectors")
        if injected is None:
            injected = standardised(item_vectors(self.item_vectors_from, data.split))
        head = nn.Embedding(data.split.catalogue_size, self.dim)
        nn.init.normal_(head.weight, std=0.1)
        projector = Projector(backbone.hidden_size, self.dim, dropout=self.dropout, scale=self.dim**-0.5)
        history = ItemTokenHistory(
            backbone,
            injection=Injection(injected, backbone=backbone, dropout=self.input_dropout, of_texts=False),
            projector=projector,
            prompt=self.backbone.tokens(self.prompt),
            response=self.backbone.tokens(self.response),
            supervision=data.supervision,
        )
        return history, IdItems(head)


def item_vectors(folder: Path, split: Split) -> Tensor:
    """The item embeddings of a trained id model, such as SASRec.

    Args:
        folder: Its run folder.
        split: The split of this run.

    Returns:
        (catalogue, dim) vectors.

    Raises:
        InputError: When the run has another split or catalogue, or no item embeddings.
    """
    checkpoint = read_on(folder, split)
    vectors: Tensor | None = checkpoint["state_dict"].get("item_encoder.embedding.weight")
    if vectors is None:
        model = checkpoint[METADATA]["model"]
        raise InputError(f"Expected {folder} to hold item embeddings, got a run of {model} without them")
    return vectors


def read_on(folder: Path, split: Split) -> dict[str, Any]:
    """The best checkpoint of a run on this split.

    Args:
        folder: Its run folder.
        split: The split of the run that reads it.

    Raises:
        InputError: When the run has another split or catalogue, or no checkpoint.
    """
    checkpoint = read(folder)
    found, expected = checkpoint[METADATA], describe_catalogue(split)
    if found["split"] != expected["split"] or found["items"] != expected["items"]:
        raise InputError(f"Expected {folder} to be a run on split {expected['split']}, got {found['split']}")
    return checkpoint


def standardised(vectors: Tensor) -> Tensor:
    """Centred, and scaled to variance 1 over all entries.

    Args:
        vectors: (catalogue, dim).
    """
    return (vectors - vectors.mean(0)) / vectors.std()

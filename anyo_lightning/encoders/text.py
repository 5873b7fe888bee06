"""The two encoders of a variant whose LLM reads histories and whose items are frozen text vectors."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from anyo_lightning.data.datamodule import RecDataModule
from anyo_lightning.encoders.history import Injection, ItemTokenHistory, TextHistory
from anyo_lightning.encoders.items import FrozenTextItems, text_vectors
from anyo_lightning.encoders.projector import Projector
from anyo_lightning.llm.backbone import Backbone, load_tokenizer
from anyo_lightning.llm.text_vectors import Pooling

Reads = Literal["texts", "vectors", "both"]
PROMPT = "The user has liked these items, oldest first:"
RESPONSE = "\n### Response:"


def text_encoders(
    backbone: Backbone,
    data: RecDataModule,
    *,
    reads: Reads,
    dim: int,
    pooling: Pooling = "mean",
    hidden: int | None = None,
    id_residual: bool = False,
    dropout: float = 0.0,
    input_dropout: float = 0.0,
) -> tuple[TextHistory | ItemTokenHistory, FrozenTextItems]:
    """The history encoder and the item encoder.

    Args:
        backbone: The LLM.
        data: The data module, set up.
        reads: What the LLM reads of each item: `texts`, `vectors` (one frozen text vector an item), or `both`.
        dim: Width of item vectors and states.
        pooling: How the frozen LLM's states of an item's text become its vector.
        hidden: Width of the item projector's hidden layer; None for a linear projector.
        id_residual: Add a free row to each item's text vector.
        dropout: On the states before the projector and on the items' projected vectors.
        input_dropout: On the item vectors that the LLM reads.
    """
    vectors = text_vectors(backbone, data, pooling=pooling)
    items = FrozenTextItems(
        vectors,
        projector=Projector(vectors.shape[1], dim, hidden=hidden, norm=False, gain=0.1),
        trained=torch.from_numpy(data.split.training_counts() > 0),
        id_residual=id_residual,
        dropout=dropout,
    )
    history = llm_history(
        backbone,
        reads=reads,
        item_vectors=vectors,
        dim=dim,
        dropout=dropout,
        input_dropout=input_dropout,
        supervision=data.supervision,
    )
    return history, items


def llm_history(
    backbone: Backbone,
    *,
    reads: Reads,
    item_vectors: Float[Tensor, "catalogue width"],
    dim: int,
    dropout: float,
    input_dropout: float,
    supervision: str,
    of_texts: bool = True,
    prompt: str = PROMPT,
    response: str = RESPONSE,
) -> TextHistory | ItemTokenHistory:
    """The history encoder of the LLM variants: `TextHistory`, or `ItemTokenHistory` over the items' vectors.

    Args:
        backbone: The LLM.
        reads: What it reads of each item.
        item_vectors: (catalogue, width) frozen vectors, for `vectors` and `both`.
        dim: Width of the states; they are scaled by `dim ** -0.5`.
        dropout: On the LLM's states.
        input_dropout: On the item vectors.
        supervision: As in the DataModule.
        of_texts: Whether the vectors are those of the items' texts.
        prompt: Text before the item vectors.
        response: Text after them, with `supervision: last`.
    """
    projector = Projector(backbone.hidden_size, dim, dropout=dropout, scale=dim**-0.5)
    injection = None
    if reads != "texts":
        injection = Injection(item_vectors, backbone=backbone, dropout=input_dropout, of_texts=of_texts)
    if reads != "vectors" or injection is None:
        return TextHistory(backbone, projector=projector, supervision=supervision, injection=injection)
    tokenizer = load_tokenizer(*backbone.source)
    return ItemTokenHistory(
        backbone,
        injection=injection,
        projector=projector,
        prompt=tokenizer(prompt, add_special_tokens=False)["input_ids"],
        response=tokenizer(response, add_special_tokens=False)["input_ids"],
        supervision=supervision,
    )

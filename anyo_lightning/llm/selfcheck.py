"""Try a loaded backbone on two short texts before anything is trained on it, and say in one sentence what is wrong."""

import copy

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from anyo_lightning.errors import InputError
from anyo_lightning.llm.backbone import Backbone
from anyo_lightning.llm.evaluation_mode import evaluating

TEXTS = ("Toy Story (1995), Animation, Children's, Comedy", "Heat (1995), Action, Crime, Thriller. A second sentence.")
LARGEST_COPY = 2_000_000_000  # parameters; a larger model's float32 copy may not fit into memory
LEAST_COSINE = 0.98  # between low precision and float32, over all states of a text
# Greatest relative difference of two states that should be equal. A wrong mask or position gives 0.3 and more.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.15}


def self_check(backbone: Backbone, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that states are finite, do not depend on padding, respect causality and survive the dtype.

    Args:
        backbone: As loaded; its mode is restored.
        tokenizer: The backbone's tokenizer.

    Raises:
        InputError: Naming the first property that does not hold.
    """
    with evaluating(backbone), torch.autocast(backbone.device.type, enabled=False):
        _check(backbone, tokenizer)


def _check(backbone: Backbone, tokenizer: PreTrainedTokenizerBase) -> None:
    identity = backbone.identity
    name = f"{identity['name']} ({identity['dtype']}, {identity['attention']} attention)"
    tolerance = TOLERANCE[backbone.dtype]
    rows = [tokenizer(text)["input_ids"] for text in TEXTS]
    if not all(rows):
        raise InputError(f"Expected a tokenizer that gives tokens for {name}, got none")
    backbone.check_token_ids(max(map(max, rows)))
    known = {token for text in TEXTS for token in tokenizer(text, add_special_tokens=False)["input_ids"]}
    if known <= {tokenizer.unk_token_id}:
        raise InputError(f"Expected a tokenizer with a vocabulary for {name}, got one that knows no word")
    tokens = [torch.tensor([row], device=backbone.device) for row in rows]
    alone = [backbone(row) for row in tokens]
    if not all(bool(states.isfinite().all()) for states in alone):
        raise InputError(f"Expected finite states from {name}, got NaN or infinity; try another dtype")

    for side in ("right", "left") if backbone.causal else ("right",):
        if (found := _padding_difference(backbone, tokens, alone, left=side == "left")) > tolerance:
            raise InputError(
                f"Expected states of {name} that do not depend on {side} padding, got a change of {found:.1%}"
            )

    if backbone.causal and (found := _causality_difference(backbone, tokens[0], alone[0])) > tolerance:
        raise InputError(
            f"Expected {name} to be causal, got a change of {found:.1%} in earlier states by a later token"
        )

    copied = backbone.dtype != torch.float32 and backbone.parameters_total <= LARGEST_COPY and not backbone.sharded
    if copied and not getattr(backbone.model, "is_quantized", False):
        precise = copy.deepcopy(backbone).float()
        precise.dtype = torch.float32
        cosine = float(F.cosine_similarity(precise(tokens[0]).flatten(), alone[0].float().flatten(), dim=0))
        if cosine < LEAST_COSINE:
            raise InputError(
                f"Expected states of {name} close to float32's, got a cosine of {cosine:.3f}; try dtype float32"
            )


def _padding_difference(
    backbone: Backbone, tokens: list[Int[Tensor, "1 _"]], alone: list[Float[Tensor, "1 _ hidden"]], *, left: bool
) -> float:
    """The change of a text's states when it is padded beside a longer one."""
    longest = max(row.shape[1] for row in tokens) + 3
    ids = torch.ones(len(tokens), longest, dtype=torch.long, device=backbone.device)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    spans = []
    for index, row in enumerate(tokens):
        start = longest - row.shape[1] if left else 0
        spans.append(slice(start, start + row.shape[1]))
        ids[index, spans[-1]] = row[0]
        mask[index, spans[-1]] = True
    padded = backbone(ids, attention_mask=None if backbone.causal and not left else mask)
    return max(_difference(padded[index, span], alone[index][0]) for index, span in enumerate(spans))


def _causality_difference(backbone: Backbone, tokens: Int[Tensor, "1 _"], states: Float[Tensor, "1 _ hidden"]) -> float:
    changed = tokens.clone()
    changed[0, -1] = (changed[0, -1] + 1) % backbone.embedding_rows
    return _difference(backbone(changed)[0, :-1], states[0, :-1])


def _difference(found: Float[Tensor, "tokens hidden"], expected: Float[Tensor, "tokens hidden"]) -> float:
    """The greatest relative difference of a token's state."""
    found, expected = found.float(), expected.float()
    return float(((found - expected).norm(dim=-1) / expected.norm(dim=-1).clamp(min=1e-6)).max())

"""Both pretext tasks of a text in one pass: what it says (SELF) and what follows it (NEXT).

A row is `text, SELF prompt, EOS, NEXT prompt, EOS`. NEXT does not attend to SELF and its positions continue those of
the text, so that its state is that of `text, NEXT prompt, EOS` alone, and SELF's that of `text, SELF prompt, EOS`: what
the dual encoder reads for histories and items.

Reference: Llama2Vec (ACL 2024, arXiv 2312.15503), section 3.2 and figure 2.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import AutoModelForCausalLM

from anyo_lightning.data.tokens import padded
from anyo_lightning.errors import InputError
from anyo_lightning.llm.aliases import loading, locate
from anyo_lightning.llm.backbone import Backbone

TEXT, SELF, NEXT = range(3)
# Of configurations that do more with their logits: Granite's, Cohere's, Gemma 2's.
PLAIN_LOGITS = {"logits_scaling": 1, "logit_scale": 1, "final_logit_softcapping": None}


@dataclass(frozen=True)
class PretextRows:
    """Texts with both prompts, right-padded."""

    token_ids: Int[Tensor, "rows tokens"]
    position_ids: Int[Tensor, "rows tokens"]
    attention_mask: Bool[Tensor, "rows tokens tokens"]  # True where a token (first) attends to another (second)
    pooled: Int[Tensor, "rows 2 count"]  # places of the pooled tokens of SELF and of NEXT

    @classmethod
    def of(
        cls,
        texts: Sequence[np.ndarray],
        *,
        self_prompt: Sequence[int],
        next_prompt: Sequence[int],
        end: int,
        count: int,
    ) -> "PretextRows":
        """Put texts and prompts together.

        Args:
            texts: Token ids of each text.
            self_prompt: Token ids of the SELF prompt.
            next_prompt: Token ids of the NEXT prompt.
            end: Token id of EOS.
            count: Number of pooled tokens after each prompt.
        """
        suffixes = [np.array([*prompt, *[end] * count]) for prompt in (self_prompt, next_prompt)]
        token_ids, _ = padded([np.concatenate([text, *suffixes]) for text in texts], end)
        lengths = torch.tensor([len(text) for text in texts])[:, None]
        self_end = lengths + len(suffixes[0])
        place = torch.arange(token_ids.shape[1])
        part = torch.where(place < lengths, TEXT, torch.where(place < self_end, SELF, NEXT))
        hidden = (part[:, :, None] == NEXT) & (part[:, None, :] == SELF)
        ends = torch.cat([self_end, self_end + len(suffixes[1])], dim=1)
        return cls(
            token_ids=token_ids,
            position_ids=torch.where(part == NEXT, place - len(suffixes[0]), place),
            attention_mask=(place[:, None] >= place) & ~hidden,
            pooled=ends[..., None] - count + torch.arange(count),
        )


def output_embeddings(backbone: Backbone) -> Float[Tensor, "vocabulary width"]:
    """The language model's output embeddings: its input embeddings if the two are tied, otherwise loaded.

    Raises:
        InputError: When the model was saved without them, or its logits are not their products with its states.
    """
    config = backbone.model.config
    for name, usual in PLAIN_LOGITS.items():
        if (found := getattr(config, name, None)) not in (None, usual):
            raise InputError(
                f"Expected a language model whose logits are its states times its output embeddings, got "
                f"{backbone.identity['name']} with {name} {found}"
            )
    if backbone.model.config.tie_word_embeddings:
        weight: Tensor = backbone.model.get_input_embeddings().weight
        return weight
    location = locate(*backbone.source)
    with loading(location):
        model, report = AutoModelForCausalLM.from_pretrained(
            location.source,
            revision=location.revision,
            dtype=backbone.dtype,
            trust_remote_code=False,
            output_loading_info=True,
        )
    head: Tensor = model.get_output_embeddings().weight
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        raise InputError(f"Expected output embeddings without biases, got {backbone.identity['name']} with them")
    if {name for name, weight in model.named_parameters() if weight is head} & set(report["missing_keys"]):
        raise InputError(
            f"Expected a causal language model with output embeddings, got {backbone.identity['name']} without them"
        )
    return head.detach().to(backbone.device)

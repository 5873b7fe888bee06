"""A frozen LLM in 4 bits (QLoRA): which of bitsandbytes' settings are taken, and how a checkpoint notes them.

Weights are quantised whenever they are loaded, on the device that they are loaded on; a checkpoint holds LoRA and no
frozen weight, so that the same model, settings and device give the same function. Token embeddings and norms stay in
the backbone's dtype. Every product dequantises its weights first: 4 bits save memory and cost time.

The type is NF4. FP4, which transformers takes by default, is further from the original everywhere, and 8 bits
(LLM.int8) quantise activations with the outliers of a whole batch: a state then depends on the other rows, and differs
between training and evaluation.

Reference: Dettmers et al., QLoRA: Efficient Finetuning of Quantized LLMs (NeurIPS 2023, arXiv 2305.14314).
"""

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.utils import is_bitsandbytes_available

from anyo_lightning.errors import InputError

FIELDS = {
    "load_in_4bit": (True,),
    "bnb_4bit_quant_type": ("nf4",),
    "bnb_4bit_use_double_quant": (True, False),
    "bnb_4bit_compute_dtype": ("float32", "bfloat16", "float16"),
}


def quantisation(given: Mapping[str, Any], *, dtype: str) -> BitsAndBytesConfig:
    """What transformers is given.

    Args:
        given: Values of `FIELDS`, `load_in_4bit` among them.
        dtype: Of the products, unless `bnb_4bit_compute_dtype` says otherwise.

    Raises:
        InputError: When bitsandbytes is missing or too old, or a field or its value is not one of `FIELDS`.
    """
    if not is_bitsandbytes_available():
        raise InputError(
            "Expected bitsandbytes for quantization_config, got none or too old a version: "
            "pip install '.[quantized]' in the clone"
        )
    if given.get("load_in_8bit"):
        raise InputError(
            "Expected load_in_4bit in quantization_config, got load_in_8bit, with which a state depends on what else "
            "is in its batch"
        )
    settings = {"load_in_4bit": None, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype, **given}
    for name, value in settings.items():
        if name not in FIELDS:
            raise InputError(f"Expected fields of quantization_config among {', '.join(FIELDS)}, got {name}")
        if repr(value) not in map(repr, FIELDS[name]):  # 1 is not true
            choices = " or ".join(map(_word, FIELDS[name]))
            raise InputError(f"Expected quantization_config.{name} {choices}, got {_word(value)}")
    return BitsAndBytesConfig(**settings)


def as_noted(config: BitsAndBytesConfig) -> str:
    """What caches and checkpoints note: all that decides the weights, whether it was given or a default."""
    values = config.to_dict()
    return json.dumps({name: values[name] for name in FIELDS}, sort_keys=True)


def check_weights(quantised: bool, name: str, *, again: bool, sharded: bool) -> None:
    """Refuse what cannot be done with weights that were saved quantised.

    Args:
        quantised: Whether they were.
        name: The model's.
        again: Whether they are to be quantised.
        sharded: Whether they are to be split over processes.

    Raises:
        InputError: When they were and either is asked for.
    """
    if quantised and again:
        raise InputError(f"Expected no quantization_config for {name}, whose weights are quantised already, got one")
    if quantised and sharded:
        raise InputError(f"Expected weights that are not quantised for a sharded backbone, got {name}")


def parameter_count(module: nn.Module) -> int:
    """The number of parameters; a byte of 4-bit weights holds two."""
    return sum(p.numel() * (2 if p.dtype == torch.uint8 else 1) for p in module.parameters())


def _word(value: Any) -> str:
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)

"""A pre-trained model as a backbone needs it: cut to its first layers, complete, and known for what it is."""

from typing import Any

import torch
from torch import nn
from transformers import AutoModel, BitsAndBytesConfig, PretrainedConfig
from transformers.utils import is_flash_attn_2_available

import anyo_lightning.llm.attention  # noqa: F401  (registers the attention "auto")
from anyo_lightning.errors import InputError
from anyo_lightning.internals import attention_of, keep_packed_weights
from anyo_lightning.llm.aliases import Location, loading
from anyo_lightning.llm.evaluation_mode import evaluating

TRIED_TOKENS = 16
CAUSAL_TOLERANCE = {torch.float32: 1e-5}  # of low precision a thousandth: untrained models attend to little


def keep_layers(config: PretrainedConfig, layers: int | None) -> None:
    """Cut a configuration to its first layers, in place.

    Args:
        config: Of a decoder or an encoder.
        layers: How many; None keeps all.

    Raises:
        InputError: For an encoder-decoder, a model without states of one width, or one with fewer layers.
    """
    if getattr(config, "is_encoder_decoder", False):
        raise InputError(
            f"Expected a decoder or an encoder as the backbone, got an encoder-decoder ({config.model_type})"
        )
    if not hasattr(config, "hidden_size") or not hasattr(config, "num_hidden_layers"):
        raise InputError(
            f"Expected a language model as the backbone, got {config.model_type}, which is made of several models or "
            "has no states of one width: give its text model"
        )
    if layers is None:
        return
    if not 1 <= layers <= config.num_hidden_layers:
        raise InputError(f"Expected layers between 1 and {config.num_hidden_layers}, got {layers}")
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = config.layer_types[:layers]


def load_model(
    location: Location,
    config: PretrainedConfig,
    dtype: torch.dtype,
    attention: str,
    four_bit: BitsAndBytesConfig | None,
) -> Any:
    """Load a transformers model without its heads.

    Args:
        location: Where it is.
        config: Its configuration, perhaps cut.
        dtype: Of its weights.
        attention: As in `Backbone`.
        four_bit: How weights are quantised, as `quantisation` gives it; None leaves them.

    Raises:
        InputError: When it cannot be read or lacks weights, or its attention needs another dtype or a package.
    """
    if attention.startswith("flash_attention"):
        if dtype == torch.float32:
            raise InputError(f"Expected dtype bfloat16 or float16 for attention {attention}, got float32")
        if attention == "flash_attention_2" and not is_flash_attn_2_available():
            raise InputError(
                f"Expected a GPU and the package flash-attn for attention {attention}, got neither or one: attention "
                "auto uses torch's own flash kernel"
            )
    options: dict[str, Any] = {}
    if four_bit is not None:
        options["quantization_config"] = four_bit
    with loading(location):
        model, report = AutoModel.from_pretrained(
            location.source,
            config=config,
            revision=location.revision,
            dtype=dtype,
            attn_implementation=None if attention == "auto" else attention,
            trust_remote_code=False,
            output_loading_info=True,
            **options,
        )
        if attention == "auto" and attention_of(model) == "sdpa":  # otherwise it knows `eager` only
            model.set_attn_implementation("auto")
    missing = sorted(key for key in report["missing_keys"] if not key.startswith("pooler."))
    if missing:
        raise InputError(f"Expected all weights of {location.name}, got none for {len(missing)}, such as {missing[0]}")
    if getattr(model, "pooler", None) is not None:
        model.pooler = None  # BERT's, unused: only the token states are read
    keep_packed_weights(model)
    return model


def is_causal(model: Any, rows: int) -> bool:
    """Whether a later token leaves earlier states alone, found by trying: what models say of themselves is often wrong.

    Args:
        model: As loaded, on any device.
        rows: Number of token embeddings.
    """
    tokens = torch.arange(TRIED_TOKENS, device=model.device)[None] % rows
    changed = tokens.clone()
    changed[0, -1] = (changed[0, -1] + 1) % rows
    with evaluating(model):
        first, second = (model(input_ids=ids).last_hidden_state[0, :-1].float() for ids in (tokens, changed))
    return bool((first - second).norm() <= CAUSAL_TOLERANCE.get(model.dtype, 1e-3) * first.norm())


def max_positions(model: nn.Module, config: PretrainedConfig) -> int | None:
    """The longest input: positions less those that a table like RoBERTa's keeps for padding; None without a limit."""
    limit: int | None = getattr(config, "max_position_embeddings", None)
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            return module.num_embeddings - module.padding_idx - 1
    return limit

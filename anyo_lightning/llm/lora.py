"""LoRA: the trained weights of a frozen language model, in float32."""

from collections.abc import Mapping
from typing import Any

from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from anyo_lightning.errors import InputError
from anyo_lightning.llm.low_rank import adapt

# Of peft's ways to start LoRA, those that leave the base weights alone: caches and checkpoints rely on these.
LORA_STARTS = (True, False, "gaussian", "orthogonal", "eva")


def add_lora(model: nn.Module, lora: Mapping[str, Any] | LoraConfig) -> list[str]:
    """Inject float32 LoRA weights, the only trained ones.

    Args:
        model: The frozen model, changed in place.
        lora: Fields of peft's `LoraConfig`, or one.

    Returns:
        Keys of the frozen rest in the state of a module that holds it as `model`.

    Raises:
        InputError: For a field that is unknown or fits no layer, a start that changes base weights, or embeddings.
    """
    try:
        config = lora if isinstance(lora, LoraConfig) else LoraConfig(**lora)
        if config.init_lora_weights not in LORA_STARTS:
            raise InputError(
                f"Expected lora.init_lora_weights among {', '.join(map(str, LORA_STARTS))}, which leave the base "
                f"weights alone, got {config.init_lora_weights}"
            )
        inject_adapter_in_model(config, model)
    except InputError:
        raise
    except (TypeError, ValueError) as error:
        raise InputError(
            f"Expected fields of peft's LoraConfig for lora, got: {' '.join(str(error).split())[:300]}"
        ) from error
    adapted = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    if any(isinstance(module.get_base_layer(), nn.Embedding) for module in adapted):
        raise InputError("Expected lora.target_modules without token embeddings, which are read without LoRA, got them")
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.cast_input_dtype_enabled = False
    adapt(model)
    return [f"model.{key}" for key in model.state_dict() if key not in trained]

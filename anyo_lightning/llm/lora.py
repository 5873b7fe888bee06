"""LoRA: the trained weights of a frozen language model, in float32."""

import copy
import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from anyo_lightning.errors import InputError
from anyo_lightning.internals import without_bitsandbytes
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
        InputError: For a field that is unknown or fits no layer, a start or biases that change base weights, or for
            embeddings.
    """
    try:
        # Of a configuration a copy: peft writes the layers that it finds into it.
        config = copy.deepcopy(lora) if isinstance(lora, LoraConfig) else LoraConfig(**lora)
        if config.init_lora_weights not in LORA_STARTS:
            raise InputError(
                f"Expected lora.init_lora_weights among {', '.join(map(str, LORA_STARTS))}, which leave the base "
                f"weights alone, got {config.init_lora_weights}"
            )
        if config.bias != "none":
            raise InputError(f"Expected lora.bias none, which leaves the base weights alone, got {config.bias}")
        with without_bitsandbytes():
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


def start_lora(backbone: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Put another run's LoRA weights in the place of a language model's own.

    Args:
        backbone: The language model, in which these are the only trained weights.
        weights: By the language model's names.

    Raises:
        InputError: They are of other layers, other targets or another rank.
    """
    own = {name: weight for name, weight in backbone.named_parameters() if weight.requires_grad}
    given = {name: tuple(weight.shape) for name, weight in weights.items()}
    if given != {name: tuple(weight.shape) for name, weight in own.items()}:
        raise InputError(
            "Expected a run whose LoRA has the layers, target_modules and r of model.encoders.backbone "
            f"({_summary(own)}), got {_summary(weights)}"
        )
    with torch.no_grad():
        for name, weight in own.items():
            weight.copy_(weights[name])


@contextmanager
def lora_disabled(model: nn.Module) -> Iterator[None]:
    """Inside, the forward pass is that of the frozen model.

    Args:
        model: The model with its LoRA weights.
    """
    kinds = BaseTunerLayer | ModulesToSaveWrapper
    adapted = [module for module in model.modules() if isinstance(module, kinds)]
    for module in adapted:
        module.enable_adapters(False)
    try:
        yield
    finally:
        for module in adapted:
            module.enable_adapters(True)


def lora_digest(backbone: nn.Module) -> str:
    """A hash of what LoRA adds to a language model: its weights and their scale."""
    content = hashlib.sha256()
    for name, module in backbone.named_modules():
        if isinstance(module, BaseTunerLayer):
            content.update(f"{name} {sorted(getattr(module, 'scaling', {}).items())}".encode())
    for name, weight in sorted(backbone.named_parameters()):
        if weight.requires_grad:
            content.update(f"{name} {tuple(weight.shape)}".encode() + weight.detach().float().cpu().numpy().tobytes())
    return content.hexdigest()[:24]


def _summary(weights: Mapping[str, Tensor]) -> str:
    """How many adapters, and of which ranks."""
    down = [weight for name, weight in weights.items() if ".lora_A." in name]
    ranks = ", ".join(str(rank) for rank in sorted({len(weight) for weight in down}))
    return f"{len(down)} adapters" + (f" of r {ranks}" if ranks else "")

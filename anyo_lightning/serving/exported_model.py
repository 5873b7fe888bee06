"""A run's language model in the forms of transformers and peft: base, adapter, merged weights, tokenizer."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import PreTrainedModel

from anyo_lightning.llm.aliases import load_config, loading, locate
from anyo_lightning.llm.backbone import Backbone
from anyo_lightning.llm.load import keep_layers, load_model
from anyo_lightning.serving.flat_heads import NotExpressibleError


@dataclass(frozen=True)
class Base:
    """Where the frozen model under an adapter is.

    Attributes:
        name: The alias, the folder's own name, or the hub id.
        revision: The commit of a hub id; None: the export holds the model, in `base`.
        dtype: In which the run holds its weights.
        adapted: Whether there is an adapter; without one the merged weights are the frozen ones.
    """

    name: str
    revision: str | None
    dtype: str
    adapted: bool


def in_float32(backbones: Sequence[Backbone]) -> None:
    """Let loaded language models compute in float32, by the weights that they have: all of them, or none.

    Those of a run in bfloat16 stay rounded, as the run has read them; its states differ by what rounding does in each
    product, which no other library would repeat.

    Args:
        backbones: Of one run.

    Raises:
        NotExpressibleError: One is quantised; all are as they were, then.
    """
    for backbone in backbones:
        saved_quantised = getattr(backbone.model.config, "quantization_config", None) is not None
        if saved_quantised or "quantization" in backbone.identity:
            raise NotExpressibleError("its weights are quantised, which merged ones could not be")
    for backbone in backbones:
        backbone.model.float()
        backbone.dtype = torch.float32


def check_tokenizer(found: Sequence[Sequence[int]], own: Sequence[Sequence[int]]) -> None:
    """Refuse a tokenizer that, opened by itself from the export, reads texts otherwise than the run.

    Args:
        found: Its token ids of each text.
        own: The run's.

    Raises:
        NotExpressibleError: Some differ.
    """
    if wrong := sum(list(one) != list(other) for one, other in zip(found, own, strict=True)):
        raise NotExpressibleError(f"its tokenizer, opened by itself, reads {wrong} of {len(own)} texts otherwise")


def write_language_model(backbone: Backbone, folder: Path) -> Base:
    """Write `config.json` and `model.safetensors` (merged, float32), `adapter/`, and `base/` where no hub has it.

    The merged weights are made from the two others, as anyone would: what is written has been opened.

    Args:
        backbone: With trained LoRA weights, or without LoRA.
        folder: There already.

    Returns:
        Where the base is.
    """
    location, lora = locate(*backbone.source), getattr(backbone.model, "peft_config", None)
    base = Base(location.name, location.revision, backbone.identity["dtype"], lora is not None)
    config = load_config(location)
    keep_layers(config, int(backbone.identity["layers"]))
    model: PreTrainedModel = load_model(
        location, config, getattr(torch, backbone.identity["dtype"]), backbone.identity["attention"], None
    )
    with loading(location):
        if lora is not None:
            if location.revision is None:
                model.save_pretrained(folder / "base")
            _write_adapter(backbone, folder / "adapter", base)
            adapted = PeftModel.from_pretrained(model.float(), str(folder / "adapter"))
            model = adapted.merge_and_unload(safe_merge=True)
        model.float().save_pretrained(folder)
    return base


def _write_adapter(backbone: Backbone, folder: Path, base: Base) -> None:
    """The two files that `PeftModel.from_pretrained` reads."""
    (settings,) = backbone.model.peft_config.values()
    weights = {
        f"base_model.model.{name}": weight.detach().float().cpu().contiguous()
        for name, weight in get_peft_model_state_dict(backbone.model).items()
    }
    folder.mkdir()
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    settings.base_model_name_or_path, settings.revision = base.name, base.revision
    settings.task_type, settings.inference_mode = "FEATURE_EXTRACTION", True
    settings.save_pretrained(str(folder))

"""What a checkpoint says of itself, and what is refused when it is loaded.

A checkpoint holds everything but the language models' frozen weights, and names those by their identities. It is not
Lightning's `save_hyperparameters`: LightningCLI would silently merge that over the command line.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from anyo_lightning.checkpoint_io import METADATA, read
from anyo_lightning.encoders.base import LANGUAGE_MODEL, language_model_in
from anyo_lightning.errors import InputError
from anyo_lightning.llm.backbone import Backbone
from anyo_lightning.llm.lora import start_lora
from anyo_lightning.models.transfer import Transfer

DATA_PARTS = ("items", "catalogue", "split")
PARTS = ("model", "backbones", *DATA_PARTS)
LLM_OPTION = "model.encoders.backbone"
FINE_TUNED = ("CSFT",)  # classes whose runs give their language model, and no more, to a model of any other class


def language_models(module: nn.Module) -> list[Backbone]:
    """The language models inside a module, each once, in the order of their names."""
    return [child for child in module.modules() if isinstance(child, Backbone)]


def frozen_keys(module: nn.Module) -> set[str]:
    """The names of all language models' frozen weights in the module's state."""
    places = [(n, m) for n, m in module.named_modules(remove_duplicate=False) if isinstance(m, Backbone)]
    return {f"{name}.{key}" for name, backbone in places for key in backbone.frozen_state_keys()}


def identify(
    module: nn.Module, catalogue: Mapping[str, Any], settings: Mapping[str, str], frozen: Mapping[str, str]
) -> dict[str, Any]:
    """What must agree where a checkpoint is loaded: model, language models, catalogue and split.

    Args:
        module: The module, built.
        catalogue: As `checkpoint_io.describe_catalogue` describes it.
        settings: What decides the module's function beside its weights.
        frozen: What decided frozen vectors among these.
    """
    identities = [dict(backbone.identity) for backbone in language_models(module)]
    return {
        "model": type(module).__name__,
        "backbones": identities,
        **catalogue,
        "settings": settings,
        "frozen": frozen,
    }


def check(
    expected: Mapping[str, Any],
    checkpoint: Mapping[str, Any],
    *,
    defaults: Mapping[str, str],
    also: Collection[str] = (),
    alike: Collection[str] = (),
    other_data: bool = False,
) -> None:
    """Refuse a checkpoint that does not belong to a module.

    Args:
        expected: What `identify` says of the module.
        checkpoint: What was read.
        defaults: Of settings; a checkpoint without one of these settings, of an earlier version, was trained with it.
        also: Names of other classes whose checkpoint is taken as well.
        alike: Settings that must agree with one of these, too; its encoders may have other options.
        other_data: Whether catalogue and split may differ, and with them the template of its texts.

    Raises:
        InputError: When the checkpoint is not one of ours, or names another model, backbone, catalogue or split, or was
            trained with another setting.
    """
    found = checkpoint.get(METADATA)
    if found is None or not {*PARTS, "settings"} <= set(found):
        raise InputError(
            "Expected a checkpoint written by this version of anyo-lightning, got one without its metadata"
        )
    for part in PARTS[: -len(DATA_PARTS)] if other_data else PARTS:
        if found[part] != expected[part] and not (part == "model" and found[part] in also):
            ours, its = _where_different(expected[part], found[part])
            raise InputError(f"Expected a checkpoint of {part} {_words(ours)}, got {_words(its)}")
    its, ours = ({**side["settings"], **side.get("frozen", {})} for side in (found, expected))
    if "frozen" not in found:  # of an earlier version
        ours = expected["settings"]
    compared = its.keys() | ours.keys() if found["model"] == expected["model"] else set(alike)
    for option in sorted(compared - ({"data.template"} if other_data else set())):
        trained, given = its.get(option, defaults.get(option)), ours.get(option)
        if trained != given:
            raise InputError(
                f"Expected {option} {_quoted(trained)}, with which the checkpoint was trained, got {_quoted(given)}"
            )


def check_same(option: str, trained: Mapping[str, str], given: Mapping[str, str]) -> None:
    """Refuse to resume with another language model than one that has decided what is trained, and is in no checkpoint.

    Args:
        option: Its option.
        trained: Its identity in the training.
        given: Its identity now.

    Raises:
        InputError: They differ.
    """
    if trained != given:
        before, now = _where_different([dict(trained)], [dict(given)])
        raise InputError(f"Expected {option} {_words(before)}, with which the run was trained, got {_words(now)}")


def check_keys(frozen: set[str], given: set[str], result: Any) -> None:
    """Only frozen weights may be missing, all or none of them, and nothing may be left over.

    Args:
        frozen: As `frozen_keys` names them; among them are parts of 4-bit weights, which torch never calls missing.
        given: The names that were loaded.
        result: What torch's `load_state_dict` returned.

    Raises:
        InputError: When other keys are missing or left over.
    """
    unexpected, missing = set(result.unexpected_keys), set(result.missing_keys) - frozen
    if frozen & given:
        missing |= frozen - given
    if unexpected or missing:
        names = sorted(unexpected or missing)
        raise InputError(
            "Expected a checkpoint with the same weights as the model, got "
            f"{'unknown' if unexpected else 'no'} {', '.join(names[:3])}{' and others' if len(names) > 3 else ''}"
        )


def weights_to_start_from(
    module: nn.Module,
    checkpoint: Mapping[str, Any],
    *,
    expected: Mapping[str, Any],
    defaults: Mapping[str, str],
    other_classes: Collection[str],
    alike: Collection[str],
    starts_afresh: Collection[str],
    transfer: Transfer | None,
) -> dict[str, Tensor]:
    """The best weights of another run, completed by a module's own where the run may lack them.

    A run of one of the other classes gives its item encoder, and with it the LLM: the module's other weights stay. One
    that has fine-tuned the LLM gives that alone.

    Args:
        module: The module, built.
        checkpoint: The run's.
        expected: What `identify` says of the module.
        defaults: As `check` takes them.
        other_classes: Names of classes whose runs are taken beside the module's own.
        alike: Settings in which a run of one of these must agree with the module.
        starts_afresh: Names of state that is not taken over.
        transfer: From its items to the module's, where it is of another catalogue or split.

    Raises:
        InputError: When the run does not fit.
    """
    if is_fine_tuned(checkpoint, expected["model"]):
        expected, alike = {**expected, "backbones": [dict(_read_by_histories(module).identity)]}, ()
    check(
        expected,
        checkpoint,
        defaults=defaults,
        also=(*other_classes, *FINE_TUNED),
        alike=alike,
        other_data=transfer is not None,
    )
    weights = {key: value for key, value in checkpoint["state_dict"].items() if key not in starts_afresh}
    own = module.state_dict()  # views of its weights: copying these to where they are changes none of those given
    frozen = frozen_keys(module)
    if transfer is not None:
        weights = transfer.weights(weights, own, starts_afresh=(), tested=False)
    if is_fine_tuned(checkpoint, expected["model"]):
        start_lora(_read_by_histories(module), language_model_in(weights))
        return {key: value for key, value in own.items() if key not in frozen}
    if checkpoint[METADATA]["model"] in other_classes:
        given = {key: value for key, value in weights.items() if not key.startswith("history_encoder.")}
        weights = {**{key: value for key, value in own.items() if key not in frozen}, **given}
    return {**{key: own[key] for key in starts_afresh if key in own}, **weights}


def fine_tuned_language_model(folder: Path, *, model: str, settings: Mapping[str, str]) -> dict[str, Tensor] | None:
    """The language model's trained weights of a run that has fine-tuned it, by the model's names, for `build`.

    Args:
        folder: Run folder.
        model: Name of the class that starts from it.
        settings: What decides that model's function beside its weights.

    Returns:
        None for a run of any other kind.

    Raises:
        InputError: When the run's LoRA is another one, or it has no checkpoint.
    """
    checkpoint = read(folder)
    if not is_fine_tuned(checkpoint, model):
        return None
    trained, given = (found.get(LLM_OPTION) for found in (checkpoint[METADATA]["settings"], settings))
    if trained != given:
        raise InputError(f"Expected {LLM_OPTION} {trained}, with which {folder} was trained, got {given}")
    return {key: value for key, value in checkpoint["state_dict"].items() if key.startswith(LANGUAGE_MODEL)}


def is_fine_tuned(checkpoint: Mapping[str, Any], model: str) -> bool:
    """Whether a model of this class takes only the language model from a checkpoint."""
    found = checkpoint[METADATA]["model"]
    return found in FINE_TUNED and found != model


def _read_by_histories(module: nn.Module) -> Backbone:
    """The language model of a module's history encoder."""
    backbone = getattr(module.get_submodule("history_encoder"), "backbone", None)
    if not isinstance(backbone, Backbone):
        raise InputError(
            "Expected a history encoder that holds its language model as backbone with model.init_from, got "
            f"{type(module.get_submodule('history_encoder')).__name__}"
        )
    return backbone


def _where_different(expected: Any, found: Any) -> tuple[Any, Any]:
    """Of equally many backbones what is not the same; all of anything else."""
    if not isinstance(expected, list) or len(expected) != len(found):
        return expected, found
    names = {name for a, b in zip(expected, found, strict=True) for name in a | b if a.get(name) != b.get(name)}
    ours, its = (
        [{name: part.get(name, "none") for name in sorted(names)} for part in side] for side in (expected, found)
    )
    return ours, its


def _quoted(value: str | None) -> str | None:
    """A setting as it is, in quotes where that cannot be seen, as of an empty prompt."""
    return value if value is None or value.strip() == value != "" else f'"{value}"'


def _words(value: Any) -> str:
    if isinstance(value, list):
        return " and ".join(map(_words, value)) or "none"
    return " ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else str(value)

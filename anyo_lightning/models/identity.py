"""What a checkpoint says of itself, and what is refused when it is loaded.

A checkpoint holds everything but the backbone's frozen weights, and names those by the backbone's identity. It is not
Lightning's `save_hyperparameters`: LightningCLI would silently merge that over the command line.
"""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from anyo_lightning.checkpoint_io import METADATA, read
from anyo_lightning.data.splits import Split
from anyo_lightning.errors import InputError

if TYPE_CHECKING:
    from anyo_lightning.models.base import RetrievalModule


def describe_catalogue(split: Split) -> dict[str, Any]:
    """The catalogue's size and fingerprint (ids and texts), and the split's fingerprint."""
    content = json.dumps([split.item_ids.tolist(), list(split.item_texts)]).encode()
    return {
        "items": split.catalogue_size,
        "catalogue": hashlib.sha256(content).hexdigest()[:16],
        "split": split.fingerprint,
    }


def describe(module: "RetrievalModule") -> dict[str, Any]:
    """What a checkpoint says of itself; a collective."""
    return {**identify(module), "seen": module.seen_by_all()}


def identify(module: "RetrievalModule") -> dict[str, Any]:
    """What must agree where a checkpoint is loaded."""
    return {
        "model": type(module).__name__,
        "backbone": dict(module.backbone.identity) if module.backbone is not None else None,
        **module.catalogue,
    }


def frozen_keys(module: "RetrievalModule") -> set[str]:
    """The keys of the backbone's frozen weights in the module's state."""
    if module.backbone is None:
        return set()
    frozen = set(module.backbone.frozen_state_keys())
    places = [name for name, child in module.named_modules(remove_duplicate=False) if child is module.backbone]
    return {f"{place}.{key}" for place in places for key in frozen}


def check(module: "RetrievalModule", checkpoint: dict[str, Any], *, also: tuple[str, ...] = ()) -> None:
    """Refuse a checkpoint that does not belong to this module.

    Args:
        module: The module, built.
        checkpoint: What was read.
        also: Names of other classes whose checkpoint is taken as well.

    Raises:
        InputError: When the checkpoint is not one of ours, or names another model, backbone, catalogue or split.
    """
    found = checkpoint.get(METADATA)
    if found is None:
        raise InputError("Expected a checkpoint written by anyo-lightning, got one without its metadata")
    expected = identify(module)
    for part in ("model", "backbone", "items", "catalogue", "split"):
        if found[part] != expected[part] and not (part == "model" and found[part] in also):
            raise InputError(f"Expected a checkpoint of {part} {_words(expected[part])}, got {_words(found[part])}")


def check_keys(module: "RetrievalModule", result: Any) -> None:
    """Only the backbone's frozen weights may be missing, all or none of them, and nothing may be left over.

    Raises:
        InputError: When other keys are missing or left over.
    """
    missing, unexpected = set(result.missing_keys), set(result.unexpected_keys)
    if unexpected or missing not in (set(), frozen_keys(module)):
        names = sorted(unexpected or missing - frozen_keys(module))
        raise InputError(
            "Expected a checkpoint with the same weights as the model, got "
            f"{'unknown' if unexpected else 'no'} {', '.join(names[:3])}{' and others' if len(names) > 3 else ''}"
        )


def start_from(module: "RetrievalModule", folder: Path) -> None:
    """Load the best weights of another run into a module, where both are of one backbone, catalogue and split.

    A run of one of the classes that the module `starts_from` gives its item encoder, and with it the LLM: what it lacks
    stays as it is.

    Raises:
        InputError: When the run does not fit.
    """
    checkpoint = read(folder)
    check(module, checkpoint, also=module.starts_from)
    weights = {key: value for key, value in checkpoint["state_dict"].items() if key not in module.starts_afresh}
    own = module.state_dict()  # views of its weights: copying these to where they are changes none of those given
    if checkpoint[METADATA]["model"] in module.starts_from:
        frozen = frozen_keys(module)
        given = {key: value for key, value in weights.items() if not key.startswith("history_encoder.")}
        weights = {**{key: value for key, value in own.items() if key not in frozen}, **given}
    module.load_state_dict({**{key: own[key] for key in module.starts_afresh if key in own}, **weights})


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
    checkpoint = read(folder)
    found, expected = checkpoint[METADATA], describe_catalogue(split)
    if found["split"] != expected["split"] or found["items"] != expected["items"]:
        raise InputError(f"Expected {folder} to be a run on split {expected['split']}, got {found['split']}")
    vectors: Tensor | None = checkpoint["state_dict"].get("item_encoder.embedding.weight")
    if vectors is None:
        raise InputError(f"Expected {folder} to hold item embeddings, got a run of {found['model']} without them")
    return vectors


def _words(value: Any) -> str:
    return " ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else str(value)

"""Reading and writing checkpoint files: whole or not at all, and nothing in them is executed."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins import TorchCheckpointIO
from torch import Tensor

from anyo_lightning.data.splits import Split
from anyo_lightning.disk import renamed_to
from anyo_lightning.errors import InputError
from anyo_lightning.lineage import describe_items, known_settings, lineage_of, noted_in, variant_of
from anyo_lightning.runs import LINEAGE, RunFolder, named_run

METADATA = "anyo_lightning"  # the key of what a checkpoint says of itself


class AtomicCheckpoints(TorchCheckpointIO):
    """Writes a checkpoint beside its place and renames it; reads tensors and plain values only.

    Lightning's own goes through the system's folder for temporary files: on another disk the last move is a copy,
    and a machine that dies in it leaves half a checkpoint instead of a whole one.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write it, or leave what is there.

        Raises:
            InputError: When the disk does not take it.
        """
        try:
            with renamed_to(Path(path)) as temporary:
                torch.save(checkpoint, temporary)
        except (OSError, RuntimeError) as error:  # torch's own writer raises RuntimeError
            reason = " ".join(str(error).split())[:200]
            raise InputError(
                f"Expected to write {path}, got: {reason}; earlier checkpoints are as they were"
            ) from error

    def load_checkpoint(
        self, path: str | Path, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read it; nothing in it is executed."""
        # not by super(), whose `weights_only` Lightning has from 2.6 on
        checkpoint: dict[str, Any] = torch.load(path, map_location=map_location, weights_only=True)
        return checkpoint


def read(folder: Path) -> dict[str, Any]:
    """The best checkpoint of a run folder, on the CPU.

    Raises:
        InputError: When the folder has no checkpoint or it cannot be read.
    """
    return load(RunFolder(folder).best_checkpoint)


def load(path: Path) -> dict[str, Any]:
    """A checkpoint of ours, on the CPU.

    Raises:
        InputError: When there is no such file, it cannot be read, or it is not one of ours.
    """
    if not path.is_file():
        raise InputError(f"Expected a checkpoint, got no file {path}")
    try:
        checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise InputError(f"Expected a readable checkpoint, got {path} ({type(error).__name__})") from error
    if METADATA not in checkpoint:
        raise InputError(f"Expected a checkpoint written by anyo-lightning, got {path}")
    return checkpoint


def describe_catalogue(split: Split) -> dict[str, Any]:
    """The catalogue's size and fingerprint (ids and texts), and the split's fingerprint."""
    return {
        "items": split.catalogue_size,
        "catalogue": describe_items(split.item_ids.tolist(), split.item_texts),
        "split": split.fingerprint,
    }


def describe_run(path: Path) -> dict[str, Any]:
    """What a run that reads another one notes of it, for its own checkpoints and metrics.json.

    Args:
        path: The other run's folder, or the file in it that is read.

    Returns:
        `run`, the folder; `variant`; `model`, the class; `split`, the fingerprint; `weights`, a hash of all tensors of
        its best checkpoint; `settings`, as `read_settings` reads them; `lineage`, the same of the runs that it has read
        itself, by their options. None stands for what it does not say.

    Raises:
        InputError: Its best checkpoint cannot be read.
    """
    run = named_run(path)
    settings = known_settings(run)
    found: dict[str, Any] = {"run": str(run.path), "variant": variant_of(run)}
    if not run.best_checkpoint.is_file():  # a floor
        data, kind = settings or {}, (settings or {}).get("model.class_path")
        model = None if kind is None else str(kind).rpartition(".")[2]
        given = {"model": model, "split": data.get("split"), "weights": None}
        return {**found, **given, "settings": settings, LINEAGE: lineage_of(run)}
    checkpoint = read(run.path)
    noted = checkpoint[METADATA]
    if settings is not None:  # of a run that has not been tested, its checkpoint alone says which data it had
        settings |= {part: noted[part] for part in ("split", "catalogue")}
    weights = _hash_of(checkpoint["state_dict"])
    given = {"model": noted["model"], "split": noted["split"], "weights": weights}
    return {**found, **given, "settings": settings, LINEAGE: noted_in(noted)}


def check_runs_read(run: RunFolder, places: Mapping[str, Path]) -> None:
    """Refuse to go on with a finished run that is made of others if these are no longer what it was made of.

    Args:
        run: The run folder; where it notes nothing of what it has read, nothing is refused.
        places: What it would read, by the options that name it.

    Raises:
        InputError: One has another class or other weights.
    """
    noted = lineage_of(run)
    for option, place in places.items():
        if option in noted:
            found = describe_run(place)
            if any(noted[option].get(part) != found[part] for part in ("model", "weights")):
                raise InputError(
                    f"Expected {place} to have the weights with which {run.path} was tested, got others: fit it again, "
                    "with another --run"
                )


def check_counted(run: RunFolder, split: Split) -> None:
    """Refuse to count a floor on other data under the name of a run that was counted on its own.

    Args:
        run: The floor's run folder; where it has not been tested, nothing is refused.
        split: The split of the data at hand.

    Raises:
        InputError: It is another one.
    """
    counted = run.read_metrics()["split"]["fingerprint"] if run.finished else split.fingerprint
    if counted != split.fingerprint:
        raise InputError(
            f"Expected the data of split {counted} that {run.path} is counted on, got split {split.fingerprint}: fit "
            "it there"
        )


def _hash_of(weights: Mapping[str, Tensor]) -> str:
    content = hashlib.sha256()
    for name, weight in sorted(weights.items()):
        content.update(f"{name} {tuple(weight.shape)}".encode())
        content.update(weight.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return content.hexdigest()[:16]

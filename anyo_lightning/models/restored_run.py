"""A finished run's model and data, as `anyo test --run` has them, without a Trainer; nothing is written.

The data are read through the run's own configuration: floors count them, trained models take the catalogue, what occurs
in training and the longest history from them, and compare their fingerprint with the checkpoint's.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentError, ArgumentParser

from anyo_lightning import checkpoint_io
from anyo_lightning.data.datamodule import RecDataModule
from anyo_lightning.errors import InputError, argument_sentence, in_own_words
from anyo_lightning.evaluation.callback import RetrievalMetrics
from anyo_lightning.llm.evaluation_mode import evaluating
from anyo_lightning.models.base import RetrievalModule
from anyo_lightning.runs import RunFolder

MIXED = {"bf16-mixed": torch.bfloat16, "bf16": torch.bfloat16, "16-mixed": torch.float16, "16": torch.float16}


@dataclass(frozen=True, eq=False)
class RestoredRun:
    """A run, ready to encode.

    Attributes:
        model: With the best checkpoint's weights, on its device, in evaluation mode.
        data: Set up; carries what the model reads.
        history_masked: Whether the run's evaluation leaves the items of a history out.
        mixed: The dtype in which the run's evaluation computes states under autocast; None: without.
    """

    model: RetrievalModule
    data: RecDataModule
    history_masked: bool
    mixed: torch.dtype | None

    @contextmanager
    def as_evaluated(self) -> Iterator[None]:
        """Inside, histories are encoded as in the run's evaluation: no dropout, no gradients, its precision."""
        kind = self.model.device.type
        dtype = torch.bfloat16 if kind == "cpu" else self.mixed  # of Lightning on a CPU, too
        with evaluating(self.model), torch.autocast(kind, dtype, enabled=self.mixed is not None):
            yield


def restore_run(folder: Path, *, device: torch.device) -> RestoredRun:
    """Build a run's model and load its best checkpoint.

    Args:
        folder: Run folder.
        device: Where the model goes; a floor that counts stays on the CPU.

    Raises:
        InputError: The folder has no configuration or, for a trained model, no checkpoint that fits it; or its data
            cannot be read or, for a floor, are others than those that it was counted on.
    """
    run = RunFolder(folder)
    config = run.read_config()
    if not {"model", "data"} <= config.keys():
        raise InputError(f"Expected {run.config_file} to describe a run, got no model and data in it")
    model, data = _instantiate(config, folder)
    weights = None
    checkpoint: dict[str, Any] = {}
    if model.trained:
        checkpoint = checkpoint_io.read(folder)
        weights = checkpoint["state_dict"]
    else:
        checkpoint_io.check_runs_read(run, model.runs_read())
    data.setup("predict")
    if not model.trained:
        checkpoint_io.check_counted(run, data.split)
    data.read_for(model)
    metrics = RetrievalMetrics(mask_history=(config.get("metrics") or {}).get("mask_history"))
    model.history_masked = metrics.masks_history(data.split)
    model.prepare(data, saved=weights)
    if weights is not None:
        model.on_load_checkpoint(checkpoint)
        model.load_state_dict(weights)
    model.to(device).eval().requires_grad_(False)
    precision = (config.get("trainer") or {}).get("precision")
    return RestoredRun(model, data, model.history_masked, MIXED.get(str(precision)))


def chosen_device(device: str | None) -> torch.device:
    """The device of a name; by default the first GPU if there is one.

    Args:
        device: Such as `cpu` or `cuda:0`.

    Raises:
        InputError: There is no such device.
    """
    try:
        chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:  # torch's, without CUDA
        reason = str(error).splitlines()[0]
        raise InputError(f"Expected a device of this machine such as cpu or cuda:0, got {device}: {reason}") from None
    return chosen


def _instantiate(config: dict[str, Any], folder: Path) -> tuple[RetrievalModule, RecDataModule]:
    """The objects that a configuration describes, by the same types as on the command line."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(RetrievalModule, "model")
    parser.add_class_arguments(RecDataModule, "data")
    try:
        parts = {name: config[name] for name in ("model", "data")}
        with in_own_words():
            found = parser.instantiate_classes(parser.parse_object(parts))
    except ArgumentError as error:
        raise InputError(f"Expected {folder} to be a run of this version, got: {argument_sentence(error)}") from error
    return found["model"], found["data"]

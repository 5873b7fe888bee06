"""What a run was trained and tested with, its seeds apart, and whether two runs agree in it."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import polars as pl

from anyo_lightning.defaults import at_default, by_path
from anyo_lightning.errors import InputError
from anyo_lightning.runs import RunFolder

Settings = dict[str, Any]  # options by their dotted paths, and what else decides

# Settings that change neither what is learnt nor what is measured, so that seeds of a variant may differ in them.
FREE_SETTINGS = {
    "trainer": (
        "accelerator",
        "strategy",
        "devices",
        "num_nodes",
        "deterministic",
        "benchmark",
        "default_root_dir",
        "logger",
        "log_every_n_steps",
        "enable_progress_bar",
        "enable_model_summary",
        "enable_autolog_hparams",
        "model_registry",
        "profiler",
        "max_time",  # of runs that it has ended, CUT_SHORT tells
    ),
    "data": ("seed", "num_workers", "micro_batch_tokens", "evaluation_batch_tokens"),
    "checkpoint": ("dirpath", "verbose", "save_last", "save_top_k"),
    "early_stopping": ("verbose",),
    # Whether histories were masked, metrics.json's protocol says.
    "metrics": ("cutoffs", "top_k", "extra", "variant", "mask_history"),
}
FILES = ("data.interactions", "data.items")
FOLDER_SETTINGS = ("init_from", "item_vectors_from", "distil_from")  # of these runs only the settings matter
CUT_SHORT = "cut short"


def read_settings(folder: RunFolder, *, any_draw: bool = False) -> Settings:
    """All that decides what a run has learnt and what was measured, its seeds apart.

    Files of data may lie anywhere where metrics.json's split and catalogue.parquet say what was in them. Where another
    run's folder is named, that run's settings stand for it, or its name if they cannot be read.

    Args:
        folder: The run; without a config.yaml only its data are known.
        any_draw: Whether splits may differ by how ties were drawn: then files must lie where they lay.

    Raises:
        InputError: Its config.yaml cannot be read.
    """
    return _read_settings(folder, any_draw, ())


def agree(one: Settings, other: Settings) -> bool:
    """Whether two runs may be averaged as seeds of one variant.

    An option that only one of them has agrees with the other's version at its default. Classes are imported to learn
    defaults, which takes seconds, so only where all else agrees.
    """
    shared = one.keys() & other.keys()
    return all(_same(one[option], other[option]) for option in shared) and all(
        _at_default(option, side) for side in (one, other) for option in side.keys() - shared
    )


def _read_settings(folder: RunFolder, any_draw: bool, within: tuple[Path, ...]) -> Settings:
    config = folder.read_config() if folder.config_file.exists() else {}
    # What stands outside of blocks is about the command: its folder, what it does at its end.
    blocks = {name: block for name, block in config.items() if isinstance(block, dict)}
    found: Settings = {}
    for name, block in blocks.items():
        free = FREE_SETTINGS.get(name, ())
        found |= by_path({key: value for key, value in block.items() if key not in free}, f"{name}.")
    if str(found.get("trainer.precision")) in ("None", "32"):
        found["trainer.precision"] = "32-true"
    for option, value in found.items():
        if option.rpartition(".")[2] in FOLDER_SETTINGS and value:
            found[option] = _started_from(RunFolder(str(value)), any_draw, (*within, folder.path.resolve()))
    data = _data(folder)
    if any_draw:
        data.pop("split", None)
        found.pop("data.ties_seed", None)
    elif data:
        found = {option: value for option, value in found.items() if option not in FILES}
    return found | data | _cut_short(folder, blocks)


def _started_from(folder: RunFolder, any_draw: bool, within: tuple[Path, ...]) -> Settings | str:
    """The settings of a run that another one names; its name where they cannot be read, or are those of that one."""
    if folder.config_file.is_file() and folder.path.resolve() not in within:
        try:
            return _read_settings(folder, any_draw, within)
        except (InputError, OSError, AttributeError, TypeError, ValueError):
            pass
    try:
        return str(folder.read_metrics()["variant"])
    except (InputError, OSError):
        return folder.variant


def _data(folder: RunFolder) -> dict[str, str]:
    """The split's fingerprint, in which texts are not, and a hash over items' ids and texts; nothing unless both."""
    try:
        split = folder.read_metrics()["split"]["fingerprint"]
        catalogue = folder.read_catalogue().select("item_id", "text").sort("item_id")
    except (InputError, OSError, KeyError, TypeError, pl.exceptions.PolarsError):
        return {}
    return {"split": split, "catalogue": hashlib.sha256(catalogue.write_csv().encode()).hexdigest()}


def _cut_short(folder: RunFolder, blocks: Mapping[str, Any]) -> dict[str, Any]:
    """The time limit of a run that, by curves.csv, did not reach its last epoch or step or lose patience.

    Without curves a run that has a time limit counts as cut, unless it has nothing to train.
    """
    trainer, stopping = (blocks.get(name, {}) for name in ("trainer", "early_stopping"))
    if trainer.get("max_time") is None:
        return {}
    try:
        table = folder.read_curves()
    except InputError:
        table = None
    curves: dict[str, list[Any]] = {} if table is None else table.to_dict(as_series=False)
    epochs, steps = (max(curves.get(name) or [start]) for name, start in (("epoch", -1), ("step", 0)))
    reached = {"max_epochs": epochs + 1, "max_steps": steps}
    if any(trainer.get(limit) is not None and 0 <= trainer[limit] <= number for limit, number in reached.items()):
        return {}
    values = [value for value in curves.get(str(stopping.get("monitor")), []) if value is not None]
    best = values.index((max if stopping.get("mode") == "max" else min)(values)) if values else 0
    out_of_patience = stopping.get("patience") is not None and len(values) - 1 - best >= stopping["patience"]
    return {} if values and out_of_patience else {CUT_SHORT: trainer["max_time"]}


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, dict) and isinstance(other, dict):
        return agree(one, other)
    return repr(one) == repr(other)  # 1 batch is not 1.0, all of them


def _at_default(option: str, settings: Settings) -> bool:
    """Whether an option is at its default, as far as its class is there to be asked."""
    try:
        return at_default(option, settings)
    except (ImportError, AttributeError, ValueError, TypeError):
        return False

"""What a run was trained and tested with, its seeds apart, and whether two runs agree in it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from anyo_lightning import lineage
from anyo_lightning.defaults import at_default
from anyo_lightning.runs import LINEAGE, RUN_OPTIONS, RunFolder, named_places, named_run

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


def read_settings(folder: RunFolder, *, any_draw: bool = False) -> Settings:
    """All that decides what a run has learnt and what was measured, its seeds apart.

    Files of data may lie anywhere where metrics.json's split and catalogue.parquet say what was in them. Where another
    run is named, what decided of that run stands for it: as this run noted it when it read it, or else as it is in the
    folder; or its name, if neither is known (`known_by_name`).

    Args:
        folder: The run; without a config.yaml only its data are known.
        any_draw: Whether splits may differ by how ties were drawn: then files must lie where they lay.

    Raises:
        InputError: Its config.yaml cannot be read.
    """
    noted = lineage.lineage_of(folder)
    return _decisive(lineage.read_settings(folder), noted, any_draw, (folder.path.resolve(),))


def agree(one: Settings, other: Settings) -> bool:
    """Whether two runs may be averaged as seeds of one variant.

    An option that only one of them has agrees with the other's version at its default. Classes are imported to learn
    defaults, which takes seconds, so only where all else agrees.
    """
    shared = one.keys() & other.keys()
    return all(_same(one[option], other[option]) for option in shared) and all(
        _at_default(option, side) for side in (one, other) for option in side.keys() - shared
    )


def known_by_name(settings: Settings) -> list[str]:
    """The names of the runs that a run has read, or that those have read, of which nothing else is known."""
    found = []
    for option, value in settings.items():
        if isinstance(value, dict):
            found += known_by_name(value)
        elif _names_run(option) and value:
            found.append(str(value))
    return found


def _decisive(settings: Settings, noted: Mapping[str, Any], any_draw: bool, within: tuple[Path, ...]) -> Settings:
    """What of a run's settings decides.

    Args:
        settings: All of them.
        noted: What it has noted of the runs that it has read.
        any_draw: As in `read_settings`.
        within: The folders of the runs that have led to this one.
    """
    left_out = ("split", "data.ties_seed") if any_draw else FILES if "split" in settings else ()
    found: Settings = {}
    for option, value in settings.items():
        block, _, within_block = option.partition(".")
        if option in left_out or within_block.partition(".")[0] in FREE_SETTINGS.get(block, ()):
            continue
        if _names_run(option) and value:
            name = option.rpartition(".")[2]
            places = named_places(name, value)
            read = {key: _of_named(place, noted.get(key) or {}, any_draw, within) for key, place in places.items()}
            found[option] = read.get(name, read)
        else:
            found[option] = value
    if str(found.get("trainer.precision")) in ("None", "32"):
        found["trainer.precision"] = "32-true"
    return found


def _of_named(place: Any, noted: Mapping[str, Any], any_draw: bool, within: tuple[Path, ...]) -> Settings | str:
    """What decided of a run that another one names; its name where nothing is known, or it is one of those before."""
    if noted.get("settings"):
        return _decisive(noted["settings"], noted.get(LINEAGE) or {}, any_draw, within)
    run = named_run(place)
    settings = None if run.path.resolve() in within else lineage.known_settings(run)
    if settings is None:
        return str(noted.get("variant") or lineage.variant_of(run))
    return _decisive(settings, lineage.lineage_of(run), any_draw, (*within, run.path.resolve()))


def _names_run(option: str) -> bool:
    return option.rpartition(".")[2] in RUN_OPTIONS


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

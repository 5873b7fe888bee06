"""What a run folder says of how it was trained, and of the runs that it has read; without torch, which takes seconds.

A run notes what the runs were that it reads (`checkpoint_io.describe_run`), since their folders go.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl

from anyo_lightning.defaults import by_path
from anyo_lightning.errors import InputError
from anyo_lightning.runs import LINEAGE, RunFolder

CUT_SHORT = "cut short"


def noted_in(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What a run has noted of the runs that it has read, by a checkpoint's metadata.

    Of an earlier version these say it of `init_from` alone.
    """
    earlier = metadata.get("started_from")
    return metadata.get(LINEAGE) or ({"init_from": earlier} if earlier else {})


def read_settings(run: RunFolder) -> dict[str, Any]:
    """A run's options by their paths, in the values that JSON has, and what else decides what it has learnt.

    That is `split`, the fingerprint in which texts are not, and `catalogue`, a hash over items' ids and texts, where
    the run's files have both; and `CUT_SHORT`, the time limit that has ended it, where one has. What stands outside of
    config.yaml's blocks is about the command: its folder, what it does at its end.

    Raises:
        InputError: Its config.yaml cannot be read.
    """
    config = run.read_config() if run.config_file.exists() else {}
    settings = by_path({name: block for name, block in config.items() if isinstance(block, dict) and block})
    settings |= _data(run) | _cut_short(run, settings)
    plain: dict[str, Any] = json.loads(json.dumps(settings, default=str), parse_constant=str)
    return plain


def known_settings(run: RunFolder) -> dict[str, Any] | None:
    """The same; None where the run has no config.yaml or it cannot be understood."""
    if not run.config_file.is_file():
        return None
    try:
        return read_settings(run)
    except (InputError, OSError, AttributeError, TypeError, ValueError):
        return None


def variant_of(run: RunFolder) -> str:
    """What a run calls itself, or its folder where it has not been tested."""
    try:
        return str(run.read_metrics()["variant"])
    except (InputError, OSError):
        return run.variant


def lineage_of(run: RunFolder) -> dict[str, Any]:
    """What a tested run has noted of the runs that it has read, by the options that name them."""
    try:
        found = run.read_metrics().get(LINEAGE)
    except (InputError, OSError):
        return {}
    return found if isinstance(found, dict) else {}


def describe_items(ids: Sequence[str], texts: Sequence[str]) -> str:
    """The fingerprint of a catalogue.

    Args:
        ids: Of its items, in their order.
        texts: Their texts.
    """
    return hashlib.sha256(json.dumps([list(ids), list(texts)]).encode()).hexdigest()[:16]


def _data(run: RunFolder) -> dict[str, str]:
    """The fingerprints of a tested run's split and catalogue; nothing unless both are there."""
    try:
        split = run.read_metrics()["split"]["fingerprint"]
        catalogue = run.read_catalogue()
        return {"split": split, "catalogue": describe_items(*(catalogue[n].to_list() for n in ("item_id", "text")))}
    except (InputError, OSError, KeyError, TypeError, pl.exceptions.PolarsError):
        return {}


def _cut_short(run: RunFolder, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The time limit of a run that, by curves.csv, did not reach its last epoch or step or lose patience.

    Without curves a run that has a time limit counts as cut, unless it has nothing to train.
    """
    limits = {o: str(v) for o, v in settings.items() if f"{o}.".startswith("trainer.max_time.") and v is not None}
    if not limits:
        return {}
    try:
        table = run.read_curves()
    except InputError:
        table = None
    curves: dict[str, list[Any]] = {} if table is None else table.to_dict(as_series=False)
    epochs, steps = (max(curves.get(name) or [start]) for name, start in (("epoch", -1), ("step", 0)))
    reached = {"trainer.max_epochs": epochs + 1, "trainer.max_steps": steps}
    if any(settings.get(limit) is not None and 0 <= settings[limit] <= number for limit, number in reached.items()):
        return {}
    monitor, mode, patience = (settings.get(f"early_stopping.{name}") for name in ("monitor", "mode", "patience"))
    values = [value for value in curves.get(str(monitor), []) if value is not None]
    best = values.index((max if mode == "max" else min)(values)) if values else 0
    out_of_patience = patience is not None and len(values) - 1 - best >= patience
    return {} if values and out_of_patience else {CUT_SHORT: " ".join(limits.values())}

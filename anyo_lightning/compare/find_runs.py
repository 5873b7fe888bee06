"""Which runs below a folder are compared."""

import functools
from collections.abc import Sequence
from pathlib import Path

from anyo_lightning.compare.settings import agree, read_settings
from anyo_lightning.errors import InputError
from anyo_lightning.runs import RunFolder


def find_runs(path: str | Path, *, every_split: bool = False) -> tuple[list[RunFolder], list[RunFolder]]:
    """The run that a folder is, or the newest tested version of each variant, seed and settings below it.

    What metrics.json calls the variant counts; where two folders have runs of one variant, both do. An older version
    with other settings counts, too, unless it is of another split: data that were changed replace the split.

    Args:
        path: A run folder, a variant's folder (`runs/sasrec`), or the folder of all runs.
        every_split: Whether versions of one variant and seed count each, if their splits differ.

    Returns:
        The runs, by folder, and those that were passed over: without a metrics.json, or of a split that was replaced.

    Raises:
        InputError: There is no such folder, or a metrics.json or config.yaml cannot be read.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise InputError(f"Expected runs to be folders, found none at {folder}")
    run = RunFolder(folder)
    if run.finished:
        return [run], []
    below = sorted(child for child in [*folder.glob("*"), *folder.glob("*/*")] if child.is_dir())
    by_folder: dict[Path, list[RunFolder]] = {}
    for run in map(RunFolder, below):
        if run.finished or run.config_file.is_file():
            by_folder.setdefault(run.variant_folder, []).append(run)
    counted: list[RunFolder] = []
    skipped: list[RunFolder] = []
    for runs in by_folder.values():
        newest_first = sorted(runs, key=lambda run: run.version, reverse=True)
        tested = [run for run in newest_first if run.finished]
        newest, older = _newest(tested, every_split) if tested else ([], newest_first[:1])
        counted += newest
        skipped += older
    return counted, skipped if by_folder else [RunFolder(folder)]


def _newest(newest_first: Sequence[RunFolder], every_split: bool) -> tuple[list[RunFolder], list[RunFolder]]:
    """Of a folder's versions those that count, the oldest first, and those of a split that a newer one has replaced."""
    counted: list[RunFolder] = []
    replaced: list[RunFolder] = []
    settings_of = functools.cache(read_settings)  # a file is read once, however many versions there are
    splits: dict[tuple[str, int | None], dict[str | None, list[RunFolder]]] = {}  # of each variant and seed
    for run in newest_first:
        metrics = run.read_metrics()
        by_split = splits.setdefault((metrics["variant"], metrics["seed"]), {})
        split = metrics["split"].get("fingerprint")
        if by_split and split not in by_split and not every_split:
            replaced.append(run)
            continue
        same = by_split.setdefault(split, [])
        if not any(agree(settings_of(run), settings_of(newer)) for newer in same):
            same.append(run)
            counted.append(run)
    return counted[::-1], replaced

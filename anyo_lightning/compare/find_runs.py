"""Which runs below a folder are compared."""

from pathlib import Path

from anyo_lightning.errors import InputError
from anyo_lightning.runs import RunFolder


def find_runs(path: str | Path, *, every_split: bool = False) -> tuple[list[RunFolder], list[RunFolder]]:
    """The run that a folder is, or the newest tested version of each variant and seed below it.

    What metrics.json calls the variant counts; where two folders have runs of one variant, both do.

    Args:
        path: A run folder, a variant's folder (`runs/sasrec`), or the folder of all runs.
        every_split: Whether versions of one variant and seed count each, if their splits differ.

    Returns:
        The runs, by folder name, and those without a metrics.json that were passed over.

    Raises:
        InputError: There is no such folder.
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
    newest: dict[tuple[Path, str, int | None, str | None], RunFolder] = {}
    skipped: list[RunFolder] = []
    for variant_folder, runs in by_folder.items():
        newest_first = sorted(runs, key=lambda run: run.version, reverse=True)
        tested = [run for run in newest_first if run.finished]
        for run in reversed(tested):
            metrics = run.read_metrics()
            split = metrics["split"]["fingerprint"] if every_split else None
            newest[variant_folder, metrics["variant"], metrics["seed"], split] = run
        skipped += [] if tested else newest_first[:1]
    return list(newest.values()), skipped if by_folder else [RunFolder(folder)]

"""Which run folders make which rows of a comparison: seeds of one variant together, and nothing that does not compare.

Runs are one variant if metrics.json calls them so and their configurations agree in all that is trained, the seed
apart. Runs of different splits or protocols are refused: their figures do not mean the same.
"""

import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from anyo_lightning.compare.find_runs import find_runs
from anyo_lightning.compare.settings import Settings, agree, known_by_name, read_settings
from anyo_lightning.errors import InputError
from anyo_lightning.runs import RunFolder


@dataclass(frozen=True, eq=False)
class TestedRun:
    """A run folder and the content of its metrics.json."""

    __test__ = False  # not for pytest

    folder: RunFolder
    content: dict[str, Any]

    @property
    def seed(self) -> int | None:
        """What the run was seeded with."""
        return self.content["seed"]


@dataclass(frozen=True, eq=False)
class Variant:
    """One row: the runs of a variant that differ in their seed only, or another system's lists."""

    label: str
    runs: tuple[TestedRun, ...]
    left_out: Mapping[str, str] = field(default_factory=dict)  # metrics that lists cannot show, and why
    list_length: int | None = None  # of lists: how many places are known
    note: str = ""

    def holds(self, name: str) -> bool:
        """Whether the row is called so, or the folder is one of its runs' or holds their versions."""
        folder = Path(name).resolve()
        return name in (self.label, self.runs[0].content["variant"]) or any(
            folder in (run.folder.path.resolve(), run.folder.variant_folder) for run in self.runs
        )

    @property
    def model(self) -> str:
        """The class of its models, `Markov`; nothing where no config.yaml says it."""
        run = RunFolder(self.runs[0].folder.path)
        model = run.read_config().get("model") if run.config_file.is_file() else None
        return str(model.get("class_path", "")).rpartition(".")[2] if isinstance(model, dict) else ""


def read_variants(paths: Sequence[Path]) -> tuple[list[Variant], list[Path]]:
    """Read the tested runs that paths stand for and check that they may stand in one table.

    Args:
        paths: Run folders, or folders that hold them: then the newest tested version of each variant, seed and
            settings counts.

    Returns:
        The rows, and the folders that were passed over: not tested yet, or of a split that a newer version replaced.

    Raises:
        InputError: A folder does not exist or holds no tested run, or runs differ in split or protocol; the two are
            then on stderr side by side.
    """
    found: dict[Path, RunFolder] = {}
    passed_over: dict[Path, RunFolder] = {}
    for path in paths:
        tested, others = find_runs(path)
        found |= {run.path.resolve(): run for run in tested}
        passed_over |= {run.path.resolve(): run for run in others}
    runs = _tested(found, paths)
    _check_one(runs, "split", lambda run: run.content["split"], _split_name, key_of=_fingerprint)
    _check_one(runs, "protocol", lambda run: _decisive(run.content["protocol"]), _protocol_name)
    return _grouped(runs), [run.path for run in passed_over.values()]


def read_splits(paths: Sequence[Path]) -> list[Variant]:
    """Read tested runs of one data set, strategy and tie policy, whose seeds and splits may differ.

    Args:
        paths: Run folders, or folders that hold them: the newest tested one of each variant, seed, settings and split.

    Returns:
        The rows; each has runs of one or more splits.

    Raises:
        InputError: A folder does not exist or holds no tested run, or runs differ in more than ties and seeds.
    """
    found = {run.path.resolve(): run for path in paths for run in find_runs(path, every_split=True)[0]}
    runs = _tested(found, paths)
    across = ["--across_splits", "true"]
    _check_one(runs, "kind of split", lambda run: run.content["split"], _split_kind, options=across)
    _check_one(runs, "protocol", lambda run: _decisive(run.content["protocol"]), _protocol_name, options=across)
    return _grouped(runs, any_draw=True)


def find_variant(variants: Sequence[Variant], name: str) -> Variant:
    """The row that is called so, holds that run folder, or is the only one of that class of models.

    Raises:
        InputError: None is, or more than one.
    """
    named = (
        [variant for variant in variants if variant.label == name]
        or [variant for variant in variants if variant.holds(name)]
        or [variant for variant in variants if variant.model.lower() == name.lower()]
    )
    if not named:
        there = ", ".join(variant.label for variant in variants)
        raise InputError(f"Expected baseline to be one of the rows {there}, or a folder of theirs, got {name!r}")
    if len(named) > 1:
        there = ", ".join(variant.label for variant in named)
        raise InputError(
            f"Expected baseline to name one row, got {name!r}, which names {len(named)}: give one of {there}"
        )
    return named[0]


def _tested(found: Mapping[Path, RunFolder], paths: Sequence[Path]) -> list[TestedRun]:
    """The runs that paths stand for, with what they say.

    Raises:
        InputError: There is none.
    """
    if not found:
        where = ", ".join(str(path) for path in paths) or "nothing"
        raise InputError(f"Expected runs to name at least one tested run (a folder with metrics.json), got {where}")
    return [TestedRun(folder, folder.read_metrics()) for folder in found.values()]


def _grouped(runs: Sequence[TestedRun], *, any_draw: bool = False) -> list[Variant]:
    """Rows in order of their first run; a variant with several configurations, or with a seed twice, has several.

    Args:
        runs: What is grouped.
        any_draw: Whether the runs of a row may differ in how ties are drawn, and so in their splits.
    """
    groups: list[tuple[str, Settings, list[TestedRun]]] = []
    for run in runs:
        variant, settings = run.content["variant"], read_settings(run.folder, any_draw=any_draw)
        for name, others, group in groups:
            if name == variant and agree(others, settings):
                group.append(run)
                break
        else:
            groups.append((variant, settings, [run]))
    rows: list[tuple[list[TestedRun], list[str]]] = []  # and the runs that its seeds have read, if known by name alone
    for _, settings, group in groups:
        if len({(run.seed, run.content["split"]["fingerprint"]) for run in group}) < len(group):
            rows += [([run], []) for run in group]
        else:
            rows.append((sorted(group, key=lambda run: run.seed or 0), known_by_name(settings) if group[1:] else []))
    names = [row[0].content["variant"] for row, _ in rows]
    folders = [row[0].folder.path.resolve().name for row, _ in rows]
    titles = [n if names.count(n) == 1 else f"{n} ({f})" for n, f in zip(names, folders, strict=True)]
    found = []
    for title, name, (row, read) in zip(titles, names, rows, strict=True):
        label = title if titles.count(title) == 1 else f"{name} ({row[0].folder.path})"
        read_by_name = " and ".join(dict.fromkeys(read))
        note = f"{label}: of the runs that its seeds have read only the name is known, {read_by_name}."
        found.append(Variant(label, tuple(row), note=note if read else ""))
    return found


def _check_one(
    runs: Sequence[TestedRun],
    what: str,
    content_of: Callable[[TestedRun], dict[str, Any]],
    name_of: Callable[[dict[str, Any]], str],
    *,
    key_of: Callable[[dict[str, Any]], str] | None = None,
    options: Sequence[str] = (),
) -> None:
    """Refuse runs that differ in what `key_of` says, or else `name_of`; the first two kinds are then on stderr.

    The sentence has the command, with these options, that compares each kind by itself.
    """
    groups: dict[str, list[TestedRun]] = {}
    for run in runs:
        groups.setdefault((key_of or name_of)(content_of(run)), []).append(run)
    if len(groups) == 1:
        return
    first, second = list(groups.values())[:2]
    _print_side_by_side(what, *(({"run": group[0].folder.path} | content_of(group[0])) for group in (first, second)))
    folders = [[str(run.folder.path) for run in of] for of in groups.values()]
    commands = [shlex.join(["anyo", "compare", *paths, *options]) for paths in folders]
    names = [name_of(content_of(of[0])) for of in groups.values()]
    found = "; ".join(f"{name}: {command}" for name, command in zip(names, commands, strict=True))
    raise InputError(f"Expected runs of one {what}, got {len(groups)}. {found}")


def _print_side_by_side(what: str, left: dict[str, Any], right: dict[str, Any]) -> None:
    """Two contents as a table on stderr, a mark where they differ."""
    left, right = _flat(left), _flat(right)
    table = Table("", what, "first", "second", box=None, padding=(0, 2, 0, 0))
    for name in {**left, **right}:
        one, other = (str(side.get(name, "-")) for side in (left, right))
        mark = "≠" if one != other and name != "run" else ""
        table.add_row(*map(Text, (mark, name, one, other)))  # as they are: rich would read [brackets] as markup
    Console(file=sys.stderr, soft_wrap=True).print(table)


def _flat(content: dict[str, Any]) -> dict[str, Any]:
    """One level: `counts users` for `{"counts": {"users": …}}`."""
    flat: dict[str, Any] = {}
    for name, value in content.items():
        inner = value.items() if isinstance(value, dict) else ()
        flat |= {f"{name} {key}": part for key, part in inner} or {name: value}
    return flat


def _split_name(split: dict[str, Any]) -> str:
    return f"{split['name']} {split['strategy']} ties {split['ties']} fingerprint {split['fingerprint']}"


def _fingerprint(split: dict[str, Any]) -> str:
    return str(split["fingerprint"])


def _split_kind(split: dict[str, Any]) -> str:
    counts = split["counts"]
    return f"{split['name']} {split['strategy']} ties {split['ties']}, {counts['users']} users, {counts['items']} items"


def _decisive(protocol: dict[str, Any]) -> dict[str, Any]:
    """What decides the figures: not the cutoffs, nor the index, since ranks are exact."""
    return {name: protocol[name] for name in ("history_masked", "rows")}


def _protocol_name(protocol: dict[str, Any]) -> str:
    return f"history {'masked' if protocol['history_masked'] else 'not masked'}, {protocol['rows']} rows"

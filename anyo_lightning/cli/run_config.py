"""A run's config.yaml, as commands that name the run read it."""

import re
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from anyo_lightning.errors import InputError
from anyo_lightning.runs import RunFolder


def with_config_of_run(arguments: list[str]) -> list[str]:
    """Read the configuration from the run folder that `--run` names, unless one is given.

    Raises:
        InputError: The folder has none, and no model is given either.
    """
    names = [argument.partition("=")[0] for argument in arguments]
    runs = [i for i, name in enumerate(names) if name == "--run"]
    if not runs or not {"-c", "--config"}.isdisjoint(names):
        return arguments
    value = arguments[runs[-1]].partition("=")[2] or arguments[min(runs[-1] + 1, len(arguments) - 1)]  # the last counts
    file = RunFolder(value).config_file
    if file.is_file():
        return [arguments[0], f"--config={file}", *arguments[1:]]
    named = any(name in ("--model", "--model.class_path", "-h") or name.endswith("help") for name in names)
    if not named and not any(re.match("-c.", name) for name in names):
        raise InputError(f"Expected --config FILE, or --run with a run folder, got {value}, which has no {file.name}")
    return arguments


def at(settings: dict[str, Any] | None, path: str) -> Any:
    """What nested settings have at a dotted path, None where there is nothing."""
    found: Any = settings
    for name in path.split("."):
        found = found.get(name) if isinstance(found, dict) else None
    return found


def config_name(config: Namespace) -> str:
    """The stem of the first configuration file, otherwise the model's name."""
    if config.get("config"):
        return Path(str(config.config[0])).stem
    return str(config.model.class_path).rpartition(".")[2].lower()

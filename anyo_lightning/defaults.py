"""Defaults of constructors: an option that a later version added says nothing new about a run at its default."""

import importlib
import inspect
from collections.abc import Mapping
from typing import Any

# The classes of a configuration's blocks that name none.
BLOCKS = {
    "trainer": "lightning.pytorch.Trainer",
    "data": "anyo_lightning.data.datamodule.RecDataModule",
    "metrics": "anyo_lightning.evaluation.callback.RetrievalMetrics",
    "checkpoint": "lightning.pytorch.callbacks.ModelCheckpoint",
    "early_stopping": "lightning.pytorch.callbacks.EarlyStopping",
}


def by_path(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` as `{"a.b": 1}`; lists and empty mappings are values.

    Args:
        settings: A configuration, as config.yaml has it.
        prefix: What stands before each path.
    """
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            found |= by_path(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


def constructor_defaults(kind: type) -> dict[str, Any]:
    """The defaults of a class's options, those included that it passes on to the classes above it.

    Args:
        kind: The class.
    """
    found: dict[str, Any] = {}
    for base in reversed(kind.__mro__):
        if "__init__" in vars(base) and base is not object:
            parameters = inspect.signature(vars(base)["__init__"]).parameters.values()
            found |= {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
    return found


def at_default(option: str, settings: Mapping[str, Any]) -> bool:
    """Whether an option of a configuration is at its default.

    Args:
        option: Its dotted path, as in `model.init_args.encoders.init_args.dim`.
        settings: All options by their paths, the classes' among them.
    """
    owner, _, name = option.rpartition(".init_args.")
    path = settings.get(f"{owner}.class_path")
    block, _, within = option.partition(".")
    if block in BLOCKS and not owner:
        path, name = BLOCKS[block], within
    if not isinstance(path, str):
        return False
    module, _, kind = path.rpartition(".")
    defaults = constructor_defaults(getattr(importlib.import_module(module), kind))
    return name in defaults and repr(defaults[name]) == repr(settings[option])  # 1 is not 1.0

"""The words of a command line, before jsonargparse reads them."""

import json
from collections.abc import Sequence
from typing import Any


def nulls_as_configs(words: Sequence[str]) -> list[str]:
    """`--model.a.b null` as a piece of configuration: jsonargparse reads null below a class as the text "None".

    Args:
        words: Of the command line, the stage first.
    """
    found: list[str] = []
    rest = iter(words)
    for word in rest:
        name, equals, value = word.partition("=")
        if name.startswith("--model.") and not equals:
            value = next(rest, "")
        if name.startswith("--model.") and value == "null":
            found.append(f"--config={json.dumps(_nested(name.removeprefix('--').split('.')))}")
        elif name.startswith("--model.") and not equals:
            found += [word, value]
        else:
            found.append(word)
    return found


def _nested(names: list[str]) -> dict[str, Any] | None:
    return {names[0]: _nested(names[1:])} if names else None

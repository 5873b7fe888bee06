"""Files on disk: the cache folder, writing whole files or none, and setting damaged ones aside."""

import contextlib
import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def cache_folder() -> Path:
    """The folder for fetched and computed files: `ANYO_CACHE`, otherwise `XDG_CACHE_HOME/anyo-lightning`."""
    if folder := os.environ.get("ANYO_CACHE"):
        return Path(folder).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "anyo-lightning"


@contextlib.contextmanager
def renamed_to(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its name when the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())  # otherwise a machine that dies may have the new name without its content
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp's files are for their owner alone
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def folder_renamed_to(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its name when the block ends well.

    When another process was faster, its files stay: they are the same.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        temporary = Path(folder) / path.name
        temporary.mkdir()
        yield temporary
        try:
            temporary.rename(path)
        except OSError:
            if not path.is_dir():
                raise


def write_json(path: Path, content: Any) -> None:
    """Write JSON that people can read: indented, in UTF-8, with characters as they are.

    Args:
        path: The file.
        content: What `json.dumps` takes, without NaN and infinity, which are no JSON.
    """
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def text_sha256(text: str) -> str:
    """The hexadecimal SHA-256 of a text's UTF-8 bytes."""
    return hashlib.sha256(text.encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """The hexadecimal SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def set_aside(path: Path, *, reason: str = "damaged") -> Path:
    """Rename a file or folder of the cache that cannot be used, deleting nothing, and say so.

    Args:
        path: What is damaged; it will be made again.
        reason: What is wrong with it, for the warning.

    Returns:
        The new name: `….damaged-<n>`, the first that is free.
    """
    number = 1
    while (aside := path.with_name(f"{path.name}.damaged-{number}")).exists():
        number += 1
    path.rename(aside)
    warnings.warn(f"{path} is {reason}: kept as {aside.name}, made again", stacklevel=3)
    return aside

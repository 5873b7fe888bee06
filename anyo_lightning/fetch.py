"""Fetch data and weights that travel inside Python wheels, and name the folder where they are kept."""

import fnmatch
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
import zipfile
from pathlib import Path

from anyo_lightning.errors import InputError


def cache_folder() -> Path:
    """The folder for fetched and computed files: `ANYO_CACHE`, else `XDG_CACHE_HOME/anyo-lightning`."""
    if folder := os.environ.get("ANYO_CACHE"):
        return Path(folder).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "anyo-lightning"


def file_sha256(path: Path) -> str:
    """The hexadecimal SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch_wheel(requirement: str, *, sha256: str, members: str, folder: Path) -> Path:
    """Download a wheel with pip, check it, and extract some of its files into `folder`, flat.

    Nothing happens when `folder` exists: it is written to a temporary name and renamed when complete.

    Args:
        requirement: What pip downloads, with a pinned version (`recbole==1.2.1`).
        sha256: The expected SHA-256 of the wheel.
        members: Pattern (`fnmatch`) of the files to extract.
        folder: Where the files go.

    Returns:
        `folder`.

    Raises:
        InputError: When pip cannot download the wheel, or its SHA-256 differs.
    """
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    print(f"Fetching {requirement} with pip into {folder} ...", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".fetch-") as temporary:
        wheel = _download(requirement, Path(temporary))
        if (found := file_sha256(wheel)) != sha256:
            raise InputError(f"Expected the wheel of {requirement} to have SHA-256 {sha256}, got {found}")
        extracted = Path(temporary) / "extracted"
        extracted.mkdir()
        with zipfile.ZipFile(wheel) as archive:
            for name in fnmatch.filter(archive.namelist(), members):
                if not name.endswith("/"):
                    with archive.open(name) as source, (extracted / Path(name).name).open("wb") as target:
                        shutil.copyfileobj(source, target)
        assert any(extracted.iterdir()), f"the wheel of {requirement} holds no {members}"
        try:
            extracted.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster: its files are the same
                raise
    return folder


def set_aside(path: Path, *, reason: str = "damaged") -> Path:
    """Rename a file or folder of the cache that cannot be used, deleting nothing, and say so.

    Args:
        path: What is damaged; it will be made anew.
        reason: What is wrong with it, for the warning.

    Returns:
        The new name: `….damaged-<n>`, the first that is free.
    """
    number = 1
    while (aside := path.with_name(f"{path.name}.damaged-{number}")).exists():
        number += 1
    path.rename(aside)
    warnings.warn(f"{path} is {reason}: kept as {aside.name}, made anew", stacklevel=3)
    return aside


def _download(requirement: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    finished = subprocess.run(
        [*command, "--dest", str(folder), requirement], capture_output=True, text=True, check=False
    )
    wheels = list(folder.glob("*.whl"))
    if finished.returncode or not wheels:
        reason = (finished.stderr.strip().splitlines() or ["no wheel was written"])[-1]
        raise InputError(f"Expected pip to download {requirement}, got: {reason}")
    return wheels[0]

"""Fetch data and weights: those that travel inside Python wheels, and archives from the web."""

import fnmatch
import re
import shutil
import subprocess
import sys
import urllib.request
import zipfile
from pathlib import Path

from anyo_lightning.disk import file_sha256, folder_renamed_to
from anyo_lightning.errors import InputError

TIMEOUT_S = 60  # without an answer


def fetch(origin: str, *, sha256: str, members: str, folder: Path) -> Path:
    """Download a wheel or a zip file, check it, and extract some of its files into `folder`, flat.

    Nothing happens when `folder` exists: it is written to a temporary name and renamed when complete.

    Args:
        origin: Address of a zip file (`https://…`), or what pip downloads, with a pinned version (`recbole==1.2.1`).
        sha256: The expected SHA-256 of the zip file or wheel.
        members: Pattern (`fnmatch`) of the files to extract.
        folder: Where the files go.

    Returns:
        `folder`.

    Raises:
        InputError: When it cannot be downloaded, or its SHA-256 differs.
    """
    if folder.is_dir():
        return folder
    print(f"Fetching {origin} into {folder} ...", file=sys.stderr, flush=True)
    with folder_renamed_to(folder) as extracted:
        path = (_from_web if re.match(r"\w+://", origin) else _with_pip)(origin, extracted)
        if (found := file_sha256(path)) != sha256:
            raise InputError(f"Expected {origin} to have SHA-256 {sha256}, got {found}")
        _extract(path, members, extracted)
    return folder


def _extract(path: Path, members: str, folder: Path) -> None:
    """Files of an archive into a folder, flat; the archive is then deleted."""
    with zipfile.ZipFile(path) as archive:
        for name in fnmatch.filter(archive.namelist(), members):
            if not name.endswith("/"):
                with archive.open(name) as source, (folder / Path(name).name).open("wb") as target:
                    shutil.copyfileobj(source, target)
    path.unlink()
    assert any(folder.iterdir()), f"{path.name} holds no {members}"


def _from_web(url: str, folder: Path) -> Path:
    path = folder / "archive.zip"
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_S) as response, path.open("wb") as file:
            shutil.copyfileobj(response, file)
    except OSError as error:  # URLError and HTTPError are of this kind
        raise InputError(f"Expected to download {url}, got: {error}") from error
    return path


def _with_pip(requirement: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    finished = subprocess.run(
        [*command, "--dest", str(folder), requirement], capture_output=True, text=True, check=False
    )
    wheels = list(folder.glob("*.whl"))
    if finished.returncode or not wheels:
        reason = (finished.stderr.strip().splitlines() or ["no wheel was written"])[-1]
        raise InputError(f"Expected pip to download {requirement}, got: {reason}")
    return wheels[0]

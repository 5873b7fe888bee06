"""Fetch data and weights: those that travel inside Python wheels, and archives from the web."""

import fnmatch
import shutil
import subprocess
import sys
import urllib.request
import zipfile
from pathlib import Path

from anyo_lightning.disk import file_sha256, folder_renamed_to
from anyo_lightning.errors import InputError

TIMEOUT = 60  # seconds without an answer


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
    print(f"Fetching {requirement} with pip into {folder} ...", file=sys.stderr, flush=True)
    with folder_renamed_to(folder) as extracted:
        wheel = _download(requirement, extracted)
        if (found := file_sha256(wheel)) != sha256:
            raise InputError(f"Expected the wheel of {requirement} to have SHA-256 {sha256}, got {found}")
        _extract(wheel, members, extracted)
    return folder


def fetch_archive(url: str, *, sha256: str, members: str, folder: Path) -> Path:
    """Download a zip file, check it, and extract some of its files into `folder`, flat, as `fetch_wheel` does.

    Args:
        url: Where it is.
        sha256: The expected SHA-256 of the file.
        members: Pattern (`fnmatch`) of the files to extract.
        folder: Where the files go.

    Returns:
        `folder`.

    Raises:
        InputError: When the file cannot be downloaded, or its SHA-256 differs.
    """
    if folder.is_dir():
        return folder
    print(f"Fetching {url} into {folder} ...", file=sys.stderr, flush=True)
    with folder_renamed_to(folder) as extracted:
        path = extracted / "archive.zip"
        try:
            with urllib.request.urlopen(url, timeout=TIMEOUT) as response, path.open("wb") as file:
                shutil.copyfileobj(response, file)
        except OSError as error:  # URLError and HTTPError are of this kind
            raise InputError(f"Expected to download {url}, got: {error}") from error
        if (found := file_sha256(path)) != sha256:
            raise InputError(f"Expected {url} to have SHA-256 {sha256}, got {found}")
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

"""What a figure depends on beside the code: versions, hardware, commit."""

import contextlib
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import psutil
import torch

from anyo_lightning.hardware import fast_dtype

PACKAGES = ("anyo-lightning", "torch", "lightning", "transformers", "peft", "faiss-cpu", "polars", "numpy")


def environment() -> dict[str, Any]:
    """Versions, hardware and commit that a figure depends on; no paths and no names of machines."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    hardware = {
        "cpu": _cpu_name(),
        "cpu_cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpus": gpus,
        "dtype": fast_dtype(),
    }
    return {"versions": versions, "hardware": hardware, "commit": _commit()}


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """The commit of this package's own checkout, with `+changes` where files differ from it."""
    project = Path(__file__).resolve().parents[1]
    if not (project / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(project), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        changes = "+changes" if git("status", "--porcelain", "--untracked-files=no") else ""
        return git("rev-parse", "--short=12", "HEAD") + changes
    except (OSError, subprocess.SubprocessError):
        return None

"""What a figure depends on beside the code: versions, hardware, commit."""

import contextlib
import importlib.metadata
import os
import platform
import resource
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

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
        "memory_gib": _memory_gib(),
        "gpus": gpus,
        "dtype": fast_dtype(),
    }
    return {"versions": versions, "hardware": hardware, "commit": _commit()}


def describe_environments(environments: Sequence[Mapping[str, Any]]) -> str:
    """The machines and commits of several runs, for the line below their table; each machine and commit once."""
    machines, commits = set(), set()
    for environment in environments:
        found = environment["hardware"]
        gpus = ", ".join(found["gpus"]) or "no GPU"
        dtype = f", {found['dtype']}" if "dtype" in found else ""  # noted since 2026-11-26
        machines.add(
            f"{found['cpu_cores']} cores of {found['cpu']}, {found['memory_gib']} GiB, {gpus}, "
            f"{found['threads']} thread(s) a run{dtype}"
        )
        commits.add(str(environment["commit"]))
    return f"{' and '.join(sorted(machines))}, at commit {', '.join(sorted(commits))}"


def fast_dtype() -> Literal["bfloat16", "float32"]:
    """bfloat16 where this machine's own instructions multiply in it, else float32.

    Emulated, a product takes many times as long as in float32 (`benchmarks/dtype.py`).
    """
    if torch.cuda.is_available():
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        found = torch.cpu.get_capabilities()  # its names differ between x86 and ARM
        native = torch.backends.mps.is_available() or any(map(found.get, ("avx512_bf16", "amx_bf16", "bf16")))
    return "bfloat16" if native else "float32"


def peak_memory_gib() -> float:
    """The most memory that was in use, in GiB: the GPU's where there is one, else the process's."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
    except (AttributeError, ValueError, OSError):
        return None


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

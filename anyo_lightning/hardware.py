"""What this machine computes fast in, and how much memory has been in use."""

import re
import sys
from typing import Literal

import psutil
import torch

from anyo_lightning.internals import cpu_has_bfloat16

CPU_OUT_OF_MEMORY = re.compile(r"DefaultCPUAllocator: (can't|not enough)")


def fast_dtype() -> Literal["bfloat16", "float32"]:
    """bfloat16 where this machine's own instructions multiply in it, otherwise float32.

    Emulated, a product takes many times as long as in float32 (`benchmarks/dtype.py`).
    """
    if torch.cuda.is_available():
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = torch.backends.mps.is_available() or cpu_has_bfloat16()
    return "bfloat16" if native else "float32"


def peak_memory_gib() -> float:
    """The most memory that was in use, in GiB: the GPU's where there is one, otherwise the process's."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset / 2**30
    import resource  # Windows has none

    unit = 2**30 if sys.platform == "darwin" else 2**20  # of ru_maxrss: bytes, or KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def is_out_of_memory(exception: BaseException) -> bool:
    """Whether a GPU's or the CPU's allocator failed."""
    found = isinstance(exception, RuntimeError) and CPU_OUT_OF_MEMORY.search(str(exception)) is not None
    return isinstance(exception, torch.OutOfMemoryError) or found

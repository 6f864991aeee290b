"""What the computer has. Importing this needs nothing: the doctor has to run anywhere."""

import os
import platform
import re
from pathlib import Path


def cpu_name(cpuinfo: str | os.PathLike = "/proc/cpuinfo") -> str:
    """The CPU's model name, or whatever else is known of it."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path(cpuinfo).read_text(), re.MULTILINE)
    except OSError:  # not Linux
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def usable_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def usable_gpus() -> int:
    """CUDA devices that PyTorch can use. ``torch.cuda.device_count`` counts others, too, such as
    those whose driver is too old.
    """
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def bfloat16_support(cpuinfo: str | os.PathLike = "/proc/cpuinfo") -> str:
    """How fast SOLVER.AMP.ENABLED is on this CPU, by its instruction sets."""
    try:
        flags = set(Path(cpuinfo).read_text().split())
    except OSError:
        return "unknown"
    if "amx_bf16" in flags:
        return "fast (AMX)"
    return "yes (AVX-512)" if "avx512_bf16" in flags else "emulated (slow)"

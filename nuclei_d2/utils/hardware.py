"""What the computer has. Importing this needs nothing: the doctor has to run anywhere."""

import os
import platform
import re
from pathlib import Path

from nuclei_d2.utils.errors import NucleiError


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


def use_device(name: str) -> None:
    """Make sure that PyTorch can use a device, such as ``MODEL.DEVICE``.

    A GPU with a number becomes the current one, which CUDA's events and memory counters look at.

    Raises:
        NucleiError: this hardware is not there.
    """
    import torch

    try:
        device = torch.device(name)
        if device.type == "cuda" and (device.index or 0) < usable_gpus():
            if device.index is not None:
                torch.cuda.set_device(device)
            return  # without a tensor on the first GPU, whose context would stay in this process
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise NucleiError(
            f"MODEL.DEVICE is {name!r} but it cannot be used here "
            f"({str(error).splitlines()[0]}); add MODEL.DEVICE cpu"
        ) from error


def bfloat16_support(cpuinfo: str | os.PathLike = "/proc/cpuinfo") -> str:
    """How fast SOLVER.AMP.ENABLED is on this CPU, by its instruction sets."""
    try:
        flags = set(Path(cpuinfo).read_text().split())
    except OSError:
        return "unknown"
    if "amx_bf16" in flags:
        return "fast (AMX)"
    return "yes (AVX-512)" if "avx512_bf16" in flags else "emulated (slow)"

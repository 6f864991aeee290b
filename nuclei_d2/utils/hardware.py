"""What the computer has. Importing this needs nothing: the doctor has to run anywhere."""

import os
import platform
import re
from pathlib import Path

from nuclei_d2.utils.errors import NucleiError

_BFLOAT16_FLAGS = {"amx_bf16": "AMX", "avx512_bf16": "AVX-512 BF16"}  # the best first


def cpu_name(cpuinfo: str | os.PathLike = "/proc/cpuinfo") -> str:
    """The CPU's model name and what it has for bfloat16, or whatever else is known of it.

    A virtual machine's name ("Intel(R) Xeon(R) Processor") says nothing of its instructions, with
    which one may train twice as fast as another.
    """
    text = _read(cpuinfo)
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    name = found[1].strip() if found else platform.processor() or platform.machine()
    return ", ".join(filter(None, (name, _bfloat16_instructions(text))))


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
    """How SOLVER.AMP.ENABLED does on this CPU, by its instruction sets.

    "fast", "slow" or "unknown", with more words. Without AMX a training step took 1.2 to 1.3 times
    as long in bfloat16 as in float32 (docs/training.md). Of other CPUs than Linux's x86 nothing is
    known.
    """
    text = _read(cpuinfo)
    if not re.search(r"^flags\s*:", text, re.MULTILINE):
        return "unknown"
    instructions = _bfloat16_instructions(text)
    if instructions == "AMX":
        return "fast (AMX)"
    return f"slow ({instructions or 'emulated'})"


def _read(cpuinfo: str | os.PathLike) -> str:
    try:
        return Path(cpuinfo).read_text()
    except OSError:  # not Linux
        return ""


def _bfloat16_instructions(cpuinfo: str) -> str | None:
    flags = set(cpuinfo.split())
    return next((name for flag, name in _BFLOAT16_FLAGS.items() if flag in flags), None)

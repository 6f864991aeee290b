"""Time and peak memory of a function, with Python's standard library only. Linux only."""

import ctypes
import gc
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_REPEATED = 20.0  # seconds; what takes longer is measured once
_REPETITIONS = 12  # at most


def measure_run(run: Callable) -> dict[str, Any]:
    """Seconds, peak memory in MB, and what ``run`` returned.

    The first run shows the memory and warms up; the time is the least of as many more as fit into
    20 seconds, up to 12, or that of the first where none does.
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # or freed memory would be used again, and not be seen
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    before = _status("VmRSS")
    result, first = timed(run)
    peak = max(_status("VmHWM") - before, 1e6)  # less is noise
    repetitions = min(_REPETITIONS, int(_REPEATED / first))
    seconds = min((timed(run)[1] for _ in range(repetitions)), default=first)
    return {"seconds": seconds, "peak_mb": peak / 1e6, "result": result}


def timed(run: Callable) -> tuple[Any, float]:
    """What ``run`` returned, and its seconds."""
    start = time.perf_counter()
    result = run()
    return result, time.perf_counter() - start


def address_space() -> int:
    """Bytes that this process has mapped."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def _status(key: str) -> int:
    """Bytes, from /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))

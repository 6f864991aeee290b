"""Where the time goes, measured without stopping the device."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

# So many boundaries are kept before they are added up; only then a CUDA device is waited for.
_MAX_PENDING = 1000
_active: ContextVar["StageClock | None"] = ContextVar("active_clock", default=None)


class StageClock:
    """Seconds spent in named stages.

    Every moment belongs to the stage that was switched to last, so that the stages add up to the
    whole. On a CUDA device a boundary is an event in the stream, which is passed when the device
    has done what was asked of it before: the time of a kernel belongs to the stage that launched
    it, and nothing waits until the seconds are read. Elsewhere a boundary is a moment on the host.
    """

    def __init__(self, device: torch.device, now: Callable[[], float] = time.perf_counter):
        """
        Args:
            device: where the model runs.
            now: seconds on the host; not used on a CUDA device.
        """
        self._now = _cuda_now if device.type == "cuda" else now
        self._elapsed = _cuda_elapsed if device.type == "cuda" else _host_elapsed
        self.reset()

    def reset(self) -> None:
        """Forget everything; no stage runs until the next :meth:`switch`."""
        self._seconds = defaultdict(float)
        self._boundaries: list[tuple] = []  # moment, stage that begins there

    def switch(self, stage: str | None) -> str | None:
        """End the current stage and begin ``stage``, or none.

        Returns:
            The stage that ended.
        """
        ended = self._boundaries[-1][1] if self._boundaries else None
        self._boundaries.append((self._now(), stage))
        if len(self._boundaries) > _MAX_PENDING:
            self._add_up()
        return ended

    def take(self) -> dict[str, float]:
        """Seconds of each stage up to the last :meth:`switch`, since the last call of this."""
        self._add_up()
        taken, self._seconds = self._seconds, defaultdict(float)
        return dict(taken)

    def _add_up(self) -> None:
        for (start, stage), (end, _) in zip(self._boundaries, self._boundaries[1:], strict=False):
            if stage is not None:
                self._seconds[stage] += self._elapsed(start, end)
        del self._boundaries[:-1]

    @contextmanager
    def active(self) -> Iterator[None]:
        """Let :func:`stage` inside the block mean this clock."""
        token = _active.set(self)
        try:
            yield
        finally:
            _active.reset(token)


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Charge the block to stage ``name`` of the active clock; without one, do nothing."""
    clock = _active.get()
    if clock is None:
        yield
        return
    outer = clock.switch(name)
    try:
        yield
    finally:
        clock.switch(outer)


def _host_elapsed(start: float, end: float) -> float:
    return end - start


def _cuda_now() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _cuda_elapsed(start: torch.cuda.Event, end: torch.cuda.Event) -> float:
    end.synchronize()
    return start.elapsed_time(end) / 1000  # from milliseconds

import pytest
import torch

from nuclei_d2.utils.timing import StageClock, stage

CPU = torch.device("cpu")


class Time:
    """A clock that moves only when it is told to."""

    def __init__(self):
        self.seconds = 0.0

    def __call__(self):
        return self.seconds

    def pass_by(self, seconds):
        self.seconds += seconds


@pytest.fixture
def time():
    return Time()


@pytest.fixture
def clock(time):
    return StageClock(CPU, time)


def test_every_moment_belongs_to_one_stage(clock, time):
    for stage_name, seconds in (("a", 1), ("b", 2), (None, 4), ("a", 8), ("b", 16)):
        clock.switch(stage_name)
        time.pass_by(seconds)
    clock.switch(None)
    time.pass_by(32)
    assert clock.take() == {"a": 9, "b": 18}


def test_switch_returns_the_stage_that_ended(clock):
    assert [clock.switch(name) for name in ("a", "b", None, "c")] == [None, "a", "b", None]


def test_taking_begins_anew_without_losing_time(clock, time):
    clock.switch("a")
    time.pass_by(1)
    clock.switch("b")
    assert clock.take() == {"a": 1}
    time.pass_by(2)
    clock.switch(None)
    assert clock.take() == {"b": 2}
    assert clock.take() == {}


def test_reset_forgets_the_running_stage_too(clock, time):
    clock.switch("a")
    time.pass_by(1)
    clock.reset()
    time.pass_by(1)
    assert clock.switch("b") is None
    time.pass_by(2)
    clock.switch(None)
    assert clock.take() == {"b": 2}


def test_an_inner_stage_interrupts_the_outer(clock, time):
    clock.switch("network")
    time.pass_by(1)
    with clock.active(), stage("postprocess"):
        time.pass_by(2)
        with stage("inner"):
            time.pass_by(4)
        time.pass_by(8)
    time.pass_by(16)
    clock.switch(None)
    assert clock.take() == {"network": 17, "postprocess": 10, "inner": 4}


def test_an_error_ends_the_stage(clock, time):
    def fail():
        with clock.active(), stage("postprocess"):
            time.pass_by(1)
            raise ValueError("out of memory")

    clock.switch("network")
    with pytest.raises(ValueError, match="out of memory"):
        fail()
    time.pass_by(2)
    clock.switch(None)
    assert clock.take() == {"postprocess": 1, "network": 2}
    with stage("postprocess"):
        time.pass_by(4)  # the clock is no longer active
    assert clock.take() == {}


def test_boundaries_do_not_pile_up(clock, time):
    for _ in range(5000):
        clock.switch("a")
        time.pass_by(1)
    assert len(clock._boundaries) <= 1001
    clock.switch(None)
    assert clock.take() == {"a": 5000}


def test_on_cuda_the_time_between_events_counts_and_only_reading_waits(time, monkeypatch):
    waits = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.milliseconds = 1000 * time()

        def synchronize(self):
            waits.append(self)

        def elapsed_time(self, end):
            assert end in waits
            return end.milliseconds - self.milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    clock = StageClock(torch.device("cuda"))
    for name, seconds in (("a", 1), ("b", 2), (None, 0)):
        clock.switch(name)
        time.pass_by(seconds)
    assert waits == []
    assert clock.take() == {"a": 1, "b": 2}

import time

import pytest
import torch
from detectron2.utils.events import EventStorage, get_event_storage
from torch import nn

from nuclei_d2.engine import hooks
from nuclei_d2.engine.hooks import BestCheckpointer, TrainingSpeed, ValidationLoss
from nuclei_d2.utils.errors import NucleiError
from nuclei_d2.utils.timing import StageClock

CPU = torch.device("cpu")


class Model(nn.Module):
    """Loss = mean of the normalised batch plus a random number, as proposal sampling has."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(1)
        self.weight = nn.Parameter(torch.tensor(2.0))

    def forward(self, batch):
        assert self.training
        return {"loss_a": self.weight * self.norm(batch).mean(), "loss_b": torch.rand(())}


def test_losses_are_averaged_and_summed():
    model = Model().train()
    batches = [torch.full((2, 1), 1.0), torch.full((2, 1), 4.0)]
    measured = ValidationLoss(1, model, batches).measure()
    # Running mean 0 and variance 1: normalisation changes nothing.
    assert measured["loss_a"] == pytest.approx(2 * (1 + 4) / 2, rel=1e-4)
    assert measured["total_loss"] == pytest.approx(measured["loss_a"] + measured["loss_b"])


def test_measuring_leaves_no_trace_in_training():
    model = Model().train()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    hook = ValidationLoss(1, model, [torch.full((2, 1), 3.0)])
    first, second = hook.measure(), hook.measure()
    assert first == second
    assert torch.equal(torch.rand(3), expected)
    assert model.norm.training
    assert model.norm.running_mean.item() == 0
    assert model.weight.grad is None


def test_measuring_on_the_cpu_leaves_gpus_alone(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)  # too old, or of other processes
    ValidationLoss(1, Model().train(), [torch.full((2, 1), 3.0)]).measure()


def test_a_failed_measurement_leaves_the_norms_in_training():
    model = Model().train()
    with pytest.raises(AttributeError):
        ValidationLoss(1, model, ["no batch"]).measure()
    assert model.norm.training


def test_measuring_leaves_no_trace_in_the_training_curves():
    class Logging(Model):
        def forward(self, batch):
            get_event_storage().put_scalar("rpn/accuracy", 0.5)
            return super().forward(batch)

    with EventStorage() as storage:
        ValidationLoss(1, Logging().train(), [torch.full((2, 1), 3.0)]).measure()
        assert storage.histories() == {}


class Run:
    """A trainer's part that hooks look at."""

    def __init__(self, storage, iteration):
        self.storage, self.iter, self.max_iter = storage, iteration, 10_000


class Saves:
    """A checkpointer that keeps the state that the hook had while saving."""

    def __init__(self):
        self.states = []

    def save(self, name, **extra):
        self.states.append((name, extra["iteration"], self.hook.state_dict()))


def feed(hook, saves, scores):
    saves.hook = hook
    for iteration, score in scores.items():
        with EventStorage(iteration) as storage:
            storage.put_scalar("segm/AP", score)
            hook.trainer = Run(storage, iteration)
            hook.after_step()


def test_the_best_score_survives_a_resume_from_the_best_checkpoint():
    saves = Saves()
    feed(BestCheckpointer(1000, saves, "segm/AP"), saves, {999: 40.0, 1999: 50.0})
    assert [s[:2] for s in saves.states] == [("model_best", 999), ("model_best", 1999)]
    resumed = BestCheckpointer(1000, saves, "segm/AP")
    resumed.load_state_dict(saves.states[-1][2])
    feed(resumed, saves, {2999: 45.0})
    assert len(saves.states) == 2
    feed(resumed, saves, {3999: 51.0, 4999: float("nan")})
    assert saves.states[-1][:2] == ("model_best", 3999)


def test_a_metric_that_nobody_measures_is_named():
    with pytest.raises(NucleiError, match=r"segm/APP is not measured; there are: segm/AP"):
        feed(BestCheckpointer(1, Saves(), "segm/APP"), Saves(), {0: 1.0})


class Training:
    """A trainer whose iteration k, from 0, takes 10 times its usual seconds while k < 5."""

    seconds = {"data": 1, "forward": 2, "backward": 4, "logging": 8, "step": 16}

    def __init__(self, max_iter, start_iter=0):
        self.start_iter, self.max_iter = start_iter, max_iter
        self.now, self.images_seen = 0.0, 0
        self.clock = StageClock(CPU, lambda: self.now)

    def run(self, hook):
        hook.trainer = self
        with EventStorage(self.start_iter) as self.storage:
            hook.before_train()
            for iteration in range(self.start_iter, self.max_iter):
                self.iter = self.storage.iter = iteration
                factor = 10 if iteration - self.start_iter < 5 else 1
                for name, seconds in self.seconds.items():
                    self.clock.switch(name)
                    self.now += factor * seconds
                self.clock.switch(None)
                self.images_seen += 4
                self.now += 1000  # other hooks, such as a validation
                hook.after_step()
        return hook.summary()

    def scalar(self, name):
        return [(iteration, value) for value, iteration in self.storage.history(name).values()]


@pytest.mark.parametrize("start", [0, 100])
def test_training_is_measured_after_the_warm_up(start):
    training = Training(start + 17, start)
    summary = training.run(TrainingSpeed(CPU, period=5))
    assert (summary["iterations"], summary["warmup_iterations"]) == (12, 5)
    for name in ("data", "forward", "backward", "step"):
        assert summary[f"{name}_s_per_iteration"] == Training.seconds[name]
    assert summary["total_s_per_iteration"] == 31
    assert summary["images_per_second"] == pytest.approx(4 / 31)
    assert summary["peak_device_memory_mb"] is None
    # At the end of every period and of the training; the first period is the warm-up.
    assert training.scalar("forward_time") == [(start + k, 2) for k in (9, 14, 16)]
    assert training.scalar("backward_time") == [(start + k, 4) for k in (9, 14, 16)]
    assert training.scalar("step_time")[0] == (start + 9, 16)
    assert training.scalar("images_per_second")[0][1] == pytest.approx(4 / 31)
    assert training.scalar("host_memory_mb")[-1][1] == summary["peak_host_memory_mb"]
    assert "max_memory_mb" not in training.storage.histories()


@pytest.mark.parametrize(("max_iter", "warmup"), [(1, 0), (3, 2), (6, 5)])
def test_of_a_short_run_the_last_iteration_is_measured(max_iter, warmup):
    summary = Training(max_iter).run(TrainingSpeed(CPU))
    assert (summary["iterations"], summary["warmup_iterations"]) == (1, warmup)


def test_nothing_trained_is_nothing_measured():
    assert Training(3, start_iter=3).run(TrainingSpeed(CPU)) is None


def test_an_evaluation_does_not_count_for_the_peak_of_the_training(monkeypatch):
    peaks = iter([100.0, 300.0, 200.0])
    monkeypatch.setattr(hooks, "reset_peak_memory", lambda device: None)
    monkeypatch.setattr(hooks, "device_memory_mb", lambda device: next(peaks))
    training = Training(3)
    summary = training.run(TrainingSpeed(torch.device("cuda")))
    # Reset by an evaluation after the second step, the device's own peak is lower again.
    assert summary["peak_device_memory_mb"] == 300
    assert training.scalar("max_memory_mb") == [(2, 300)]


def test_measuring_a_step_costs_microseconds():
    """Training steps take 50 ms at least; 1 % of that is 500 us."""
    hook = TrainingSpeed(CPU)
    training = Training(2000)
    start = time.process_time()
    training.run(hook)
    assert (time.process_time() - start) / 2000 < 500e-6

import pytest
import torch
from detectron2.utils.events import EventStorage, get_event_storage
from torch import nn

from nuclei_d2.engine.hooks import BestCheckpointer, ValidationLoss
from nuclei_d2.utils.errors import NucleiError


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

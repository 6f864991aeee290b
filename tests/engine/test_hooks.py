import pytest
import torch
from torch import nn

from nuclei_d2.engine.hooks import BestCheckpointer, ValidationLoss


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


def test_the_best_score_survives_a_resume():
    hook = BestCheckpointer(1, checkpointer=None, val_metric="segm/AP")
    hook.best_metric, hook.best_iter = 41.5, 999
    resumed = BestCheckpointer(1, checkpointer=None, val_metric="segm/AP")
    resumed.load_state_dict(hook.state_dict())
    assert (resumed.best_metric, resumed.best_iter) == (41.5, 999)

import math

import pytest
import torch

from nuclei_d2.modeling.losses import (
    bce_loss,
    boundary_dice_loss,
    class_loss,
    dice_loss,
    distance_loss,
)

TARGET = torch.tensor([[[1, 0], [0, 0]]], dtype=torch.bool)


def test_dice_of_undecided_logits():
    # p = 0.5 everywhere: 1 - (2 * 0.5 + 1) / (2 + 1 + 1)
    assert boundary_dice_loss(torch.zeros(1, 2, 2), TARGET).item() == pytest.approx(0.5)


def test_dice_is_the_mean_over_rois():
    certain = torch.where(TARGET, 100.0, -100.0)
    logits = torch.cat([certain, torch.zeros(1, 2, 2), -certain])
    # right: 0; undecided: 1/2; wrong everywhere: 1 - 1 / (3 + 1 + 1)
    expected = (0 + 0.5 + 0.8) / 3
    loss = boundary_dice_loss(logits, TARGET.expand(3, 2, 2))
    assert loss.item() == pytest.approx(expected, abs=1e-6)


def test_dice_without_boundary():
    # p = 0.5, y = 0: 1 - 1 / (2 + 0 + 1)
    loss = boundary_dice_loss(torch.zeros(1, 2, 2), torch.zeros(1, 2, 2))
    assert loss.item() == pytest.approx(2 / 3)
    assert boundary_dice_loss(torch.full((1, 2, 2), -100.0), torch.zeros(1, 2, 2)).item() == 0


def test_bce():
    assert bce_loss(torch.zeros(1, 2, 2), TARGET).item() == pytest.approx(math.log(2))
    logits = torch.tensor([[[0.0, 1.0], [-2.0, 3.0]]])
    softplus = [math.log(1 + math.exp(v)) for v in (0, 1, -2, 3)]
    assert bce_loss(logits, TARGET).item() == pytest.approx(sum(softplus) / 4)


@pytest.mark.parametrize("loss", [bce_loss, boundary_dice_loss])
def test_float32_inside_autocast(loss):
    torch.manual_seed(0)
    logits = torch.randn(4, 28, 28).bfloat16()
    targets = torch.rand(4, 28, 28) > 0.9
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(logits, targets)
    assert value.dtype == torch.float32
    assert torch.equal(value, loss(logits.float(), targets))


@pytest.mark.parametrize("loss", [bce_loss, boundary_dice_loss])
def test_no_rois_give_zero_with_a_gradient(loss):
    weight = torch.ones(3, requires_grad=True)
    logits = torch.zeros(0, 2, 2) * weight.sum()
    value = loss(logits, torch.zeros(0, 2, 2, dtype=torch.bool))
    value.backward()
    assert value.item() == 0
    assert weight.grad.tolist() == [0, 0, 0]


def test_class_loss_by_hand():
    logits = torch.log(torch.tensor([[0.5, 0.9], [0.3, 0.1], [0.2, 0.0001]]))[None, :, None]
    targets = torch.tensor([[[1, 0]]])
    weights = torch.tensor([1.0, 3.0, 10.0])
    probs = logits.softmax(dim=1)
    expected = -(3 * probs[0, 1, 0, 0].log() + probs[0, 0, 0, 1].log()) / 4
    assert class_loss(logits, targets, weights, 255) == pytest.approx(expected.item())
    # An ignored pixel changes nothing, whatever is predicted there.
    more = torch.cat([logits, torch.full((1, 3, 1, 1), 50.0)], dim=3)
    targets = torch.tensor([[[1, 0, 255]]])
    assert class_loss(more, targets, weights, 255) == pytest.approx(expected.item())
    assert class_loss(more.bfloat16(), targets, weights, 255).dtype == torch.float32


def test_dice_loss_by_hand():
    probs = torch.tensor([[0.1, 0.6, 0.2], [0.8, 0.3, 0.2], [0.1, 0.1, 0.6]])
    logits = probs.log()[None, :, None].requires_grad_()
    targets = torch.tensor([[[1, 0, 255]]])
    first = 1 - (2 * 0.8 + 1) / (1.1 + 1 + 1)
    second = 1 - (2 * 0.0 + 1) / (0.2 + 0 + 1)
    loss = dice_loss(logits, targets, 255)
    assert loss.item() == pytest.approx((first + second) / 2)
    loss.backward()
    assert (logits.grad[..., 2] == 0).all()
    assert (logits.grad[..., :2] != 0).any()


def test_dice_loss_without_nuclei_asks_for_none():
    targets = torch.zeros(1, 4, 4, dtype=torch.int64)
    empty, full = torch.zeros(2, 1, 2, 4, 4)
    empty[:, 0], full[:, 1] = 30, 30
    assert dice_loss(empty, targets, 255) < 1e-6
    assert dice_loss(full, targets, 255) > 0.9


def test_distance_loss_by_hand():
    predictions, targets = torch.tensor([[[0.5, 0.05, 9.0]]]), torch.tensor([[[0.2, 0.0, 0.0]]])
    counted = torch.tensor([[[True, True, False]]])
    # Linear above an error of 0.1, quadratic below.
    expected = ((0.3 - 0.05) + 0.5 * 0.05**2 / 0.1) / 2
    assert distance_loss(predictions, targets, counted).item() == pytest.approx(expected)
    assert distance_loss(predictions.bfloat16(), targets, counted).dtype == torch.float32

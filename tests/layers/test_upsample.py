import pytest
import torch

from nuclei_d2.layers import UpsamplePredictor


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_equals_layer_after_layer(memory_format):
    torch.manual_seed(0)
    layer = UpsamplePredictor(4, 6, 3).double()
    torch.nn.init.normal_(layer.deconv.bias)
    torch.nn.init.normal_(layer.predictor.bias)
    x = torch.randn(2, 4, 5, 7, dtype=torch.double).contiguous(memory_format=memory_format)
    expected = layer.predictor(layer.deconv(x).relu())
    assert layer(x).shape == (2, 3, 10, 14)
    assert torch.allclose(layer(x), expected, rtol=0, atol=1e-12)

    parameters = list(layer.parameters())
    weights = torch.randn_like(expected)
    ours = torch.autograd.grad((layer(x) * weights).sum(), parameters)
    reference = torch.autograd.grad((expected * weights).sum(), parameters)
    for gradient, other in zip(ours, reference, strict=True):
        assert torch.allclose(gradient, other, rtol=0, atol=1e-12)


def test_hand_computed():
    layer = UpsamplePredictor(1, 1, 1)
    with torch.no_grad():
        layer.deconv.weight.copy_(torch.tensor([[[[1.0, 2], [-3, 4]]]]))
        layer.predictor.weight.fill_(10)
        layer.predictor.bias.fill_(0.5)
    # ReLU removes the -3.
    expected = [[10.5, 20.5], [0.5, 40.5]]
    assert layer(torch.ones(1, 1, 1, 1))[0, 0].tolist() == expected


def test_no_rois():
    assert UpsamplePredictor(4, 6, 2)(torch.zeros(0, 4, 14, 14)).shape == (0, 2, 28, 28)

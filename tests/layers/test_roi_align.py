import pytest
import torch
from detectron2.layers import ROIAlign
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes
from hypothesis import given, settings
from hypothesis import strategies as st

from nuclei_d2.layers import SmallROIAlign, SmallROIPooler, roi_align

coordinate = st.floats(-30, 230, width=32)
side = st.floats(0, 150, width=32)


def both(features, rois, size, sampling_ratio):
    """(output, gradient of the features) of ours and of ROIAlign."""
    results = []
    for pool in (
        SmallROIAlign(size, 0.25, sampling_ratio),
        ROIAlign((size, size), 0.25, sampling_ratio, aligned=True),
    ):
        output = pool(features, rois)
        weights = torch.linspace(-1, 1, output.numel()).view_as(output)
        results.append((output, torch.autograd.grad((output * weights).sum(), features)[0]))
    return results


@settings(max_examples=40, deadline=None)
@given(
    boxes=st.lists(
        st.tuples(st.integers(0, 1), coordinate, coordinate, side, side), min_size=1, max_size=6
    ),
    size=st.sampled_from([7, 14, 28]),
    sampling_ratio=st.sampled_from([0, 2]),
)
def test_equals_roi_align(boxes, size, sampling_ratio):
    torch.manual_seed(0)
    features = torch.rand(2, 3, 40, 50).requires_grad_()
    rois = torch.tensor([(b, x, y, x + w, y + h) for b, x, y, w, h in boxes])
    ours, reference = both(features, rois, size, sampling_ratio)
    assert torch.allclose(ours[0], reference[0], atol=1e-5)
    assert torch.allclose(ours[1], reference[1], rtol=1e-4, atol=1e-4)  # sums of many terms


def test_chunks_and_channels_last_change_nothing(monkeypatch):
    torch.manual_seed(0)
    features = torch.rand(2, 3, 40, 50)
    corners = torch.rand(30, 2) * 150
    boxes = torch.cat(
        [torch.arange(30.0)[:, None] % 2, corners, corners + torch.rand(30, 2) * 90], 1
    )
    expected = ROIAlign((7, 7), 0.25, 0, aligned=True)(features, boxes)
    monkeypatch.setattr(roi_align, "_CHUNK_TERMS", 1000)
    features = features.contiguous(memory_format=torch.channels_last)
    assert torch.allclose(SmallROIAlign(7, 0.25, 0)(features, boxes), expected, atol=1e-5)


def test_box_of_feature_pixels_returns_them():
    features = torch.arange(60.0).view(1, 1, 6, 10)
    rois = torch.tensor([[0.0, 8, 4, 20, 16]])  # feature columns 2..4, rows 1..3
    output = SmallROIAlign(3, 0.25, 0)(features, rois)
    assert output[0, 0].tolist() == [[12, 13, 14], [22, 23, 24], [32, 33, 34]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sampling_ratio", [0, 1])
def test_boxes_are_not_rounded_to_the_type_of_the_features(dtype, sampling_ratio):
    # Feature column i has the value i - 200, at i + 0.5; bfloat16 would round 800.5 to 800.
    features = (torch.arange(300.0) - 200).expand(1, 1, 4, 300).to(dtype)
    rois = torch.tensor([[0.0, 800.5, 0, 808.5, 8]])
    output = SmallROIAlign(2, 0.25, sampling_ratio)(features, rois)
    assert output.dtype == torch.float32
    assert output[0, 0].tolist() == [[0.125, 1.125], [0.125, 1.125]]


def test_no_boxes():
    output = SmallROIAlign(14, 0.25, 0)(torch.rand(2, 3, 8, 8), torch.zeros(0, 5))
    assert output.shape == (0, 3, 14, 14)


def test_pooler_equals_roi_pooler_over_levels():
    torch.manual_seed(0)
    features = [torch.rand(2, 3, 64, 64), torch.rand(2, 3, 32, 32)]
    boxes = [
        Boxes(torch.tensor([[10.0, 12, 30, 40], [5, 5, 200, 240]])),
        Boxes(torch.tensor([[100.0, 90, 130, 117]])),
    ]
    ours = SmallROIPooler(14, [1 / 4, 1 / 8], 0)(features, boxes)
    reference = ROIPooler(14, [1 / 4, 1 / 8], 0, "ROIAlignV2")(features, boxes)
    assert torch.allclose(ours, reference, atol=1e-4)

import numpy as np
import pytest
import torch
from detectron2.layers import paste_masks_in_image
from detectron2.structures import BitMasks, Boxes, Instances
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from nuclei_d2.structures import BoxedMasks, boxed_masks
from nuclei_d2.structures.boxed_masks import paste_masks

WINDOWS = torch.tensor([[1, 2, 4, 4], [0, 0, 0, 0], [8, 7, 10, 8], [0, 0, 10, 8]])


def four_masks() -> BoxedMasks:
    """In 8 x 10 pixels: four pixels of a 2 x 3 window, no window, a corner, an empty frame."""
    values = torch.zeros(6 + 0 + 2 + 80, dtype=torch.bool)
    values[:6] = torch.tensor([0, 1, 1, 0, 1, 1], dtype=torch.bool)
    values[7] = True
    return BoxedMasks(values, WINDOWS, (8, 10))


def dense_masks() -> torch.Tensor:
    dense = torch.zeros(4, 8, 10, dtype=torch.bool)
    dense[0, 2:4, 2:4] = True
    dense[2, 7, 9] = True
    return dense


def random_masks(seed: int = 0, num: int = 12, size: tuple[int, int] = (30, 40)) -> BoxedMasks:
    generator = torch.Generator().manual_seed(seed)
    probabilities = torch.rand(num, 7, 7, generator=generator)
    corners = torch.rand(num, 2, generator=generator) * torch.tensor(size[::-1])
    sides = torch.rand(num, 2, generator=generator) * 15
    return paste_masks(probabilities, torch.cat([corners, corners + sides], dim=1), size)


def test_dense_forms_by_hand():
    masks = four_masks()
    assert len(masks) == 4
    assert masks.shape == (4, 8, 10)
    assert masks.dtype == torch.bool
    assert masks.image_size == (8, 10)
    assert masks.device == torch.device("cpu")
    assert torch.equal(masks.tensor, dense_masks())
    assert torch.equal(torch.stack(list(masks)), dense_masks())
    np.testing.assert_array_equal(np.asarray(masks), dense_masks().numpy())
    assert np.asarray(masks).dtype == bool
    assert np.asarray(masks, dtype=np.uint8).dtype == np.uint8


def test_boxes_areas_and_emptiness_by_hand():
    masks = four_masks()
    expected = [[2, 2, 4, 4], [0, 0, 0, 0], [9, 7, 10, 8], [0, 0, 0, 0]]
    assert masks.get_bounding_boxes().tensor.tolist() == expected
    assert masks.area().tolist() == [4, 0, 1, 0]
    assert masks.nonempty().tolist() == [True, False, True, False]


def test_crops_by_hand():
    top, left, pixels = four_masks().crop(0)
    assert (top, left) == (2, 1)
    assert pixels.tolist() == [[False, True, True], [False, True, True]]
    assert four_masks().crop(1)[2].shape == (0, 0)
    assert four_masks().crop(-2)[:2] == (7, 8)


@pytest.mark.parametrize(
    "item",
    [
        2,
        -1,
        slice(1, 7, 2),
        slice(5, None, 12),
        torch.arange(12) % 3 == 0,
        torch.tensor([4, 4, 0, 11]),
        torch.zeros(0, dtype=torch.int64),
        torch.zeros(12, dtype=torch.bool),
    ],
)
def test_behaves_as_bitmasks(item):
    expected = BitMasks(random_masks().tensor)[item]
    masks = random_masks()[item]
    assert len(masks) == len(expected)
    assert torch.equal(masks.tensor, expected.tensor)
    assert torch.equal(masks.nonempty(), expected.nonempty())
    assert torch.equal(masks.get_bounding_boxes().tensor, expected.get_bounding_boxes().tensor)
    assert torch.equal(masks.area(), expected.tensor.sum(dim=(1, 2)))


def test_index_out_of_range():
    with pytest.raises(IndexError):
        four_masks()[4]


def test_cat_keeps_the_order_and_the_pixels():
    first, second = random_masks(0)[torch.tensor([3, 1])], random_masks(1)[5:]
    joined = BoxedMasks.cat([first, second, first[:0]])
    dense = torch.cat([first.tensor, second.tensor])
    assert torch.equal(joined.tensor, dense)
    with pytest.raises(AssertionError, match=r"\(8, 10\)"):
        BoxedMasks.cat([first, four_masks()])


def test_inside_instances():
    scores = torch.tensor([0.1, 0.9, 0.5, 0.7])
    instances = Instances((8, 10), pred_masks=four_masks(), scores=scores)
    assert len(instances) == 4
    order = torch.tensor([2, 0])
    assert torch.equal(instances[order].pred_masks.tensor, dense_masks()[order])
    assert torch.equal(instances[2].pred_masks.tensor, dense_masks()[2:3])
    joined = Instances.cat([instances, instances[scores > 0.6]]).to("cpu")
    assert torch.equal(joined.pred_masks.tensor, dense_masks()[[0, 1, 2, 3, 1, 3]])


def whole_frame(probabilities, boxes, size):
    """Detectron2's formula, sampled at every pixel of the image and without its windows."""
    pixel = [torch.arange(length, dtype=torch.float32) + 0.5 for length in size]
    y, x = (
        (pixel[axis] - boxes[:, 1 - axis, None])
        / (boxes[:, 3 - axis] - boxes[:, 1 - axis])[:, None]
        * 2
        - 1
        for axis in (0, 1)
    )
    shape = (len(boxes), *size)
    grid = torch.stack([x[:, None, :].expand(shape), y[:, :, None].expand(shape)], dim=3)
    return F.grid_sample(probabilities[:, None], grid, align_corners=False)[:, 0] >= 0.5


coordinate = st.floats(-40, 100, width=32)
side = st.one_of(st.floats(0.0078125, 3, width=32), st.floats(3, 200, width=32))


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 1000),
    boxes=st.lists(st.tuples(coordinate, coordinate, side, side), max_size=9),
    whole_pixels=st.booleans(),
    mask_size=st.sampled_from([1, 14, 28]),
    threshold=st.sampled_from([0.5, 0.3, 0.0, -1]),
)
def test_pixels_of_detectron2(seed, boxes, whole_pixels, mask_size, threshold):
    size = (50, 60)
    boxes = torch.tensor(boxes).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    boxes = boxes.round() if whole_pixels else boxes
    # Detectron2 raises for boxes beyond the image, and has no meaning for empty ones.
    boxes = boxes[((boxes[:, :2] < torch.tensor([60, 50])) & (boxes[:, 2:] > 0)).all(dim=1)]
    probabilities = torch.rand(
        len(boxes), mask_size, mask_size, generator=torch.Generator().manual_seed(seed)
    )
    pasted = paste_masks(probabilities, boxes, size, threshold)
    expected = paste_masks_in_image(probabilities, Boxes(boxes), size, threshold)
    assert torch.equal(pasted.tensor, expected.to(pasted.dtype))
    if threshold == 0.5:
        nonempty = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
        frames = whole_frame(probabilities[nonempty], boxes[nonempty], size)
        assert torch.equal(pasted[nonempty].tensor, frames)


def test_boxes_beyond_the_image_and_empty_ones_give_empty_masks():
    outside = [[70.0, 5, 80, 10], [-30, 5, -20, 10], [5, 90, 10, 95], [5, -9, 10, -4]]
    empty = [[5.0, 5, 5, 9], [9, 9, 4, 4]]
    boxes = torch.tensor(outside + empty)
    for threshold, dtype in ((0.5, torch.bool), (-1, torch.uint8)):
        masks = paste_masks(torch.ones(6, 28, 28), boxes, (50, 60), threshold)
        assert masks.dtype == dtype
        assert not masks.nonempty().any()
        assert (masks.windows[:, 2:] >= masks.windows[:, :2]).all()
        assert (masks.windows >= 0).all()
        assert (masks.windows <= torch.tensor([60, 50, 60, 50])).all()
    assert paste_masks(torch.zeros(0, 28, 28), torch.zeros(0, 4), (50, 60)).shape == (0, 50, 60)


def test_batches_of_bounded_memory(monkeypatch):
    expected = random_masks(4, num=40).tensor
    monkeypatch.setattr(boxed_masks, "_BATCH_BYTES", 1000)
    assert torch.equal(random_masks(4, num=40).tensor, expected)


def test_memory_is_that_of_the_windows():
    boxes = torch.rand(500, 2) * 1000
    boxes = torch.cat([boxes, boxes + 20], dim=1)
    masks = paste_masks(torch.rand(500, 28, 28), boxes, (1024, 1024))
    assert len(masks.values) <= 500 * 24 * 24

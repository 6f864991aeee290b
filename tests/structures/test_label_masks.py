import pickle

import numpy as np
import pytest
import torch
from detectron2.structures import BitMasks, Boxes, Instances
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import roi_align

from nuclei_d2.structures import LabelMasks, label_masks


def random_masks(seed: int = 0, height: int = 70, width: int = 90, layers: int = 1) -> LabelMasks:
    """Ellipses painted over each other; ids with gaps, so rank and id differ."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    labels = np.zeros((layers, height, width), np.int32)
    ids, layer_of = [], []
    for k in range(12 * layers):
        radius = rng.uniform(3, 12, 2)
        inside = ((y - rng.uniform(0, height)) / radius[0]) ** 2 + (
            (x - rng.uniform(0, width)) / radius[1]
        ) ** 2 < 1
        labels[k % layers][inside] = 3 * k + 1
        ids.append(3 * k + 1)
        layer_of.append(k % layers)
    return LabelMasks(torch.from_numpy(labels), torch.tensor(ids), torch.tensor(layer_of))


def two_squares() -> LabelMasks:
    """Id 5: rows 1-3, columns 2-5; id 9: one pixel in the last corner; id 7 owns nothing."""
    labels = torch.zeros(1, 8, 10, dtype=torch.int32)
    labels[0, 1:4, 2:6] = 5
    labels[0, 7, 9] = 9
    labels[0, 7, 0] = 4  # belongs to no instance
    return LabelMasks(labels, torch.tensor([9, 5, 7]))


def test_boxes_areas_and_emptiness_by_hand():
    masks = two_squares()
    expected = [[9, 7, 10, 8], [2, 1, 6, 4], [0, 0, 0, 0]]
    assert masks.get_bounding_boxes().tensor.tolist() == expected
    assert masks.area().tolist() == [1, 12, 0]
    assert masks.nonempty().tolist() == [True, True, False]
    assert masks.image_size == (8, 10)
    assert masks.device == torch.device("cpu")


def test_repeated_instances_keep_their_numbers():
    masks = two_squares()[torch.tensor([1, 1, 2, 0, 1])]
    assert masks.ids.tolist() == [5, 5, 7, 9, 5]
    assert masks.area().tolist() == [12, 12, 0, 1, 12]
    square, corner, nothing = [2, 1, 6, 4], [9, 7, 10, 8], [0, 0, 0, 0]
    assert masks.get_bounding_boxes().tensor.tolist() == [square, square, nothing, corner, square]


@pytest.mark.parametrize("layers", [1, 2])
def test_agrees_with_bitmasks(layers):
    masks = random_masks(layers=layers)
    bitmasks = BitMasks(masks.tensor)
    assert torch.equal(masks.get_bounding_boxes().tensor, bitmasks.get_bounding_boxes().tensor)
    assert torch.equal(masks.area(), bitmasks.tensor.sum(dim=(1, 2)))
    assert torch.equal(masks.nonempty(), bitmasks.nonempty())
    assert torch.equal(torch.stack(list(masks)), bitmasks.tensor)


@pytest.mark.parametrize(
    "item",
    [
        2,
        -1,
        slice(1, 7, 2),
        torch.arange(12) % 3 == 0,
        torch.tensor([4, 4, 0, 11]),
        torch.zeros(0, dtype=torch.int64),
        torch.zeros(12, dtype=torch.bool),
    ],
)
def test_indexing_as_bitmasks(item):
    masks = random_masks()
    expected = BitMasks(masks.tensor)[item]
    assert len(masks[item]) == len(expected)
    assert torch.equal(masks[item].tensor, expected.tensor)
    assert masks[item].labels is masks.labels  # shared, not copied


def test_int_index_out_of_range():
    with pytest.raises(IndexError):
        two_squares()[3]


def test_two_layers_hold_overlapping_nuclei():
    labels = torch.zeros(2, 6, 6, dtype=torch.int32)
    labels[0, 0:4, 0:4] = 1
    labels[1, 2:6, 2:6] = 1  # the same id in another layer is another nucleus
    masks = LabelMasks(labels, torch.tensor([1, 1]), torch.tensor([0, 1]))
    assert masks.area().tolist() == [16, 16]
    assert masks.get_bounding_boxes().tensor.tolist() == [[0, 0, 4, 4], [2, 2, 6, 6]]
    crops = masks.crop_and_resize(torch.tensor([[2.0, 2, 6, 6], [0, 0, 4, 4]]), 4)
    corner = torch.zeros(4, 4, dtype=torch.bool)
    corner[:2, :2] = True
    assert torch.equal(crops[0], corner)
    assert torch.equal(crops[1], corner.flip(0, 1))


def test_crop_at_native_resolution_is_the_mask_itself():
    crop = two_squares()[1].crop_and_resize(torch.tensor([[1.0, 0, 7, 6]]), 6)[0]
    expected = torch.zeros(6, 6, dtype=torch.bool)
    expected[1:4, 1:5] = True
    assert torch.equal(crop, expected)


coordinate = st.floats(0, 1, width=32)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1000),
    mask_size=st.sampled_from([1, 7, 14, 28, 30]),
    corners=st.lists(st.tuples(*[coordinate] * 4), min_size=1, max_size=6),
)
def test_crop_and_resize_is_roi_align_of_the_bitmaps(seed, mask_size, corners):
    masks = random_masks(seed)
    height, width = masks.image_size
    xy = torch.tensor(corners).reshape(-1, 2, 2) * torch.tensor([width, height])
    boxes = torch.cat([xy.amin(dim=1), xy.amax(dim=1)], dim=1)
    masks = masks[torch.arange(len(boxes))]
    rois = torch.cat([torch.arange(len(boxes))[:, None], boxes], dim=1)
    bitmaps = masks.tensor.float()[:, None]
    expected = roi_align(bitmaps, rois, mask_size, sampling_ratio=0, aligned=True)[:, 0]
    crops = masks.crop_and_resize(boxes, mask_size)
    certain = (expected - 0.5).abs() > 1e-3  # a tie may fall to either side by rounding
    assert torch.equal(crops[certain], (expected >= 0.5)[certain])


@pytest.mark.parametrize("mask_size", [14, 28, 30])
def test_agrees_with_bitmasks_in_999_of_1000_target_pixels(mask_size):
    torch.manual_seed(0)
    masks = random_masks(height=200, width=300)[torch.arange(12).repeat(20)]
    masks = masks[masks.nonempty()]
    boxes = masks.get_bounding_boxes()
    boxes.tensor += torch.randn_like(boxes.tensor) * 2
    boxes.clip(masks.image_size)
    ours = masks.crop_and_resize(boxes.tensor, mask_size)
    theirs = BitMasks(masks.tensor).crop_and_resize(boxes.tensor, mask_size)
    assert (ours == theirs).float().mean() >= 0.999
    assert ours.float().mean() > 0.3  # not an agreement of empty masks


def test_chunking_does_not_change_the_result(monkeypatch):
    masks = random_masks(3)
    boxes = masks.get_bounding_boxes().tensor
    boxes[0] = torch.tensor([0.0, 0, 90, 70])  # one window of another size class
    expected = masks.crop_and_resize(boxes, 28)
    monkeypatch.setattr(label_masks, "_CHUNK_PIXELS", 1)
    assert torch.equal(masks.crop_and_resize(boxes, 28), expected)


def test_a_cut_nucleus_continues_outside_the_image():
    labels = torch.zeros(1, 20, 20, dtype=torch.int32)
    labels[0, :, :4] = 1  # touches the left border, and top and bottom
    masks = LabelMasks(labels, torch.tensor([1]))
    crop = masks.crop_and_resize(torch.tensor([[-4.0, -4, 12, 12]]), 16)[0]
    expected = torch.zeros(16, 16, dtype=torch.bool)
    expected[:, :8] = True
    assert torch.equal(crop, expected)


def test_degenerate_boxes_give_empty_masks():
    masks = two_squares()[torch.tensor([1, 1, 1, 1, 1])]
    infinity = float("inf")
    boxes = torch.tensor(
        [
            [3.0, 2, 3, 2],  # no area
            [3.0, 1, 3, 4],  # no width
            [6.0, 4, 2, 1],  # inverted
            [-900.0, -900, -800, -800],  # far outside
            [-infinity, 1, infinity, 1],
        ]
    )
    assert not masks.crop_and_resize(boxes, 14).any()


def test_no_instances():
    masks = two_squares()[torch.zeros(0, dtype=torch.int64)]
    assert len(masks) == 0
    assert masks.crop_and_resize(torch.zeros(0, 4), 28).shape == (0, 28, 28)
    assert masks.get_bounding_boxes().tensor.shape == (0, 4)
    assert masks.area().shape == masks.nonempty().shape == (0,)
    assert masks.tensor.shape == (0, 8, 10)


def test_crop_needs_one_box_per_mask():
    with pytest.raises(AssertionError):
        two_squares().crop_and_resize(torch.zeros(2, 4), 14)


def test_cat_keeps_each_label_image_once():
    masks = two_squares()
    joined = LabelMasks.cat([masks[0], masks[1:], masks[0]])
    assert joined.ids.tolist() == [9, 5, 7, 9]
    assert joined.labels is masks.labels


def test_cat_joins_instances_of_several_label_images():
    parts = [random_masks(1, layers=2), random_masks(2), random_masks(1, layers=2)[3:]]
    joined = LabelMasks.cat(parts)
    assert torch.equal(joined.tensor, torch.cat([part.tensor for part in parts]))
    assert len(joined.labels) == 3
    with pytest.raises(AssertionError):
        LabelMasks.cat([two_squares(), random_masks()])


def test_cat_of_instances():
    instances = Instances((8, 10), gt_masks=two_squares())
    joined = Instances.cat([instances[:1], instances[1:]])
    assert joined.gt_masks.ids.tolist() == [9, 5, 7]


def test_pickle_and_to_keep_everything():
    masks = random_masks(layers=2)
    for copy in (pickle.loads(pickle.dumps(masks)), masks.to("cpu"), masks.to(masks.device)):
        assert torch.equal(copy.labels, masks.labels)
        assert torch.equal(copy.ids, masks.ids)
        assert torch.equal(copy.layers, masks.layers)


def test_moves_with_its_instances():
    instances = Instances((8, 10), gt_masks=two_squares()).to("meta")
    assert instances.gt_masks.device == torch.device("meta")
    assert instances.gt_masks.ids.device == torch.device("meta")


def test_passes_through_detectron2_roi_heads():
    """Sampling repeats ground truth, then the mask loss crops what was sampled."""
    from detectron2.modeling.roi_heads import select_foreground_proposals

    masks = random_masks(5)
    boxes = masks.get_bounding_boxes()
    matched = torch.tensor([0, 3, 3, 8, 1])
    proposals = Instances(tuple(masks.image_size))
    proposals.proposal_boxes = Boxes(boxes.tensor[matched])
    proposals.gt_classes = torch.tensor([0, 0, 1, 0, 1])  # 1 is background
    proposals.gt_masks = masks[matched]
    (foreground,), _ = select_foreground_proposals([proposals], bg_label=1)
    assert foreground.gt_masks.ids.tolist() == masks.ids[torch.tensor([0, 3, 8])].tolist()
    crops = foreground.gt_masks.crop_and_resize(foreground.proposal_boxes.tensor, 28)
    expected = BitMasks(masks.tensor)[matched[[0, 1, 3]]].crop_and_resize(
        foreground.proposal_boxes.tensor, 28
    )
    assert (crops == expected).float().mean() > 0.999

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances

from nuclei_d2.inference.nuclei import ImageInfo, Nuclei
from nuclei_d2.structures.cropped_mask import CroppedMask


def square(top: int, left: int, side: int = 2) -> CroppedMask:
    return CroppedMask(np.ones((side, side), bool), top, left)


def test_order_ties_and_empty_masks():
    empty = CroppedMask(np.zeros((0, 0), bool), 0, 0)
    masks = [square(0, 0), empty, square(1, 1), square(2, 2, 3), square(5, 5)]
    nuclei = Nuclei.from_masks(
        masks, [0.5, 0.9, 0.7, 0.5, 0.8], (8, 9), {"quality": [1, 2, 3, 4, 5]}
    )
    assert len(nuclei) == 4
    assert nuclei.scores.tolist() == [0.8, 0.7, 0.5, 0.5]
    assert nuclei.measures["quality"].tolist() == [5, 3, 1, 4]
    assert nuclei.areas.tolist() == [4, 4, 4, 9]
    assert nuclei.boxes.tolist() == [[5, 5, 7, 7], [1, 1, 3, 3], [0, 0, 2, 2], [2, 2, 5, 5]]


@pytest.mark.parametrize(("scores", "quality"), [([0.5], [1, 2]), ([0.5, 0.6], [1])])
def test_columns_of_another_length(scores, quality):
    with pytest.raises(ValueError, match="of shape"):
        Nuclei.from_masks([square(0, 0)] * 2, scores, (4, 4), {"quality": quality})


def test_from_instances():
    masks = torch.zeros(3, 6, 7, dtype=torch.bool)
    masks[0, 1:3, 2:6] = True
    masks[1, 4, 0] = True
    instances = Instances(
        (6, 7),
        pred_boxes=Boxes(torch.tensor([[2.0, 1, 6, 3], [0, 4, 1, 5], [0, 0, 1, 1]])),
        scores=torch.tensor([0.25, 0.75, 0.5]),
        pred_classes=torch.zeros(3, dtype=torch.int64),
        pred_masks=masks,
        quality=torch.tensor([1.0, 2.0, 3.0]),
        embedding=torch.zeros(3, 4),
    )
    nuclei = Nuclei.from_instances(instances)
    assert nuclei.size == (6, 7)
    assert nuclei.scores.tolist() == [0.75, 0.25]
    assert nuclei.boxes.tolist() == [[4, 0, 5, 1], [1, 2, 3, 6]]
    assert list(nuclei.measures) == ["quality"]
    assert nuclei.measures["quality"].tolist() == [2.0, 1.0]


def test_the_higher_score_gets_the_pixel():
    nuclei = Nuclei.from_masks([square(0, 0, 3), square(1, 1, 3)], [0.4, 0.6], (4, 5))
    expected = [[2, 2, 2, 0, 0], [2, 1, 1, 1, 0], [2, 1, 1, 1, 0], [0, 1, 1, 1, 0]]
    assert nuclei.label_image().tolist() == expected


def test_a_hidden_nucleus_keeps_its_number():
    nuclei = Nuclei.from_masks([square(0, 0, 4), square(1, 1), square(4, 4)], [3, 2, 1], (6, 6))
    assert np.unique(nuclei.label_image()).tolist() == [0, 1, 3]


@pytest.mark.parametrize("rows", [1, 3, 7, 39, 40, 100])
def test_strips_are_the_label_image_in_pieces(rows):
    rng = np.random.default_rng(rows)
    masks = [
        CroppedMask(np.pad(rng.random((h, w)) < 0.7, 1, constant_values=True), int(t), int(left))
        for h, w, t, left in zip(
            *rng.integers(0, 9, (2, 30)), *rng.integers(0, (30, 20), (30, 2)).T, strict=True
        )
    ]
    nuclei = Nuclei.from_masks(masks, rng.random(30), (40, 31))
    expected = np.zeros((40, 31), int)
    for k, boxed in reversed(list(enumerate(nuclei.masks, start=1))):
        expected[boxed.window][boxed.mask] = k
    strips = list(nuclei.label_strips(rows))
    assert [len(strip) for strip in strips[:-1]] == [min(rows, 40)] * (len(strips) - 1)
    np.testing.assert_array_equal(np.concatenate(strips), expected)
    np.testing.assert_array_equal(nuclei.label_image(), expected)


@pytest.mark.parametrize(("count", "dtype"), [(65_535, np.uint16), (65_536, np.uint32)])
def test_type_of_the_label_image(count, dtype):
    pixel = np.ones((1, 1), bool)
    masks = [CroppedMask(pixel, *divmod(k, 256)) for k in range(count)]
    labels = Nuclei.from_masks(masks, np.zeros(count), (256, 256)).label_image()
    assert labels.dtype == dtype
    np.testing.assert_array_equal(labels.ravel()[:count], np.arange(1, count + 1))


def test_channel_names():
    image = np.zeros((4, 5, 4))
    assert ImageInfo.from_array(image[:, :, :1], "a").channels == ("grey",)
    assert ImageInfo.from_array(image[:, :, :3], "a").channels == ("red", "green", "blue")
    assert ImageInfo.from_array(image[:, :, :2], "a").channels == ("channel_1", "channel_2")
    info = ImageInfo.from_array(image, "a", "wxyz")
    assert info.read(slice(1, 3), slice(0, 2)).shape == (2, 2, 4)
    with pytest.raises(ValueError, match="2 channel names for 4 channels"):
        ImageInfo.from_array(image, "a", ["x", "y"])

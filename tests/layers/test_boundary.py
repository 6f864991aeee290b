import numpy as np
import pytest
import torch
from detectron2.structures import BitMasks
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import ndimage

from nuclei_d2.layers import crop_masks_and_boundaries, mask_to_boundary
from nuclei_d2.structures.label_masks import LabelMasks

LAPLACIAN = np.array([[-1, -1, -1], [-1, 8, -1], [-1, -1, -1]])


def rectangle(height, width, y1, y2, x1, x2):
    mask = torch.zeros(1, height, width, dtype=torch.bool)
    mask[:, y1:y2, x1:x2] = True
    return mask


def as_label_masks(masks):
    labels = masks.int() * torch.arange(1, len(masks) + 1, dtype=torch.int32)[:, None, None]
    return LabelMasks(labels, torch.arange(1, len(masks) + 1), torch.arange(len(masks)))


def frame(size):
    """Bool (1, size, size): the outermost pixels."""
    inner = torch.zeros(1, size - 2, size - 2, dtype=torch.bool)
    return torch.nn.functional.pad(inner, (1, 1, 1, 1), value=True)


def test_boundary_of_a_3x3_square_is_its_eight_outer_pixels():
    mask = rectangle(7, 7, 2, 5, 2, 5)
    expected = mask.clone()
    expected[0, 3, 3] = False
    assert torch.equal(mask_to_boundary(mask, zero_padding=True), expected)
    assert torch.equal(mask_to_boundary(mask), expected[:, 1:-1, 1:-1])


def test_diagonal_background_pixel_makes_a_boundary():
    mask = torch.ones(1, 5, 5)
    mask[0, 0, 0] = 0
    boundary = mask_to_boundary(mask)
    assert boundary.shape == (1, 3, 3)
    assert boundary.nonzero().tolist() == [[0, 0, 0]]


@settings(max_examples=30, deadline=None)
@given(hnp.arrays(bool, hnp.array_shapes(min_dims=3, max_dims=3, min_side=3, max_side=9)))
def test_boundary_is_the_positive_part_of_the_laplacian(masks):
    laplacian = np.stack(
        [ndimage.convolve(m.astype(int), LAPLACIAN, mode="constant") for m in masks]
    )
    expected = torch.from_numpy(laplacian > 0)
    masks = torch.from_numpy(masks)
    assert torch.equal(mask_to_boundary(masks, zero_padding=True), expected)
    assert torch.equal(mask_to_boundary(masks), expected[:, 1:-1, 1:-1])
    assert torch.equal(mask_to_boundary(masks.float()), expected[:, 1:-1, 1:-1])


def test_no_masks():
    empty = torch.zeros(0, 30, 30, dtype=torch.bool)
    assert mask_to_boundary(empty).shape == (0, 28, 28)
    assert mask_to_boundary(empty, zero_padding=True).shape == (0, 30, 30)


@pytest.mark.parametrize("as_masks", [BitMasks, as_label_masks])
class TestCropMasksAndBoundaries:
    def crop(self, as_masks, mask, box, target):
        boxes = torch.tensor([box], dtype=torch.float32)
        return crop_masks_and_boundaries(as_masks(mask), boxes, 28, target)

    def test_nucleus_that_fills_the_box_has_no_boundary(self, as_masks):
        nucleus = rectangle(64, 64, 5, 60, 5, 60)
        mask, boundary = self.crop(as_masks, nucleus, [16, 16, 44, 44], "exact")
        assert mask.sum() == 28 * 28
        assert boundary.sum() == 0
        mask, boundary = self.crop(as_masks, nucleus, [16, 16, 44, 44], "paper")
        assert mask.sum() == 28 * 28
        assert boundary.sum() == 108
        assert torch.equal(boundary, frame(28))

    @pytest.mark.parametrize("target", ["exact", "paper"])
    def test_small_square(self, as_masks, target):
        # One target pixel is one image pixel: the 12 x 12 square has 4 * 11 boundary pixels.
        nucleus = rectangle(64, 64, 20, 32, 18, 30)
        mask, boundary = self.crop(as_masks, nucleus, [10, 14, 38, 42], target)
        expected = rectangle(28, 28, 6, 18, 8, 20)
        assert torch.equal(mask, expected)
        assert boundary.sum() == 44
        assert torch.equal(boundary, expected & ~rectangle(28, 28, 7, 17, 9, 19))

    @pytest.mark.parametrize("target", ["exact", "paper"])
    def test_tight_box_has_its_true_boundary(self, as_masks, target):
        nucleus = rectangle(64, 64, 10, 24, 10, 24)
        mask, boundary = self.crop(as_masks, nucleus, [10, 10, 24, 24], target)
        assert mask.sum() == 28 * 28
        assert torch.equal(boundary, frame(28))

    def test_box_over_the_left_half(self, as_masks):
        # The box ends inside the nucleus: only "paper" calls that side a boundary.
        nucleus = rectangle(64, 64, 10, 38, 10, 60)
        _, exact = self.crop(as_masks, nucleus, [10, 10, 38, 38], "exact")
        _, paper = self.crop(as_masks, nucleus, [10, 10, 38, 38], "paper")
        assert torch.equal(paper, frame(28))
        right_side = rectangle(28, 28, 1, 27, 27, 28)
        assert torch.equal(exact, paper & ~right_side)

    def test_nucleus_cut_by_the_image_edge(self, as_masks):
        # The cut is not the nucleus' boundary: it shows on the other two sides only.
        nucleus = rectangle(40, 40, 0, 28, 0, 28)
        mask, boundary = self.crop(as_masks, nucleus, [0, 0, 28, 28], "exact")
        assert mask.sum() == 28 * 28
        assert torch.equal(boundary, ~rectangle(28, 28, 0, 27, 0, 27))

    def test_no_boxes(self, as_masks):
        masks = as_masks(torch.zeros(0, 16, 16, dtype=torch.bool))
        for target in ("exact", "paper"):
            for crops in crop_masks_and_boundaries(masks, torch.zeros(0, 4), 28, target):
                assert crops.shape == (0, 28, 28)
                assert crops.dtype == torch.bool


@settings(max_examples=30, deadline=None)
@given(
    centre=st.tuples(st.floats(20, 44), st.floats(20, 44)),
    radii=st.tuples(st.floats(3, 15), st.floats(3, 15)),
    margins=st.lists(st.floats(0.71, 1.29), min_size=4, max_size=4),
)
def test_exact_mask_target_is_the_plain_crop(centre, radii, margins):
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    ellipse = ((x - centre[0]) / radii[0]) ** 2 + ((y - centre[1]) / radii[1]) ** 2 <= 1
    masks = BitMasks(ellipse[None])
    signs = torch.tensor([-1.0, -1.0, 1.0, 1.0])
    box = torch.tensor([*centre, *centre]) + signs * torch.tensor(margins) * torch.tensor(
        [*radii, *radii]
    )
    mask, boundary = crop_masks_and_boundaries(masks, box[None], 28)
    # Ties at the 0.5 threshold may be rounded the other way.
    assert (mask != masks.crop_and_resize(box[None], 28)).sum() <= 28
    assert not (boundary & ~mask).any()

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from nuclei_d2.structures.cropped_mask import crop_mask, label_image_to_masks, masks_to_label_image
from nuclei_d2.utils.errors import NucleiError

masks = hnp.arrays(bool, st.tuples(st.integers(1, 9), st.integers(1, 9)))


@given(masks)
def test_crop_is_tight_and_puts_every_pixel_back(mask):
    cropped = crop_mask(mask)
    restored = np.zeros_like(mask)
    restored[cropped.window] = cropped.mask
    np.testing.assert_array_equal(restored, mask)
    if mask.any():
        assert all(cropped.mask.any(axis=1)[[0, -1]])
        assert all(cropped.mask.any(axis=0)[[0, -1]])
    else:
        assert cropped.mask.shape == (0, 0)


def test_label_image_with_gaps_pieces_and_huge_labels():
    labels = np.array([[0, 7, 7], [2**30, 0, 0], [2**30, 0, 7]], np.int32)
    (first, a), (second, b) = label_image_to_masks(labels)
    assert (first, second) == (7, 2**30)
    assert (a.top, a.left, a.mask.tolist()) == (0, 1, [[1, 1], [0, 0], [0, 1]])
    assert (b.top, b.left, b.mask.tolist()) == (1, 0, [[1], [1]])


def test_label_image_without_background_and_without_labels():
    assert [value for value, _ in label_image_to_masks(np.array([[3, 5]]))] == [3, 5]
    assert label_image_to_masks(np.zeros((4, 4), np.int32)) == []


@given(hnp.arrays(np.int32, (6, 7), elements=st.integers(0, 5)))
def test_label_image_survives_the_way_through_masks(labels):
    pairs = label_image_to_masks(labels)
    painted = masks_to_label_image([mask for _, mask in pairs], labels.shape)
    values = np.array([0, *(value for value, _ in pairs)])
    np.testing.assert_array_equal(values[painted], labels)


def test_overlap_goes_to_the_smaller_mask_and_of_equals_to_the_earlier():
    large, first, second = np.zeros((3, 1, 6), bool)
    large[0, :4] = True
    first[0, 2:5] = True
    second[0, 3:6] = True
    labels = masks_to_label_image([crop_mask(m) for m in (large, first, second)], (1, 6))
    assert labels.tolist() == [[1, 1, 2, 2, 2, 3]]
    assert labels.dtype == np.uint16


def test_more_nuclei_than_16_bits_hold():
    one = crop_mask(np.ones((1, 1)))
    assert masks_to_label_image([one] * 65535, (1, 1)).tolist() == [[1]]
    with pytest.raises(NucleiError, match=r"65536 nuclei .* 65535"):
        masks_to_label_image([one] * 65536, (1, 1))

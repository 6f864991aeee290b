import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pycocotools import mask as mask_util

from nuclei_d2.evaluation.instances import (
    layers_from_label_image,
    layers_from_masks,
    layers_from_predictions,
    layers_from_scored_masks,
    rle_to_mask,
)
from nuclei_d2.structures.cropped_mask import crop_mask

masks = hnp.arrays(bool, hnp.array_shapes(min_dims=2, max_dims=2, max_side=12))


@given(masks)
@settings(max_examples=60, deadline=None)
def test_rle_decodes_as_pycocotools_encoded_it(mask):
    rle = mask_util.encode(np.asfortranarray(mask, np.uint8))
    boxed, expected = rle_to_mask(rle), crop_mask(mask)
    assert (boxed.top, boxed.left) == (expected.top, expected.left)
    np.testing.assert_array_equal(boxed.mask, expected.mask)


def test_long_runs_need_several_characters_each():
    mask = np.zeros((900, 700), np.uint8)
    mask[100:850, 3:650] = 1
    mask[400, 500] = 0
    rle = mask_util.encode(np.asfortranarray(mask))
    boxed = rle_to_mask({"size": list(mask.shape), "counts": rle["counts"].decode()})
    np.testing.assert_array_equal(boxed.mask, mask[boxed.window])
    assert boxed.area == mask.sum()


@pytest.mark.parametrize("step", [1, 100, 10**8])
def test_labels_are_numbered_by_their_first_pixel(step):
    labels = np.array([[0, 7, 7], [3, 0, 9]]) * step
    layers = layers_from_label_image(labels)
    assert layers.count == 3
    np.testing.assert_array_equal(layers.labels, [[[0, 1, 1], [2, 0, 3]]])


def test_label_images_without_background_or_without_nuclei():
    assert layers_from_label_image(np.zeros((2, 3), int)).count == 0
    full = layers_from_label_image(np.full((2, 3), 2**30))
    assert full.count == 1
    assert (full.labels == 1).all()


def test_more_nuclei_than_uint16_holds():
    layers = layers_from_label_image(np.arange(300 * 300).reshape(300, 300))
    assert layers.count == 300 * 300 - 1
    assert layers.labels.max() == layers.count


def canvas(*windows):
    result = []
    for window in windows:
        mask = np.zeros((6, 8), bool)
        mask[window] = True
        result.append(crop_mask(mask))
    return result


def test_overlapping_masks_go_to_different_layers_and_lose_nothing():
    boxed = canvas(np.s_[0:4, 0:4], np.s_[2:6, 2:6], np.s_[0:2, 6:8])
    layers = layers_from_masks(boxed, (6, 8))
    assert layers.labels.shape == (2, 6, 8)
    assert [(layers.labels == k).sum() for k in (1, 2, 3)] == [16, 16, 4]
    assert layers.labels.any(axis=0).sum() == 16 + 16 - 4 + 4


def test_the_higher_score_gets_the_pixel_and_hidden_predictions_vanish():
    boxed = canvas(np.s_[0:4, 0:4], np.s_[2:6, 2:6], np.s_[2:4, 2:4])
    layers = layers_from_scored_masks(boxed, np.array([0.5, 0.9, 0.7]), (6, 8))
    assert layers.count == 2  # the third lies below the second
    assert (layers.labels == 1).sum() == 12
    assert (layers.labels == 2).sum() == 16
    tied = layers_from_scored_masks(boxed[:2], np.array([0.5, 0.5]), (6, 8))
    assert (tied.labels == 1).sum() == 16


def test_predictions_may_overlap_where_nuclei_do():
    nothing = np.s_[0:0, 0:0]
    boxed = canvas(np.s_[0:4, 0:4], np.s_[2:6, 2:6], np.s_[2:4, 2:4], np.s_[0:1, 6:8], nothing)
    scores = np.array([0.5, 0.9, 0.7, 0.4, 0.8])
    flat = layers_from_predictions(boxed, scores, 0.5, layers_from_masks(boxed[:1], (6, 8)))
    assert flat.labels.shape == (1, 6, 8)
    assert [(flat.labels == k).sum() for k in (1, 2)] == [12, 16]
    whole = layers_from_predictions(boxed, scores, 0.5, layers_from_masks(boxed[:2], (6, 8)))
    assert whole.count == 3
    assert [(whole.labels == k).sum() for k in (1, 2, 3)] == [16, 16, 4]


@given(st.integers(0, 5))
@settings(max_examples=6, deadline=None)
def test_no_masks_at_all(height):
    assert layers_from_masks([], (height, 4)).labels.shape == (1, height, 4)

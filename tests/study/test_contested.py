"""The most that a better division of overlapping predictions could win."""

import numpy as np
import pytest

from nuclei_d2.evaluation.inputs import GroundTruth, ImageSource, Predictions, ScoredMasks
from nuclei_d2.evaluation.instances import layers_from_label_image, layers_from_masks
from nuclei_d2.evaluation.matching import IOU_THRESHOLDS
from nuclei_d2.structures.cropped_mask import crop_mask
from nuclei_d2.study.contested import contested_pixels, divide

SIZE = (10, 30)


def columns(first, last):
    mask = np.zeros(SIZE, bool)
    mask[:, first:last] = True
    return mask


def scored(*masks_and_scores):
    masks, scores = zip(*masks_and_scores, strict=True)
    return ScoredMasks([crop_mask(mask) for mask in masks], np.array(scores), SIZE, [])


def test_every_pixel_goes_to_a_prediction_of_its_nucleus():
    nuclei = layers_from_label_image(columns(0, 10) + 2 * columns(10, 20))
    # The better prediction reaches 4 columns into the other's nucleus.
    found = scored((columns(0, 14), 0.9), (columns(10, 20), 0.8), (columns(0, 30), 0.4))
    divided, counts = divide(nuclei, found, 0.5)
    assert counts == (40, 200)
    np.testing.assert_array_equal(divided.labels[0], columns(0, 10) + 2 * columns(10, 20))


def test_what_is_no_nucleus_goes_to_the_best():
    nuclei = layers_from_label_image(columns(0, 10).astype(int))
    divided, _ = divide(nuclei, scored((columns(0, 14), 0.6), (columns(12, 20), 0.9)), 0.5)
    np.testing.assert_array_equal(divided.labels[0], columns(0, 12) + 2 * columns(12, 20))


def test_overlapping_nuclei_are_left_alone():
    masks = [crop_mask(columns(0, 12)), crop_mask(columns(8, 20))]
    divided, counts = divide(
        layers_from_masks(masks, SIZE), scored((columns(0, 12), 0.9), (columns(8, 20), 0.8)), 0.5
    )
    assert counts == (0, 0)
    assert divided.count == 2
    assert len(divided.labels) == 2


def test_the_accuracy_of_a_set():
    nuclei = layers_from_label_image(columns(0, 10) + 2 * columns(10, 20))
    nothing = layers_from_label_image(np.zeros(SIZE, int))
    gt = GroundTruth(
        "gt", {"a": ImageSource("a", lambda: nuclei), "b": ImageSource("b", lambda: nothing)}, {}
    )
    found = scored((columns(0, 14), 0.9), (columns(10, 20), 0.8))
    spurious = scored((columns(0, 4), 0.7))
    images = {"a": ImageSource("a", lambda: found), "b": ImageSource("b", lambda: spurious)}
    won = contested_pixels(gt, Predictions("p", images, has_scores=True), 0.5)
    assert won["pixels"] == pytest.approx(40 / 240)
    # Two nuclei found exactly, one spurious prediction.
    assert won["accuracy"] == pytest.approx([2 / 3] * len(IOU_THRESHOLDS), abs=1e-5)
    assert contested_pixels(gt, Predictions("p", images), 0.5) is None

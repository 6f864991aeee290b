from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import ndimage
from scipy.spatial.distance import cdist

from nuclei_d2.evaluation.boundary import (
    boundary_distances,
    compute_overlaps,
    outline_matches,
    surface_distances,
)
from nuclei_d2.evaluation.instances import layers_from_label_image, layers_from_masks
from nuclei_d2.evaluation.matching import match
from nuclei_d2.structures.cropped_mask import crop_mask

SQUARE = np.ones((3, 3), bool)


def eroded(mask, width):
    """Erosion with a frame of background."""
    inner = ndimage.binary_erosion(np.pad(mask, 1), SQUARE, iterations=width)
    return inner[1:-1, 1:-1]


def boundary(mask, width):
    return mask & ~eroded(mask, width)


blobs = hnp.arrays(np.int32, (9, 11), elements=st.integers(0, 3))


@given(blobs, blobs, st.permutations([1, 2, 3, 5]))
@settings(max_examples=60, deadline=None)
def test_boundary_overlaps_against_full_masks(gt, pred, widths):
    gt, pred = np.kron(gt, np.ones((3, 3), int)), np.kron(pred, np.ones((3, 3), int))
    sides = layers_from_label_image(gt), layers_from_label_image(pred)
    masks, boundaries = compute_overlaps(*sides, widths)
    for width, overlap in zip(widths, boundaries, strict=True):
        np.testing.assert_array_equal(overlap.gt, masks.gt)
        g = [boundary(sides[0].labels[0] == k + 1, width) for k in range(sides[0].count)]
        p = [boundary(sides[1].labels[0] == k + 1, width) for k in range(sides[1].count)]
        assert overlap.gt_areas.tolist() == [m.sum() for m in g]
        assert overlap.pred_areas.tolist() == [m.sum() for m in p]
        for i, j, common in zip(overlap.gt, overlap.pred, overlap.intersection, strict=True):
            assert common == (g[i] & p[j]).sum()


def test_boundary_at_the_image_edge_and_of_int32_labels():
    layers = layers_from_label_image(np.ones((10, 10), int))
    wide = replace(layers, labels=layers.labels.astype(np.int32))
    for side in (layers, wide):
        _, (thin, thick) = compute_overlaps(side, side, (1, 3))
        assert thin.gt_areas.tolist() == [100 - 64]
        assert thick.intersection.tolist() == [100 - 16]


def test_two_percent_of_the_diagonal():
    assert boundary_distances((300, 400)) == (10, 1, 2, 3)
    assert boundary_distances((10, 10))[0] == 1


def disks(shift):
    """Three disks of radius 8, 6 and 4, moved by ``shift`` columns."""
    labels = np.zeros((60, 60), int)
    y, x = np.mgrid[:60, :60]
    for k, (cy, cx, r) in enumerate([(15, 15, 8), (15, 40, 6), (45, 20, 4)], start=1):
        labels[(y - cy) ** 2 + (x - cx - shift) ** 2 <= r**2] = k
    return labels


@pytest.mark.parametrize("shift", [0, 1, 2])
def test_surface_distances_against_all_pairs_of_points(shift):
    gt, pred = layers_from_label_image(disks(0)), layers_from_label_image(disks(shift))
    overlap, _ = compute_overlaps(gt, pred)
    pairs = match(overlap, overlap.iou, 0.1)
    hausdorff, surface = surface_distances(gt, pred, overlap, pairs, tolerance=1.0)
    for k in range(3):
        points = [
            np.argwhere(boundary(side.labels[0] == k + 1, 1)).astype(float) for side in (gt, pred)
        ]
        there, back = cdist(*points).min(axis=1), cdist(*points).min(axis=0)
        expected = max(np.percentile(there, 95), np.percentile(back, 95))
        assert hausdorff[k] == pytest.approx(expected)
        assert surface[k] == pytest.approx((np.concatenate([there, back]) <= 1).mean())


def test_far_outlines_are_measured_exactly():
    """A stray pixel 40 columns away, beyond the fast search, in two layers."""
    near = np.zeros((9, 60), bool)
    near[2:7, 2:7] = True
    far = near.copy()
    far[4, 50] = True
    other = np.zeros_like(near)
    other[4, 30:50] = True
    gt = layers_from_masks([crop_mask(near), crop_mask(other)], near.shape)
    pred = layers_from_masks([crop_mask(far), crop_mask(other)], near.shape)
    overlap, _ = compute_overlaps(gt, pred)
    pairs = match(overlap, overlap.iou, 0.5)
    hausdorff, _ = surface_distances(gt, pred, overlap, pairs)
    # 16 outline pixels at 0 and one at 44: the 95th percentile lies at place 15.2 of 0..16.
    assert hausdorff.tolist() == pytest.approx([0.2 * 44, 0])


def test_outline_matches_by_hand():
    """A single pixel, and one 2 px away: both within a tolerance of 2, none of 1."""
    gt, pred = np.zeros((9, 9), int), np.zeros((9, 9), int)
    gt[4, 2] = pred[4, 4] = pred[8, 8] = 1
    sides = layers_from_label_image(gt), layers_from_label_image(pred)
    assert outline_matches(*sides, tolerance=2) == (1, 2, 1, 1)
    assert outline_matches(*sides, tolerance=1) == (0, 2, 0, 1)


def test_no_matches_no_distances():
    nothing = layers_from_label_image(np.zeros((8, 8), int))
    overlap, _ = compute_overlaps(nothing, nothing, (1, 2))
    pairs = match(overlap, overlap.iou, 0.5)
    hausdorff, surface = surface_distances(nothing, nothing, overlap, pairs)
    assert hausdorff.size == surface.size == 0
    assert outline_matches(nothing, nothing) == (0, 0, 0, 0)

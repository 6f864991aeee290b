import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from skimage.segmentation import find_boundaries

from nuclei_d2.data.targets import (
    BOUNDARY,
    INTERIOR,
    distance_target,
    flatten_labels,
    inner_boundary_target,
    thick_boundary_target,
    two_class_target,
)

# Two nuclei that touch, the second one cut by the right border; a nucleus of one pixel.
LABELS = np.array(
    [
        [0, 0, 0, 0, 0, 0, 0],
        [0, 1, 1, 1, 2, 2, 2],
        [0, 1, 1, 1, 2, 2, 2],
        [0, 1, 1, 1, 2, 2, 2],
        [0, 0, 0, 0, 0, 0, 0],
        [3, 0, 0, 0, 0, 0, 0],
    ]
)


@st.composite
def label_images(draw):
    """Rectangles painted over each other: any contact, cut by any border."""
    height, width = draw(st.integers(1, 24)), draw(st.integers(1, 24))
    labels = np.zeros((height, width), np.int32)
    for label in range(1, draw(st.integers(0, 6)) + 1):
        y, x = draw(st.integers(-4, height - 1)), draw(st.integers(-4, width - 1))
        h, w = draw(st.integers(1, 12)), draw(st.integers(1, 12))
        labels[max(0, y) : max(0, y + h), max(0, x) : max(0, x + w)] = label
    return labels


def test_two_class():
    target = two_class_target(LABELS)
    assert target.dtype == np.uint8
    assert (target == (LABELS > 0)).all()


def test_inner_boundary_by_hand():
    expected = [
        [0, 0, 0, 0, 0, 0, 0],
        [0, 2, 2, 2, 2, 2, 2],
        [0, 2, 1, 2, 2, 1, 1],  # none along the border that cuts nucleus 2
        [0, 2, 2, 2, 2, 2, 2],
        [0, 0, 0, 0, 0, 0, 0],
        [1, 0, 0, 0, 0, 0, 0],  # a pixel that would be all boundary is its own seed
    ]
    assert inner_boundary_target(LABELS).tolist() == expected


def test_thick_boundary_by_hand():
    expected = [
        [0, 2, 2, 2, 2, 2, 2],
        [2, 2, 2, 2, 2, 2, 2],
        [2, 2, 1, 2, 2, 1, 1],
        [2, 2, 2, 2, 2, 2, 2],
        [2, 2, 2, 2, 2, 2, 2],
        [2, 2, 0, 0, 0, 0, 0],
    ]
    assert thick_boundary_target(LABELS).tolist() == expected


@settings(deadline=None, max_examples=50)
@given(label_images())
def test_boundaries_are_those_of_scikit_image(labels):
    inner, thick = inner_boundary_target(labels), thick_boundary_target(labels)
    assert ((thick == BOUNDARY) == find_boundaries(labels, 1, "thick")).all()
    assert ((inner > 0) == (labels > 0)).all()
    expected = find_boundaries(labels, 1, "inner")
    assert (expected | (inner != BOUNDARY)).all()
    for label in np.unique(labels[labels > 0]):
        nucleus = labels == label
        seeds = nucleus & (inner == INTERIOR)
        if (nucleus & ~expected).any():
            assert (seeds == (nucleus & ~expected)).all()
        else:
            assert seeds.sum() == 1


def test_distance_by_hand():
    target = distance_target(LABELS)
    assert target.dtype == np.float32
    root = np.sqrt(2) / 2
    assert target[1:4, 1:4] == pytest.approx(
        np.array([[0.5, 0.5, 0.5], [0.5, 1.0, 0.5], [0.5, 0.5, 0.5]])
    )
    # The border is as deep as the line beside it: nothing says that the nucleus ends there.
    assert target[1:4, 4:] == pytest.approx(
        np.array([[0.5, 0.5, 0.5], [0.5, 1.0, 1.0], [0.5, 0.5, 0.5]])
    )
    assert target[5, 0] == 1
    assert not target[LABELS == 0].any()
    diagonal = distance_target(np.array([[0, 1], [1, 1]]))
    assert diagonal[1, 1] == 1
    assert diagonal[0, 1] == pytest.approx(root)


@settings(deadline=None, max_examples=50)
@given(label_images())
def test_distance_is_scipys_in_every_nucleus(labels):
    target = distance_target(labels)
    assert ((target > 0) == (labels > 0)).all()
    for label in np.unique(labels[labels > 0]):
        nucleus = labels == label
        if nucleus.all():
            assert (target == 1).all()
            continue
        depth = ndimage.distance_transform_edt(nucleus)
        assert target[nucleus] == pytest.approx((depth / depth.max())[nucleus], abs=1e-5)


def test_a_crop_has_the_target_of_the_whole_image_away_from_the_cut():
    labels = np.zeros((40, 40), np.int32)
    labels[5:25, 10:30] = 1
    whole = inner_boundary_target(labels)[:, 18:]
    crop = inner_boundary_target(labels[:, 18:])
    assert (whole == crop).all()


def test_smaller_nuclei_win_where_layers_overlap():
    layers = np.zeros((4, 6, 2), np.float32)
    layers[:, :4, 0] = 1
    layers[1:3, 2:5, 1] = 2
    flat = flatten_labels(layers)
    assert flat.dtype == np.int32
    assert flat[1].tolist() == [1, 1, 2, 2, 2, 0]
    # Also if the smaller one comes first.
    assert (flatten_labels(layers[..., ::-1]) == flat).all()
    assert (flatten_labels(layers[..., 0]) == layers[..., 0]).all()


def test_empty_images():
    labels = np.zeros((5, 3), np.int32)
    for target in (two_class_target, inner_boundary_target, thick_boundary_target, distance_target):
        assert target(labels).shape == (5, 3)
        assert not target(labels).any()

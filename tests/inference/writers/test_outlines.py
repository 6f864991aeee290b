import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import ndimage

from nuclei_d2.inference.writers.outlines import mask_to_polygons
from nuclei_d2.structures.cropped_mask import CroppedMask


def outline(text: str, top: int = 0, left: int = 0) -> list[list[list[list[int]]]]:
    mask = np.array([[c == "X" for c in row] for row in text.split()])
    return [[r.tolist() for r in rings] for rings in mask_to_polygons(CroppedMask(mask, top, left))]


def check(mask: np.ndarray, top: int, left: int) -> None:
    polygons = mask_to_polygons(CroppedMask(mask, top, left))
    assert len(polygons) == ndimage.label(mask)[1]  # 4-connected
    parts = [shapely.Polygon(rings[0], rings[1:]) for rings in polygons]
    assert all(part.is_valid for part in parts)
    shape = shapely.MultiPolygon(parts)
    assert shape.is_valid
    assert shape.area == mask.sum()
    for rings in polygons:
        for index, ring in enumerate(rings):
            assert shapely.LinearRing(ring).is_simple
            assert shapely.LinearRing(ring).is_ccw == (
                index == 0
            )  # of the numbers: as if y went up
            steps = np.diff(np.concatenate([ring, ring[1:2]]), axis=0)
            assert ((steps == 0).sum(axis=1) == 1).all()
            assert (steps[1:, 0].astype(bool) != steps[:-1, 0].astype(bool)).all()  # corners only
    y, x = np.mgrid[-1 : mask.shape[0] + 1, -1 : mask.shape[1] + 1]
    inside = shapely.contains_xy(shape, x + left + 0.5, y + top + 0.5)
    np.testing.assert_array_equal(inside, np.pad(mask, 1))


@given(arrays(bool, st.tuples(st.integers(1, 9), st.integers(1, 9))), st.integers(0, 99))
@settings(max_examples=300, deadline=None)
def test_any_mask(mask, offset):
    if not mask.any():
        mask[-1, -1] = True
    check(mask, offset, 2 * offset)


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_blobs(seed):
    rng = np.random.default_rng(seed)
    noise = ndimage.gaussian_filter(rng.random(rng.integers(10, 60, 2)), rng.uniform(0.5, 3))
    check(noise > np.quantile(noise, rng.uniform(0.2, 0.8)), 3, 5)


def test_one_pixel():
    assert outline("X", 3, 5) == [[[[5, 3], [6, 3], [6, 4], [5, 4], [5, 3]]]]


def test_a_hole():
    exterior = [[0, 0], [3, 0], [3, 3], [0, 3], [0, 0]]
    hole = [[1, 1], [1, 2], [2, 2], [2, 1], [1, 1]]
    assert outline("XXX X.X XXX") == [[exterior, hole]]


def test_two_pixels_that_touch_at_a_corner_are_two_polygons():
    polygons = outline("X. .X")
    assert sorted(rings[0][0] for rings in polygons) == [[0, 0], [1, 1]]


@pytest.mark.parametrize("text", [".XX X.X XXX", "XX. X.X XXX", "XXX X.X .XX", "XXX X.X XX."])
def test_a_ring_that_closes_at_a_corner_has_a_hole(text):
    (rings,) = outline(text)
    assert [len(ring) - 1 for ring in rings] == [6, 4]

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nuclei_d2.data.normalization import contrast_range
from nuclei_d2.inference.contrast import nuclear_contrast
from nuclei_d2.structures.cropped_mask import CroppedMask

SQUARE = np.ones((6, 6), bool)


def scene(level: float, channels: int = 1) -> tuple[np.ndarray, CroppedMask]:
    """A square nucleus of ``level`` on a background of 10."""
    pixels = np.full((30, 40, channels), 10.0, np.float32)
    pixels[8:14, 20:26] = level
    return pixels, CroppedMask(SQUARE, 8, 20)


@pytest.mark.parametrize("level", [30, -10])
def test_a_difference_counts_whatever_its_sign(level):
    pixels, nucleus = scene(level)
    assert nuclear_contrast([nucleus], pixels, noise=4).tolist() == [5]


def test_texture_counts():
    pixels, nucleus = scene(10)
    pixels[8:14, 20:26:2] += 3
    pixels[8:14, 21:26:2] -= 3
    assert nuclear_contrast([nucleus], pixels, noise=1).tolist() == [3]


def test_the_channel_with_the_greatest_contrast_counts():
    pixels, nucleus = scene(10, channels=3)
    pixels[8:14, 20:26, 2] = 17
    assert nuclear_contrast([nucleus], pixels, noise=1).tolist() == [7]


def test_every_channel_has_its_own_noise():
    pixels, nucleus = scene(10, channels=3)
    pixels[8:14, 20:26] += [8, 0, 9]
    assert nuclear_contrast([nucleus], pixels, np.array([2, 0.1, 3])).tolist() == [4]


def test_neighbours_are_no_surroundings():
    pixels, nucleus = scene(30)
    pixels[8:14, 27:39] = 30
    neighbour = CroppedMask(np.ones((6, 12), bool), 8, 27)
    assert nuclear_contrast([nucleus, neighbour], pixels, noise=2).tolist() == [10, 10]


def test_nothing_around_cannot_be_judged():
    pixels = np.zeros((6, 6, 1), np.float32)
    assert np.isnan(nuclear_contrast([CroppedMask(SQUARE, 0, 0)], pixels, noise=1))


def test_the_pixels_may_be_a_part_of_the_image():
    pixels, nucleus = scene(30)
    moved = nucleus._replace(top=108, left=220)
    assert nuclear_contrast([moved], pixels, 4, origin=(100, 200)).tolist() == [5]


def test_a_nucleus_may_reach_beyond_the_pixels():
    pixels, nucleus = scene(30)
    assert nuclear_contrast([nucleus], pixels[10:, 22:], 4, origin=(10, 22)).tolist() == [5]
    assert nuclear_contrast([nucleus], pixels[:10, :22], 4).tolist() == [5]
    assert np.isnan(nuclear_contrast([nucleus], pixels[20:], 4, origin=(20, 0)))


@pytest.mark.parametrize("noise", [0.2, 0.35])
def test_rounding_to_grey_levels_makes_nothing_visible(noise):
    """Most pixels have one level, so the noise measured is 0; two levels more can be seen."""
    image = np.rint(np.random.default_rng(0).normal(20, noise, (200, 200, 1))).astype(np.float32)
    contrast = contrast_range(image)
    nucleus = CroppedMask(np.ones((30, 30), bool), 50, 50)
    found = nuclear_contrast([nucleus], contrast.apply(image), contrast.visible_noise)
    assert found < 3
    image[50:80, 50:80] += 2
    contrast = contrast_range(image)
    found = nuclear_contrast([nucleus], contrast.apply(image), contrast.visible_noise)
    assert found > 3


def test_no_nuclei():
    assert nuclear_contrast([], np.zeros((5, 5, 3), np.float32), 1).shape == (0,)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_noise_has_a_contrast_of_one(seed):
    pixels = np.random.default_rng(seed).normal(100, 7, (60, 60, 1)).astype(np.float32)
    nucleus = CroppedMask(np.ones((30, 30), bool), 15, 15)
    assert nuclear_contrast([nucleus], pixels, noise=7) == pytest.approx(1, abs=0.15)

"""Can a nucleus be seen at all? Networks find nuclei in mere noise, too."""

from collections.abc import Sequence

import cv2
import numpy as np

from nuclei_d2.structures.cropped_mask import CroppedMask

# What has less is no nucleus; docs/prediction.md tells what real nuclei have.
LEAST_CONTRAST = 3.0
_GAP, _REACH = 1, 4  # pixels; the surroundings of a nucleus lie between the two
_LEAST_SURROUNDINGS = 5  # pixels that can be compared with


def nuclear_contrast(
    masks: Sequence[CroppedMask],
    pixels: np.ndarray,
    noise: float | np.ndarray,
    origin: tuple[int, int] = (0, 0),
) -> np.ndarray:
    """How much the pixels of every nucleus differ from those around it.

    The root of the mean squared difference from the median of the surroundings: pixels 2 to 4
    away that belong to no nucleus. So nuclei that are bright, dark, or merely textured all have
    contrast, and noise has that of noise: 1.

    Args:
        masks: N nonempty masks.
        pixels: (h, w, C) float; of several channels, that with the greatest contrast counts.
        noise: standard deviation, > 0, in the unit of the pixels, or (C,) of every channel.
        origin: top and left of ``pixels`` in the coordinates of the masks.

    Returns:
        (N,) in standard deviations of the noise; NaN where nothing but nuclei is around.
    """
    occupied = np.zeros(pixels.shape[:2], bool)
    places = [(mask.top - origin[0], mask.left - origin[1]) for mask in masks]
    for (top, left), mask in zip(places, masks, strict=True):
        _paste(occupied, mask.mask, top, left)
    found = (
        (_contrast(mask.mask, top, left, pixels, occupied) / noise).max()
        for (top, left), mask in zip(places, masks, strict=True)
    )
    return np.fromiter(found, float, len(masks))


def _contrast(
    mask: np.ndarray, top: int, left: int, pixels: np.ndarray, occupied: np.ndarray
) -> np.ndarray:
    """Of every channel, (C,) in the unit of the pixels; NaN as above."""
    first, second = max(top - _REACH, 0), max(left - _REACH, 0)
    window = np.s_[
        first : max(top + mask.shape[0] + _REACH, 0), second : max(left + mask.shape[1] + _REACH, 0)
    ]
    colours, free = pixels[window], ~occupied[window]
    inside = np.zeros(free.shape, np.uint8)
    _paste(inside, mask, top - first, left - second)
    unknown = np.full(pixels.shape[2], np.nan)
    if not inside.any():
        return unknown
    around = _grow(inside, _REACH) & ~_grow(inside, _GAP) & free
    if np.count_nonzero(around) < _LEAST_SURROUNDINGS:
        return unknown
    differences = colours[inside.view(bool)] - np.median(colours[around], axis=0)
    return np.sqrt(np.square(differences).mean(axis=0))


def _paste(canvas: np.ndarray, mask: np.ndarray, top: int, left: int) -> None:
    """Set the canvas where the mask, which may reach beyond it, is true."""
    rows, columns = slice(max(-top, 0), None), slice(max(-left, 0), None)
    target = canvas[max(top, 0) : max(top + mask.shape[0], 0), max(left, 0) :]
    part = mask[rows, columns][: target.shape[0], : target.shape[1]]
    target[: part.shape[0], : part.shape[1]][part] = True


def _grow(mask: np.ndarray, pixels: int) -> np.ndarray:
    side = 2 * pixels + 1
    return cv2.dilate(mask, np.ones((side, side), np.uint8)).view(bool)

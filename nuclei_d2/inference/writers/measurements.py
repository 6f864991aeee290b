"""What can be measured of every nucleus; docs/outputs.md defines the columns."""

from collections.abc import Iterator

import cv2
import numpy as np
from skimage.measure import regionprops

from nuclei_d2.inference.nuclei import ImageInfo, Nuclei
from nuclei_d2.structures.box_pairs import near_pairs
from nuclei_d2.structures.cropped_mask import CroppedMask

_BAND = 256  # rows; the image is read in bands of about so many
# Columns without their unit, and scikit-image's names of them.
_LENGTHS = {
    "equivalent_diameter": "equivalent_diameter_area",
    "major_axis": "axis_major_length",
    "minor_axis": "axis_minor_length",
    "perimeter": "perimeter",
}
_RATIOS = ("eccentricity", "solidity")
_INTENSITIES = {"mean": np.mean, "min": np.min, "max": np.max, "std": np.std}


def measure(nuclei: Nuclei, image: ImageInfo) -> dict[str, np.ndarray]:
    """Measure every nucleus on its whole mask, overlapped parts included.

    The image is read in bands as high as the highest nucleus and :data:`_BAND` rows.

    Returns:
        Columns of N values by name, in order; nucleus k is row k. Lengths and areas in
        micrometres are there if ``image.pixel_size`` is known.
    """
    shapes = {name: np.zeros(len(nuclei)) for name in ("x", "y", *_LENGTHS, *_RATIOS)}
    intensities = np.zeros((len(nuclei), len(image.channels), len(_INTENSITIES)))
    for k, pixels in _read_pixels(nuclei, image):
        for name, value in _measure_shape(nuclei.masks[k]).items():
            shapes[name][k] = value
        intensities[k] = np.stack([f(pixels, axis=0) for f in _INTENSITIES.values()], axis=1)
    return {
        "label": np.arange(1, len(nuclei) + 1),
        "score": nuclei.scores,
        **_place_columns(nuclei, shapes, image.pixel_size),
        **area_columns(nuclei, image),
        **_shape_columns(shapes, image.pixel_size),
        **{
            f"intensity_{name}_{channel}": intensities[:, c, i]
            for c, channel in enumerate(image.channels)
            for i, name in enumerate(_INTENSITIES)
        },
        "touching_neighbours": count_touching(nuclei),
        "touches_image_edge": _touches_edge(nuclei),
        **nuclei.measures,
    }


def area_columns(nuclei: Nuclei, image: ImageInfo) -> dict[str, np.ndarray]:
    """ "area_px" and, if the pixel size is known, "area_um2"."""
    columns = {"area_px": nuclei.areas}
    if image.pixel_size:
        columns["area_um2"] = nuclei.areas * image.pixel_size**2
    return columns


def _read_pixels(nuclei: Nuclei, image: ImageInfo) -> Iterator[tuple[int, np.ndarray]]:
    """Each nucleus's index and raw grey levels, (pixels, C) float64, from top to bottom.

    One window per nucleus would have a file decode the same strips or tiles again and again.
    """
    band_of = nuclei.boxes[:, 0] // _BAND
    for band in np.unique(band_of):
        members = np.flatnonzero(band_of == band)
        top, left = nuclei.boxes[members, :2].min(axis=0).tolist()
        bottom, right = nuclei.boxes[members, 2:].max(axis=0).tolist()
        read = image.read(slice(top, bottom), slice(left, right))
        for k in members.tolist():
            rows, columns = nuclei.masks[k].window
            window = read[rows.start - top : rows.stop - top, columns.start - left :]
            yield k, window[:, : columns.stop - columns.start][nuclei.masks[k].mask].astype(float)


def _measure_shape(boxed: CroppedMask) -> dict[str, float]:
    (region,) = regionprops(boxed.mask.view(np.uint8))
    row, column = region.centroid
    return {
        "x": boxed.left + column + 0.5,  # corner of the image is 0, not the centre of a pixel
        "y": boxed.top + row + 0.5,
        **{name: region[prop] for name, prop in _LENGTHS.items()},
        **{name: region[name] for name in _RATIOS},
    }


def _place_columns(nuclei: Nuclei, shapes: dict, pixel_size: float | None) -> dict:
    centroids = {f"centroid_{axis}_px": shapes[axis] for axis in "xy"}
    if pixel_size:
        centroids |= {f"centroid_{axis}_um": shapes[axis] * pixel_size for axis in "xy"}
    top, left, bottom, right = nuclei.boxes.T
    box = {"left": left, "top": top, "width": right - left, "height": bottom - top}
    return centroids | {f"bbox_{name}_px": values for name, values in box.items()}


def _shape_columns(shapes: dict, pixel_size: float | None) -> dict:
    columns = {}
    for name in _LENGTHS:
        columns[f"{name}_px"] = shapes[name]
        if pixel_size:
            columns[f"{name}_um"] = shapes[name] * pixel_size
    return columns | {name: shapes[name] for name in _RATIOS}


def _touches_edge(nuclei: Nuclei) -> np.ndarray:
    height, width = nuclei.size
    top, left, bottom, right = nuclei.boxes.T
    return (top == 0) | (left == 0) | (bottom == height) | (right == width)


def count_touching(nuclei: Nuclei) -> np.ndarray:
    """How many others overlap a nucleus or have a pixel among its pixels' 8 neighbours.

    Returns:
        (N,) int64.
    """
    counts = np.zeros(len(nuclei), np.int64)
    for i, j in near_pairs(nuclei.boxes, 1):
        if _touch(nuclei.masks[i], nuclei.masks[j]):
            counts[[i, j]] += 1
    return counts


def _touch(a: CroppedMask, b: CroppedMask) -> bool:
    # Two pixels that touch both lie where the boxes, each one pixel larger, meet.
    top, left = max(a.top, b.top) - 1, max(a.left, b.left) - 1
    bottom = min(a.top + len(a.mask), b.top + len(b.mask)) + 1
    right = min(a.left + a.mask.shape[1], b.left + b.mask.shape[1]) + 1
    window = (top, left, bottom - top, right - left)
    grown = cv2.dilate(_crop(a, *window).view(np.uint8), np.ones((3, 3), np.uint8))
    return bool((grown.view(bool) & _crop(b, *window)).any())


def _crop(boxed: CroppedMask, top: int, left: int, height: int, width: int) -> np.ndarray:
    """The part of a mask in a window that may reach beyond its box: (height, width) bool."""
    crop = np.zeros((height, width), bool)
    rows = slice(max(top - boxed.top, 0), top + height - boxed.top)
    columns = slice(max(left - boxed.left, 0), left + width - boxed.left)
    part = boxed.mask[rows, columns]
    y, x = max(boxed.top - top, 0), max(boxed.left - left, 0)
    crop[y : y + part.shape[0], x : x + part.shape[1]] = part
    return crop

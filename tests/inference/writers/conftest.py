"""Nuclei of every kind for the tests of all writers."""

import numpy as np
import pytest
from scipy import ndimage

from nuclei_d2.inference.nuclei import ImageInfo, Nuclei
from nuclei_d2.structures.cropped_mask import CroppedMask, crop_mask

SIZE = (40, 56)


def _draw(rng: np.random.Generator) -> np.ndarray:
    """A blob, now and then one pixel, a filled rectangle or noise, and cut by the image's edge."""
    mask = np.zeros(SIZE, bool)
    top, left = (int(rng.integers(0, side)) for side in SIZE)
    height, width = rng.integers(1, 18, 2)
    noise = ndimage.gaussian_filter(rng.random((height, width)), rng.choice([0, 1, 2]))
    blob = noise >= rng.choice([-1, np.median(noise)])
    window = mask[top : top + height, left : left + width]
    window[:] = blob[: window.shape[0], : window.shape[1]]
    if not mask.any():
        mask[top, left] = True
    return mask


@pytest.fixture(scope="session")
def draw_nuclei():
    """Function of a seed -> 0 to 11 nuclei that may overlap, have holes and lie in pieces; their
    (N, H, W) bool masks, best first; and their image of 2 channels, pixel size 0.5."""

    def draw(seed: int) -> tuple[Nuclei, np.ndarray, ImageInfo]:
        rng = np.random.default_rng(seed)
        masks = [_draw(rng) for _ in range(rng.integers(0, 12))]
        scores = rng.permutation(len(masks)) / 16
        order = np.argsort(-scores)
        nuclei = Nuclei.from_masks([crop_mask(m) for m in masks], scores, SIZE, {"quality": scores})
        stack = np.array([masks[k] for k in order], bool).reshape(-1, *SIZE)
        image = rng.integers(0, 5000, (*SIZE, 2)).astype(np.float32)
        return nuclei, stack, ImageInfo.from_array(image, "a.tif", ("DAPI", "GFP"), 0.5, 7)

    return draw


@pytest.fixture(scope="session")
def no_nuclei() -> Nuclei:
    return Nuclei.from_masks([], np.zeros(0), SIZE, {"quality": np.zeros(0)})


@pytest.fixture(scope="session")
def blank() -> ImageInfo:
    """An image without a known pixel size."""
    return ImageInfo.from_array(np.zeros((*SIZE, 1), np.float32), "blank.png")


@pytest.fixture(scope="session")
def from_drawings():
    """Function of drawings, rows separated by blanks with "X" for pixels, all at (top, left) of a
    20 x 20 image -> nuclei with falling scores in that order."""

    def make(*drawings: tuple[str, int, int], size=(20, 20), **measures) -> Nuclei:
        masks = [
            CroppedMask(np.array([[c == "X" for c in row] for row in text.split()]), top, left)
            for text, top, left in drawings
        ]
        scores = np.linspace(0.9, 0.1, len(masks))
        return Nuclei.from_masks(masks, scores, size, measures)

    return make

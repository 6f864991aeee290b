"""A picture of the nuclei's outlines over the image."""

import os

import cv2
import numpy as np
import torch
from PIL import Image

from nuclei_d2.inference.nuclei import ImageInfo, Nuclei
from nuclei_d2.structures import BoxedMasks
from nuclei_d2.utils.files import atomic_path
from nuclei_d2.visualization.overlay import draw_contours, stretch

MAX_SIDE = 4096  # pixels; larger images are shown reduced by an integer factor
THUMBNAIL_SIDE = 512
_STRIP_ROWS = 256


def write_picture(path: str | os.PathLike, nuclei: Nuclei, image: ImageInfo) -> None:
    """Write a PNG of the contrast-stretched image and the outlines of the nuclei, best on top.

    An image with a side above :data:`MAX_SIDE` is averaged over squares of pixels, strip by
    strip. Of an image with neither one nor three channels the first is shown.
    """
    drawing = _draw(nuclei, image, MAX_SIDE)
    with atomic_path(path) as temporary:
        # The default level, 6, saves 15 % and takes 2.5 times as long.
        Image.fromarray(drawing).save(temporary, compress_level=1)


def write_thumbnail(path: str | os.PathLike, nuclei: Nuclei, image: ImageInfo) -> None:
    """Write the same as a WebP with a longer side of up to :data:`THUMBNAIL_SIDE` pixels."""
    picture = Image.fromarray(_draw(nuclei, image, 2 * THUMBNAIL_SIDE))
    picture.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    with atomic_path(path) as temporary:
        picture.save(temporary, "WEBP", quality=75)


def _draw(nuclei: Nuclei, image: ImageInfo, most: int) -> np.ndarray:
    """(h, w, 3) uint8, reduced by an integer factor to sides of up to ``most`` pixels."""
    factor = -(-max(nuclei.size) // most)
    picture = stretch(_reduced_image(image, nuclei.size, factor), image.contrast)
    return draw_contours(picture, _reduced_masks(nuclei, picture.shape[:2], factor))


def _reduced_image(image: ImageInfo, size: tuple[int, int], factor: int) -> np.ndarray:
    """(h, w, 1 or 3) grey levels, ``factor`` times smaller than ``size``, rounded up."""
    height, width = size
    rows = max(_STRIP_ROWS // factor, 1) * factor
    strips = []
    for start in range(0, height, rows):
        strip = image.read(slice(start, min(start + rows, height)), slice(0, width))
        strip = strip if strip.shape[2] in (1, 3) else strip[:, :, :1]
        shape = (-(-width // factor), -(-len(strip) // factor))
        small = cv2.resize(strip, shape, interpolation=cv2.INTER_AREA)
        strips.append(small.reshape(*shape[::-1], -1))
    return np.concatenate(strips)


def _reduced_masks(nuclei: Nuclei, size: tuple[int, int], factor: int) -> BoxedMasks:
    """Every ``factor``-th pixel of the masks in an image of the reduced ``size``, best last.

    Nuclei without such a pixel are left out.
    """
    pixels, windows = [torch.zeros(0, dtype=torch.bool)], []
    for mask, top, left in reversed(nuclei.masks):
        part = mask[-top % factor :: factor, -left % factor :: factor]
        if not part.any():
            continue
        pixels.append(torch.from_numpy(part.ravel()))
        y, x = -(-top // factor), -(-left // factor)
        windows.append((x, y, x + part.shape[1], y + part.shape[0]))
    return BoxedMasks(torch.cat(pixels), torch.tensor(windows, dtype=torch.int64).view(-1, 4), size)

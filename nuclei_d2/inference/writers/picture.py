"""A picture of the nuclei's outlines over the image."""

import os

import cv2
import numpy as np
from PIL import Image

from nuclei_d2.inference.nuclei import ImageInfo, Nuclei
from nuclei_d2.utils.files import atomic_path
from nuclei_d2.visualization.overlay import draw_contours, stretch

MAX_SIDE = 4096  # pixels; larger images are shown reduced by an integer factor
_STRIP_ROWS = 256


def write_picture(path: str | os.PathLike, nuclei: Nuclei, image: ImageInfo) -> None:
    """Write a PNG of the contrast-stretched image and the outlines of its label image.

    An image with a side above :data:`MAX_SIDE` is averaged over squares of pixels, strip by
    strip. Of an image with neither one nor three channels the first is shown.
    """
    factor = -(-max(nuclei.size) // MAX_SIDE)
    picture, labels = _reduced(nuclei, image, factor)
    drawing = draw_contours(stretch(picture), labels)
    with atomic_path(path) as temporary:
        # The default level, 6, saves 15 % and takes 2.5 times as long.
        Image.fromarray(drawing).save(temporary, compress_level=1)


def _reduced(nuclei: Nuclei, image: ImageInfo, factor: int) -> tuple[np.ndarray, np.ndarray]:
    """Image (h, w, 1 or 3) and label image (h, w), ``factor`` times smaller, rounded up."""
    rows = max(_STRIP_ROWS // factor, 1) * factor
    columns = slice(0, nuclei.size[1])
    pixels, labels = [], []
    for index, strip in enumerate(nuclei.label_strips(rows)):
        top = index * rows
        read = image.read(slice(top, top + len(strip)), columns)
        shown = read if read.shape[2] in (1, 3) else read[:, :, :1]
        labels.append(strip[::factor, ::factor])
        height, width = labels[-1].shape
        shrunk = cv2.resize(shown, (width, height), interpolation=cv2.INTER_AREA)
        pixels.append(shrunk.reshape(height, width, -1))
    return np.concatenate(pixels), np.concatenate(labels)

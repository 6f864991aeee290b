#!/usr/bin/env python
"""Draw docs/pictures/failure_*.png: how each way of separating nuclei fails, on drawn nuclei.

Decoders get the maps of a network that makes no mistake but the one shown, so that what goes wrong
is the method's own doing.
"""

from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image
from skimage.draw import ellipse

from nuclei_d2.config import load_config
from nuclei_d2.data.targets import (
    distance_target,
    inner_boundary_target,
    thick_boundary_target,
    two_class_target,
)
from nuclei_d2.modeling import build_model
from nuclei_d2.modeling.postprocessing import (
    decode_boundary,
    decode_caicedo,
    decode_distance,
    decode_two_class,
)
from nuclei_d2.visualization.overlay import draw_contours, panel

PICTURES = Path(__file__).parent / "pictures"
FACTOR = 5  # enlargement
CLASS_COLORS = np.array([(25, 25, 35), (70, 150, 220), (240, 180, 60)], np.uint8)


def nuclei(*ellipses: tuple[float, float, float, float, float], size=(44, 64)) -> np.ndarray:
    """Label image of ellipses (y, x, radius, radius, angle); earlier ones stay on top."""
    labels = np.zeros(size, np.int32)
    for label, (y, x, r, c, angle) in enumerate(ellipses, start=1):
        pixels = ellipse(y, x, r, c, shape=size, rotation=np.deg2rad(angle))
        free = labels[pixels] == 0
        labels[pixels[0][free], pixels[1][free]] = label
    return labels


def one_hot(classes: np.ndarray, count: int) -> np.ndarray:
    return (classes == np.arange(count)[:, None, None]).astype(np.float32)


def light(labels: np.ndarray, levels=None) -> np.ndarray:
    """What a microscope would show: (H, W) float32, 0..255."""
    levels = levels or [170] * labels.max()
    image = np.array([25, *levels], np.float32)[labels]
    noise = np.random.default_rng(0).normal(0, 5, labels.shape)
    return np.clip(cv2.GaussianBlur(image, (0, 0), 1.2) + noise, 0, 255).astype(np.float32)


def draw(name: str, grey: np.ndarray, truth: np.ndarray, maps: np.ndarray | None, found) -> None:
    """Write failure_<name>.png: image and truth, the map that was decoded, the result."""
    picture = np.repeat(grey.astype(np.uint8)[..., None], 3, axis=2)
    pictures = [("truth", draw_contours(picture, truth, factor=FACTOR, line_width=2))]
    if maps is not None:
        shown = cv2.resize(maps, None, fx=FACTOR, fy=FACTOR, interpolation=cv2.INTER_NEAREST)
        pictures.append(("map", shown))
    pictures.append(("found", draw_contours(picture, found, factor=FACTOR, line_width=2)))
    PICTURES.mkdir(exist_ok=True)
    image = Image.fromarray(panel(pictures)).quantize(64)
    image.save(PICTURES / f"failure_{name}.png", optimize=True)


def two_class() -> None:
    truth = nuclei((22, 20, 12, 11, 0), (22, 42, 13, 11, 20))
    classes = two_class_target(truth)
    found = decode_two_class(one_hot(classes, 2))
    draw("two_class", light(truth), truth, CLASS_COLORS[classes], found)


def boundary_gap() -> None:
    """Four pixels of the boundary between two nuclei were missed."""
    truth = nuclei((22, 20, 13, 11, 0), (22, 42, 13, 12, 0))
    classes = inner_boundary_target(truth)
    classes[21:23, 28:34] = np.where(classes[21:23, 28:34] == 2, 1, classes[21:23, 28:34])
    found = decode_boundary(one_hot(classes, 3))
    draw("boundary_gap", light(truth), truth, CLASS_COLORS[classes], found)


def caicedo_small() -> None:
    truth = nuclei(
        *((8.5, 12, 1.2, 6, 0), (9, 30, 3.2, 1.3, 0), (10, 46, 6, 2.1, 40), (30, 14, 6, 7, 0)),
        *((30, 27, 6, 6, 0), (31.5, 44.5, 1.2, 1.2, 0), (24, 56, 8, 2.0, 0)),
    )
    classes = thick_boundary_target(truth)
    found = decode_caicedo(one_hot(classes, 3))
    draw("caicedo_small", light(truth), truth, CLASS_COLORS[classes], found)


def distance_two_maxima() -> None:
    """A bent nucleus with a waist is deep in two places."""
    truth = nuclei((17, 21, 9, 12, 30), (25, 41, 9, 13, -25))
    truth = (truth > 0).astype(np.int32)
    depth = distance_target(truth)
    maps = np.concatenate([one_hot(two_class_target(truth), 2), depth[None]])
    shade = (depth[..., None] * CLASS_COLORS[2] + (1 - depth[..., None]) * CLASS_COLORS[0]).astype(
        np.uint8
    )
    draw("distance_waist", light(truth), truth, shade, decode_distance(maps))


def classical() -> None:
    """One threshold for bright and dim; a shape without a waist; a shape with one too many."""
    truth = nuclei(
        *((12, 12, 8, 8, 0), (12, 52, 6, 6, 0), (33, 16, 8, 12, 0), (33, 26, 8, 12, 0)),
        (30, 50, 10, 5, 0),
    )
    grey = light(truth, [200, 55, 180, 180, 190])
    model = build_model(
        load_config("", ["MODEL.META_ARCHITECTURE", "Classical", "MODEL.DEVICE", "cpu"])
    )
    output = model([{"image": torch.from_numpy(grey).expand(3, -1, -1)}])[0]
    draw("classical", grey, truth, None, output["instances"].pred_masks)


if __name__ == "__main__":
    for failure in (classical, two_class, boundary_gap, caicedo_small, distance_two_maxima):
        failure()

"""Label image -> what a semantic network is trained to predict.

Labels are (H, W) integers of any type, 0 = background. The image border is no boundary and no
background: what a nucleus cut by a crop looks like beyond the cut is unknown, so the distance to
the cut does not count, no boundary is drawn along it, and a nucleus of which only the rim is left
has its centre there. Nuclei cut by the edge of a whole image, at test time, look the same.
"""

from collections.abc import Callable

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode
from scipy import ndimage

# Classes of the boundary targets; the two-class target has the first two.
BACKGROUND, INTERIOR, BOUNDARY = 0, 1, 2
# Class of pixels that no loss looks at: what pads the smaller images of a batch.
IGNORE = 255
CLASS_NAMES = {
    "two_class": ("background", "nucleus"),
    "boundary": ("background", "interior", "boundary"),
    "distance": ("background", "nucleus"),
}
_CROSS = np.array([[0, 1, 0], [1, 1, 1], [0, 1, 0]], np.uint8)


def flatten_labels(labels: np.ndarray) -> np.ndarray:
    """Layered labels (H, W, L), or (H, W), -> int32 (H, W).

    Where nuclei overlap, the smaller one gets the pixel, as in the label images on disk.
    """
    layers = np.moveaxis(np.atleast_3d(labels), 2, 0).astype(np.int32)
    flat = layers[0].copy()
    areas = np.bincount(layers.ravel()) if len(layers) > 1 else None
    for layer in layers[1:]:
        upper = (layer > 0) & ((flat == 0) | (areas[layer] < areas[flat]))
        flat[upper] = layer[upper]
    return flat


def two_class_target(labels: np.ndarray) -> np.ndarray:
    """1 inside nuclei, 0 outside: uint8 (H, W)."""
    return (labels > 0).astype(np.uint8)


def inner_boundary_target(labels: np.ndarray) -> np.ndarray:
    """Three classes; the boundary is the outermost pixel of each nucleus: uint8 (H, W).

    A boundary pixel has a 4-neighbour of another label. A nucleus too small to have an interior
    keeps the pixel nearest to its centre as interior, so that every nucleus has a seed.
    """
    target = two_class_target(labels)
    target[_near_other_label(labels) & (labels > 0)] = BOUNDARY
    has_seed = np.zeros(int(labels.max(initial=0)) + 1, bool)
    has_seed[labels[target == INTERIOR].astype(np.intp)] = True
    boxes = ndimage.find_objects(labels.astype(np.int32, copy=False))
    for label, box in enumerate(boxes, start=1):
        if box is not None and not has_seed[label]:
            pixels = np.argwhere(labels[box] == label)
            seed = pixels[((pixels - pixels.mean(axis=0)) ** 2).sum(axis=1).argmin()]
            target[box][tuple(seed)] = INTERIOR
    return target


def thick_boundary_target(labels: np.ndarray) -> np.ndarray:
    """Three classes; boundaries are two pixels thick, one on each side: uint8 (H, W).

    Caicedo et al., "Evaluation of deep learning strategies for nucleus segmentation in
    fluorescence images", Cytometry A 2019, as published: what skimage's
    ``find_boundaries(mode="thick")`` finds; a nucleus may be all boundary.
    """
    target = two_class_target(labels)
    target[_near_other_label(labels)] = BOUNDARY
    return target


def _near_other_label(labels: np.ndarray) -> np.ndarray:
    """Whether one of a pixel's 4 neighbours inside the image has another label: bool (H, W)."""
    labels = labels.astype(np.float32, copy=False)  # the only exact type here that OpenCV takes
    return cv2.dilate(labels, _CROSS) != cv2.erode(labels, _CROSS)


def distance_target(labels: np.ndarray) -> np.ndarray:
    """Depth inside the nucleus: float32 (H, W), 0 in the background, up to 1 in every nucleus.

    The Euclidean distance to the nearest pixel of another label, divided by its maximum in the
    nucleus.
    """
    target = np.zeros(labels.shape, np.float32)
    boxes = ndimage.find_objects(labels.astype(np.int32, copy=False))
    for label, box in enumerate(boxes, start=1):
        if box is None:
            continue
        # One pixel more on each side, unless the image ends there.
        y, x = (slice(max(0, s.start - 1), s.stop + 1) for s in box)
        mask = labels[y, x] == label
        depth = cv2.distanceTransform(mask.view(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
        target[y, x][mask] = (depth / depth.max())[mask]
    return target


def build_target(cfg: CfgNode) -> Callable[[np.ndarray], dict[str, torch.Tensor]] | None:
    """What MODEL.META_ARCHITECTURE needs besides instances; None for all but the UNet.

    Returns:
        Function of labels, (H, W) or (H, W, L) with overlapping nuclei in other layers, ->
        ``sem_seg``, uint8 (H, W), the classes of MODEL.UNET.TARGET, and with "distance" also
        ``distance``, float32 (H, W).
    """
    if cfg.MODEL.META_ARCHITECTURE != "UNet":
        return None
    with_distance = cfg.MODEL.UNET.TARGET == "distance"
    class_target = build_class_target(cfg)

    def target(labels: np.ndarray) -> dict[str, torch.Tensor]:
        labels = flatten_labels(labels)
        maps = {"sem_seg": torch.from_numpy(class_target(labels))}
        if with_distance:
            maps["distance"] = torch.from_numpy(distance_target(labels))
        return maps

    return target


def build_class_target(cfg: CfgNode) -> Callable[[np.ndarray], np.ndarray]:
    """Function of a (H, W) label image -> classes, uint8 (H, W), by the MODEL.UNET keys."""
    if cfg.MODEL.UNET.TARGET != "boundary":
        return two_class_target
    return {"inner": inner_boundary_target, "thick": thick_boundary_target}[cfg.MODEL.UNET.BOUNDARY]

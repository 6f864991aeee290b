"""One nucleus at a time: its mask cut to its bounding box; to and from label images."""

from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np
from detectron2.structures import Instances
from scipy import ndimage
from torch import Tensor

from nuclei_d2.structures.boxed_masks import BoxedMasks
from nuclei_d2.structures.label_masks import LabelMasks
from nuclei_d2.utils.errors import NucleiError

MAX_LABELS = np.iinfo(np.uint16).max


class CroppedMask(NamedTuple):
    """A binary mask cut to its bounding box, and where the box lies in the image.

    ``mask`` is (h, w) bool and touches all four sides; an empty mask has shape (0, 0).
    """

    mask: np.ndarray
    top: int
    left: int

    @property
    def area(self) -> int:
        """Number of pixels."""
        return int(np.count_nonzero(self.mask))

    @property
    def window(self) -> tuple[slice, slice]:
        """Index of the box in an image."""
        height, width = self.mask.shape
        return slice(self.top, self.top + height), slice(self.left, self.left + width)


def crop_mask(mask: np.ndarray) -> CroppedMask:
    """Cut a (H, W) mask, any type, nonzero = nucleus, to its bounding box."""
    mask = np.ascontiguousarray(mask, bool)
    left, top, width, height = cv2.boundingRect(mask.view(np.uint8)) if mask.size else (0,) * 4
    return CroppedMask(mask[top : top + height, left : left + width], top, left)


def split_masks(masks: np.ndarray | Tensor | LabelMasks | BoxedMasks) -> list[CroppedMask]:
    """The N instance masks of one image, whatever they come as; some may be empty.

    Args:
        masks: (N, H, W) array or tensor, nonzero = nucleus, or what stands for one.
    """
    if isinstance(masks, LabelMasks):
        layers = [dict(label_image_to_masks(layer)) for layer in masks.labels.cpu().numpy()]
        owners = zip(masks.layers.tolist(), masks.ids.tolist(), strict=True)
        empty = CroppedMask(np.zeros((0, 0), bool), 0, 0)
        return [layers[layer].get(label, empty) for layer, label in owners]
    if isinstance(masks, BoxedMasks):
        masks = masks.to("cpu")
        return [_box_crop(*masks.crop(k)) for k in range(len(masks))]
    masks = masks.cpu() if isinstance(masks, Tensor) else masks
    return [crop_mask(mask) for mask in np.asarray(masks)]


def _box_crop(top: int, left: int, mask: np.ndarray) -> CroppedMask:
    cropped = crop_mask(mask)
    return cropped._replace(top=top + cropped.top, left=left + cropped.left)


def label_image_to_masks(labels: np.ndarray) -> list[tuple[int, CroppedMask]]:
    """Split a (H, W) integer label image into (label, mask) pairs by increasing label; 0 is none.

    Every label is one mask, even where it has several components.
    """
    values, dense = np.unique(labels, return_inverse=True)
    dense = dense.reshape(labels.shape) + (1 if values.size and values[0] != 0 else 0)
    values = values[values != 0]
    masks = []
    for index, (value, window) in enumerate(
        zip(values.tolist(), ndimage.find_objects(dense), strict=True), start=1
    ):
        mask = dense[window] == index
        masks.append((value, CroppedMask(mask, window[0].start, window[1].start)))
    return masks


def masks_to_label_image(masks: Sequence[CroppedMask], size: tuple[int, int]) -> np.ndarray:
    """Paint ``masks`` into one image of ``size`` (H, W): mask k becomes label k + 1.

    Where masks overlap, the smaller one gets the pixel; of equally large ones the earlier.

    Returns:
        (H, W) uint16.

    Raises:
        NucleiError: more than 65,535 masks.
    """
    if len(masks) > MAX_LABELS:
        raise NucleiError(f"{len(masks)} nuclei in one image; a label image holds {MAX_LABELS}")
    labels = np.zeros(size, np.uint16)
    # Reversing the stable sort puts the smallest, and of equals the earliest, last: on top.
    for k in sorted(range(len(masks)), key=lambda k: masks[k].area)[::-1]:
        labels[masks[k].window][masks[k].mask] = k + 1
    return labels


def instances_to_masks(instances: Instances) -> tuple[list[CroppedMask], np.ndarray]:
    """Predictions of one image, and their scores.

    Args:
        instances: scores and pred_masks, in any of the forms that :func:`split_masks` takes.

    Returns:
        N masks, some perhaps empty, and (N,) float scores.
    """
    return split_masks(instances.pred_masks), instances.scores.cpu().numpy().astype(float)

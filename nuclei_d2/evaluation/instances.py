"""Nuclei of one image in the form that every metric starts from: a few dense label images.

Nuclei that do not overlap need one label image. Overlapping ones are spread over several, so
that nothing is lost and no mask is ever stored at the size of the image.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import cv2
import numpy as np

from nuclei_d2.data.datasets.coco import decode_counts
from nuclei_d2.structures.cropped_mask import CroppedMask


@dataclass(frozen=True)
class LabelLayers:
    """N nuclei of an H x W image.

    ``labels`` is (L, H, W), uint16 up to 65,535 nuclei and int32 above: 0 is background, 1..N
    are the nuclei. Each lies in one layer, and has a pixel unless it was made from an empty mask.
    L is 1 where none overlap.
    """

    labels: np.ndarray
    count: int

    @property
    def size(self) -> tuple[int, int]:
        """(H, W)."""
        return self.labels.shape[1:]

    @cached_property
    def places(self) -> list[np.ndarray]:
        """Flat indices of each layer's nucleus pixels."""
        return [np.flatnonzero(labels != 0) for labels in self.labels]

    @cached_property
    def interior(self) -> list[np.ndarray]:
        """(H, W) uint8 per layer, 1 where all 8 neighbours have the pixel's own label.

        This erodes every nucleus by a 3 x 3 square; outside the image is background.
        """
        return [_interior(labels) for labels in self.labels]

    @cached_property
    def outlines(self) -> list[np.ndarray]:
        """Flat indices of each layer's nucleus pixels that are not interior."""
        return [
            places[inside.reshape(-1)[places] == 0]
            for places, inside in zip(self.places, self.interior, strict=True)
        ]


def _interior(labels: np.ndarray) -> np.ndarray:
    if labels.dtype != np.uint16:
        labels = labels.astype(np.float32)  # OpenCV has no filters for int32; exact below 2^24
    square = np.ones((3, 3), np.uint8)
    smallest = cv2.erode(labels, square, borderType=cv2.BORDER_CONSTANT, borderValue=0)
    return ((smallest == cv2.dilate(labels, square)) & (smallest > 0)).view(np.uint8)


def layers_from_label_image(labels: np.ndarray) -> LabelLayers:
    """Number the labels of a (H, W) image of nonnegative integers 1..N by their first pixel.

    The labels' own values do not matter, so what a metric makes of a tie does not hang on them.
    """
    # Every label starts a run, and runs are few.
    flat = labels.reshape(-1)
    starts = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    values, first = np.unique(np.append(flat[:1], flat[starts]), return_index=True)
    values, first = values[values > 0], first[values > 0]
    count = len(values)
    numbers = np.zeros(count + 1, _dtype(count))
    numbers[1 + np.argsort(first)] = np.arange(1, count + 1)
    top = int(values[-1]) if count else 0
    if top < 1 << 24:
        lookup = np.zeros(top + 1, numbers.dtype)
        lookup[values] = numbers[1:]
        dense = np.take(lookup, labels)  # faster than lookup[labels]
    else:
        dense = numbers[np.searchsorted(values, labels, side="right")]
    return LabelLayers(dense[None], count)


def sorted_unique(values: np.ndarray) -> np.ndarray:
    """``np.unique`` of a 1-D array by sorting, which takes tens of thousands of integers faster."""
    values = np.sort(values)
    return values[np.append(True, values[1:] != values[:-1])[: len(values)]]


def _dtype(count: int) -> type:
    return np.uint16 if count < 1 << 16 else np.int32


def layers_from_masks(masks: Sequence[CroppedMask], size: tuple[int, int]) -> LabelLayers:
    """Nucleus k + 1 is the k-th of ``masks``; each goes to the first layer with room.

    Args:
        masks: they may overlap.
        size: (H, W) of the image.
    """
    dtype = _dtype(len(masks))
    layers = [np.zeros(size, dtype)]
    for label, boxed in enumerate(masks, start=1):
        for layer in layers:
            if not layer[boxed.window][boxed.mask].any():
                break
        else:
            layer = np.zeros(size, dtype)
            layers.append(layer)
        layer[boxed.window][boxed.mask] = label
    return LabelLayers(np.stack(layers), len(masks))


def layers_from_scored_masks(
    masks: Sequence[CroppedMask], scores: np.ndarray, size: tuple[int, int]
) -> LabelLayers:
    """Flatten overlapping predictions: a pixel belongs to the highest-scored mask that covers it.

    Of equal scores the earlier one gets it. Masks without any pixel left are dropped.

    Args:
        masks: they may overlap.
        scores: (N,) of the masks.
        size: (H, W) of the image.
    """
    image = np.zeros(size, np.int32)
    for k in np.argsort(-np.asarray(scores), kind="stable")[::-1]:
        image[masks[k].window][masks[k].mask] = k + 1
    return layers_from_label_image(image)


def layers_from_predictions(
    masks: Sequence[CroppedMask], scores: np.ndarray, threshold: float, gt: LabelLayers
) -> LabelLayers:
    """The predictions that label-based metrics compare with ``gt``; empty masks are left out.

    Where no nuclei overlap, predictions may not either: :func:`layers_from_scored_masks`. Where
    some do, every prediction keeps all its pixels.

    Args:
        masks: they may overlap.
        scores: (N,) of the masks.
        threshold: masks with a lower score are left out.
        gt: the nuclei of the same image.
    """
    sure = [k for k in np.flatnonzero(scores >= threshold) if masks[k].mask.size]
    chosen = [masks[k] for k in sure]
    if len(gt.labels) > 1:
        return layers_from_masks(chosen, gt.size)
    return layers_from_scored_masks(chosen, scores[sure], gt.size)


def rle_to_mask(rle: dict[str, Any]) -> CroppedMask:
    """Decode COCO's compressed RLE at the cost of its box, not of the image.

    Args:
        rle: ``{"size": [H, W], "counts": str or bytes}``.
    """
    ends = np.cumsum(decode_counts(rle["counts"]))
    starts, ends = ends[0::2][: len(ends) // 2], ends[1::2]
    starts, ends = starts[ends > starts], ends[ends > starts]
    if not starts.size:
        return CroppedMask(np.zeros((0, 0), bool), 0, 0)
    lengths = ends - starts
    before = np.cumsum(lengths) - lengths
    pixels = np.arange(lengths.sum()) + np.repeat(starts - before, lengths)
    columns, rows = np.divmod(pixels, rle["size"][0])
    top, left = int(rows.min()), int(columns[0])
    mask = np.zeros((int(rows.max()) - top + 1, int(columns[-1]) - left + 1), bool)
    mask[rows - top, columns - left] = True
    return CroppedMask(mask, top, left)

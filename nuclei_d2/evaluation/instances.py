"""Nuclei of one image in the form that every metric starts from: a few dense label images.

Nuclei that do not overlap need one label image. Overlapping ones are spread over several, so
that nothing is lost and no mask is ever stored at the size of the image.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from nuclei_d2.data.datasets.coco import BoxedMask


class LabelLayers(NamedTuple):
    """N nuclei of an H x W image.

    ``labels`` is (L, H, W), uint16 up to 65,535 nuclei and int32 above: 0 is background, 1..N
    are the nuclei. Each lies in one layer, and has a pixel unless it was made from an empty mask.
    L is 1 where none overlap.
    """

    labels: np.ndarray
    count: int

    @property
    def foreground(self) -> np.ndarray:
        """(H, W) bool: pixels of any nucleus."""
        return self.labels.any(axis=0)


def layers_from_label_image(labels: np.ndarray) -> LabelLayers:
    """Number the labels of a (H, W) image of nonnegative integers 1..N, in their order."""
    top = int(labels.max(initial=0))
    if top < max(labels.size, 1 << 16):
        present = np.zeros(top + 1, bool)
        present[labels.reshape(-1)] = True
        present[0] = False
        lookup = np.cumsum(present) * present
        count, dense = int(np.count_nonzero(present)), lookup
        return LabelLayers(dense.astype(_dtype(count))[labels][None], count)
    values, inverse = np.unique(labels, return_inverse=True)
    has_background = values[0] == 0
    dense = inverse.reshape(labels.shape) + (0 if has_background else 1)
    count = len(values) - int(has_background)
    return LabelLayers(dense.astype(_dtype(count))[None], count)


def _dtype(count: int) -> type:
    return np.uint16 if count < 1 << 16 else np.int32


def layers_from_masks(masks: Sequence[BoxedMask], size: tuple[int, int]) -> LabelLayers:
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
    masks: Sequence[BoxedMask], scores: np.ndarray, size: tuple[int, int]
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


def rle_to_mask(rle: dict[str, Any]) -> BoxedMask:
    """Decode COCO's compressed RLE at the cost of its box, not of the image.

    Args:
        rle: ``{"size": [H, W], "counts": str or bytes}``.
    """
    counts = rle["counts"]
    ends = np.cumsum(_decode_counts(counts.encode() if isinstance(counts, str) else counts))
    starts, ends = ends[0::2][: len(ends) // 2], ends[1::2]
    starts, ends = starts[ends > starts], ends[ends > starts]
    if not starts.size:
        return BoxedMask(np.zeros((0, 0), bool), 0, 0)
    lengths = ends - starts
    before = np.cumsum(lengths) - lengths
    pixels = np.arange(lengths.sum()) + np.repeat(starts - before, lengths)
    columns, rows = np.divmod(pixels, rle["size"][0])
    top, left = int(rows.min()), int(columns[0])
    mask = np.zeros((int(rows.max()) - top + 1, int(columns[-1]) - left + 1), bool)
    mask[rows - top, columns - left] = True
    return BoxedMask(mask, top, left)


def _decode_counts(text: bytes) -> np.ndarray:
    """Run lengths, background first, of a compressed RLE.

    pycocotools' maskApi.c, rleFrString: each character carries 5 bits, low ones first, and
    whether more follow; from the fourth number on, they are differences to the one two before.
    """
    digits = np.frombuffer(text, np.uint8).astype(np.int64) - 48
    if not digits.size:
        return digits
    last = np.flatnonzero(digits & 0x20 == 0)
    first = np.concatenate([[0], last[:-1] + 1])
    length = last - first + 1
    shift = 5 * (np.arange(last[-1] + 1) - np.repeat(first, length))
    values = np.add.reduceat((digits[: last[-1] + 1] & 0x1F) << shift, first)
    values -= np.where(digits[last] & 0x10, np.int64(1) << (5 * length), 0)
    values[1::2] = np.cumsum(values[1::2])
    values[2::2] = np.cumsum(values[2::2])
    return values

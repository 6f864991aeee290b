"""Which nuclei of an image share pixels, and which of two that are the same one stays."""

from dataclasses import dataclass

import numpy as np
import torch
from detectron2.structures import Instances

from nuclei_d2.inference.nuclei import Nuclei
from nuclei_d2.structures.box_pairs import near_pairs
from nuclei_d2.structures.cropped_mask import CroppedMask, instances_to_masks

DUPLICATE_IOU = 0.5  # of two nuclei
_DUPLICATE_CONTAINMENT = 0.7  # common pixels over those of the smaller one


@dataclass(frozen=True)
class Overlaps:
    """Pairs of nuclei of two sets, or of one, that share a pixel."""

    first: np.ndarray  # (K,) index into the first set
    second: np.ndarray  # (K,) index into the second set
    common: np.ndarray  # (K,) pixels
    areas: np.ndarray  # (K, 2) pixels of each of the two

    @property
    def iou(self) -> np.ndarray:
        """(K,) intersection over union."""
        return self.common / (self.areas.sum(axis=1) - self.common)

    @property
    def duplicates(self) -> np.ndarray:
        """(D, 2) indices of pairs that are the same nucleus, or of which one lies in the other."""
        contained = self.common / self.areas.min(axis=1)
        same = (self.iou >= DUPLICATE_IOU) | (contained >= _DUPLICATE_CONTAINMENT)
        return np.stack([self.first, self.second], axis=1)[same]


def find_overlaps(first: Nuclei, second: Nuclei) -> Overlaps:
    """All pairs with common pixels; the cost is that of comparing N x M boxes."""
    a, b = first.boxes[:, None], second.boxes[None]
    touching = (a[..., :2] < b[..., 2:]).all(axis=2) & (b[..., :2] < a[..., 2:]).all(axis=2)
    return _overlaps(first, second, *np.nonzero(touching))


def find_own_overlaps(nuclei: Nuclei) -> Overlaps:
    """All pairs of one set with common pixels, each once."""
    pairs = np.array(list(near_pairs(nuclei.boxes, 1)), int).reshape(-1, 2)
    return _overlaps(nuclei, nuclei, *pairs.T)


def _overlaps(first: Nuclei, second: Nuclei, i: np.ndarray, j: np.ndarray) -> Overlaps:
    """Those of the pairs (i, j), indices into the two sets, with common pixels."""
    common = [_common(first.masks[p], second.masks[q]) for p, q in zip(i, j, strict=True)]
    common = np.array(common, np.int64)
    i, j, common = i[common > 0], j[common > 0], common[common > 0]
    return Overlaps(i, j, common, np.stack([first.areas[i], second.areas[j]], axis=1))


def _common(a: CroppedMask, b: CroppedMask) -> int:
    top, left = max(a.top, b.top), max(a.left, b.left)
    bottom = min(a.top + a.mask.shape[0], b.top + b.mask.shape[0])
    right = min(a.left + a.mask.shape[1], b.left + b.mask.shape[1])
    parts = [m.mask[top - m.top : bottom - m.top, left - m.left : right - m.left] for m in (a, b)]
    return int(np.count_nonzero(parts[0] & parts[1]))


def keep_best(pairs: np.ndarray, best_first: np.ndarray) -> np.ndarray:
    """Of every pair of duplicates keep the better one.

    Args:
        pairs: (K, 2) indices of duplicates.
        best_first: (N,) all indices, in order of preference.

    Returns:
        (N,) bool; an index goes if a better one that stays is its duplicate.
    """
    partners: dict[int, list[int]] = {}
    for a, b in pairs.tolist():
        partners.setdefault(a, []).append(b)
        partners.setdefault(b, []).append(a)
    kept = np.ones(len(best_first), bool)
    for k in best_first.tolist():
        if kept[k] and k in partners:
            kept[partners[k]] = False
    return kept


def drop_duplicates(instances: Instances) -> Instances:
    """A prediction in which no nucleus is reported twice; of duplicates the better one stays.

    A detector's suppression compares boxes, and lets a fragment of a nucleus, or two neighbours
    taken for one, pass beside the nuclei.

    Args:
        instances: see :func:`~nuclei_d2.structures.cropped_mask.instances_to_masks`.

    Returns:
        Some of the instances, in their order.
    """
    masks, scores = instances_to_masks(instances)
    pairs = find_own_overlaps(Nuclei(masks, scores, instances.image_size)).duplicates
    kept = keep_best(pairs, np.argsort(-scores, kind="stable"))
    return instances[torch.from_numpy(kept)]

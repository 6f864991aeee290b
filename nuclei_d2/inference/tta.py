"""Test-time augmentation over the eight flips and rotations, and a vote on what they found."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from detectron2.data import transforms as T

from nuclei_d2.data.augmentation import Rotation90Transform
from nuclei_d2.inference.duplicates import DUPLICATE_IOU, find_own_overlaps, keep_best
from nuclei_d2.inference.nuclei import Nuclei, concatenate, sort, take
from nuclei_d2.structures.cropped_mask import CroppedMask, crop_mask


class View(NamedTuple):
    """Rotation counter-clockwise by ``turns`` * 90 degrees, then perhaps a mirror image."""

    turns: int = 0
    mirrored: bool = False

    def transform(self, height: int, width: int) -> T.TransformList:
        """For an upright image of this size; its ``inverse()`` turns results upright again."""
        turned_width = height if self.turns % 2 else width
        mirror = [T.HFlipTransform(turned_width)] if self.mirrored else []
        return T.TransformList([Rotation90Transform(height, width, self.turns), *mirror])


UPRIGHT = View()
VIEWS = tuple(View(turns, mirrored) for mirrored in (False, True) for turns in range(4))


def vote(views: Sequence[Nuclei]) -> Nuclei:
    """One answer from V answers for the same image.

    From the best score down, every nucleus gathers the one of each other view that it overlaps
    most, with a mask IoU of at least 0.5. A group stays if at least half of the views found it. Its
    mask has the pixels that at least half of its members have, its score and measures are their
    means, and of groups that are duplicates of each other the one found more often stays.

    Returns:
        Nuclei with one measure more, "agreement": the share of the views that found it, 0.5 to 1.
    """
    size = views[0].size
    members = concatenate(views, size)
    view_of = np.repeat(np.arange(len(views)), [len(nuclei) for nuclei in views])
    groups = [g for g in _gather(members, view_of) if 2 * len(g) >= len(views)]
    masks = [_majority([members.masks[k] for k in group]) for group in groups]
    columns = {"scores": members.scores, **members.measures}
    means = {
        name: np.array([values[group].mean() for group in groups])
        for name, values in columns.items()
    }
    scores = means.pop("scores")
    agreement = np.array([len(group) / len(views) for group in groups])
    found = Nuclei(masks, scores, size, {**means, "agreement": agreement})
    pairs = find_own_overlaps(found).duplicates
    return sort(take(found, keep_best(pairs, np.lexsort((-scores, -agreement)))))


def _gather(members: Nuclei, view_of: np.ndarray) -> list[list[int]]:
    """Groups of indices, at most one of each view, each index in one group."""
    overlaps = find_own_overlaps(members)
    similar = overlaps.iou >= DUPLICATE_IOU
    first, second = overlaps.first[similar], overlaps.second[similar]
    a, b, iou = np.r_[first, second], np.r_[second, first], np.tile(overlaps.iou[similar], 2)
    partners: dict[int, list[int]] = {}
    for k in np.lexsort((b, -iou)).tolist():
        partners.setdefault(int(a[k]), []).append(int(b[k]))
    groups, free = [], np.ones(len(members), bool)
    for seed in np.argsort(-members.scores, kind="stable").tolist():
        if not free[seed]:
            continue
        group = {view_of[seed]: seed}
        for k in partners.get(seed, ()):
            if free[k]:
                group.setdefault(view_of[k], k)
        groups.append(list(group.values()))
        free[groups[-1]] = False
    return groups


def _majority(masks: list[CroppedMask]) -> CroppedMask:
    """The pixels that at least half of the masks have."""
    top, left = min(m.top for m in masks), min(m.left for m in masks)
    bottom = max(m.top + m.mask.shape[0] for m in masks)
    right = max(m.left + m.mask.shape[1] for m in masks)
    votes = np.zeros((bottom - top, right - left), np.int64)
    for mask, y, x in masks:
        votes[y - top : y - top + mask.shape[0], x - left : x - left + mask.shape[1]] += mask
    boxed = crop_mask(2 * votes >= len(masks))
    return boxed._replace(top=boxed.top + top, left=boxed.left + left)

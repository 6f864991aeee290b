"""Boundary AP of scored predictions (Cheng et al., Boundary IoU, CVPR 2021), in percent.

COCO's average precision with min(mask IoU, boundary IoU) as the IoU of a pair. Only pairs that
overlap are looked at, so thousands of nuclei in an image are no problem.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from nuclei_d2.evaluation.boundary import BOUNDARIES, boundary_distances, compute_overlaps
from nuclei_d2.evaluation.instances import LabelLayers, layers_from_masks
from nuclei_d2.evaluation.matching import IOU_THRESHOLDS, Overlap
from nuclei_d2.evaluation.scores import boundary_iou
from nuclei_d2.structures.cropped_mask import CroppedMask

RECALLS = np.linspace(0, 1, 101)  # at which COCO takes the precision


class ScoredImage(NamedTuple):
    """One image's D best predictions, best first."""

    scores: np.ndarray  # (D,)
    hits: np.ndarray  # (4, 10, D) bool: true positive at each of BOUNDARIES and IOU_THRESHOLDS
    n_gt: int
    mask_hits: np.ndarray  # (10, D) bool: the same by mask IoU alone, COCO's "segm"


def match_scored(
    gt: LabelLayers, masks: Sequence[CroppedMask], scores: np.ndarray, max_dets: int
) -> ScoredImage:
    """COCO's matching in one image: best score first, each takes the free nucleus of largest IoU.

    Args:
        gt: the nuclei.
        masks: M predictions, which may overlap. Empty ones are false positives.
        scores: (M,) theirs. Equal ones keep their order, as in COCO.
        max_dets: only so many of the best take part.
    """
    best = np.argsort(-scores, kind="stable")[:max_dets]
    size = gt.size
    pred = layers_from_masks([masks[k] for k in best], size)
    overlap, boundaries = compute_overlaps(gt, pred, boundary_distances(size))
    hits = [_hits(overlap, boundary_iou(overlap, boundary)) for boundary in boundaries]
    return ScoredImage(scores[best], np.stack(hits), gt.count, _hits(overlap, overlap.iou))


def _hits(overlap: Overlap, iou: np.ndarray) -> np.ndarray:
    """(10, D) bool for predictions sorted by score."""
    hits = np.zeros((len(IOU_THRESHOLDS), len(overlap.pred_areas)), bool)
    # Of equal IoU COCO takes the last nucleus.
    order = np.lexsort((-overlap.gt, -iou, overlap.pred))
    pairs = list(zip(*(a[order].tolist() for a in (overlap.pred, overlap.gt, iou)), strict=True))
    for row, threshold in zip(hits, IOU_THRESHOLDS.tolist(), strict=True):
        taken = set()
        for pred, gt, value in pairs:
            if value >= threshold and gt not in taken and not row[pred]:
                taken.add(gt)
                row[pred] = True
    return hits


def boundary_ap(images: Iterable[ScoredImage]) -> dict[str, dict[str, float]]:
    """AP (mean over IoU .50:.05:.95), AP50 and AP75, in percent, for each of ``BOUNDARIES``.

    Returns:
        ``{"2%": {"AP": ..., "AP50": ..., "AP75": ...}, "1px": ...}``; NaN without nuclei.
    """
    images = list(images)
    n_gt = sum(image.n_gt for image in images)
    if not n_gt:
        return {name: dict.fromkeys(("AP", "AP50", "AP75"), float("nan")) for name in BOUNDARIES}
    order = np.argsort(-np.concatenate([image.scores for image in images]), kind="stable")
    hits = np.concatenate([image.hits for image in images], axis=2)[:, :, order]
    results = {}
    for name, rows in zip(BOUNDARIES, hits, strict=True):
        values = [100 * average_precision(row, n_gt) for row in rows]
        results[name] = {"AP": float(np.mean(values)), "AP50": values[0], "AP75": values[5]}
    return results


def average_precision(hits: np.ndarray, n_gt: int) -> float:
    """COCO's 101-point interpolated average precision, 0 to 1; see :func:`precision_curve`."""
    return float(precision_curve(hits, n_gt).mean())


def precision_curve(hits: np.ndarray, n_gt: int) -> np.ndarray:
    """COCO's interpolated precision: the best at this recall or a higher one, 0 if none gets there.

    Args:
        hits: (D,) bool, whether each prediction, best first, is a true positive.
        n_gt: nuclei, above 0.

    Returns:
        (101,) precision at :data:`RECALLS`, 0 to 1.
    """
    found = np.cumsum(hits)
    precision = found / np.arange(1, len(hits) + 1)
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    places = np.searchsorted(found / n_gt, RECALLS, side="left")
    return np.append(precision, 0)[places]

"""How much could be won by dividing pixels better that several predictions cover?

A detector's masks may overlap. Its boundary maps, or anything else, may help to say which nucleus
such a pixel belongs to; the ground truth says it best. All predictions are kept: dropping one is
another matter.
"""

from typing import Any

import numpy as np

from nuclei_d2.evaluation.boundary import compute_overlaps
from nuclei_d2.evaluation.inputs import GroundTruth, Predictions, ScoredMasks
from nuclei_d2.evaluation.instances import (
    LabelLayers,
    layers_from_label_image,
    layers_from_predictions,
)
from nuclei_d2.evaluation.matching import IOU_THRESHOLDS, true_positives


def contested_pixels(
    gt: GroundTruth, found: Predictions, score_threshold: float
) -> dict[str, Any] | None:
    """What a perfect division of the contested pixels of a test set gives.

    Returns:
        "pixels", the share of the predicted pixels that more than one prediction covers, and
        "accuracy", TP / (TP + FP + FN) of all images together at :data:`IOU_THRESHOLDS` if each of
        these went to a prediction of the nucleus that it belongs to. None without scores.
    """
    if not found.has_scores:
        return None
    matched, objects, pixels = np.zeros(len(IOU_THRESHOLDS)), 0, np.zeros(2)
    for name, source in gt.images.items():
        nuclei, scored = source.read(), found.images[name].read()
        divided, counts = divide(nuclei, scored, score_threshold)
        overlap, _ = compute_overlaps(nuclei, divided)
        matched += true_positives(overlap, overlap.iou)
        objects += len(overlap.gt_areas) + len(overlap.pred_areas)
        pixels += counts
    accuracy = matched / np.maximum(objects - matched, 1)
    return {"pixels": float(pixels[0] / max(pixels[1], 1)), "accuracy": accuracy.round(5).tolist()}


def divide(
    gt: LabelLayers, found: ScoredMasks, score_threshold: float
) -> tuple[LabelLayers, tuple[int, int]]:
    """Give every pixel to a prediction of its nucleus; where there is none, to the best prediction.

    A prediction is one of the nucleus that it covers most of. Where nuclei overlap, nothing is
    divided.

    Returns:
        The predictions with a sufficient score, and the numbers of their pixels: those that more
        than one of them covers, and all.
    """
    if len(gt.labels) > 1:
        return layers_from_predictions(found.masks, found.scores, score_threshold, gt), (0, 0)
    labels, covers = np.zeros((2, *gt.size), np.int32)
    merit = np.full(gt.size, -1.0)
    for k in np.flatnonzero(found.scores >= score_threshold):
        mask, window = found.masks[k].mask, found.masks[k].window
        truth = gt.labels[0][window]
        sizes = np.bincount(truth[mask], minlength=2)
        right = truth == 1 + sizes[1:].argmax()
        values = found.scores[k] + 2 * right  # scores are at most 1
        better = mask & (values > merit[window])
        labels[window][better], merit[window][better] = k + 1, values[better]
        covers[window] += mask
    return layers_from_label_image(labels), (int((covers > 1).sum()), int((covers > 0).sum()))

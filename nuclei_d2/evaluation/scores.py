"""All label-based metrics: what is kept of each image, and the numbers made of it.

Per image only counts and sums are kept, so data sets of any size, several processes and the
bootstrap all work on one small table.

Cases without nuclei:

* An image with neither nuclei nor predictions says nothing about any metric here: its values
  are undefined (NaN), it is left out of every mean over images, and is counted in
  ``n_images_empty``. (StarDist counts it as 0, Cellpose as NaN.)
* Nuclei without predictions, or predictions without nuclei, score 0 in every metric between 0
  and 1; distances are undefined.
* With no match at an IoU threshold, precision, recall, F1, accuracy and SQ are 0, as in StarDist
  and panopticapi.
* A pooled number over nothing is NaN (null in JSON).
"""

import csv
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import pairwise

import numpy as np

from nuclei_d2.evaluation.boundary import (
    BOUNDARIES,
    TOLERANCE,
    boundary_distances,
    compute_overlaps,
    outline_matches,
    surface_distances,
)
from nuclei_d2.evaluation.instances import LabelLayers
from nuclei_d2.evaluation.matching import (
    IOU_THRESHOLDS,
    SIZE_EDGES,
    Overlap,
    aji,
    aji_plus,
    match,
    panoptic_sums,
    segmentation_errors,
    size_bins,
    true_positives,
)
from nuclei_d2.utils.files import atomic_path

ERRORS = ("merges", "splits", "missed", "spurious")
_THRESHOLD_NAMES = tuple(f"{t:.2f}" for t in IOU_THRESHOLDS)
_EDGES = (0, *SIZE_EDGES, "inf")
SIZE_NAMES = tuple(f"{a}-{b}" for a, b in pairwise(_EDGES))

# A metric's place in the JSON, such as ("pooled", "f1", "0.50").
Path = tuple[str, ...]
# The numbers that tables show.
HEADLINE: tuple[Path, ...] = (
    *(("pooled", "f1", t) for t in ("0.50", "0.75", "mean")),
    *(("pooled", "accuracy", t) for t in ("0.50", "0.75", "mean")),
    ("pooled", "precision", "0.50"),
    ("pooled", "recall", "0.50"),
    ("pooled", "pq"),
    ("pooled", "mean_matched_iou"),
    ("image_mean", "f1", "mean"),
    ("image_mean", "accuracy", "mean"),
    *(("image_mean", name) for name in ("aji", "aji_plus", "pq", "sq", "dq", "dice")),
    *(("boundary", name) for name in ("f1", "nsd", "hd95")),
    *(("boundary", "iou", name) for name in BOUNDARIES),
    *(("errors", name) for name in ERRORS),
)


def is_better_high(path: Path) -> bool:
    """Whether a higher value is the better one; not so of errors and distances."""
    return path[0] != "errors" and path[-1] != "hd95"


# What the numbers mean, by the last or last but one part of their place.
DEFINITIONS = {
    "f1": "2 TP / (nuclei + predictions) at IoU >= t, one to one; mean over .50:.05:.95",
    "accuracy": "TP / (TP + FP + FN) at IoU >= t: the DSB 2018 score",
    "precision": "TP / predictions at IoU >= t",
    "recall": "TP / nuclei at IoU >= t",
    "pq": "sum of IoU > 0.5 / (TP + FP/2 + FN/2)",
    "sq": "mean IoU of the pairs with IoU > 0.5",
    "dq": "TP / (TP + FP/2 + FN/2) at IoU > 0.5",
    "mean_matched_iou": "mean IoU of the pairs matched at IoU >= 0.5",
    "aji": "aggregated Jaccard index: greedy, predictions reusable (Kumar)",
    "aji_plus": "AJI with one-to-one pairs",
    "dice": "2 common / all foreground pixels",
    "boundary f1": f"outline pixels within {TOLERANCE:g} px of the other side's, any nucleus",
    "nsd": f"matched pairs' outline pixels within {TOLERANCE:g} px of each other",
    "hd95": "95 % Hausdorff distance of matched outlines, px",
    "iou": "matched pairs' min(mask IoU, IoU of boundaries so thick)",
    "merges": "predictions with IoU > 0.1 to several nuclei",
    "splits": "nuclei with IoU > 0.1 to several predictions",
    "missed": "nuclei without a prediction of IoU > 0.7",
    "spurious": "predictions without a nucleus of IoU > 0.7",
}


def definition(path: Path) -> str:
    """What the metric at ``path`` is, in a few words."""
    for key in (" ".join(path), path[-1], path[-2]):
        if key in DEFINITIONS:
            return DEFINITIONS[key]
    raise KeyError(path)


@dataclass(frozen=True)
class ImageScores:
    """Counts and sums of one image; areas in pixels, distances in pixels."""

    n_gt: int
    n_pred: int
    true_positives: np.ndarray  # (10,) at IOU_THRESHOLDS
    panoptic_matches: int  # IoU > 0.5
    panoptic_iou: float  # sum of theirs
    aji: float
    aji_plus: float
    common_pixels: int  # foreground of both
    foreground_pixels: int  # of ground truth plus of prediction
    matched_iou: float  # sum over the matches at IoU 0.5
    boundary_iou: np.ndarray  # (4,) sums over the same matches, at BOUNDARIES
    boundary_true_positives: np.ndarray  # (4, 10) with boundary IoU in place of IoU
    hausdorff: float  # sum over the same matches
    surface: float  # sum over the same matches of the normalised surface distance
    outline_pixels: np.ndarray  # (4,) see outline_matches
    errors: np.ndarray  # (4, 4) counts: ERRORS x sizes
    gt_sizes: np.ndarray  # (4,) nuclei by size
    pred_sizes: np.ndarray  # (4,) predictions by size
    found_sizes: np.ndarray  # (4,) nuclei matched at IoU 0.5, by size


def score_image(gt: LabelLayers, pred: LabelLayers) -> ImageScores:
    """Measure one image.

    Args:
        gt: the nuclei.
        pred: what was found, in an image of the same size.
    """
    overlap, boundaries = compute_overlaps(gt, pred, boundary_distances(gt.size))
    boundary_ious = [boundary_iou(overlap, boundary) for boundary in boundaries]
    pairs = match(overlap, overlap.iou, IOU_THRESHOLDS[0])
    hausdorff, surface = surface_distances(gt, pred, overlap, pairs)
    panoptic_matches, panoptic_iou = panoptic_sums(overlap)
    gt_bins, pred_bins = size_bins(overlap.gt_areas), size_bins(overlap.pred_areas)
    common, foreground = _foreground_pixels(gt, pred, overlap)
    return ImageScores(
        n_gt=gt.count,
        n_pred=pred.count,
        true_positives=true_positives(overlap, overlap.iou),
        panoptic_matches=panoptic_matches,
        panoptic_iou=panoptic_iou,
        aji=aji(overlap),
        aji_plus=aji_plus(overlap),
        common_pixels=common,
        foreground_pixels=foreground,
        matched_iou=float(overlap.iou[pairs].sum()),
        boundary_iou=np.array([iou[pairs].sum() for iou in boundary_ious]),
        boundary_true_positives=np.stack([true_positives(overlap, iou) for iou in boundary_ious]),
        hausdorff=float(hausdorff.sum()),
        surface=float(surface.sum()),
        outline_pixels=np.array(outline_matches(gt, pred)),
        errors=_errors_by_size(overlap, gt_bins, pred_bins),
        gt_sizes=_count(gt_bins),
        pred_sizes=_count(pred_bins),
        found_sizes=_count(gt_bins[overlap.gt[pairs]]),
    )


def _foreground_pixels(gt: LabelLayers, pred: LabelLayers, overlap: Overlap) -> tuple[int, int]:
    """Pixels that are foreground in both, and the sum of both sides' foreground pixels."""
    if len(gt.labels) == len(pred.labels) == 1:  # nothing overlaps: masks add up
        areas = overlap.gt_areas.sum() + overlap.pred_areas.sum()
        return int(overlap.intersection.sum()), int(areas)
    first, second = (side.labels.any(axis=0) for side in (gt, pred))
    return (
        int(np.count_nonzero(first & second)),
        int(np.count_nonzero(first) + np.count_nonzero(second)),
    )


def boundary_iou(mask: Overlap, boundary: Overlap) -> np.ndarray:
    """(K,) the smaller of mask IoU and boundary IoU (Cheng et al., CVPR 2021, section 4.2).

    The minimum keeps two masks with equal boundaries of which one is hollow from scoring 1.
    """
    return np.minimum(mask.iou, boundary.iou)


def _errors_by_size(overlap: Overlap, gt_bins, pred_bins) -> np.ndarray:
    flags = segmentation_errors(overlap)
    bins = {"merges": pred_bins, "splits": gt_bins, "missed": gt_bins, "spurious": pred_bins}
    return np.stack([_count(bins[name][flags[name]]) for name in ERRORS])


def _count(bins: np.ndarray) -> np.ndarray:
    return np.bincount(bins, minlength=len(SIZE_NAMES))


class ScoreTable:
    """The scores of n images of one prediction set, and every metric for any weighting of them."""

    def __init__(self, images: Sequence[ImageScores]):
        self._columns = {
            field.name: np.array([getattr(image, field.name) for image in images], float)
            for field in fields(ImageScores)
        }
        self.n_images = len(images)

    @property
    def n_images_empty(self) -> int:
        """Images with neither nuclei nor predictions."""
        return int(np.count_nonzero(~self._is_filled()))

    def _is_filled(self) -> np.ndarray:
        return self._columns["n_gt"] + self._columns["n_pred"] > 0

    def image_metrics(self) -> dict[Path, np.ndarray]:
        """(n,) value of each metric of ``image_mean`` for each image; NaN for empty ones."""
        c = self._columns
        rates = detection_rates(c["true_positives"], c["n_gt"][:, None], c["n_pred"][:, None])
        metrics = _by_threshold(rates)
        metrics[("aji",)], metrics[("aji_plus",)] = c["aji"], c["aji_plus"]
        metrics.update(_pixels_and_panoptic(c))
        return metrics

    def metrics(self, weights: np.ndarray | None = None) -> dict[Path, np.ndarray]:
        """Every metric, by its place in the JSON.

        Args:
            weights: (B, n) how often each image counts; None counts each once, B = 1.

        Returns:
            (B,) float arrays.
        """
        if weights is None:
            weights = np.ones((1, self.n_images))
        totals = {key: np.tensordot(weights, value, 1) for key, value in self._columns.items()}
        metrics = {}
        rates = detection_rates(
            totals["true_positives"], totals["n_gt"][:, None], totals["n_pred"][:, None]
        )
        metrics.update(_below("pooled", {**_by_threshold(rates), **_pixels_and_panoptic(totals)}))
        metrics["pooled", "mean_matched_iou"] = _ratio(
            totals["matched_iou"], totals["true_positives"][:, 0]
        )
        filled = self._is_filled()
        share = weights[:, filled]
        for path, values in self.image_metrics().items():
            metrics[("image_mean", *path)] = _ratio(share @ values[filled], share.sum(axis=1))
        metrics.update(_below("boundary", _boundary_metrics(totals)))
        for k, name in enumerate(ERRORS):
            metrics["errors", name] = totals["errors"][:, k].sum(axis=1)
        return metrics

    def summary(self) -> dict:
        """Every number of the set, nested as in the JSON of ``tools/evaluate.py``."""
        values = {path: float(value[0]) for path, value in self.metrics().items()}
        nested = nest(values)
        totals = {key: value.sum(axis=0) for key, value in self._columns.items()}
        nested["errors"] = {name: int(count) for name, count in nested["errors"].items()}
        nested["errors"]["by_size"] = _sizes(totals)
        nested["boundary"]["tolerance_px"] = TOLERANCE
        counts = {key: int(totals[key]) for key in ("n_gt", "n_pred")}
        return {
            "n_images": self.n_images,
            "n_images_empty": self.n_images_empty,
            **counts,
            **nested,
        }


def detection_rates(tp: np.ndarray, n_gt: np.ndarray, n_pred: np.ndarray) -> dict[str, np.ndarray]:
    """F1, precision, recall and accuracy = TP / (TP + FP + FN) of any shape.

    F1 = 2 TP / (N + M) and so on for N nuclei, M predictions. The accuracy is Kaggle's DSB 2018
    score, and what Cellpose and StarDist call average precision.
    """
    nothing = n_gt + n_pred == 0
    rates = {
        "f1": 2 * tp / np.maximum(n_gt + n_pred, 1),
        "precision": tp / np.maximum(n_pred, 1),
        "recall": tp / np.maximum(n_gt, 1),
        "accuracy": tp / np.maximum(n_gt + n_pred - tp, 1),
    }
    return {name: np.where(nothing, np.nan, rate) for name, rate in rates.items()}


def _by_threshold(rates: dict[str, np.ndarray]) -> dict[Path, np.ndarray]:
    """Split (B, 10) arrays by threshold, and add their mean."""
    split = {}
    for name, rate in rates.items():
        for k, threshold in enumerate(_THRESHOLD_NAMES):
            split[name, threshold] = rate[:, k]
        split[name, "mean"] = rate.mean(axis=1)
    return split


def _pixels_and_panoptic(c: dict[str, np.ndarray]) -> dict[Path, np.ndarray]:
    """PQ, SQ, DQ and pixel Dice = 2 |A and B| / (|A| + |B|) of the foregrounds A and B."""
    objects = (c["n_gt"] + c["n_pred"]) / 2
    nothing = objects == 0
    matches = c["panoptic_matches"]
    return {
        ("pq",): _ratio(c["panoptic_iou"], objects),
        ("sq",): np.where(nothing, np.nan, c["panoptic_iou"] / np.maximum(matches, 1)),
        ("dq",): _ratio(matches, objects),
        ("dice",): np.where(
            nothing, np.nan, 2 * c["common_pixels"] / np.maximum(c["foreground_pixels"], 1)
        ),
    }


def _boundary_metrics(totals: dict[str, np.ndarray]) -> dict[Path, np.ndarray]:
    """All pooled: over outline pixels, or over the pairs matched at IoU 0.5."""
    near_pred, all_pred, near_gt, all_gt = totals["outline_pixels"].T
    precision, recall = near_pred / np.maximum(all_pred, 1), near_gt / np.maximum(all_gt, 1)
    f1 = 2 * precision * recall / np.where(precision + recall > 0, precision + recall, 1)
    nothing = all_pred + all_gt == 0
    outlines = {"f1": f1, "precision": precision, "recall": recall}
    metrics = {(name,): np.where(nothing, np.nan, value) for name, value in outlines.items()}
    matches = totals["true_positives"][:, 0]
    metrics[("hd95",)] = _ratio(totals["hausdorff"], matches)
    metrics[("nsd",)] = _ratio(totals["surface"], matches)
    for k, name in enumerate(BOUNDARIES):
        metrics["iou", name] = _ratio(totals["boundary_iou"][:, k], matches)
        rates = detection_rates(
            totals["boundary_true_positives"][:, k],
            totals["n_gt"][:, None],
            totals["n_pred"][:, None],
        )
        metrics.update(_below(f"instance_f1_{name}", _by_threshold({"f1": rates["f1"]}), drop=1))
    return metrics


def _below(name: str, metrics: dict[Path, np.ndarray], drop: int = 0) -> dict[Path, np.ndarray]:
    return {(name, *path[drop:]): values for path, values in metrics.items()}


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """NaN where the denominator is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(denominator > 0, numerator / denominator, np.nan)


def _sizes(totals: dict[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """Counts by area in px^2: of the nucleus for splits and missed, else of the prediction."""
    table = {}
    for k, size in enumerate(SIZE_NAMES):
        n_gt = int(totals["gt_sizes"][k])
        counts = {name: int(totals["errors"][e, k]) for e, name in enumerate(ERRORS)}
        recall = float(totals["found_sizes"][k] / n_gt) if n_gt else float("nan")
        table[size] = {
            "n_gt": n_gt,
            "n_pred": int(totals["pred_sizes"][k]),
            "recall_0.50": recall,
            **counts,
        }
    return table


def nest(values: dict[Path, float]) -> dict:
    """``{("a", "b"): 1}`` -> ``{"a": {"b": 1}}``."""
    result: dict = {}
    for path, value in values.items():
        node = result
        for part in path[:-1]:
            node = node.setdefault(part, {})
        node[path[-1]] = value
    return result


def write_per_image(
    path: str | os.PathLike, names: Sequence[str], images: Sequence[ImageScores]
) -> None:
    """Write one CSV line per image, atomically; undefined values stay empty.

    Names of files need not be Unicode: other bytes are written as ``\\udcff``.
    """
    metrics = ScoreTable(images).image_metrics()
    columns = {"_".join(key): values.tolist() for key, values in metrics.items()}
    encoding = {"encoding": "utf-8", "errors": "backslashreplace"}
    with atomic_path(path) as temporary, temporary.open("w", newline="", **encoding) as file:
        writer = csv.writer(file)
        writer.writerow(["image", "n_gt", "n_pred", *ERRORS, *columns])
        for k, (name, image) in enumerate(zip(names, images, strict=True)):
            values = (column[k] for column in columns.values())
            writer.writerow(
                [
                    *(name, image.n_gt, image.n_pred),
                    *image.errors.sum(axis=1).tolist(),
                    *("" if np.isnan(value) else f"{value:.6f}" for value in values),
                ]
            )

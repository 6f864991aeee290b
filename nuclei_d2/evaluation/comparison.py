"""Measure prediction files against ground-truth files: what ``tools/evaluate.py`` does."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from detectron2.structures import BoxMode
from tqdm import tqdm

from nuclei_d2.data.datasets.coco import mask_to_annotation
from nuclei_d2.evaluation.bootstrap import (
    LEVEL,
    bootstrap_intervals,
    paired_differences,
    sample_warning,
)
from nuclei_d2.evaluation.boundary_ap import ScoredImage, boundary_ap, match_scored
from nuclei_d2.evaluation.coco_evaluation import AREA_RANGES, coco_ap, dataset_to_coco
from nuclei_d2.evaluation.inputs import GroundTruth, Predictions, ScoredMasks
from nuclei_d2.evaluation.instances import (
    LabelLayers,
    layers_from_predictions,
)
from nuclei_d2.evaluation.matching import IOU_THRESHOLDS
from nuclei_d2.evaluation.scores import HEADLINE, ImageScores, ScoreTable, nest, score_image
from nuclei_d2.structures.cropped_mask import label_image_to_masks
from nuclei_d2.utils.errors import NucleiError


@dataclass(frozen=True)
class Evaluation:
    """One prediction set, measured. Lists are in the order of ``names``."""

    predictions: Predictions
    names: list[str]
    images: list[ImageScores]
    table: ScoreTable
    coco: dict[str, Any] | None  # where scores exist; AP in percent
    scored: list[ScoredImage]  # where scores exist; else empty
    warnings: list[str]


def evaluate_files(
    truth: GroundTruth,
    predictions: Sequence[Predictions],
    score_threshold: float = 0.5,
    max_dets: int | None = None,
) -> list[Evaluation]:
    """Measure every prediction set on all images of ``truth``, in the order of their names.

    Args:
        truth: from ``open_ground_truth``.
        predictions: each from ``open_predictions``.
        score_threshold: scored predictions below it are left out of the label-based metrics.
        max_dets: instance cap per image of COCO's and boundary AP; None: no cap.

    Raises:
        NucleiError: a file is unreadable or of another size than its ground truth.
    """
    sets = [_Collector(part, score_threshold, max_dets) for part in predictions]
    for name in tqdm(sorted(truth.images), "evaluating", unit="image"):
        gt = truth.images[name].read()
        if isinstance(gt, ScoredMasks):
            raise NucleiError(f"{truth.images[name].where}: ground truth has no scores")
        for part in sets:
            part.add(name, truth, gt)
    return [part.finish() for part in sets]


class _Collector:
    """Gathers one prediction set's numbers image by image; keeps no image."""

    def __init__(self, predictions: Predictions, score_threshold: float, max_dets: int | None):
        self.predictions = predictions
        self.score_threshold = score_threshold
        self.max_dets = max_dets
        self.names: list[str] = []
        self.images: list[ImageScores] = []
        self.scored: list[ScoredImage] = []
        self.records: list[dict[str, Any]] = []
        self.results: list[dict[str, Any]] = []
        self.counts: list[int] = []  # scored predictions of each image, whatever the cap
        self.n_sure = self.n_hidden = 0  # sure predictions, and those of them without a label

    def add(self, name: str, truth: GroundTruth, gt: LabelLayers) -> None:
        source = self.predictions.images[name]
        found = source.read()
        self.names.append(name)
        if isinstance(found, ScoredMasks):
            self._add_scored(name, truth, gt, found)
            found = self._labels_of(found, gt)
        _check_size(gt, found, truth.images[name].where, source.where)
        self.images.append(score_image(gt, found))

    def _add_scored(
        self, name: str, truth: GroundTruth, gt: LabelLayers, found: ScoredMasks
    ) -> None:
        image_id = len(self.names)
        self.counts.append(len(found.masks))
        record = truth.records.get(name) or _record(name, gt)
        self.records.append({**record, "image_id": image_id})
        self.scored.append(match_scored(gt, found.masks, found.scores, self._cap(found)))
        self.results += [{**result, "image_id": image_id} for result in found.results]

    def _labels_of(self, found: ScoredMasks, gt: LabelLayers) -> LabelLayers:
        layers = layers_from_predictions(found.masks, found.scores, self.score_threshold, gt)
        sure = int((found.scores >= self.score_threshold).sum())
        self.n_sure += sure
        self.n_hidden += sure - layers.count
        return layers

    def _cap(self, found: ScoredMasks) -> int:
        return len(found.masks) if self.max_dets is None else self.max_dets

    def finish(self) -> Evaluation:
        table = ScoreTable(self.images)
        coco = self._coco() if self.predictions.has_scores else None
        return Evaluation(
            predictions=self.predictions,
            names=self.names,
            images=self.images,
            table=table,
            coco=coco,
            scored=self.scored,
            warnings=self._warnings(table),
        )

    def _coco(self) -> dict[str, Any]:
        most = max((len(image.scores) for image in self.scored), default=0)
        max_dets = max(1, most) if self.max_dets is None else self.max_dets
        truth = dataset_to_coco(self.records)
        return {
            "unit": "percent",
            "max_dets": max_dets,
            **{task: coco_ap(truth, self.results, task, max_dets) for task in ("bbox", "segm")},
            "boundary": boundary_ap(self.scored),
        }

    def _warnings(self, table: ScoreTable) -> list[str]:
        path, found = self.predictions.path, []
        if few := sample_warning(table.n_images):
            found.append(few)
        if not any(image.n_gt for image in self.images):
            found.append("the ground truth has no nuclei at all")
        if not any(image.n_pred for image in self.images):
            found.append(f"{path}: no predictions count; the score threshold may be too high")
        if self.n_hidden:
            found.append(
                f"{path}: {self.n_hidden} of {self.n_sure} sure predictions lie wholly under "
                "others, or are empty, and count for AP only"
            )
        scores = {result["score"] for result in self.results}
        if len(self.results) > 1 and len(scores) == 1:
            found.append(f"{path}: all scores are {scores.pop():g}; AP then has no meaning")
        return found + self._cap_warnings()

    def _cap_warnings(self) -> list[str]:
        path, most = self.predictions.path, max(self.counts, default=0)
        if self.max_dets is not None:
            cut = sum(count > self.max_dets for count in self.counts)
            binds = f"{path}: the cap of {self.max_dets} instances binds in {cut} images"
            return [binds] if cut else []
        full = self.counts.count(most)
        if full < 3 or not most or most % 100:
            return []
        return [
            f"{path}: {full} images have exactly {most} predictions, as many as any; if that is "
            "the program's own cap, raise it"
        ]


def _check_size(gt: LabelLayers, pred: LabelLayers, gt_file: str, pred_file: str) -> None:
    first, second = gt.size, pred.size
    if first == second:
        return
    sizes = [" x ".join(map(str, size)) for size in (second, first)]
    ratios = {round(b / a, 3) for a, b in zip(first, second, strict=True) if a}
    scale = f", {ratios.pop():g} times as large" if len(ratios) == 1 else ""
    raise NucleiError(
        f"{pred_file} is {sizes[0]} pixels{scale}, its ground truth {gt_file} {sizes[1]}; "
        "predict at the size of the image"
    )


def _record(name: str, gt: LabelLayers) -> dict[str, Any]:
    """Dataset dict of label images, for COCO's evaluation."""
    size = gt.size
    masks = dict(pair for layer in gt.labels for pair in label_image_to_masks(layer))
    annotations = [{**mask_to_annotation(masks[k], size), **_BOX} for k in sorted(masks)]
    return {"file_name": name, "height": size[0], "width": size[1], "annotations": annotations}


_BOX = {"bbox_mode": BoxMode.XYWH_ABS, "category_id": 0}


def to_json(evaluation: Evaluation, weights: np.ndarray, settings: dict[str, Any]) -> dict:
    """Everything measured of one prediction set, with bootstrap intervals.

    Args:
        evaluation: of the set.
        weights: (B, n) from ``bootstrap_weights``.
        settings: written beside the numbers.
    """
    content = evaluation.table.summary()
    if evaluation.coco is not None:
        content["coco"] = evaluation.coco
    content["intervals"] = nest(bootstrap_intervals(evaluation.table, weights))
    content["warnings"] = evaluation.warnings
    content["settings"] = {
        **settings,
        "predictions": evaluation.predictions.path,
        "iou_thresholds": IOU_THRESHOLDS,
        "area_ranges_px2": AREA_RANGES,
        "interval_level": LEVEL,
        "resamples": len(weights),
    }
    return content


def compare(
    names: Sequence[str], evaluations: Sequence[Evaluation], weights: np.ndarray
) -> dict[str, dict]:
    """Paired differences of the headline numbers: every later set minus the first."""
    first = evaluations[0].table
    differences = {}
    for name, other in zip(names[1:], evaluations[1:], strict=True):
        parts = paired_differences(first, other.table, weights)
        differences[f"{name} - {names[0]}"] = nest({path: parts[path] for path in HEADLINE})
    return differences

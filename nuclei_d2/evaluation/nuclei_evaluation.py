"""What biologists and challenges ask of nuclei, beside COCO's AP, for Detectron2 models."""

import logging
from collections import OrderedDict
from functools import cached_property
from pathlib import Path

from detectron2.data import DatasetCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from tabulate import tabulate

from nuclei_d2.data.datasets.coco import annotations_as_rle
from nuclei_d2.evaluation.bootstrap import bootstrap_intervals, bootstrap_weights
from nuclei_d2.evaluation.boundary_ap import ScoredImage, boundary_ap, match_scored
from nuclei_d2.evaluation.instances import (
    LabelLayers,
    layers_from_masks,
    layers_from_predictions,
    rle_to_mask,
)
from nuclei_d2.evaluation.scores import HEADLINE, ImageScores, ScoreTable, nest, score_image
from nuclei_d2.structures.cropped_mask import instances_to_masks
from nuclei_d2.utils.files import write_json

_logger = logging.getLogger(__name__)


class NucleiEvaluator(DatasetEvaluator):
    """Label-based metrics and boundary AP of one registered data set.

    Label-based metrics need decisions: predictions with a score below a threshold are left out,
    and unless nuclei overlap, a pixel that several cover belongs to the one with the highest
    score. Boundary AP takes all predictions up to the cap. Only counts and sums of each image
    are kept and gathered.
    """

    def __init__(
        self,
        dataset_name: str,
        *,
        score_threshold: float,
        max_dets: int,
        output_dir: str | None = None,
    ):
        """
        Args:
            dataset_name: registered data set; its dicts are the ground truth.
            score_threshold: least score for the label-based metrics (``TEST.SCORE_THRESH_LABELS``).
            max_dets: instance cap per image (``TEST.DETECTIONS_PER_IMAGE``).
            output_dir: where ``nuclei_metrics.json`` goes; None writes no file.
        """
        self._dataset_name = dataset_name
        self._score_threshold = score_threshold
        self._max_dets = max_dets
        self._output_dir = output_dir
        self._images: dict[int | str, tuple[ImageScores, ScoredImage]] = {}

    def reset(self) -> None:
        self._images = {}

    @cached_property
    def _records(self) -> dict[int | str, dict]:
        return {record["image_id"]: record for record in DatasetCatalog.get(self._dataset_name)}

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        """Measure one batch: dataset dicts with image_id, and the model's ``instances``."""
        for record, output in zip(inputs, outputs, strict=True):
            image_id = record["image_id"]
            gt = record_to_layers(self._records[image_id])
            masks, scores = instances_to_masks(output["instances"])
            pred = layers_from_predictions(masks, scores, self._score_threshold, gt)
            self._images[image_id] = (
                score_image(gt, pred),
                match_scored(gt, masks, scores, self._max_dets),
            )

    def evaluate(self) -> OrderedDict | None:
        """``{"nuclei": {...}, "boundary": {...}}``; None but on the main process.

        "nuclei" holds the headline numbers, fractions from 0 to 1, named by their place in the
        JSON file (``pooled_f1_0.50``); "boundary" the boundary AP in percent. Empty, with a
        warning, if no image was processed.
        """
        gathered = comm.gather(self._images, dst=0)
        if not comm.is_main_process():
            return None
        images = {image_id: scores for part in gathered for image_id, scores in part.items()}
        if not images:
            _logger.warning(f"{self._dataset_name}: no predictions were made")
            return OrderedDict()
        images = [images[image_id] for image_id in sorted(images)]
        table = ScoreTable([image[0] for image in images])
        aps = boundary_ap(image[1] for image in images)
        if self._output_dir:
            self._write(table, aps)
        values = table.metrics()
        results = OrderedDict(
            nuclei={"_".join(path): float(values[path][0]) for path in HEADLINE},
            boundary={f"AP_{name}": ap["AP"] for name, ap in aps.items()},
        )
        _logger.info(
            f"{self._dataset_name}: fractions of 1, distances in px, predictions with score >= "
            f"{self._score_threshold}:\n{tabulate(results['nuclei'].items(), floatfmt='.4f')}\n"
            f"Boundary AP in percent, at most {self._max_dets} instances an image:\n"
            f"{tabulate(results['boundary'].items(), floatfmt='.2f')}"
        )
        return results

    def _write(self, table: ScoreTable, aps: dict) -> None:
        intervals = bootstrap_intervals(table, bootstrap_weights(table.n_images))
        content = {
            **table.summary(),
            "boundary_ap_percent": aps,
            "intervals": nest(intervals),
            "score_threshold": self._score_threshold,
        }
        write_json(Path(self._output_dir) / "nuclei_metrics.json", content)


def record_to_layers(record: dict) -> LabelLayers:
    """Nuclei of a Detectron2 dataset dict; crowds and empty masks are left out."""
    masks = [
        rle_to_mask(annotation["segmentation"])
        for annotation in annotations_as_rle(record)
        if not annotation.get("iscrowd", 0)
    ]
    masks = [boxed for boxed in masks if boxed.mask.size]
    return layers_from_masks(masks, (record["height"], record["width"]))

"""COCO box and mask AP at one stated instance cap, for images with hundreds of nuclei."""

import logging
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from detectron2.data import DatasetCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import BoxMode, Instances
from detectron2.utils import comm
from detectron2.utils.logger import create_small_table
from faster_coco_eval import COCO, COCOeval_faster
from pycocotools import mask as mask_util

from nuclei_d2.data.datasets.coco import annotations_as_rle, mask_to_rle
from nuclei_d2.evaluation.coco_parts import cut_into_parts
from nuclei_d2.structures.cropped_mask import split_masks
from nuclei_d2.utils.errors import NucleiError
from nuclei_d2.utils.files import write_json

_logger = logging.getLogger(__name__)

# Everything is one class, "nucleus".
_CATEGORY_ID = 1
# Nuclei-sized ranges in px^2 (18^2 = 324 and 31^2 = 961); COCO's own edges, 32^2 and 96^2, put
# nearly every nucleus into "small".
AREA_RANGES = {
    "all": (0.0, 1e10),
    "small": (0.0, 324.0),
    "medium": (324.0, 961.0),
    "large": (961.0, 1e10),
}
_TASKS = ("bbox", "segm")


def dataset_to_coco(dataset_dicts: Sequence[dict]) -> COCO:
    """Ground truth of Detectron2 dataset dicts as a COCO object with one category.

    It is made from the dicts that the model is fed, so no cached file can be stale.
    """
    images, annotations = [], []
    for record in dataset_dicts:
        size = {"height": record["height"], "width": record["width"]}
        images.append({"id": record["image_id"], "file_name": record["file_name"], **size})
        for annotation in annotations_as_rle(record):
            rle = annotation["segmentation"]
            x, y, w, h = BoxMode.convert(
                annotation["bbox"], annotation["bbox_mode"], BoxMode.XYWH_ABS
            )
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": record["image_id"],
                    "category_id": _CATEGORY_ID,
                    "bbox": [x, y, w, h],
                    "area": float(mask_util.area(rle)),
                    "iscrowd": annotation.get("iscrowd", 0),
                    "segmentation": rle,
                }
            )
    categories = [{"id": _CATEGORY_ID, "name": "nucleus"}]
    return COCO({"images": images, "annotations": annotations, "categories": categories})


def coco_ap(truth: COCO, predictions: Sequence[dict], task: str, max_dets: int) -> dict[str, float]:
    """COCO average precision and recall (Lin et al., 2014) with ``max_dets`` per image.

    AP is the mean over IoU 0.50:0.05:0.95 of the 101-point interpolated precision; APs, APm and
    APl restrict it to :data:`AREA_RANGES`. No ground truth in a range gives NaN for it; ground
    truth without any prediction gives 0.

    Args:
        truth: ground truth, see :func:`dataset_to_coco`.
        predictions: COCO results: image_id, category_id, bbox XYWH, score, segmentation (RLE).
        task: "bbox" or "segm".
        max_dets: only the best-scored ``max_dets`` predictions of an image count.

    Returns:
        AP, AP50, AP75, APs, APm, APl and AR, all in percent.
    """
    names = {"small": "APs", "medium": "APm", "large": "APl"}
    if not predictions:
        return _no_predictions(truth, names)
    if task == "segm":  # with a box, loadRes takes its area for the mask's
        predictions = [{k: v for k, v in p.items() if k != "bbox"} for p in predictions]
    truth, predictions = cut_into_parts(truth, predictions, task, max_dets)
    found = truth.loadRes(predictions)
    scorer = COCOeval_faster(truth, found, task, print_function=_logger.debug)
    scorer.params.maxDets = [max_dets]
    scorer.params.areaRng = [list(r) for r in AREA_RANGES.values()]
    scorer.params.areaRngLbl = list(AREA_RANGES)
    scorer.evaluate()
    scorer.accumulate()
    precision = np.asarray(scorer.eval["precision"])[:, :, 0, :, 0]  # (IoU, recall, area range)
    recall = np.asarray(scorer.eval["recall"])[:, 0, :, 0]  # (IoU, area range)
    results = {
        "AP": _mean_percent(precision[:, :, 0]),
        "AP50": _mean_percent(precision[0, :, 0]),
        "AP75": _mean_percent(precision[5, :, 0]),
    }
    for index, area in enumerate(AREA_RANGES):
        if area in names:
            results[names[area]] = _mean_percent(precision[:, :, index])
    results["AR"] = _mean_percent(recall[:, 0])
    return results


def _no_predictions(truth: COCO, names: dict[str, str]) -> dict[str, float]:
    areas = [annotation["area"] for annotation in truth.dataset["annotations"]]
    overall = 0.0 if areas else float("nan")
    results = dict.fromkeys(("AP", "AP50", "AP75"), overall)
    for area, name in names.items():
        low, high = AREA_RANGES[area]
        results[name] = 0.0 if any(low <= a <= high for a in areas) else float("nan")
    return {**results, "AR": overall}


def _mean_percent(values: np.ndarray) -> float:
    """Mean of the defined entries (COCO marks undefined ones by -1) in percent."""
    values = values[values > -1]
    return float(values.mean() * 100) if values.size else float("nan")


def instances_to_results(instances: Instances, image_id: int | str) -> list[dict]:
    """COCO results (boxes XYWH, masks RLE) of one image, at the cost of the masks' pixels.

    Args:
        instances: predictions on the CPU; pred_masks in any of the forms of :func:`split_masks`.
    """
    rles = [mask_to_rle(m, instances.image_size) for m in split_masks(instances.pred_masks)]
    # Detectron2 would encode whole frames.
    others = {k: v for k, v in instances.get_fields().items() if k != "pred_masks"}
    results = instances_to_coco_json(Instances(instances.image_size, **others), image_id)
    return [
        {**result, "category_id": _CATEGORY_ID, "segmentation": rle}
        for result, rle in zip(results, rles, strict=True)
    ]


class NucleiCOCOEvaluator(DatasetEvaluator):
    """Box and mask AP of one registered data set, with the model's own instance cap.

    Detectron2's COCOEvaluator stops at 100 instances an image unless told otherwise, and falls
    back to slow Python code when told; this one takes ``TEST.DETECTIONS_PER_IMAGE`` for model
    and evaluator alike, uses a C++ evaluator, and warns when the cap binds.
    """

    def __init__(self, dataset_name: str, *, max_dets: int, output_dir: str | None = None):
        """
        Args:
            dataset_name: registered data set; its dicts are the ground truth.
            max_dets: instance cap per image (``TEST.DETECTIONS_PER_IMAGE``).
            output_dir: where ``coco_instances_results.json`` goes; None writes no file.
        """
        self._dataset_name = dataset_name
        self._max_dets = max_dets
        self._output_dir = output_dir
        self._predictions: list[dict] = []

    def reset(self) -> None:
        self._predictions = []

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        """Add one batch: dataset dicts with image_id, and the model's ``instances``.

        Raises:
            NucleiError: the predictions are not of the size of the image.
        """
        for record, output in zip(inputs, outputs, strict=True):
            instances = output["instances"].to("cpu")
            _check_size(record, instances.image_size)
            self._predictions += instances_to_results(instances, record["image_id"])

    def evaluate(self) -> OrderedDict | None:
        """``{"bbox": {...}, "segm": {...}}`` as :func:`coco_ap`; None but on the main process."""
        gathered = comm.gather(self._predictions, dst=0)
        if not comm.is_main_process():
            return None
        predictions = [p for part in gathered for p in part]
        if self._output_dir:
            path = Path(self._output_dir) / "coco_instances_results.json"
            write_json(path, predictions, indent=None)
        truth = dataset_to_coco(DatasetCatalog.get(self._dataset_name))
        self._warn_if_cap_binds(truth, predictions)
        self._warn_if_scores_are_equal(predictions)
        results = OrderedDict()
        for task in _TASKS:
            results[task] = coco_ap(truth, predictions, task, self._max_dets)
            _logger.info(
                f"{self._dataset_name}: {task} AP in percent, at most {self._max_dets} instances "
                f"an image, area edges 324 and 961 px^2:\n{create_small_table(results[task])}"
            )
        return results

    def _warn_if_cap_binds(self, truth: COCO, predictions: list[dict]) -> None:
        fullest = max((len(v) for v in truth.imgToAnns.values()), default=0)
        counts = np.unique([p["image_id"] for p in predictions], return_counts=True)[1]
        full = int((counts >= self._max_dets).sum())
        if fullest > self._max_dets or full:
            _logger.warning(
                f"TEST.DETECTIONS_PER_IMAGE = {self._max_dets} binds: {full} images reach it and "
                f"the fullest image of {self._dataset_name} has {fullest} nuclei; raise it"
            )

    def _warn_if_scores_are_equal(self, predictions: list[dict]) -> None:
        scores = {p["score"] for p in predictions}
        if len(predictions) > 1 and len(scores) == 1:
            _logger.warning(
                f"all {len(predictions)} predictions on {self._dataset_name} have the score "
                f"{scores.pop():g}: they have no order, and AP has no meaning"
            )


def _check_size(record: dict, size: tuple[int, int]) -> None:
    expected = (record["height"], record["width"])
    if tuple(size) != expected:
        raise NucleiError(
            f"{record['file_name']}: predicted at {size[0]} x {size[1]} pixels (height x width), "
            f"but the image and its ground truth have {expected[0]} x {expected[1]}; "
            "MODEL.META_ARCHITECTURE has to return instances at the size of the file"
        )

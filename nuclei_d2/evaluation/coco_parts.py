"""Cut images into parts that COCO's evaluation may treat as images.

It is quadratic in the nuclei of an image: every prediction meets every nucleus, at 10 thresholds in
each area range: seconds and hundreds of megabytes at thousands of nuclei. But only pairs that may
reach the least threshold can match, and these are a few neighbours.
"""

from collections.abc import Sequence

import numpy as np
from faster_coco_eval import COCO
from pycocotools import mask as mask_util
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial import KDTree

_GROUPS = 32  # of nuclei and predictions that may match; so many are one part


def cut_into_parts(
    truth: COCO, predictions: Sequence[dict], task: str, max_dets: int, least_iou: float = 0.5
) -> tuple[COCO, list[dict]]:
    """Ground truth and predictions with another ``image_id``, for which COCO gives the same AP.

    Args:
        truth: with images, categories, and annotations as COCO's evaluation wants them.
        predictions: COCO results.
        task: "bbox" or "segm".
        max_dets: of an image's predictions only so many of the best remain.
        least_iou: the smallest threshold of the evaluation.

    Returns:
        The parts' ground truth, and the remaining predictions; their scores are replaced by ranks,
        as equal scores would otherwise be in the order of the parts.
    """
    of_image = {image_id: [] for image_id in sorted(truth.imgs)}
    for prediction in predictions:
        of_image[prediction["image_id"]].append(prediction)
    images, annotations, results = [], [], []
    for image_id, found in of_image.items():
        nuclei = truth.imgToAnns[image_id]
        best = sorted(found, key=lambda p: -p["score"])[:max_dets]
        part = len(images) + _parts(nuclei, best, task, least_iou)
        for items, numbers, target in (
            (nuclei, part[: len(nuclei)], annotations),
            (best, part[len(nuclei) :], results),
        ):
            pairs = zip(items, numbers.tolist(), strict=True)
            target += [{**item, "image_id": number} for item, number in pairs]
        end = int(part.max(initial=len(images))) + 1
        images += [{**truth.imgs[image_id], "id": k} for k in range(len(images), end)]
    order = np.argsort([-result["score"] for result in results], kind="stable")
    for rank, k in enumerate(order):
        results[k]["score"] = float(len(results) - rank)
    categories = truth.dataset["categories"]
    return COCO({"images": images, "annotations": annotations, "categories": categories}), results


def _parts(
    nuclei: Sequence[dict], predictions: Sequence[dict], task: str, least_iou: float
) -> np.ndarray:
    """(nuclei + predictions,) int: the same for all that may match, directly or through others."""
    count, total = len(nuclei), len(nuclei) + len(predictions)
    gt, pred = (
        _candidates(nuclei, predictions, task, least_iou)
        if nuclei and predictions
        else np.zeros((2, 0), int)
    )
    graph = coo_array((np.ones(len(gt), bool), (gt, count + pred)), shape=(total, total))
    return connected_components(graph, directed=False)[1] // _GROUPS


def _candidates(
    nuclei: Sequence[dict], predictions: Sequence[dict], task: str, least_iou: float
) -> np.ndarray:
    """(2, K): index of nucleus and prediction of every pair whose IoU may reach ``least_iou``."""
    (gt_boxes, gt_areas), (boxes, areas) = (
        _boxes_and_areas(items, task) for items in (nuclei, predictions)
    )
    reach = (boxes[:, 2:].max(axis=1) + gt_boxes[:, 2:].max()) / 2
    near = KDTree(gt_boxes[:, :2] + gt_boxes[:, 2:] / 2).query_ball_point(
        boxes[:, :2] + boxes[:, 2:] / 2, reach, p=np.inf
    )
    pred = np.repeat(np.arange(len(boxes)), [len(found) for found in near])
    gt = np.concatenate([np.asarray(found, int) for found in near])
    low = np.maximum(gt_boxes[gt, :2], boxes[pred, :2])
    high = np.minimum((gt_boxes[:, :2] + gt_boxes[:, 2:])[gt], (boxes[:, :2] + boxes[:, 2:])[pred])
    common = np.prod(np.maximum(high - low, 0), axis=1)  # at most
    common = np.minimum(common, np.minimum(gt_areas[gt], areas[pred]))
    crowd = np.array([item.get("iscrowd", 0) for item in nuclei], bool)[gt]
    union = np.where(crowd, areas[pred], gt_areas[gt] + areas[pred] - common)
    return np.stack([gt, pred])[:, common >= (least_iou - 1e-9) * union]


def _boxes_and_areas(items: Sequence[dict], task: str) -> tuple[np.ndarray, np.ndarray]:
    """(N, 4) XYWH and (N,) of boxes, or of masks."""
    if task == "bbox":
        boxes = np.array([item["bbox"] for item in items], float)
        return boxes, boxes[:, 2] * boxes[:, 3]
    rles = [item["segmentation"] for item in items]
    # One at a time: with NumPy 2, pycocotools' area overflows at a list of 256.
    return mask_util.toBbox(rles), np.array([mask_util.area(rle) for rle in rles], float)

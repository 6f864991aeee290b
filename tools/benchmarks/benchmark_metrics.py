#!/usr/bin/env python
"""Time the metrics side by side with StarDist's and Cellpose's, and COCO AP with pycocotools'.

pip install --no-deps stardist cellpose csbdeep numba llvmlite fastremap fill-voids natsort
tools/benchmarks/benchmark_metrics.py --output benchmark.json

Every number is CPU seconds of one thread, so that a busy machine does not blur the ratios.
"""

import argparse
import contextlib
import io
import resource
import sys
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tabulate import tabulate
from tqdm import tqdm

from nuclei_d2.data.datasets.coco import mask_to_annotation
from nuclei_d2.evaluation.boundary_ap import match_scored
from nuclei_d2.evaluation.coco_evaluation import coco_ap, dataset_to_coco
from nuclei_d2.evaluation.instances import layers_from_label_image
from nuclei_d2.evaluation.matching import IOU_THRESHOLDS
from nuclei_d2.evaluation.scores import ScoreTable, score_image
from nuclei_d2.structures.cropped_mask import label_image_to_masks
from nuclei_d2.utils.errors import NucleiError, run_tool
from nuclei_d2.utils.files import write_json

COCO_NUCLEI, MAX_DETS = 2400, 2000  # in one image; some are left out
OURS, STARDIST_CALLS = "nuclei_d2, whole suite", "stardist.matching, 10 calls"
CELLPOSE = "cellpose.metrics.average_precision, 10 thresholds"
COCO_AP, PYCOCOTOOLS = "nuclei_d2, COCO mask AP", "pycocotools, the same AP"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=50, help="(default: %(default)s)")
    parser.add_argument("--size", type=int, default=1024, help="pixels (default: %(default)s)")
    parser.add_argument("--nuclei", type=int, default=600, help="(default: %(default)s)")
    parser.add_argument("--output", metavar="JSON")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    try:
        from cellpose.metrics import average_precision
        from stardist.matching import matching
    except ImportError as error:
        raise NucleiError(f"{error}: install the packages that --help lists") from error
    cv2.setNumThreads(1)
    pairs = Pairs(args.images, args.size, args.nuclei)
    thresholds = IOU_THRESHOLDS.tolist()
    matching(*make_pair(0, 64, 2), thresh=thresholds)  # numba compiles at the first call

    before = peak_memory()
    ours = seconds(pairs, "nuclei_d2", measure)
    grown = peak_memory() - before
    rows = {
        OURS: ours,
        "stardist.matching, 10 thresholds in one call": seconds(
            pairs, "stardist", lambda gt, pred: matching(gt, pred, thresh=thresholds)
        ),
        STARDIST_CALLS: seconds(
            pairs, "stardist", lambda gt, pred: [matching(gt, pred, thresh=t) for t in thresholds]
        ),
        CELLPOSE: seconds(
            pairs, "cellpose", lambda gt, pred: average_precision(gt, pred, thresholds)
        ),
        **time_coco(*make_pair(0, 2 * args.size, COCO_NUCLEI)),
    }
    goals = promises(rows, before + grown)
    print(
        f"{args.images} images of {args.size} x {args.size}, {args.nuclei} nuclei each; COCO: one "
        f"of {2 * args.size} x {2 * args.size}, {COCO_NUCLEI} nuclei, maxDets {MAX_DETS}"
    )
    print(tabulate(rows.items(), ["", "CPU s"], floatfmt=".2f"))
    print(f"memory: {before + grown:.0f} MB at most, of which {grown:.0f} MB for the metrics\n")
    print(tabulate(goals, headers="keys", floatfmt=".3g"))
    if args.output:
        content = {"cpu_seconds": rows, "peak_mb": before + grown, "grown_mb": grown}
        write_json(args.output, {**content, "promises": goals})


def promises(rows: dict[str, float], peak_mb: float) -> list[dict[str, Any]]:
    """What is asked of us beside what was measured."""
    asked = [
        ("COCO mask AP: times faster than pycocotools", ">=", 20,
         rows[PYCOCOTOOLS] / rows[COCO_AP]),
        ("whole suite: times faster than ten StarDist calls and Cellpose", ">=", 10,
         (rows[STARDIST_CALLS] + rows[CELLPOSE]) / rows[OURS]),
        ("peak MB of the process", "<", 1000, peak_mb),
    ]  # fmt: skip
    return [
        {"what": what, "asked": f"{sign} {bound}", "measured": value,
         "kept": value >= bound if sign == ">=" else value < bound}
        for what, sign, bound, value in asked
    ]  # fmt: skip


@dataclass(frozen=True)
class Pairs:
    """Drawn when asked for, so that memory is that of the metrics."""

    count: int
    size: int
    nuclei: int

    def __getitem__(self, k: int) -> tuple[np.ndarray, np.ndarray]:
        return make_pair(k, self.size, self.nuclei)


def make_pair(seed: int, size: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Ground truth of ``count`` ellipses of about 18 px, and a prediction: (H, W) int32 each.

    Most predictions are shifted or shrunk by a pixel; some are missing, some merged.
    """
    rng = np.random.default_rng(seed)
    gt = np.zeros((size, size), np.int32)
    y, x = np.mgrid[-16:17, -16:17]
    for label in range(1, count + 1):
        centre, radii = rng.integers(16, size - 16, 2), rng.uniform(6, 14, 2)
        inside = (y / radii[0]) ** 2 + (x / radii[1]) ** 2 <= 1
        gt[y[inside] + centre[0], x[inside] + centre[1]] = label
    numbers = np.concatenate([[0], 1 + rng.permutation(count)])
    numbers[rng.random(count + 1) < 0.05] = 0
    numbers[1:-1][rng.random(count - 1) < 0.03] = numbers[-1]
    pred = numbers[np.roll(gt, rng.integers(-1, 2, 2), (0, 1))].astype(np.int32)
    shrunk = cv2.erode(pred.astype(np.uint16), np.ones((3, 3), np.uint8))
    return gt, np.where(rng.random(count + 1)[pred] < 0.5, pred, shrunk).astype(np.int32)


def measure(gt: np.ndarray, pred: np.ndarray):
    return score_image(layers_from_label_image(gt), layers_from_label_image(pred))


def seconds(pairs: Pairs, name: str, function: Callable) -> float:
    """CPU time of ``function`` alone, summed over the pairs."""
    total, results = 0.0, []
    for k in tqdm(range(pairs.count), name, unit="image"):
        pair = pairs[k]
        start = time.process_time()
        results.append(function(*pair))
        total += time.process_time() - start
    if function is measure:
        start = time.process_time()
        ScoreTable(results).summary()
        total += time.process_time() - start
    return total


def peak_memory() -> float:
    """MB; the kernel counts KiB on Linux, bytes on macOS."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def time_coco(gt: np.ndarray, pred: np.ndarray) -> dict[str, float]:
    """Mask AP of the same predictions with random scores, by the two evaluators; boundary AP."""
    rng = np.random.default_rng(0)
    annotations, results = (
        [mask_to_annotation(mask, gt.shape) for _, mask in label_image_to_masks(side)]
        for side in (gt, pred)
    )
    annotations = [{**a, "bbox_mode": 1} for a in annotations]
    results = [{**a, "image_id": 1, "score": float(rng.random())} for a in results]
    size = {"height": gt.shape[0], "width": gt.shape[1]}
    record = {"file_name": "", "image_id": 1, "annotations": annotations, **size}
    truth = dataset_to_coco([record])
    copy = COCO()
    copy.dataset = deepcopy(truth.dataset)  # the first evaluator changes its input
    copied = deepcopy(results)
    start = time.process_time()
    fast = coco_ap(truth, results, "segm", MAX_DETS)["AP"]
    ours = time.process_time() - start

    with contextlib.redirect_stdout(io.StringIO()):
        copy.createIndex()
        start = time.process_time()
        scorer = COCOeval(copy, copy.loadRes(copied), "segm")
        scorer.params.maxDets = [MAX_DETS]
        scorer.evaluate()
        scorer.accumulate()
    theirs = time.process_time() - start
    slow = 100 * scorer.eval["precision"][:, :, 0, 0, 0].mean()
    if abs(fast - slow) > 1e-9:
        raise NucleiError(f"AP {fast} is not pycocotools' {slow}")

    start = time.process_time()
    masks = [mask for _, mask in label_image_to_masks(pred)]
    match_scored(layers_from_label_image(gt), masks, rng.random(len(masks)), MAX_DETS)
    boundary = time.process_time() - start
    return {COCO_AP: ours, PYCOCOTOOLS: theirs, "nuclei_d2, boundary AP at four widths": boundary}


if __name__ == "__main__":
    run_tool(main)

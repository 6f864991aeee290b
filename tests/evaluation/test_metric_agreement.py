"""Our numbers against those that StarDist and Cellpose gave (see metric_agreement.py)."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from faster_coco_eval import COCOeval_faster
from metric_agreement import FIXTURE, checksum, generated_pairs, real_pairs
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from nuclei_d2.data.datasets.coco import mask_to_annotation
from nuclei_d2.evaluation.boundary import compute_overlaps
from nuclei_d2.evaluation.coco_evaluation import dataset_to_coco
from nuclei_d2.evaluation.instances import layers_from_label_image
from nuclei_d2.evaluation.matching import (
    IOU_THRESHOLDS,
    aji,
    aji_plus,
    assign,
    match,
    panoptic_sums,
    true_positives,
)
from nuclei_d2.evaluation.scores import ScoreTable, score_image
from nuclei_d2.structures.cropped_mask import label_image_to_masks

REFERENCE = json.loads(FIXTURE.read_text())
PAIRS = list(generated_pairs())
DSB2018 = Path(os.environ.get("DETECTRON2_DATASETS", "datasets"), "dsb2018", "labels")


def layers(*labels):
    return [layers_from_label_image(side) for side in labels]


def cellpose_aji(overlap, gt, pred):
    """The variant of cellpose.metrics: intersections of the pairs that are matched at IoU 0.5
    first and by IoU then, over the union of the two foregrounds (not of the pairs)."""
    fewer = min(len(overlap.gt_areas), len(overlap.pred_areas))
    pairs = assign(overlap.gt, overlap.pred, (overlap.iou >= 0.5) + overlap.iou / (2 * fewer))
    return overlap.intersection[pairs].sum() / ((gt > 0) | (pred > 0)).sum()


def check(reference, gt, pred):
    assert checksum(gt, pred) == reference["checksum"], "the pair is not the one measured"
    overlap, _ = compute_overlaps(*layers(gt, pred))
    tp = true_positives(overlap, overlap.iou)
    n_gt, n_pred = len(overlap.gt_areas), len(overlap.pred_areas)
    assert (n_gt, n_pred) == (reference["n_true"], reference["n_pred"])
    assert tp.tolist() == reference["stardist_tp"] == reference["cellpose_tp"]
    assert (n_pred - tp).tolist() == reference["cellpose_fp"]
    assert (n_gt - tp).tolist() == reference["cellpose_fn"]
    pairs = match(overlap, overlap.iou, 0.5)
    matched = overlap.iou[pairs].sum() / max(len(pairs), 1)
    # StarDist computes IoU in float32.
    assert matched == pytest.approx(reference["stardist_matched_iou"], abs=1e-6)
    pq = panoptic_sums(overlap)[1] / max((n_gt + n_pred) / 2, 1)
    assert pq == pytest.approx(reference["stardist_pq"], abs=1e-6)
    if reference["cellpose_aji"] is not None:
        assert cellpose_aji(overlap, gt, pred) == pytest.approx(
            reference["cellpose_aji"], abs=1e-12
        )


@pytest.mark.parametrize("start", range(0, len(PAIRS), 30))
def test_generated_pairs(start):
    for reference, (name, gt, pred) in list(zip(REFERENCE["generated"], PAIRS, strict=True))[
        start : start + 30
    ]:
        assert reference["name"] == name
        check(reference, gt, pred)


@pytest.mark.skipif(not DSB2018.is_dir(), reason="DSB 2018 is not prepared here")
def test_real_pairs():
    assert len(REFERENCE["real"]) >= 20
    for reference, (name, gt, pred) in zip(REFERENCE["real"], real_pairs(DSB2018), strict=True):
        assert reference["name"] == name
        check(reference, gt, pred)


def test_pooled_and_image_means_of_the_whole_set():
    table = ScoreTable([score_image(*layers(gt, pred)) for _, gt, pred in PAIRS])
    metrics = table.metrics()
    # StarDist counts an image without nuclei and predictions as 0, we leave it out.
    share = 1 - table.n_images_empty / table.n_images
    assert 0.9 < share < 1
    for k, threshold in enumerate(IOU_THRESHOLDS):
        for rate in ("f1", "precision", "recall", "accuracy"):
            path = (rate, f"{threshold:.2f}")
            pooled, by_image = (REFERENCE["dataset"][n][rate][k] for n in ("pooled", "by_image"))
            assert metrics[("pooled", *path)][0] == pytest.approx(pooled, abs=1e-12)
            assert metrics[("image_mean", *path)][0] * share == pytest.approx(by_image, abs=1e-12)


def test_the_variants_of_aji_differ_as_documented():
    """Cellpose's union counts shared pixels once, so it is never below AJI+ by much."""
    values = []
    for _, gt, pred in PAIRS:
        overlap, _ = compute_overlaps(*layers(gt, pred))
        if gt.any() and pred.any():
            values.append((aji(overlap), aji_plus(overlap), cellpose_aji(overlap, gt, pred)))
    ours, plus, theirs = np.mean(values, axis=0)
    assert ours < plus < theirs


def test_the_twelve_coco_numbers_at_2000_detections():
    rng = np.random.default_rng(0)
    records, results = [], []
    for image_id, (_, gt, pred) in enumerate(PAIRS[:40], start=1):
        size = {"height": gt.shape[0], "width": gt.shape[1]}
        annotations = [
            {**mask_to_annotation(m, gt.shape), "bbox_mode": 1} for _, m in label_image_to_masks(gt)
        ]
        records.append(
            {
                **{"file_name": f"{image_id}.png", "image_id": image_id},
                **{"annotations": annotations, **size},
            }
        )
        for _, mask in label_image_to_masks(pred):
            annotation = mask_to_annotation(mask, gt.shape)
            results.append({**annotation, "image_id": image_id, "score": float(rng.random())})
    fast = dataset_to_coco(records)
    slow = COCO()
    slow.dataset = json.loads(json.dumps(fast.dataset))
    slow.createIndex()
    for task in ("bbox", "segm"):
        stats = []
        for kind, truth in ((COCOeval_faster, fast), (COCOeval, slow)):
            scorer = kind(truth, truth.loadRes(json.loads(json.dumps(results))), task)
            scorer.params.maxDets = [1, 10, 2000]
            scorer.evaluate()
            scorer.accumulate()
            stats.append(twelve(scorer))
        np.testing.assert_allclose(stats[0], stats[1], rtol=0, atol=1e-9)
        assert len(stats[0]) == 12


def twelve(scorer):
    """COCO's summary; pycocotools' own summarize() insists on 100 detections."""
    precision = np.asarray(scorer.eval["precision"])[:, :, 0]  # IoU, recall, area, dets
    recall = np.asarray(scorer.eval["recall"])[:, 0]

    def mean(values):
        values = values[values > -1]
        return values.mean() if values.size else -1

    return [
        mean(precision[..., 0, 2]),
        *(mean(precision[k, :, 0, 2]) for k in (0, 5)),
        *(mean(precision[..., area, 2]) for area in (1, 2, 3)),
        *(mean(recall[:, 0, dets]) for dets in (0, 1, 2)),
        *(mean(recall[:, area, 2]) for area in (1, 2, 3)),
    ]

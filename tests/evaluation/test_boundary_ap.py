import json
import math

import numpy as np
import pytest
from faster_coco_eval import COCO, COCOeval_faster

from nuclei_d2.data.datasets.coco import mask_to_annotation
from nuclei_d2.evaluation.boundary import boundary_distances
from nuclei_d2.evaluation.boundary_ap import average_precision, boundary_ap, match_scored
from nuclei_d2.evaluation.instances import layers_from_masks
from nuclei_d2.structures.cropped_mask import crop_mask

SIZE = (96, 120)


def ellipses(rng, count):
    y, x = np.mgrid[: SIZE[0], : SIZE[1]]
    for _ in range(count):
        cy, cx = rng.uniform(0, SIZE[0]), rng.uniform(0, SIZE[1])
        ry, rx = rng.uniform(4, 14, 2)
        yield ((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2 <= 1


def disturbed(rng, mask):
    shift = rng.integers(-2, 3, 2)
    return np.roll(mask, shift, (0, 1)) if rng.random() < 0.8 else mask


@pytest.fixture(scope="module")
def scored():
    """Overlapping nuclei and overlapping predictions with distinct scores in seven images."""
    rng = np.random.default_rng(5)
    images = []
    for count in (12, 0, 5, 20, 1, 9, 15):
        gt = [m for m in ellipses(rng, count) if m.any()]
        pred = [disturbed(rng, m) for m in gt if rng.random() < 0.9] + list(ellipses(rng, 3))
        pred = [m for m in pred if m.any()]
        images.append((gt, pred, rng.permutation(len(pred)) / 40 + rng.random() / 100))
    return images


def library_ap(images, ratio, max_dets):
    """AP, AP50, AP75 of faster-coco-eval's boundary evaluation."""
    truth = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "nucleus"}]}
    results = []
    for image_id, (gt, pred, scores) in enumerate(images, start=1):
        size = {"height": SIZE[0], "width": SIZE[1]}
        truth["images"].append({"id": image_id, "file_name": f"{image_id}.png", **size})
        for mask in gt:
            ids = {"id": len(truth["annotations"]) + 1, "image_id": image_id}
            truth["annotations"].append({**ids, **mask_to_annotation(crop_mask(mask), SIZE)})
        for mask, score in zip(pred, scores.tolist(), strict=True):
            annotation = mask_to_annotation(crop_mask(mask), SIZE)
            results.append({"image_id": image_id, "score": score, **annotation})
    options = {
        "iouType": "boundary",
        "print_function": lambda *_: None,
        "boundary_dilation_ratio": ratio,
        "boundary_cpu_count": 1,
    }
    truth = COCO(truth)
    scorer = COCOeval_faster(truth, truth.loadRes(json.loads(json.dumps(results))), **options)
    scorer.params.maxDets = [max_dets]
    scorer.params.areaRng, scorer.params.areaRngLbl = [[0, 1e10]], ["all"]
    scorer.evaluate()
    scorer.accumulate()
    precision = np.asarray(scorer.eval["precision"])[:, :, 0, 0, 0]
    return 100 * np.array([precision.mean(), precision[0].mean(), precision[5].mean()])


@pytest.mark.parametrize("max_dets", [2000, 8])
def test_agrees_with_a_library_at_every_width(scored, max_dets):
    images = [
        match_scored(layers_from_masks(list(map(crop_mask, gt)), SIZE), list(map(crop_mask, pred)),
                     scores, max_dets)
        for gt, pred, scores in scored
    ]  # fmt: skip
    ours = boundary_ap(images)
    diagonal = math.hypot(*SIZE)
    for name, width in zip(("2%", "1px", "2px", "3px"), boundary_distances(SIZE), strict=True):
        ratio = 0.02 if name == "2%" else width / diagonal
        theirs = library_ap(scored, ratio, max_dets)
        assert 1 < theirs[0] < 95
        assert list(ours[name].values()) == pytest.approx(theirs.tolist(), abs=1e-9)


def test_average_precision_by_hand():
    """Miss, hit, of two nuclei: precision 1/2 for the 51 recalls up to 1/2."""
    assert average_precision(np.array([False, True]), 2) == pytest.approx(51 / 101 / 2)
    assert average_precision(np.zeros(0, bool), 3) == 0
    assert average_precision(np.array([True, True]), 2) == 1


def test_a_worse_duplicate_is_a_false_positive_whatever_its_overlap():
    mask = next(ellipses(np.random.default_rng(0), 1))
    gt = layers_from_masks([crop_mask(mask)], SIZE)
    image = match_scored(gt, [crop_mask(mask)] * 2, np.array([0.4, 0.6]), 10)
    assert image.scores.tolist() == [0.6, 0.4]
    assert image.hits[0].tolist() == [[True, False]] * 10


def test_without_nuclei_it_is_undefined():
    gt = layers_from_masks([], SIZE)
    image = match_scored(gt, [], np.zeros(0), 10)
    assert math.isnan(boundary_ap([image])["1px"]["AP"])

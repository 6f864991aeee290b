"""The evaluation of parts is that of whole images."""

import numpy as np
import pytest
from faster_coco_eval import COCO, COCOeval_faster
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as mask_util

from nuclei_d2.evaluation import coco_parts
from nuclei_d2.evaluation.coco_parts import cut_into_parts

SIZE = 96


def annotation(box, **fields):
    """Of an ellipse that fills ``box`` (XYWH)."""
    y, x = np.mgrid[:SIZE, :SIZE] + 0.5
    left, top, width, height = box
    inside = ((x - left) / width * 2 - 1) ** 2 + ((y - top) / height * 2 - 1) ** 2 <= 1
    rle = mask_util.encode(np.asfortranarray(inside.astype(np.uint8)))
    rle["counts"] = rle["counts"].decode()
    area = float(mask_util.area(rle))
    return {"category_id": 1, "bbox": list(box), "segmentation": rle, "area": area, **fields}


def random_case(seed, crowds, ties):
    """Crowded nuclei in three images; predictions moved, doubled, merged and invented."""
    rng = np.random.default_rng(seed)
    nuclei, found = [], []
    for image_id in (7, 3, 5):
        for box in rng.uniform(2, 84, (int(rng.integers(0, 40)), 4)):
            box[2:] = rng.uniform(4, 14, 2)
            crowd = int(crowds and rng.random() < 0.1)
            ids = {"id": len(nuclei) + 1, "image_id": image_id}
            nuclei.append(annotation(box.tolist(), iscrowd=crowd, **ids))
            for _ in range(rng.integers(0, 3)):
                moved = box + rng.normal(0, 1, 4)
                moved[2:] = np.maximum(moved[2:], 1) * rng.choice([1, 1, 1, 3])
                score = round(float(rng.random()), 1 if ties else 12)
                found.append(annotation(moved.tolist(), score=score, image_id=image_id))
    images = [{"id": k, "height": SIZE, "width": SIZE} for k in (3, 5, 7, 9)]  # 9 is empty
    categories = [{"id": 1, "name": "nucleus"}]
    order = rng.permutation(len(found))
    truth = COCO({"images": images, "annotations": nuclei, "categories": categories})
    return truth, [found[k] for k in order]


def curves(truth, predictions, task, max_dets):
    if task == "segm":
        predictions = [{k: v for k, v in p.items() if k != "bbox"} for p in predictions]
    scorer = COCOeval_faster(truth, truth.loadRes(predictions), task, print_function=str)
    scorer.params.maxDets = [max_dets]
    scorer.params.areaRng, scorer.params.areaRngLbl = [[0, 1e10], [0, 60]], ["all", "small"]
    scorer.evaluate()
    scorer.accumulate()
    return scorer.eval["precision"], scorer.eval["recall"]


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    task=st.sampled_from(["bbox", "segm"]),
    crowds=st.booleans(),
    max_dets=st.sampled_from([5, 1000]),
    groups=st.sampled_from([1, 3]),
)
def test_parts_give_the_curves_of_whole_images(seed, task, crowds, max_dets, groups):
    truth, predictions = random_case(seed, crowds, ties=False)
    if not predictions:
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coco_parts, "_GROUPS", groups)
        parts, ranked = cut_into_parts(truth, predictions, task, max_dets)
    whole = curves(truth, predictions, task, max_dets)
    for expected, got in zip(whole, curves(parts, ranked, task, max_dets), strict=True):
        np.testing.assert_array_equal(got, expected)


def test_equal_scores_keep_cocos_order():
    for seed in range(10):
        truth, predictions = random_case(seed, False, ties=True)
        parts, ranked = cut_into_parts(truth, predictions, "segm", 1000)
        whole = curves(truth, predictions, "segm", 1000)
        np.testing.assert_array_equal(curves(parts, ranked, "segm", 1000)[0], whole[0])


def test_nuclei_side_by_side_are_not_compared(monkeypatch):
    """A sheet of touching nuclei, whose boxes all overlap: a part for each."""
    monkeypatch.setattr(coco_parts, "_GROUPS", 1)
    boxes = [[x, y, 9.0, 9.0] for x in range(2, 80, 8) for y in range(2, 80, 8)]
    nuclei = [annotation(box, id=k, image_id=1, iscrowd=0) for k, box in enumerate(boxes, start=1)]
    found = [annotation(box, score=0.5, image_id=1) for box in boxes]
    images = [{"id": 1, "height": SIZE, "width": SIZE}]
    truth = COCO({"images": images, "annotations": nuclei, "categories": [{"id": 1}]})
    for task in ("bbox", "segm"):
        parts, ranked = cut_into_parts(truth, found, task, 1000)
        assert len(parts.imgs) == len(boxes)
        assert len({p["image_id"] for p in ranked}) == len(boxes)


def test_the_cap_takes_the_best():
    truth, predictions = random_case(1, False, ties=False)
    _, ranked = cut_into_parts(truth, predictions, "segm", 4)
    best = [
        p
        for image_id in (3, 5, 7)
        for p in sorted(predictions, key=lambda p: -p["score"])
        if p["image_id"] == image_id
    ]
    counts = {k: sum(p["image_id"] == k for p in best) for k in (3, 5, 7)}
    assert len(ranked) == sum(min(4, count) for count in counts.values())
    assert sorted(p["score"] for p in ranked) == list(range(1, len(ranked) + 1))

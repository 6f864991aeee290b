import json
import logging

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, BoxMode, Instances
from pycocotools import mask as mask_util
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tiny import in_two_processes

from nuclei_d2.evaluation.coco_evaluation import NucleiCOCOEvaluator, coco_ap, dataset_to_coco
from nuclei_d2.modeling.label_instances import predictions_from_labels
from nuclei_d2.utils.errors import NucleiError


def squares(boxes, shape=(128, 128)):
    """One bool mask per XYXY box."""
    masks = np.zeros((len(boxes), *shape), dtype=bool)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes, strict=True):
        mask[y0:y1, x0:x1] = True
    return masks


def record(image_id, boxes, shape=(128, 128)):
    annotations = []
    for mask, box in zip(squares(boxes, shape), boxes, strict=True):
        rle = mask_util.encode(np.asfortranarray(mask))
        annotations.append(
            {
                "bbox": [float(v) for v in box],
                "bbox_mode": BoxMode.XYXY_ABS,
                "category_id": 0,
                "segmentation": {**rle, "counts": rle["counts"].decode()},
            }
        )
    size = {"height": shape[0], "width": shape[1]}
    return {
        "file_name": f"{image_id}.png",
        "image_id": image_id,
        "annotations": annotations,
        **size,
    }


def instances(boxes, scores, shape=(128, 128)):
    return Instances(
        shape,
        pred_boxes=Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)),
        scores=torch.tensor(scores, dtype=torch.float32),
        pred_classes=torch.zeros(len(scores), dtype=torch.int64),
        pred_masks=torch.from_numpy(squares(boxes, shape)),
    )


def grid(n, size=8, shape=(1024, 1024)):
    step = size + 2
    columns = shape[1] // step
    return [
        (x, y, x + size, y + size)
        for x, y in ((i % columns * step, i // columns * step) for i in range(n))
    ]


@pytest.fixture
def dataset():
    """Register dataset dicts for one test."""
    names = []

    def register(dicts):
        name = f"evaluation_test_{len(names)}"
        DatasetCatalog.register(name, lambda: dicts)
        MetadataCatalog.get(name).set(thing_classes=["nucleus"])
        names.append(name)
        return name

    yield register
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def run(name, dicts, outputs, max_dets=600, output_dir=None):
    evaluator = NucleiCOCOEvaluator(name, max_dets=max_dets, output_dir=output_dir)
    evaluator.reset()
    evaluator.process(dicts, [{"instances": o} for o in outputs])
    return evaluator.evaluate()


def test_perfect_predictions_score_100_at_1_and_at_1000_nuclei(dataset):
    for n in (1, 1000):
        boxes = grid(n)
        dicts = [record(1, boxes, (1024, 1024))]
        result = run(
            dataset(dicts), dicts, [instances(boxes, [0.9] * n, (1024, 1024))], max_dets=1500
        )
        for task in ("bbox", "segm"):
            assert result[task]["AP"] == pytest.approx(100)
            assert result[task]["APs"] == pytest.approx(100)
            assert np.isnan(result[task]["APl"])


def test_a_cap_below_the_fullest_image_is_reported(dataset, caplog):
    boxes = grid(30)
    dicts = [record(1, boxes, (1024, 1024))]
    with caplog.at_level(logging.WARNING):
        result = run(
            dataset(dicts), dicts, [instances(boxes, [0.9] * 30, (1024, 1024))], max_dets=15
        )
    assert result["segm"]["AP"] < 60
    assert "TEST.DETECTIONS_PER_IMAGE = 15 binds" in caplog.text


def test_ap_by_hand(dataset):
    """One of two nuclei found, below a false positive: precision 1/2 up to recall 1/2."""
    truth = [(0, 0, 20, 20), (40, 40, 60, 60)]
    dicts = [record(1, truth)]
    found = instances([(0, 0, 20, 20), (80, 80, 100, 100)], [0.5, 0.9])
    result = run(dataset(dicts), dicts, [found])
    # 51 of the 101 recall points (0 .. 0.5) have precision 0.5, the others 0.
    assert result["segm"]["AP50"] == pytest.approx(100 * 51 / 101 * 0.5)
    assert result["segm"]["AR"] == pytest.approx(50)


def test_size_ranges_of_masks_go_by_the_mask_not_its_box():
    """Disks of 253 px^2 are small, though their boxes of 361 px^2 are medium."""
    y, x = np.mgrid[:64, :64]
    disks = [(y - 20) ** 2 + (x - c) ** 2 <= 81 for c in (15, 45)]
    rles = [mask_util.encode(np.asfortranarray(d)) for d in disks]
    assert [mask_util.area(r) for r in rles] == [253, 253]
    rles = [{**r, "counts": r["counts"].decode()} for r in rles]
    box = {"bbox": [6.0, 11.0, 25.0, 30.0], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0}
    truth = {**record(1, [], (64, 64)), "annotations": [{**box, "segmentation": rles[0]}]}
    found = [
        {"image_id": 1, "category_id": 1, "score": score, "segmentation": rle, "bbox": bbox}
        for score, rle, bbox in ((0.8, rles[0], [6, 11, 19, 19]), (0.9, rles[1], [36, 11, 19, 19]))
    ]
    result = coco_ap(dataset_to_coco([truth]), found, "segm", max_dets=10)
    # The false disk, scored higher, is small too: precision 1/2 at every recall.
    assert result["APs"] == pytest.approx(50)
    assert np.isnan(result["APm"])
    assert coco_ap(dataset_to_coco([truth]), found, "bbox", max_dets=10)["AP"] == pytest.approx(50)


def test_no_prediction_is_zero_and_no_truth_is_undefined(dataset):
    empty = instances([], [])
    dicts = [record(1, [(0, 0, 20, 20)])]
    assert run(dataset(dicts), dicts, [empty])["segm"]["AP"] == 0
    dicts = [record(1, [])]
    assert np.isnan(run(dataset(dicts), dicts, [empty])["segm"]["AP"])
    one = instances([(0, 0, 20, 20)], [0.9])
    assert np.isnan(run(dataset(dicts), dicts, [one])["segm"]["AP"])


def test_results_file_is_standard_coco(dataset, tmp_path):
    boxes = [(0, 0, 20, 20), (40, 40, 60, 60)]
    dicts = [record(5, boxes)]
    run(dataset(dicts), dicts, [instances(boxes, [0.9, 0.8])], output_dir=str(tmp_path))
    results = json.loads((tmp_path / "coco_instances_results.json").read_text())
    assert [r["bbox"] for r in results] == [[0, 0, 20, 20], [40, 40, 20, 20]]
    assert {r["image_id"] for r in results} == {5}
    assert mask_util.area(results[0]["segmentation"]) == 400


def test_agrees_with_pycocotools_on_noisy_predictions():
    rng = np.random.default_rng(0)
    dicts, predictions = [], []
    for image_id in range(1, 9):
        size, most = ((12, 60), (24, 20), (36, 9))[image_id % 3]
        boxes = grid(int(rng.integers(0, most)), size=size, shape=(128, 128))
        dicts.append(record(image_id, boxes))
        for x0, y0, x1, y1 in boxes:
            dx, dy = rng.integers(-3, 4, 2).tolist()
            box = (max(x0 + dx, 0), max(y0 + dy, 0), min(x1 + dx, 128), min(y1 + dy, 128))
            rle = mask_util.encode(np.asfortranarray(squares([box])[0]))
            predictions.append(
                {
                    "image_id": image_id,
                    "category_id": 1,
                    "bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]],
                    "score": float(rng.random()),
                    "segmentation": {**rle, "counts": rle["counts"].decode()},
                }
            )
    fast_truth = dataset_to_coco(dicts)
    slow_truth = COCO()
    slow_truth.dataset = json.loads(json.dumps(fast_truth.dataset))
    slow_truth.createIndex()
    for task in ("bbox", "segm"):
        scorer = COCOeval(slow_truth, slow_truth.loadRes(json.loads(json.dumps(predictions))), task)
        scorer.params.maxDets = [2000]
        scorer.params.areaRng = [[0, 1e10], [0, 324], [324, 961], [961, 1e10]]
        scorer.params.areaRngLbl = ["all", "small", "medium", "large"]
        scorer.evaluate()
        scorer.accumulate()
        precision = scorer.eval["precision"][:, :, 0, :, 0]
        expected = {
            **{"AP": precision[..., 0], "AP50": precision[0, :, 0], "AP75": precision[5, :, 0]},
            **{"APs": precision[..., 1], "APm": precision[..., 2], "APl": precision[..., 3]},
            "AR": scorer.eval["recall"][:, 0, 0, 0],
        }
        means = {name: 100 * values[values > -1].mean() for name, values in expected.items()}
        assert min(means.values()) > 0
        assert coco_ap(fast_truth, predictions, task, 2000) == pytest.approx(means, abs=1e-9)


def test_masks_of_a_label_image_are_encoded_like_bitmaps():
    labels = np.zeros((60, 50), np.int32)
    labels[3:20, 4:30], labels[20:40, 4:20], labels[55:, 48:] = 1, 2, 3
    scores = np.array([0.2, 0.9, 0.5], np.float32)
    found = predictions_from_labels(labels, scores, labels.shape)
    dense = Instances(found.image_size, **found.get_fields())
    dense.pred_masks = found.pred_masks.tensor
    written = []
    for predictions in (found, dense):
        evaluator = NucleiCOCOEvaluator("x", max_dets=10)
        record = {"image_id": 1, "height": 60, "width": 50}
        evaluator.process([record], [{"instances": predictions}])
        written.append(evaluator._predictions)
    assert written[0] == written[1]
    for result, mask in zip(written[0], dense.pred_masks.numpy(), strict=True):
        rle = mask_util.encode(np.asfortranarray(mask))
        assert result["segmentation"] == {"size": [60, 50], "counts": rle["counts"].decode()}


def test_equal_scores_are_reported(dataset, caplog):
    boxes = grid(3)
    dicts = [record(1, boxes, (1024, 1024))]
    name = dataset(dicts)
    with caplog.at_level(logging.WARNING):
        run(name, dicts, [instances(boxes, [0.5, 0.5, 0.25], (1024, 1024))])
        run(name, dicts, [instances(boxes[:1], [0.5], (1024, 1024))])
    assert caplog.text == ""
    with caplog.at_level(logging.WARNING):
        run(name, dicts, [instances(boxes, [0.5] * 3, (1024, 1024))])
    assert f"all 3 predictions on {name} have the score 0.5" in caplog.text


def test_predictions_of_another_size_name_the_image(dataset):
    dicts = [record(7, [(0, 0, 20, 20)], (64, 128))]
    found = instances([(0, 0, 20, 20)], [0.9], (128, 64))
    with pytest.raises(NucleiError, match=r"^7\.png: predicted at 128 x 64 .* have 64 x 128;"):
        run(dataset(dicts), dicts, [found])


def test_two_processes_give_exactly_the_numbers_of_one(dataset, tmp_path):
    rng = np.random.default_rng(3)
    dicts, outputs = [], []
    for image_id in range(1, 6):
        boxes = grid(int(rng.integers(0, 40)), size=12, shape=(128, 128))
        dicts.append(record(image_id, boxes))
        shifted = np.array(boxes, int).reshape(-1, 4) + rng.integers(0, 4, (len(boxes), 1))
        outputs.append(instances(shifted.tolist(), rng.random(len(boxes)).round(1)))
    name = dataset(dicts)

    def evaluate(part, folder):
        return run(name, dicts[part], outputs[part], output_dir=folder and str(folder))

    # As unevenly as Detectron2's sampler; many scores are equal.
    parts = (slice(0, 2), slice(2, None))
    first, second = in_two_processes(lambda rank: evaluate(parts[rank], tmp_path / "two"), tmp_path)
    alone = evaluate(slice(None), tmp_path / "one")
    assert str(first) == str(alone)  # NaN is not equal to itself
    assert 0 < alone["segm"]["AP"] < 100
    assert second is None
    written = [tmp_path / name / "coco_instances_results.json" for name in ("one", "two")]
    assert written[0].read_bytes() == written[1].read_bytes()

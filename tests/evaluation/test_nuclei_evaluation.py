import json
import math

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, BoxMode, Instances
from skimage.draw import disk
from tiny import in_two_processes

from nuclei_d2.config import load_config
from nuclei_d2.data.datasets.coco import mask_to_annotation
from nuclei_d2.evaluation import build_evaluator
from nuclei_d2.evaluation.nuclei_evaluation import NucleiEvaluator, record_to_layers
from nuclei_d2.structures.cropped_mask import crop_mask, instances_to_masks, label_image_to_masks
from nuclei_d2.structures.label_masks import LabelMasks
from nuclei_d2.utils.errors import NucleiError

SIZE = (64, 80)


def nuclei(rng, count):
    """(H, W) labels of up to ``count`` disks."""
    labels = np.zeros(SIZE, int)
    for k in range(1, count + 1):
        labels[disk(rng.integers(4, 60, 2), rng.integers(3, 9), shape=SIZE)] = k
    return labels


def record(image_id, labels):
    annotations = [
        {**mask_to_annotation(mask, SIZE), "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0}
        for _, mask in label_image_to_masks(labels)
    ]
    size = {"height": SIZE[0], "width": SIZE[1]}
    return {
        "file_name": f"{image_id}.png",
        "image_id": image_id,
        "annotations": annotations,
        **size,
    }


def predictions(labels, scores=None, shift=0):
    values = np.unique(labels[labels > 0])
    masks = np.roll(labels == values[:, None, None], shift, axis=2)
    boxes = [mask_box(mask) for mask in masks]
    scores = np.linspace(0.9, 0.6, len(masks)) if scores is None else scores
    return Instances(
        SIZE,
        pred_boxes=Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)),
        scores=torch.as_tensor(scores, dtype=torch.float32),
        pred_classes=torch.zeros(len(masks), dtype=torch.int64),
        pred_masks=torch.from_numpy(masks),
    )


def mask_box(mask):
    boxed = crop_mask(mask)
    height, width = boxed.mask.shape
    return boxed.left, boxed.top, boxed.left + width, boxed.top + height


def make_data():
    """Five images with shifted predictions, one without nuclei, two predictions too unsure."""
    rng = np.random.default_rng(1)
    records, outputs = [], []
    for image_id, count in enumerate((6, 3, 0, 8, 5), start=1):
        labels = nuclei(rng, count)
        records.append(record(image_id, labels))
        found = predictions(labels, shift=image_id % 3)
        found.scores[:1] = 0.3 if image_id % 2 else 0.95
        found.scores += image_id / 1000
        outputs.append({"instances": found})
    return records, outputs


def register(records, name="nuclei_evaluation_test"):
    DatasetCatalog.register(name, lambda: records)
    MetadataCatalog.get(name).set(evaluator_type="nuclei", thing_classes=["nucleus"])
    return name


@pytest.fixture
def dataset():
    records, outputs = make_data()
    name = register(records)
    yield name, records, outputs
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


def evaluate(name, records, outputs, output_dir=None):
    evaluator = NucleiEvaluator(name, score_threshold=0.5, max_dets=50, output_dir=output_dir)
    evaluator.reset()
    for pair in zip(records, outputs, strict=True):
        evaluator.process(*([part] for part in pair))
    return evaluator.evaluate()


def test_results_and_file(dataset, tmp_path):
    results = evaluate(*dataset, output_dir=str(tmp_path))
    assert set(results) == {"nuclei", "boundary"}
    assert all(isinstance(v, float) for part in results.values() for v in part.values())
    written = json.loads((tmp_path / "nuclei_metrics.json").read_text())
    assert written["pooled"]["f1"]["0.50"] == results["nuclei"]["pooled_f1_0.50"]
    assert written["n_images"] == 5
    assert written["n_images_empty"] == 1
    # Image 1 and 5 each have one prediction below the threshold.
    n_gt = sum(len(np.unique(record_to_layers(r).labels)) - 1 for r in dataset[1])
    assert (written["n_gt"], written["n_pred"]) == (n_gt, n_gt - 2)
    low, high = written["intervals"]["pooled"]["f1"]["0.50"]
    assert low <= written["pooled"]["f1"]["0.50"] <= high
    assert written["boundary_ap_percent"]["1px"]["AP"] == results["boundary"]["AP_1px"]


def test_perfect_predictions(dataset):
    name, records, _ = dataset
    layers = [record_to_layers(r).labels[0] for r in records]
    results = evaluate(name, records, [{"instances": predictions(x)} for x in layers])
    for key, value in results["nuclei"].items():
        expected = 0 if key.startswith("errors") or key == "boundary_hd95" else 1
        assert value == expected, key
    assert set(results["boundary"].values()) == {100.0}


def test_the_order_of_images_does_not_matter(dataset):
    name, records, outputs = dataset
    assert evaluate(name, records[::-1], outputs[::-1]) == evaluate(name, records, outputs)


def test_an_empty_mask_is_a_false_positive_of_ap_alone(dataset):
    name, records, _ = dataset
    outputs = [{"instances": predictions(record_to_layers(r).labels[0])} for r in records]
    outputs[0]["instances"].pred_masks[0] = False
    results = evaluate(name, records, outputs)
    assert results["nuclei"]["pooled_precision_0.50"] == 1
    assert results["nuclei"]["pooled_recall_0.50"] < 1
    assert results["boundary"]["AP_2%"] < 100


def test_no_image_is_a_warning_as_in_detectron2(dataset, caplog):
    evaluator = NucleiEvaluator(dataset[0], score_threshold=0.5, max_dets=600)
    evaluator.reset()
    assert evaluator.evaluate() == {}
    assert "no predictions were made" in caplog.text


def test_polygons_and_unannotated_images_are_ground_truth(dataset):
    """Of sets that users register themselves; Detectron2's evaluator takes them."""
    square = {"iscrowd": 0, "segmentation": [[4, 5, 14, 5, 14, 15, 4, 15]]}
    image = {"file_name": "x.png", "height": SIZE[0], "width": SIZE[1]}
    layers = record_to_layers({**image, "annotations": [square]})
    assert layers.count == 1
    assert layers.labels[0, 5:15, 4:14].all()
    assert layers.labels.sum() == 100
    assert record_to_layers(image).count == 0
    with pytest.raises(NucleiError, match=r"x\.png: an annotation has no segmentation"):
        record_to_layers({**image, "annotations": [{"bbox": [0, 0, 5, 5]}]})
    other = mask_to_annotation(crop_mask(np.ones((4, 4), bool)), (8, 8))
    with pytest.raises(NucleiError, match=r"x\.png: broken segmentation \(RLE of size \[8, 8\]"):
        record_to_layers({**image, "annotations": [other]})


def test_no_predictions_are_zero(dataset):
    name, records, outputs = dataset
    nothing = [{"instances": o["instances"][:0]} for o in outputs]
    results = evaluate(name, records, nothing)
    assert results["nuclei"]["pooled_f1_mean"] == 0
    assert results["boundary"]["AP_2%"] == 0
    assert math.isnan(results["nuclei"]["boundary_hd95"])


def test_overlapping_predictions_are_flattened_by_score():
    """Two overlapping predictions, the surer on top: 16 and 12 px are left."""
    masks = np.zeros((2, *SIZE), bool)
    masks[0, 2:6, 2:6] = masks[1, 4:8, 4:8] = True
    truth = np.zeros(SIZE, int)
    truth[masks[0]], truth[masks[1]] = 1, 2
    truth[4:6, 4:6] = 1
    name = register([record(1, truth)], "overlap_test")
    try:
        found = predictions(truth, scores=[0.6, 0.9])
        found.pred_masks = torch.from_numpy(masks)
        found.pred_boxes = Boxes(torch.tensor([[2.0, 2, 6, 6], [4, 4, 8, 8]]))
        result = evaluate(name, [{"image_id": 1}], [{"instances": found}])
        # IoU of the first: 12 / 16, of the second: 12 / 16.
        assert result["nuclei"]["pooled_mean_matched_iou"] == 0.75
        found.scores = torch.tensor([0.9, 0.6])
        result = evaluate(name, [{"image_id": 1}], [{"instances": found}])
        assert result["nuclei"]["pooled_mean_matched_iou"] == 1
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def test_overlapping_nuclei_are_found_whole():
    masks = np.zeros((2, *SIZE), bool)
    masks[0, 2:6, 2:6] = masks[1, 4:8, 4:8] = True
    annotations = [
        {**mask_to_annotation(crop_mask(mask), SIZE), "bbox_mode": BoxMode.XYWH_ABS}
        for mask in masks
    ]
    truth = {**record(1, np.zeros(SIZE, int)), "annotations": annotations}
    name = register([truth], "overlapping_nuclei_test")
    try:
        found = Instances(SIZE, pred_masks=torch.from_numpy(masks), scores=torch.tensor([0.6, 0.9]))
        result = evaluate(name, [{"image_id": 1}], [{"instances": found}])
        assert result["nuclei"]["pooled_f1_mean"] == result["nuclei"]["pooled_pq"] == 1
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def test_an_annotation_without_pixels_is_no_nucleus():
    labels = nuclei(np.random.default_rng(2), 4)
    truth = record(1, labels)
    truth["annotations"].insert(0, mask_to_annotation(crop_mask(np.zeros(SIZE)), SIZE))
    layers = record_to_layers(truth)
    assert layers.count == len(np.unique(labels)) - 1
    assert sorted(np.unique(layers.labels)) == list(range(layers.count + 1))


def test_label_masks_are_read_like_bitmaps():
    labels = nuclei(np.random.default_rng(2), 6)
    plain = predictions(labels)
    ids = torch.from_numpy(np.unique(labels)[1:])
    compact = Instances(SIZE, **{**plain.get_fields()})
    compact.remove("pred_masks")
    compact.pred_masks = LabelMasks(torch.from_numpy(labels.astype(np.int32))[None], ids)
    for first, second in zip(*(instances_to_masks(i)[0] for i in (plain, compact)), strict=True):
        assert (first.top, first.left) == (second.top, second.left)
        np.testing.assert_array_equal(first.mask, second.mask)


def test_the_evaluator_type_chooses(dataset):
    name, records, outputs = dataset
    cfg = load_config()
    evaluator = build_evaluator(cfg, name, None)
    evaluator.reset()
    evaluator.process(records, outputs)
    assert set(evaluator.evaluate()) == {"bbox", "segm", "nuclei", "boundary"}
    MetadataCatalog.remove(name)
    MetadataCatalog.get(name).set(evaluator_type="coco")
    coco = build_evaluator(cfg, name, None)
    coco.reset()
    coco.process(records, outputs)
    assert set(coco.evaluate()) == {"bbox", "segm"}


def test_two_processes_give_exactly_the_numbers_of_one(dataset, tmp_path):
    name, records, outputs = dataset
    parts = (slice(0, 2), slice(2, 5))  # as unevenly as Detectron2's sampler

    def work(rank):
        return evaluate(name, records[parts[rank]], outputs[parts[rank]])

    first, second = in_two_processes(work, tmp_path)
    assert first == evaluate(*dataset)
    assert second is None

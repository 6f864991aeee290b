import numpy as np
import pytest
from PIL import Image

from nuclei_d2.data.datasets.coco import mask_to_annotation
from nuclei_d2.evaluation.comparison import evaluate_files
from nuclei_d2.evaluation.inputs import (
    GroundTruth,
    ImageSource,
    Predictions,
    ScoredMasks,
    open_ground_truth,
    open_predictions,
)
from nuclei_d2.evaluation.instances import layers_from_masks
from nuclei_d2.structures.cropped_mask import crop_mask, label_image_to_masks
from nuclei_d2.utils.errors import NucleiError

SIZE = (40, 60)


def square(top, left, side=10):
    mask = np.zeros(SIZE, bool)
    mask[top : top + side, left : left + side] = True
    return crop_mask(mask)


def evaluate(images, size=SIZE, **settings):
    """Measure images, each a list of nuclei and a list of (mask, score)."""
    truth, found = {}, {}
    for k, (nuclei, scored) in enumerate(images):
        truth[f"{k}"] = source(layers_from_masks(nuclei, size))
        masks, scores = [mask for mask, _ in scored], np.array([score for _, score in scored])
        results = [{**mask_to_annotation(mask, size), "score": score} for mask, score in scored]
        found[f"{k}"] = source(ScoredMasks(masks, scores, size, results))
    predictions = Predictions("p.json", found, has_scores=True)
    (evaluation,) = evaluate_files(GroundTruth("g", truth, {}), [predictions], **settings)
    return evaluation


def source(content):
    return ImageSource("somewhere", lambda: content)


def test_overlapping_nuclei_are_found_whole():
    nuclei = [square(2, 2), square(8, 8), square(10, 10, 4)]
    image = (nuclei, [(mask, 0.9 - k / 10) for k, mask in enumerate(nuclei)])
    evaluation = evaluate([image] * 10)
    summary = evaluation.table.summary()
    assert summary["pooled"]["f1"]["mean"] == summary["pooled"]["pq"] == 1
    assert summary["image_mean"]["aji"] == 1
    assert evaluation.warnings == []


def test_predictions_under_others_are_counted_once_for_all_images():
    nucleus, inside = square(2, 2), square(4, 4, 3)
    image = ([nucleus], [(nucleus, 0.9), (inside, 0.8), (inside, 0.4)])
    evaluation = evaluate([image, image])
    assert evaluation.table.summary()["n_pred"] == 2
    few, warning = evaluation.warnings
    assert few.startswith("only 2 images")
    assert warning.startswith("p.json: 2 of 4 sure predictions lie wholly under others")


@pytest.mark.parametrize("count", [1, 1000])
def test_perfect_predictions_score_one_in_labels_coco_and_boundary_ap(count):
    size = (320, 360)
    labels = np.kron(np.arange(32 * 36).reshape(32, 36), np.ones((10, 10), int))
    labels[labels > count] = 0
    nuclei = [mask for _, mask in label_image_to_masks(labels)]
    scored = list(zip(nuclei, np.linspace(0.9, 0.6, count).tolist(), strict=True))
    evaluation = evaluate([(nuclei, scored)], size)
    summary = evaluation.table.summary()
    assert summary["n_gt"] == summary["n_pred"] == count
    assert summary["pooled"]["f1"]["mean"] == summary["image_mean"]["aji_plus"] == 1
    assert summary["boundary"]["nsd"] == summary["boundary"]["iou"]["1px"] == 1
    parts = [
        evaluation.coco["bbox"],
        evaluation.coco["segm"],
        *evaluation.coco["boundary"].values(),
    ]
    assert [part[name] for part in parts for name in ("AP", "AP75")] == pytest.approx([100] * 12)


def test_an_unreadable_file_among_a_thousand(tmp_path):
    truth, found = tmp_path / "truth", tmp_path / "found"
    for folder in (truth, found):
        folder.mkdir()
        for k in range(1000):
            Image.fromarray(np.eye(4, dtype=np.uint8)).save(folder / f"{k:03}.png")
    (found / "500.png").write_bytes((found / "500.png").read_bytes()[:50])
    gt = open_ground_truth(truth)
    with pytest.raises(NucleiError, match=str(found / "500.png")):
        evaluate_files(gt, [open_predictions(found, gt)])


def cap_warnings(counts, **settings):
    """Of images with so many predictions."""
    image = [square(2, 2)]
    images = [(image, [(image[0], 0.9 - k / 1000) for k in range(n)]) for n in counts]
    return [w for w in evaluate(images, **settings).warnings if "cap" in w]


def test_a_cap_is_reported_where_it_cut_something():
    (warning,) = cap_warnings([2, 3, 4], max_dets=2)
    assert warning == "p.json: the cap of 2 instances binds in 2 images"
    assert cap_warnings([2, 1, 2], max_dets=2) == []


def test_a_cap_of_the_program_itself_is_suspected():
    (warning,) = cap_warnings([100, 100, 7, 100])
    assert warning.startswith("p.json: 3 images have exactly 100 predictions, as many as any")
    assert cap_warnings([100, 100, 7]) == cap_warnings([99, 99, 99]) == []
    assert cap_warnings([100, 100, 100], max_dets=200) == []


def test_nuclei_of_overlapping_layers_keep_their_order_in_coco():
    nuclei = [square(2, 30), square(2, 2), square(8, 8), square(8, 36, 4)]
    evaluation = evaluate([(nuclei, [(mask, 0.9 - k / 10) for k, mask in enumerate(nuclei)])])
    assert evaluation.coco["segm"]["AP"] == pytest.approx(100)
    assert evaluation.coco["bbox"]["AP"] == pytest.approx(100)

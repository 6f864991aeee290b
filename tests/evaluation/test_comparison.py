import numpy as np

from nuclei_d2.data.datasets.coco import box_mask, mask_to_annotation
from nuclei_d2.evaluation.comparison import evaluate_files
from nuclei_d2.evaluation.inputs import (
    GroundTruth,
    ImageSource,
    Predictions,
    ScoredMasks,
)
from nuclei_d2.evaluation.instances import layers_from_masks

SIZE = (40, 60)


def square(top, left, side=10):
    mask = np.zeros(SIZE, bool)
    mask[top : top + side, left : left + side] = True
    return box_mask(mask)


def evaluate(images, **settings):
    """Measure images, each a list of nuclei and a list of (mask, score)."""
    truth, found = {}, {}
    for k, (nuclei, scored) in enumerate(images):
        truth[f"{k}"] = source(layers_from_masks(nuclei, SIZE))
        masks, scores = [mask for mask, _ in scored], np.array([score for _, score in scored])
        results = [{**mask_to_annotation(mask, SIZE), "score": score} for mask, score in scored]
        found[f"{k}"] = source(ScoredMasks(masks, scores, SIZE, results))
    predictions = Predictions("p.json", found, has_scores=True)
    (evaluation,) = evaluate_files(GroundTruth("g", truth, {}), [predictions], **settings)
    return evaluation


def source(content):
    return ImageSource("somewhere", lambda: content)


def test_overlapping_nuclei_are_found_whole():
    nuclei = [square(2, 2), square(8, 8), square(10, 10, 4)]
    evaluation = evaluate([(nuclei, [(mask, 0.9 - k / 10) for k, mask in enumerate(nuclei)])])
    summary = evaluation.table.summary()
    assert summary["pooled"]["f1"]["mean"] == summary["pooled"]["pq"] == 1
    assert summary["image_mean"]["aji"] == 1
    assert evaluation.warnings == []


def test_predictions_under_others_are_counted_once_for_all_images():
    nucleus, inside = square(2, 2), square(4, 4, 3)
    image = ([nucleus], [(nucleus, 0.9), (inside, 0.8), (inside, 0.4)])
    evaluation = evaluate([image, image])
    assert evaluation.table.summary()["n_pred"] == 2
    (warning,) = evaluation.warnings
    assert warning.startswith("p.json: 2 of 4 sure predictions lie wholly under others")

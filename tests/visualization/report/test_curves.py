import json

import numpy as np
import pycocotools.mask as mask_util
import pytest
from tiny import write_split

from nuclei_d2.evaluation.boundary_ap import ScoredImage
from nuclei_d2.evaluation.comparison import evaluate_files
from nuclei_d2.evaluation.inputs import open_ground_truth, open_predictions
from nuclei_d2.visualization.report.curves import (
    Reliability,
    precision_recall,
    reliability,
    score_edges,
)


def scored(scores, hits, n_gt):
    """One image; the same hits at every threshold."""
    return ScoredImage(np.array(scores), np.zeros((4, 10, 0), bool), n_gt, np.tile(hits, (10, 1)))


def test_precision_against_recall():
    # Best first over both images: right, wrong, right; two of four nuclei stay unfound.
    images = [scored([0.9, 0.5], [True, True], 2), scored([0.7], [False], 2)]
    recall, precision = precision_recall(images, 5)
    np.testing.assert_allclose(recall, np.arange(51) / 100)  # 2 of 4
    np.testing.assert_allclose(precision[:26], 1)
    np.testing.assert_allclose(precision[26:], 2 / 3)
    assert precision_recall([], 0)[0].size == 0
    assert precision_recall([scored([0.3], [False], 0)], 0)[0].size == 0


def test_the_area_below_the_curve_is_cocos_average_precision(tmp_path):
    write_split(tmp_path, "tiny_test", [12, 0, 9, 15], seed=1)
    truth = open_ground_truth(tmp_path / "annotations" / "tiny_test.json")
    content = json.loads((tmp_path / "annotations" / "tiny_test.json").read_text())
    rng = np.random.default_rng(0)
    results = []
    for annotation in content["annotations"]:
        mask = np.roll(mask_util.decode(annotation["segmentation"]), rng.integers(0, 4), axis=1)
        rle = mask_util.encode(np.asfortranarray(mask))
        rle["counts"] = rle["counts"].decode()
        score = float(rng.random())
        results.append({**annotation, "segmentation": rle, "bbox": None, "score": score})
    (tmp_path / "results.json").write_text(json.dumps(results))
    predictions = open_predictions(tmp_path / "results.json", truth)
    [evaluation] = evaluate_files(truth, [predictions])
    for threshold, key in ((0, "AP50"), (5, "AP75")):
        _, precision = precision_recall(evaluation.scored, threshold)
        assert 100 * precision.sum() / 101 == pytest.approx(evaluation.coco["segm"][key])
        assert 5 < evaluation.coco["segm"][key] < 95


def test_reliability_by_hand():
    images = [
        scored([0.05, 0.95, 1.0], [True, True, False], 3),
        scored([0.1, 0.12], [False, True], 1),
    ]
    edges = score_edges(images)
    np.testing.assert_allclose(edges, np.arange(11) / 10)
    found = reliability(images, edges)
    assert found.counts.tolist() == [1, 2, 0, 0, 0, 0, 0, 0, 0, 2]
    np.testing.assert_allclose(found.scores[[0, 1, 9]], [0.05, 0.11, 0.975])
    np.testing.assert_allclose(found.shares[[0, 1, 9]], [1, 0.5, 0.5])
    assert np.isnan(found.shares[2:9]).all()
    assert found.error == pytest.approx((0.95 + 2 * 0.39 + 2 * 0.475) / 5)
    assert np.isnan(reliability([], edges).error)


def test_points_of_few_predictions_are_left_out():
    scores, shares = np.array([0.1, 0.5, 0.9]), np.array([0.0, 0.5, 0.9])
    found = Reliability(np.array([19, 20, 1000]), scores, shares, 0.1)
    np.testing.assert_array_equal(found.line()[0], scores)
    np.testing.assert_array_equal(found.line()[1], [np.nan, 0.5, 0.9])


def test_scores_that_are_no_probabilities():
    edges = score_edges([scored([-2.0, 3.0], [True, True], 2)])
    assert (edges[0], edges[-1], len(edges)) == (-2, 3, 11)
    assert reliability([scored([-2.0, 3.0], [True, True], 2)], edges).counts.sum() == 2

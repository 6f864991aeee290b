import json
from types import SimpleNamespace

import numpy as np
import pycocotools.mask as mask_util
import pytest
from tiny import write_split

from nuclei_d2.evaluation.bootstrap import bootstrap_weights
from nuclei_d2.evaluation.boundary_ap import ScoredImage
from nuclei_d2.evaluation.comparison import evaluate_files
from nuclei_d2.evaluation.inputs import open_ground_truth, open_predictions
from nuclei_d2.evaluation.instances import layers_from_label_image
from nuclei_d2.evaluation.scores import ScoreTable, score_image
from nuclei_d2.visualization.report.findings import (
    MAIN,
    MERGES,
    METRICS,
    QUESTIONS,
    SPLITS,
    Change,
    Reliability,
    Statistics,
    answer,
    cost_rows,
    format_change,
    format_value,
    is_better_high,
    precision_recall,
    reliability,
    score_edges,
)


class Given:
    """Stands for the statistics: values and a difference of one metric, favourites of others."""

    def __init__(self, values, difference=None, favours=(), n_images=10):
        self._values, self._difference = np.array(values, float), difference
        self._favours = dict(favours)
        self.n_images = n_images

    def values(self, path):
        return self._values

    def interval(self, k, path):
        return f"interval {k}"

    def change(self, first, second, path):
        if path in self._favours:
            return Change("-1", "-3 to +1", self._favours[path])
        return self._difference(first, second)


def scored(scores, hits, n_gt):
    """One image; the same hits at every threshold."""
    return ScoredImage(np.array(scores), np.zeros((4, 10, 0), bool), n_gt, np.tile(hits, (10, 1)))


def test_the_second_best_is_what_the_best_is_compared_with():
    asked = []

    def change(first, second):
        asked.append((first, second))
        return Change("-2", "-3 to -1", 2)

    found = answer(QUESTIONS[1], ["a", "b", "c"], Given([5, 9, 7], change))
    assert asked == [(1, 2)]  # the later minus the earlier one, as in the table
    assert found.question == "Which merges most nuclei?"
    assert found.headline == "b"
    assert found.sentence == "9 merges (interval 1) against 7 of c, 5 of a."
    assert found.named == 1
    clear = "c minus b: -2 (-3 to -1). Clearly in favour of c: the interval excludes 0."
    assert found.difference == clear  # c has fewer merges


def test_what_may_be_chance_is_said_to_be():
    unsure = Given([7, 6], lambda first, second: Change("-1", "-3 to +1", None))
    found = answer(QUESTIONS[1], ["a", "b"], unsure)
    assert found.question == "Which merges more nuclei?"
    assert (found.headline, found.named) == ("Too close to call", None)
    assert found.sentence == "a: 7 merges (interval 0) against 6 of b."
    assert found.difference == "b minus a: -1 (-3 to +1). It may be chance: the interval holds 0."


def test_one_image_cannot_tell():
    alone = Given([7, 6], lambda first, second: Change("-1", "", None), n_images=1)
    found = answer(QUESTIONS[1], ["a", "b"], alone)
    assert (found.headline, found.named) == ("One image cannot tell", None)
    assert found.difference == "b minus a: -1. It may be chance."


def test_a_few_images_cannot_tell_either():
    few = Given([7, 6], lambda first, second: Change("-1", "-3 to -1", None), n_images=9)
    found = answer(QUESTIONS[1], ["a", "b"], few)
    assert (found.headline, found.named) == ("Too few images to tell", None)
    assert found.sentence == "a: 7 merges (interval 0) against 6 of b."
    chance = "b minus a: -1 (-3 to -1). It may be chance: 9 images cannot settle it."
    assert found.difference == chance
    unsure = Given([7, 3, 7], lambda first, second: Change("-4", "-5 to -3", None), n_images=9)
    tied = answer(QUESTIONS[1], ["a", "b", "c"], unsure)
    assert (tied.headline, tied.named) == ("Too few images to tell", None)
    assert tied.sentence == "a and c: 7 merges each against 3 of b."


FAVOURS = {metric.path: None for metric in METRICS}
REMARK = "Among 11 metrics an interval or two may exclude 0 by chance."


def test_what_speaks_for_the_other_one():
    favours = {**FAVOURS, MAIN: 1, MERGES: 1, SPLITS: 0, ("boundary", "f1"): 0}
    found = answer(QUESTIONS[0], ["a", "b"], Given([0.5, 0.6], None, favours))
    assert (found.headline, found.named) == ("b", 1)
    assert found.beside == f"a is ahead in: Boundary F1, Splits. {REMARK}"
    alone = answer(QUESTIONS[0], ["a", "b"], Given([0.5, 0.6], None, {**FAVOURS, MAIN: 1}))
    assert alone.beside == ""
    merges = answer(QUESTIONS[1], ["a", "b"], Given([5, 4], None, favours))
    assert merges.beside == ""  # no question of better or worse


def test_what_speaks_for_both_of_an_undecided_pair():
    favours = {**FAVOURS, MERGES: 1, SPLITS: 0}
    found = answer(QUESTIONS[0], ["a", "b"], Given([0.6, 0.5], None, favours))
    assert found.headline == "Too close to call"
    assert found.beside == f"a is ahead in: Splits. b is ahead in: Merges. {REMARK}"


def test_equal_sets_and_one_alone():
    clear = Given([7, 3, 7], lambda first, second: Change("-4", "-5 to -3", 1))
    found = answer(QUESTIONS[1], ["a", "b", "c"], clear)
    assert (found.headline, found.difference, found.named) == ("a and c", "", None)
    assert found.sentence == "7 merges each against 3 of b."
    one_only = Given([7, 3, 7], lambda first, second: Change("-4", "", 1 if first == 0 else None))
    found = answer(QUESTIONS[1], ["a", "b", "c"], one_only)
    assert (found.headline, found.named) == ("Too close to call", None)
    assert found.sentence == "a and c: 7 merges each against 3 of b."
    found = answer(QUESTIONS[1], ["a", "b"], Given([7, 7]))
    assert (found.headline, found.sentence) == ("No difference", "7 merges each.")
    found = answer(QUESTIONS[2], ["a"], Given([4]))
    assert found.question == "How often does it split nuclei?"
    assert (found.headline, found.named) == ("a", 0)
    assert found.sentence == "4 splits (interval 0)."


def test_nothing_to_measure():
    found = answer(QUESTIONS[0], ["a"], Given([np.nan]))
    assert (found.headline, found.difference) == ("", "")
    assert "Nothing to measure" in found.sentence


def test_whom_a_clear_difference_favours():
    assert is_better_high(MAIN)
    assert not is_better_high(MERGES)
    assert not is_better_high(("boundary", "hd95"))
    labels = np.kron(np.arange(1, 10).reshape(3, 3), np.pad(np.ones((8, 8), int), 2))
    few = [labels * (labels > k) for k in (3, 4, 5, 6, 7)] * 2
    tables = [score_table(labels, [labels] * 10), score_table(labels, few)]
    weights = bootstrap_weights(10)
    for order, winner in (((0, 1), 0), ((1, 0), 1)):
        statistics = Statistics([SimpleNamespace(table=tables[k]) for k in order], weights)
        assert statistics.change(0, 1, MAIN).favours == winner
        assert statistics.change(0, 1, ("errors", "missed")).favours == winner
        assert statistics.change(0, 1, MERGES).favours is None
    tables = [score_table(labels, [labels] * 9), score_table(labels, few[:9])]
    statistics = Statistics([SimpleNamespace(table=t) for t in tables], bootstrap_weights(9))
    change = statistics.change(0, 1, MAIN)
    assert change.interval.count("\N{MINUS SIGN}") == 2  # excludes 0, but of too few images
    assert change.favours is None


def score_table(truth, predictions):
    """Of one image's predictions, each as if it was another image."""
    gt, *found = map(layers_from_label_image, (truth, *predictions))
    return ScoreTable([score_image(gt, part) for part in found])


def test_numbers_as_text():
    assert format_value(1234, MERGES) == "1,234"
    assert format_value(0.12345) == "0.123"
    assert format_value(np.nan) == ""
    assert format_change(-0.0004) == "0.000"
    assert format_change(-0.5) == "\N{MINUS SIGN}0.500"
    assert format_change(3, MERGES) == "+3"
    assert format_change(np.nan) == ""


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


def test_costs_side_by_side():
    first = {"model": {"parameters": 12345, "image_size": [520, 696]}, "hardware": "CPU"}
    second = {"evaluation": {"my_test": {"network_s_per_image": 0.123456, "peak_mb": None}}}
    rows = cost_rows([{"efficiency": first}, {"efficiency": second}])
    assert rows == {
        "model: parameters": ["12,345", ""],
        "model: image size": ["520 x 696", ""],
        "hardware": ["CPU", ""],
        "evaluation: my_test: network s per image": ["", "0.1235"],
        "evaluation: my_test: peak mb": ["", ""],
    }
    assert cost_rows([{"segm": {"AP": 1}}]) == {}

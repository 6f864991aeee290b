import numpy as np
import pytest

from nuclei_d2.evaluation.bootstrap import (
    bootstrap_intervals,
    bootstrap_weights,
    paired_differences,
    sample_warning,
)
from nuclei_d2.evaluation.instances import layers_from_label_image
from nuclei_d2.evaluation.scores import ScoreTable, score_image

F1 = ("pooled", "f1", "0.50")


def table(found):
    """One image per entry: that many of four nuclei are found."""
    labels = np.zeros((16, 16), int)
    for k in range(4):
        labels[4 * k : 4 * k + 3, 2:6] = k + 1
    gt = layers_from_label_image(labels)
    images = [layers_from_label_image(np.where(labels <= n, labels, 0)) for n in found]
    return ScoreTable([score_image(gt, pred) for pred in images])


def test_weights_draw_as_many_images_as_there_are():
    weights = bootstrap_weights(7, resamples=50, seed=3)
    assert weights.shape == (50, 7)
    assert (weights.sum(axis=1) == 7).all()
    np.testing.assert_array_equal(weights, bootstrap_weights(7, resamples=50, seed=3))
    assert (weights != bootstrap_weights(7, resamples=50, seed=4)).any()


def test_one_image_has_no_interval():
    weights = bootstrap_weights(1)
    assert weights.shape == (0, 1)
    first, second = table([2]), table([3])
    assert np.isnan(bootstrap_intervals(first, weights)[F1]).all()
    change = paired_differences(first, second, weights)[F1]
    assert np.isnan([change["low"], change["high"]]).all()
    assert change["difference"] == pytest.approx(6 / 7 - 2 / 3)


def test_few_images_are_warned_of():
    assert "no interval" in sample_warning(1)
    assert "only 9 images" in sample_warning(9)
    assert sample_warning(10) is None


def test_weighting_equals_repeating_images():
    weights = np.array([[2, 0, 1]])
    weighted = table([1, 2, 4]).metrics(weights)
    repeated = table([1, 1, 4]).metrics()
    for path, values in repeated.items():
        np.testing.assert_allclose(weighted[path], values, err_msg=str(path))


def test_interval_is_that_of_the_resampled_values():
    scores = table([1, 2, 3, 4, 4, 4])
    weights = bootstrap_weights(6, resamples=400)
    found = weights @ np.array([1, 2, 3, 4, 4, 4])
    expected = np.percentile(2 * found / (24 + found), [2.5, 97.5])
    low, high = bootstrap_intervals(scores, weights)[F1]
    assert (low, high) == pytest.approx(tuple(expected))
    assert low < float(scores.metrics()[F1][0]) < high


def test_paired_differences_cancel_what_is_common():
    first, second = table([1, 2, 3, 4]), table([1, 2, 3, 4])
    weights = bootstrap_weights(4)
    assert paired_differences(first, second, weights)[F1] == {
        "difference": 0,
        "low": 0,
        "high": 0,
    }
    better = paired_differences(first, table([2, 3, 4, 4]), weights)[F1]
    assert better["difference"] > 0
    assert better["low"] <= better["difference"] <= better["high"]

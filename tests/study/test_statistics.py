"""Bootstrap of AP against drawn copies, seeds, differences, and bins of crowding."""

import numpy as np
import pytest
from scipy.stats import t as student

from nuclei_d2.evaluation.bootstrap import bootstrap_weights
from nuclei_d2.evaluation.boundary_ap import average_precision
from nuclei_d2.evaluation.instances import LabelLayers
from nuclei_d2.evaluation.scores import score_image
from nuclei_d2.study.measure import Measured
from nuclei_d2.study.statistics import (
    METRICS,
    Estimate,
    Sample,
    Scores,
    difference,
    equal_images,
    estimate,
    holm,
    part_of,
    touching_bins,
    weighted_ap,
)
from nuclei_d2.utils.errors import NucleiError


def layers(labels):
    return LabelLayers(np.asarray(labels, np.uint16)[None], int(np.max(labels)))


def image_scores(nuclei: int, found: int):
    """Of an image with so many nuclei, of which so many are found exactly and none besides."""
    gt = np.zeros((4, 4 * nuclei + 1), int)
    for k in range(nuclei):
        gt[:3, 4 * k : 4 * k + 3] = k + 1
    return score_image(layers(gt), layers(np.where(gt <= found, gt, 0)))


def measured(found, nuclei=(4, 2, 4), touching=(0, 1, 4), hits=True) -> Measured:
    """Three images; all predictions are right."""
    rows = np.ones((10, sum(found)), bool)
    return Measured(
        names=["a", "b", "c"],
        touching=np.array(touching),
        images=[image_scores(*pair) for pair in zip(nuclei, found, strict=True)],
        owner=np.repeat(np.arange(3), found),
        hits=dict.fromkeys(("mask", "2%", "1px", "2px", "3px"), rows) if hits else {},
        score_threshold=0.5,
        validation=None,
        coco=None,
        contested=None,
    )


def test_weighted_ap_is_ap_of_the_drawn_images():
    rng = np.random.default_rng(0)
    owner, hits = rng.integers(0, 6, 80), rng.random(80) < 0.6
    nuclei = np.array([np.count_nonzero(hits[owner == k]) + k for k in range(6)])
    weights = bootstrap_weights(6, 25)
    result = weighted_ap(hits[None], weights[:, owner], weights @ nuclei)
    for row, (value,) in zip(weights, result, strict=True):
        copies = np.repeat(hits, row[owner])  # copies of an image have equal scores: neighbours
        assert value == pytest.approx(average_precision(copies, row @ nuclei))


def test_ap_of_a_draw_without_nuclei_is_undefined():
    hits, drawn = np.array([[True, False]]), np.array([[0, 1], [1, 1]])
    assert np.isnan(weighted_ap(hits, drawn, np.array([0, 1]))).tolist() == [[True], [False]]


def test_metrics_of_one_run():
    scores = Scores(measured((4, 0, 4)), np.ones((1, 3), int))
    values = {key: float(metric.compute(scores)[0]) for key, metric in METRICS.items()}
    assert values["accuracy"] == pytest.approx(0.8)  # 8 of 10 nuclei, nothing else
    assert values["accuracy_90"] == pytest.approx(0.8)
    assert values["missed"] == pytest.approx(20)
    assert values["merges"] == values["splits"] == 0
    # Precision is 1 up to recall 0.8: 81 of 101 points.
    assert values["ap"] == values["boundary_ap"] == pytest.approx(8100 / 101)
    assert values["pooled_recall_0.50"] == pytest.approx(0.8)
    assert values["not_found"] == pytest.approx(20)
    assert values["overlooked"] == pytest.approx(20)
    assert scores.recall_by_size()[0].tolist()[0] == pytest.approx(0.8)  # all are small
    assert np.isnan(scores.recall_by_size()[0][1:]).all()


def test_overlooked_is_what_no_prediction_has_whatever_its_score():
    run = measured((4, 0, 4))
    hits = np.ones((10, 8), bool)
    hits[0, -1] = False  # of the third image, which counts three times
    run = run._replace(hits={**run.hits, "mask": hits}, score_threshold=0.99)
    scores = Scores(run, np.array([[1, 1, 3], [0, 0, 0]]))
    overlooked = METRICS["overlooked"].compute(scores)
    assert overlooked[0] == pytest.approx(100 * (2 + 3) / 18)
    assert np.isnan(overlooked[1])
    assert METRICS["overlooked"].highest == 100


def test_without_scores_there_is_no_ap():
    scores = Scores(measured((4, 0, 4), hits=False), np.ones((1, 3), int))
    assert np.isnan(METRICS["boundary_ap"].compute(scores)).all()
    assert np.isnan(METRICS["overlooked"].compute(scores)).all()
    assert METRICS["accuracy"].compute(scores)[0] == pytest.approx(0.8)


def test_an_estimate_is_the_mean_over_seeds_and_keeps_each():
    sample = Sample.of({0: measured((4, 2, 4)), 1: measured((4, 0, 4))})
    found = estimate(sample, METRICS["accuracy"].compute)
    assert found.value == pytest.approx(0.9)
    assert found.seeds == pytest.approx((1.0, 0.8))
    assert 0 <= found.low < found.value < found.high
    assert estimate(sample, METRICS["accuracy"].compute, highest=1).high == 1
    assert found.is_known


def drawn(*seeds, images=("a", "b", "c")) -> Sample:
    """A model whose metric is given: for each seed its value, and that of every draw."""
    return Sample(dict(enumerate(map(np.array, seeds))), tuple((name, 1) for name in images))


def itself(values):
    return values


def test_an_interval_is_that_of_other_images_and_trainings():
    found = estimate(drawn([4.0, 3, 5, 3, 5], [6.0, 5, 7, 5, 7]), itself)
    # Images: variance 1 of the draws of three, 3 / 2 of other images, 2 degrees of freedom. Seeds:
    # 2 / 2, 1 degree.
    freedom = (1.5 + 1) ** 2 / (1.5**2 / 2 + 1 / 1)
    half = student.ppf(0.975, freedom) * 2.5**0.5
    assert found[:3] == pytest.approx((5, max(5 - half, 0), 5 + half))
    assert found.p == pytest.approx(2 * student.sf(5 / 2.5**0.5, freedom))
    first, second = drawn([4.0, 3, 5, 3, 5], [6.0, 5, 7, 5, 7]), drawn([3.0, 2, 4, 2, 4])
    change = difference(first, second, itself)  # the images are hard for both: only seeds count
    assert change[:3] == pytest.approx((2, 2 - student.ppf(0.975, 1), 2 + student.ppf(0.975, 1)))
    assert change.seeds == (1,)


def test_one_seed_has_an_interval_of_images_and_one_image_has_none():
    half = student.ppf(0.975, 2) * 1.5**0.5
    assert estimate(drawn([4.0, 3, 5, 3, 5]), itself)[:3] == pytest.approx((4, 0, 4 + half))
    found = estimate(drawn([4.0], [5.0], images="a"), itself)
    assert found.value == 4.5
    assert np.isnan((found.low, found.high, found.p)).all()


def test_an_image_of_most_nuclei_counts_most():
    assert equal_images(np.array([5, 5, 5, 5])) == 4
    assert equal_images(np.array([90, 1, 1])) == pytest.approx(92**2 / 8102)
    assert equal_images(np.array([0, 0])) == 2
    uneven = Sample({0: np.array([4.0, 3, 5, 3, 5])}, (("a", 90), ("b", 1), ("c", 1)))
    half = student.ppf(0.975, 1) * 1.5**0.5  # one degree of freedom at least
    assert estimate(uneven, itself).high == pytest.approx(4 + half)


def test_what_never_varied_has_no_interval():
    found = estimate(drawn([0.0, 0, 0, 0, 0]), itself)  # other images may have one
    assert found.value == 0
    assert np.isnan((found.low, found.high)).all()


def test_no_more_than_all_nuclei_can_be_missing():
    assert METRICS["not_found"].highest == METRICS["ap"].highest == 100
    assert METRICS["merges"].highest == METRICS["boundary_hd95"].highest == np.inf


@pytest.mark.parametrize("seeds", [2, 3])
def test_methods_that_are_alike_are_told_apart_in_one_of_twenty_studies(seeds):
    rng = np.random.default_rng(0)
    images = tuple(map(str, range(56)))
    wrong = 0
    for _ in range(500):
        true, draws = 0.3 * rng.normal(), 0.3 * rng.normal(size=100)  # images, for one of the two
        trainings = 0.45 * rng.normal(size=(2, seeds, 1))
        both = [trained + np.concatenate([[0], draws]) + true for trained in trainings[0]]
        others = [np.repeat(trained, 101) for trained in trainings[1]]
        wrong += (
            difference(drawn(*both, images=images), drawn(*others, images=images), itself).sign != 0
        )
    assert 0.02 < wrong / 500 < 0.08


def test_p_values_corrected_for_their_number():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1, 1]
    assert holm([]) == []


def test_only_what_was_measured_on_the_same_images_is_compared():
    first = Sample.of({0: measured((4, 2, 4))})
    renamed = measured((4, 2, 4))._replace(names=["a", "b", "d"])
    with pytest.raises(NucleiError, match="of different images"):
        difference(first, Sample.of({0: renamed}), METRICS["accuracy"].compute)
    with pytest.raises(NucleiError, match="of different images"):
        Sample.of({0: measured((4, 2, 4)), 1: measured((4, 2, 4), nuclei=(4, 2, 5))})


def test_merges_and_splits_are_added():
    merged = layers(np.where(np.arange(9) % 8, [[1] * 9] * 3, 0))  # one that covers two nuclei
    gt = np.zeros((3, 9), int)
    gt[:, 1:4], gt[:, 5:8] = 1, 2
    image = score_image(layers(gt), merged)
    part = measured((4,), nuclei=(4,), touching=(0,), hits=False)._replace(images=[image])
    scores = Scores(part, np.ones((1, 1), int))
    assert METRICS["merges"].compute(scores)[0] == pytest.approx(50)
    assert METRICS["splits"].compute(scores)[0] == 0
    assert METRICS["merges_and_splits"].compute(scores)[0] == pytest.approx(50)


def test_a_difference_is_paired_by_image_and_seed():
    first = Sample.of({0: measured((4, 2, 4)), 1: measured((4, 2, 4))})
    second = Sample.of({1: measured((2, 1, 2)), 2: measured((2, 1, 2))})
    change = difference(first, second, METRICS["accuracy"].compute)
    # Half of the nuclei of every image: the same difference in every draw.
    assert change.value == change.low == change.high == pytest.approx(0.5)
    assert change.seeds == pytest.approx((0.5,))
    assert change.sign == 1
    assert difference(second, first, METRICS["accuracy"].compute).sign == -1


@pytest.mark.parametrize(
    ("low", "high", "sign"), [(0.1, 1, 1), (-1, -0.1, -1), (-1, 1, 0), (0, 1, 0)]
)
def test_the_sign_of_an_interval(low, high, sign):
    assert Estimate(0.5, low, high, ()).sign == sign


def test_bins_of_touching_nuclei():
    part = measured((4, 2, 4), nuclei=(10, 10, 4), touching=(0, 1, 4))
    assert [bin_.tolist() for bin_ in touching_bins(part)] == [[0], [1], [2]]
    empty = part._replace(images=[image_scores(0, 0), *part.images[1:]])
    assert [bin_.tolist() for bin_ in touching_bins(empty)] == [[], [1], [2]]


def test_a_part_is_a_test_set_of_its_own():
    whole = measured((4, 1, 4))
    part = part_of(whole, [1])
    scores = Scores(part, np.ones((1, 1), int))
    assert METRICS["accuracy"].compute(scores)[0] == pytest.approx(0.5)
    assert METRICS["ap"].compute(scores)[0] == pytest.approx(5100 / 101)
    assert part.names == ["b"]

from types import SimpleNamespace

import numpy as np

from nuclei_d2.evaluation.bootstrap import bootstrap_weights
from nuclei_d2.evaluation.instances import layers_from_label_image
from nuclei_d2.evaluation.scores import ScoreTable, score_image
from nuclei_d2.visualization.report.findings import (
    MAIN,
    MERGES,
    METRICS,
    QUESTIONS,
    SPLITS,
    Change,
    Statistics,
    answer,
    cost_rows,
    format_change,
    format_value,
    is_better_high,
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
    clear = "On other images like these c would be ahead, too: the interval excludes 0."
    assert found.difference == f"c minus b: -2 (-3 to -1). {clear}"  # c has fewer merges


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
REMARK = (
    "Among 11 metrics some intervals exclude 0 by chance, more so if another training of the same "
    "method would find other nuclei."
)


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

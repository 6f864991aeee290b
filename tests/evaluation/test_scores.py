import csv
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from nuclei_d2.evaluation.instances import layers_from_label_image, layers_from_masks
from nuclei_d2.evaluation.scores import ScoreTable, nest, score_image, write_per_image
from nuclei_d2.structures.cropped_mask import CroppedMask


def score(gt, pred):
    return score_image(layers_from_label_image(gt), layers_from_label_image(pred))


def grid(count, side=6, size=256):
    """``count`` squares of ``side`` px, three px apart."""
    labels = np.zeros((size, size), int)
    columns = size // (side + 3)
    for k in range(count):
        y, x = (side + 3) * (k // columns), (side + 3) * (k % columns)
        labels[y : y + side, x : x + side] = k + 1
    assert len(np.unique(labels)) == count + 1
    return labels


def cut(labels, width):
    """The nuclei without their right ``width`` of 6 columns."""
    result = labels.copy()
    for k in range(width):
        result[:, 5 - k :: 9] = 0
    return result


EMPTY = np.zeros((256, 256), int)


@pytest.mark.parametrize("count", [1, 100, 1000])
def test_perfect_predictions_score_one_in_everything(count):
    labels = grid(count, size=300)
    summary = ScoreTable([score(labels, labels)]).summary()
    for part in ("pooled", "image_mean"):
        for name, value in summary[part].items():
            values = value.values() if isinstance(value, dict) else [value]
            assert list(values) == [1] * len(values), (part, name)
    assert set(summary["errors"]) == {"merges", "splits", "missed", "spurious", "by_size"}
    assert [summary["errors"][k] for k in ("merges", "splits", "missed", "spurious")] == [0] * 4
    edge = summary["boundary"]
    assert edge["hd95"] == 0
    assert edge["nsd"] == edge["f1"] == 1
    assert set(edge["iou"].values()) == {1.0}
    assert edge["instance_f1_1px"]["0.95"] == 1
    assert summary["n_gt"] == summary["n_pred"] == count


@given(
    hnp.arrays(np.int32, (8, 9), elements=st.integers(0, 5)).filter(np.any),
    st.permutations(range(1, 6)),
)
@settings(max_examples=50, deadline=None)
def test_the_same_nuclei_renumbered_are_perfect(labels, numbers):
    summary = ScoreTable([score(labels, 7 * np.array([0, *numbers])[labels])]).summary()
    for part in ("pooled", "image_mean"):
        assert summary[part]["f1"]["mean"] == summary[part]["accuracy"]["mean"] == 1
        assert summary[part]["pq"] == summary[part]["dice"] == 1
    assert summary["image_mean"]["aji"] == summary["image_mean"]["aji_plus"] == 1
    assert summary["boundary"]["f1"] == summary["boundary"]["nsd"] == 1
    assert summary["boundary"]["hd95"] == 0


def test_pooled_and_image_mean_by_hand():
    """Image 1: 10 of 10 at IoU 5/6. Image 2: 1 of 2 nuclei, and no other prediction."""
    many = grid(10)
    few = grid(2)
    images = [score(many, cut(many, 1)), score(few, np.where(few == 1, few, 0))]
    summary = ScoreTable(images).summary()
    pooled, mean = summary["pooled"], summary["image_mean"]
    assert pooled["recall"]["0.80"] == pytest.approx(11 / 12)
    assert pooled["recall"]["0.85"] == pytest.approx(1 / 12)
    assert pooled["precision"]["0.80"] == 1
    assert pooled["f1"]["0.80"] == pytest.approx(22 / 23)
    assert pooled["accuracy"]["0.80"] == pytest.approx(11 / 12)
    assert pooled["pq"] == pytest.approx((10 * 5 / 6 + 1) / (11 + 0.5))
    assert pooled["sq"] == pytest.approx((10 * 5 / 6 + 1) / 11)
    assert pooled["dq"] == pytest.approx(11 / 11.5)
    assert pooled["mean_matched_iou"] == pooled["sq"]
    assert pooled["dice"] == pytest.approx(2 * (300 + 36) / (360 + 300 + 72 + 36))
    assert pooled["recall"]["mean"] == pytest.approx((7 * 11 / 12 + 3 * 1 / 12) / 10)
    assert mean["recall"]["0.80"] == pytest.approx((1 + 1 / 2) / 2)
    assert mean["f1"]["0.80"] == pytest.approx((1 + 2 / 3) / 2)
    assert mean["pq"] == pytest.approx((5 / 6 + 1 / 1.5) / 2)
    assert mean["aji"] == pytest.approx((5 / 6 + 1 / 2) / 2)
    assert summary["errors"]["missed"] == 1
    assert summary["errors"]["by_size"]["0-250"] == {
        **{"n_gt": 12, "n_pred": 11, "recall_0.50": pytest.approx(11 / 12)},
        **{"merges": 0, "splits": 0, "missed": 1, "spurious": 0},
    }
    assert math.isnan(summary["errors"]["by_size"]["900-inf"]["recall_0.50"])


def test_an_empty_pair_moves_no_mean_and_is_counted():
    labels = grid(9)
    with_empty = ScoreTable([score(labels, cut(labels, 2)), score(EMPTY, EMPTY)]).summary()
    without = ScoreTable([score(labels, cut(labels, 2))]).summary()
    assert with_empty.pop("n_images") == 2
    assert with_empty.pop("n_images_empty") == 1
    assert without.pop("n_images") == 1
    assert without.pop("n_images_empty") == 0
    np.testing.assert_equal(with_empty, without)


@pytest.mark.parametrize("swap", [False, True])
def test_nothing_found_or_nothing_there_is_zero(swap):
    pair = (EMPTY, grid(4)) if swap else (grid(4), EMPTY)
    summary = ScoreTable([score(*pair)]).summary()
    for part in ("pooled", "image_mean"):
        for name, value in summary[part].items():
            if name != "mean_matched_iou":
                values = value.values() if isinstance(value, dict) else [value]
                assert list(values) == [0] * len(values), (part, name)
    assert math.isnan(summary["boundary"]["hd95"])
    assert summary["boundary"]["f1"] == 0
    assert summary["errors"]["spurious" if swap else "missed"] == 4
    assert summary["n_images_empty"] == 0


def test_nuclei_without_pixels_leave_no_mean_undefined():
    labels = grid(4)
    nowhere = layers_from_masks([CroppedMask(np.zeros((0, 0), bool), 0, 0)], EMPTY.shape)
    images = [score(labels, labels), score_image(nowhere, layers_from_label_image(EMPTY))]
    mean = ScoreTable(images).summary()["image_mean"]
    assert [mean[name] for name in ("aji", "aji_plus", "dice", "pq")] == [0.5] * 4


def test_only_empty_images_leave_everything_undefined():
    summary = ScoreTable([score(EMPTY, EMPTY)]).summary()
    assert math.isnan(summary["pooled"]["f1"]["mean"])
    assert math.isnan(summary["image_mean"]["aji"])
    assert summary["errors"]["merges"] == 0


def test_the_order_of_images_does_not_matter():
    labels = [grid(k) for k in (3, 8, 20)]
    images = [score(x, cut(x, k)) for k, x in enumerate(labels)]
    first, second = (ScoreTable(part).summary() for part in (images, images[::-1]))
    np.testing.assert_equal(first["errors"], second["errors"])
    assert first["pooled"]["f1"] == second["pooled"]["f1"]
    for part, name in (("pooled", "pq"), ("image_mean", "aji"), ("boundary", "nsd")):
        assert first[part][name] == pytest.approx(second[part][name], rel=1e-12)


def test_boundary_iou_is_stricter_for_thin_boundaries():
    labels = grid(20, side=20)
    shifted = np.roll(labels, 2, axis=1)
    iou = ScoreTable([score(labels, shifted)]).summary()["boundary"]["iou"]
    mask = 18 / 22
    assert iou["1px"] < iou["2px"] < iou["3px"] < iou["2%"] <= mask
    # Two frames of 76 px, 2 columns apart, share 2 x 18 px of their horizontal sides.
    assert iou["1px"] == pytest.approx(36 / (76 + 76 - 36))


def test_per_image_table(tmp_path):
    labels = grid(9)
    images = [score(labels, cut(labels, 2)), score(EMPTY, EMPTY)]
    write_per_image(tmp_path / "t.csv", ["a", "b"], images)
    first, second = csv.DictReader((tmp_path / "t.csv").open())
    assert first["image"] == "a"
    assert first["n_gt"] == "9"
    assert float(first["f1_0.65"]) == 1
    assert float(first["aji"]) == pytest.approx(4 / 6, abs=1e-6)
    assert second["aji"] == ""


def test_per_image_table_of_names_that_are_no_unicode(tmp_path):
    write_per_image(tmp_path / "t.csv", ["im\udcffage", "caf\u00e9"], [score(EMPTY, EMPTY)] * 2)
    text = (tmp_path / "t.csv").read_text(encoding="utf-8")
    assert r"im\udcffage" in text
    assert "caf\u00e9" in text


def test_nest():
    assert nest({("a", "b"): 1, ("a", "c"): 2, ("d",): 3}) == {"a": {"b": 1, "c": 2}, "d": 3}

"""benchmark_prediction.py with the classical baseline, which needs no weights."""

import json
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pycocotools.mask import encode
from tiny import CONFIGS, REPOSITORY

from nuclei_d2.utils.errors import NucleiError

sys.path.insert(0, str(REPOSITORY / "tools" / "benchmarks"))  # as for a script that lies there
import benchmark_prediction as tool


@pytest.fixture
def measure(monkeypatch, tmp_path):
    """Run the tool; returns the rows that it writes."""

    def run(*words):
        output = tmp_path / "rows.json"
        argv = ["benchmark_prediction.py", words[0], "--config-file", CONFIGS / "classical.yaml"]
        argv += [*words[1:], "--output", output, "--opts", "MODEL.DEVICE", "cpu"]
        argv += ["INPUT.NUCLEUS_DIAMETER", 12]
        ranges = ("FOCUS", "NOISE", "SATURATED", "BACKGROUND", "DIAMETER")
        for name in ranges:
            argv += [f"INPUT.TRAINING_RANGES.{name}", "[0.0, 0.2]"]
        monkeypatch.setattr("sys.argv", [str(word) for word in argv])
        tool.main()
        return json.loads(output.read_text())["rows"]

    return run


def test_tiles_of_the_classical_baseline_find_what_the_whole_image_does(measure):
    whole, tiled = measure("tiling", "--size", 1100, "--nuclei", 150)
    assert (whole["tiles"], tiled["tiles"]) == (1, 4)
    assert whole["nuclei"] == tiled["nuclei"] > 100
    assert whole["F1 with the other"] == 1
    at_cuts, elsewhere = (tiled[f"without partner {w}"].split() for w in ("at cuts", "elsewhere"))
    assert at_cuts[0] == elsewhere[0] == "0"
    assert int(at_cuts[2]) + int(elsewhere[2]) == tiled["nuclei"]
    assert int(at_cuts[2]) > 0


def test_empty_fields_and_annotated_nuclei(measure, tiny_data, monkeypatch):
    few = dict(list(tool.empty_fields().items())[:2])
    monkeypatch.setattr(tool, "empty_fields", lambda: few)
    *fields, annotated = measure("empty", "--datasets", "tiny_val")
    assert [row["field"] for row in fields] == list(few)
    assert all(row["known size, contrast >= 3"] == 0 for row in fields)
    assert annotated["field"].startswith("tiny_val: ")


def test_spoilt_images_are_unlike_the_training(measure, tiny_data):
    rows = {row["images"]: row for row in measure("unlike", "--datasets", "tiny_val", "tiny_test")}
    assert rows["inverted"]["background"] == 100
    assert rows["tiny_val"]["background"] == 0
    assert rows["tiny_val"]["diameter"] == 100  # no nucleus is as small as the range given above
    assert len(rows) == 2 + len(tool.spoilers())


def test_scores_are_compared_with_the_truth(measure, tiny_data, capsys):
    (score,) = measure("trust", "--datasets", "tiny_train", "tiny_test")
    assert score["predictor"] == "score"
    assert 0 < score["AUROC"] < 1
    assert score["gain, low"] == score["gain, high"] == 0
    assert "6 images, " in capsys.readouterr().out


def test_estimated_sizes_follow_the_images(measure, tiny_data):
    rows = measure("scale", "--datasets", "tiny_val", "tiny_test")
    assert [row["size"] for row in rows] == list(tool._SIZES)
    assert all(0.5 < row["median"] < 2 for row in rows)
    assert all(0 < row["F1, annotated"] <= 1 for row in rows)


@pytest.mark.parametrize("size", [0.5, 1, 2])
def test_annotated_nuclei_of_a_resized_image(size):
    mask = np.zeros((20, 30), np.uint8, order="F")
    mask[4:12, 6:16] = 1
    record = {"height": 20, "width": 30, "annotations": [{"segmentation": encode(mask)}]}
    truth = tool.annotated(record, size)
    assert truth.size == (20 * size, 30 * size)
    assert truth.areas.tolist() == [80 * size**2]


@pytest.mark.parametrize("what", ["trust", "scale"])
def test_data_sets_have_to_be_named(measure, what):
    with pytest.raises(NucleiError, match="--datasets"):
        measure(what)


@given(
    arrays(int, 12, elements=st.integers(0, 5)),
    arrays(bool, 12),
    arrays(int, 12, elements=st.integers(0, 3)),
)
def test_area_under_roc_counts_pairs(values, right, weights):
    pairs = [
        (0.5 * (a == b) + (a > b), m * n)
        for a, m in zip(values[right], weights[right], strict=True)
        for b, n in zip(values[~right], weights[~right], strict=True)
    ]
    total = sum(count for _, count in pairs)
    found = tool.area_under_roc(values, right, weights)
    if not total:
        assert np.isnan(found)
    else:
        assert found == pytest.approx(sum(value * count for value, count in pairs) / total)

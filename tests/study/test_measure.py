"""What is kept of predictions, against the evaluators, and the choice of the score threshold."""

import json

import numpy as np
import pytest
from skimage.draw import disk

from nuclei_d2.data.datasets.coco import mask_to_annotation, write_coco_json
from nuclei_d2.evaluation.boundary_ap import average_precision
from nuclei_d2.evaluation.comparison import evaluate_files
from nuclei_d2.evaluation.inputs import open_ground_truth, open_predictions
from nuclei_d2.evaluation.matching import IOU_THRESHOLDS
from nuclei_d2.evaluation.scores import ScoreTable
from nuclei_d2.structures.cropped_mask import crop_mask
from nuclei_d2.study.measure import choose_score_threshold, measure, read_measured
from nuclei_d2.utils.errors import NucleiError

SIZE = (60, 80)


def circle(centre, radius):
    mask = np.zeros(SIZE, bool)
    mask[disk(centre, radius, shape=SIZE)] = True
    return crop_mask(mask)


def write_truth(path, images):
    """COCO JSON; every image a list of masks."""
    entries = [
        {
            **{"id": k, "file_name": f"{k}.png", "height": SIZE[0], "width": SIZE[1]},
            "annotations": [mask_to_annotation(mask, SIZE) for mask in masks],
        }
        for k, masks in enumerate(images, start=1)
    ]
    write_coco_json(path, entries)
    return str(path)


def write_results(path, images):
    """COCO results; every image a list of (mask, score)."""
    results = [
        {**mask_to_annotation(mask, SIZE), "image_id": k, "score": score}
        for k, found in enumerate(images, start=1)
        for mask, score in found
    ]
    path.write_text(json.dumps(results))
    return str(path)


@pytest.fixture
def files(tmp_path):
    """Ground truth and predictions of three images; the last has neither nuclei nor predictions."""
    rng = np.random.default_rng(0)
    truth, found = [], []
    for _ in range(2):
        places = [(y, x) for y in (12, 30, 48) for x in (12, 30, 48, 66)]
        masks = [circle(place, rng.uniform(4, 9.5)) for place in places]
        shifted = [
            circle(np.add(place, rng.normal(0, 1.5, 2)), rng.uniform(4, 9)) for place in places
        ]
        truth.append(masks)
        found.append([(mask, round(rng.uniform(0.2, 1), 3)) for mask in shifted])
    return (
        write_truth(tmp_path / "truth.json", [*truth, []]),
        write_results(tmp_path / "results.json", [*found, []]),
    )


def test_what_is_kept_gives_the_same_numbers(files, tmp_path):
    measure(files, {"my_test": files}, str(tmp_path / "out"), 100)
    kept = read_measured(tmp_path / "out" / "my_test.json")
    truth = open_ground_truth(files[0])
    predictions = open_predictions(files[1], truth)
    (direct,) = evaluate_files(truth, [predictions], kept.score_threshold, 100)
    assert kept.names == direct.names == ["1", "2", "3"]
    before, after = direct.table.metrics(), ScoreTable(kept.images).metrics()
    for path, value in before.items():
        np.testing.assert_allclose(after[path], value, atol=1e-5, err_msg=str(path))
    n_gt = sum(image.n_gt for image in kept.images)
    for name, ap in direct.coco["boundary"].items():
        values = [100 * average_precision(row, n_gt) for row in kept.hits[name]]
        assert np.mean(values) == pytest.approx(ap["AP"])
    masks = [100 * average_precision(row, n_gt) for row in kept.hits["mask"]]
    assert np.mean(masks) == pytest.approx(direct.coco["segm"]["AP"])
    assert kept.coco["bbox"]["AP"] == pytest.approx(direct.coco["bbox"]["AP"])


def test_what_overlaps_cost_is_kept(tmp_path):
    nuclei = [circle((20, 20), 9), circle((20, 38), 9)]
    found = [(circle((20, 24), 9), 0.9), (nuclei[1], 0.8)]  # the first one bites into the second
    truth = write_truth(tmp_path / "truth.json", [nuclei])
    results = write_results(tmp_path / "results.json", [found])
    measure((truth, results), {"t": (truth, results)}, str(tmp_path), 100)
    kept = read_measured(tmp_path / "t.json")
    assert 0.02 < kept.contested["pixels"] < 0.2
    assert ScoreTable(kept.images).metrics()["pooled", "accuracy", "0.95"][0] == 0
    assert kept.contested["accuracy"][-1] == pytest.approx(1 / 3, abs=1e-5)


def test_touching_nuclei_are_counted(tmp_path):
    masks = [circle((20, 20), 8), circle((20, 35), 7.5), circle((45, 60), 6)]  # two of them meet
    truth = write_truth(tmp_path / "truth.json", [masks])
    results = write_results(tmp_path / "results.json", [[(mask, 0.9) for mask in masks]])
    measure((truth, results), {"t": (truth, results)}, str(tmp_path), 100)
    assert read_measured(tmp_path / "t.json").touching.tolist() == [2]


def test_the_score_threshold_is_where_the_predictions_do_best(tmp_path):
    nuclei = [circle((15, 15), 8), circle((15, 50), 8)]
    wrong = circle((45, 30), 8)
    # At 0.40 and 0.45 both nuclei and nothing else count: 2 / 2. Below one is spurious, above
    # one is missed.
    found = [(nuclei[0], 0.93), (nuclei[1], 0.47), (wrong, 0.37)]
    truth = write_truth(tmp_path / "truth.json", [nuclei])
    results = write_results(tmp_path / "results.json", [found])
    threshold, tried = choose_score_threshold(truth, results)
    assert threshold == 0.45  # of the best the nearest to 0.5
    assert (tried["0.35"], tried["0.40"], tried["0.50"]) == (
        pytest.approx(2 / 3, abs=1e-4),
        1.0,
        0.5,
    )
    assert tried["0.95"] == 0.0


def test_overlapping_nuclei_are_found_whole(tmp_path):
    nuclei = [circle((20, 20), 9), circle((20, 32), 9)]
    truth = write_truth(tmp_path / "truth.json", [nuclei])
    results = write_results(tmp_path / "results.json", [[(mask, 0.9) for mask in nuclei]])
    assert choose_score_threshold(truth, results)[1]["0.50"] == 1


def test_nothing_to_choose_by_is_an_error(tmp_path):
    truth = write_truth(tmp_path / "truth.json", [[]])
    results = write_results(tmp_path / "results.json", [[]])
    with pytest.raises(NucleiError, match="no nuclei to choose"):
        choose_score_threshold(truth, results)


def test_predictions_without_scores_have_no_ap(files, tmp_path):
    unscored = write_truth(tmp_path / "found.json", [[circle((12, 12), 6)], [], []])
    measure(None, {"t": (files[0], unscored)}, str(tmp_path), 100)
    kept = read_measured(tmp_path / "t.json")
    assert kept.hits == {}
    assert kept.coco is None
    assert ScoreTable(kept.images).metrics()["pooled", "f1", "0.50"][0] > 0


def test_the_files_are_small(tmp_path):
    """50 kB for an image set like DSB2018's test fold: 56 images, 1,759 nuclei."""
    rng = np.random.default_rng(0)
    places = [(y, x) for y in range(4, 60, 9) for x in range(4, 80, 9)][:32]
    masks = [circle(place, 4) for place in places]
    found = [(m, round(rng.uniform(), 4)) for m in masks for _ in range(2)]
    truth = write_truth(tmp_path / "truth.json", [masks] * 56)
    results = write_results(tmp_path / "results.json", [found] * 56)
    measure(None, {"t": (truth, results)}, str(tmp_path), 100)
    assert (tmp_path / "t.json").stat().st_size < 50_000


def test_other_files_are_refused_in_one_line(tmp_path):
    path = tmp_path / "t.json"
    for text in ("{}", "[]", "{", '{"images": {"n_gt": [1]}}'):
        path.write_text(text)
        with pytest.raises(NucleiError, match="not a study's result file") as error:
            read_measured(path)
        assert "\n" not in str(error.value)
    with pytest.raises(NucleiError, match="cannot read"):
        read_measured(tmp_path / "none.json")


def test_hits_are_those_of_ten_thresholds(files, tmp_path):
    measure(files, {"t": files}, str(tmp_path), 100)
    kept = read_measured(tmp_path / "t.json")
    assert all(hits.shape == (len(IOU_THRESHOLDS), len(kept.owner)) for hits in kept.hits.values())
    assert set(kept.owner.tolist()) == {0, 1}

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from nuclei_d2.evaluation.inputs import open_ground_truth, open_predictions
from nuclei_d2.utils.errors import NucleiError


def write_coco(path, names, annotations=()):
    """Images of 4 x 6 pixels with ids from 1."""
    images = [
        {"id": k, "file_name": name, "height": 4, "width": 6} for k, name in enumerate(names, 1)
    ]
    categories = [{"id": 1, "name": "nucleus"}]
    content = {"images": images, "annotations": list(annotations), "categories": categories}
    path.write_text(json.dumps(content))
    return path


def test_names_of_coco_images_are_stems_or_paths(tmp_path):
    truth = open_ground_truth(write_coco(tmp_path / "a.json", ["x/a.png", "y/b.tif"]))
    assert list(truth.images) == ["a", "b"]
    truth = open_ground_truth(write_coco(tmp_path / "b.json", ["x/a.png", "y/a.png"]))
    assert list(truth.images) == ["x/a", "y/a"]


@pytest.mark.parametrize("names", [["x/a.png", "b.png", "x/a.tif"], ["a.png", "b.png", "a.png"]])
def test_two_coco_images_of_one_name(tmp_path, names):
    path = write_coco(tmp_path / "t.json", names)
    with pytest.raises(NucleiError, match=r"t\.json: images 1 and 3 are both called (x/)?a;"):
        open_ground_truth(path)


def test_the_output_folder_of_a_prediction_is_one_of_label_images(tmp_path):
    labels = np.array([[0, 1, 1], [2, 0, 0]], np.uint16)
    (tmp_path / "truth").mkdir()
    Image.fromarray(labels).save(tmp_path / "truth" / "a.png")
    (tmp_path / "out").mkdir()
    Image.fromarray(labels).save(tmp_path / "out" / "a_labels.tif")
    Image.new("RGB", (3, 2)).save(tmp_path / "out" / "a_overlay.png")
    truth = open_ground_truth(tmp_path / "truth")
    found = open_predictions(tmp_path / "out", truth)
    assert list(found.images) == ["a"]
    assert np.array_equal(found.images["a"].read().labels[0], labels)


def test_one_label_image_belongs_to_one_image_whatever_their_names(tmp_path):
    labels = np.array([[0, 1, 1], [2, 0, 0]], np.uint16)
    for name in ("mine.png", "theirs_masks.tif"):
        Image.fromarray(labels).save(tmp_path / name)
    truth = open_ground_truth(tmp_path / "mine.png")
    found = open_predictions(tmp_path / "theirs_masks.tif", truth)
    assert list(truth.images) == list(found.images) == ["mine"]
    assert np.array_equal(found.images["mine"].read().labels[0], labels)


def test_a_hidden_label_image_counts_where_it_is_named(tmp_path):
    Image.fromarray(np.zeros((2, 3), np.uint16)).save(tmp_path / "a.png")
    shutil.copy(tmp_path / "a.png", tmp_path / ".b.png")
    truth = open_ground_truth(tmp_path)
    assert list(truth.images) == ["a"]
    assert list(open_predictions(tmp_path / ".b.png", truth).images) == ["a"]


def test_a_label_image_that_was_not_fetched_is_missed(tmp_path):
    Image.fromarray(np.zeros((2, 3), np.uint16)).save(tmp_path / "a.png")
    (tmp_path / "b.png").symlink_to(tmp_path / "nowhere")
    truth = open_ground_truth(tmp_path)
    assert list(truth.images) == ["a", "b"]
    with pytest.raises(NucleiError, match=r"b\.png"):
        truth.images["b"].read()


def test_one_label_image_is_not_enough_for_a_folder(tmp_path):
    for name in ("a.png", "b.png"):
        Image.fromarray(np.zeros((2, 3), np.uint16)).save(tmp_path / name)
    truth = open_ground_truth(tmp_path)
    with pytest.raises(NucleiError, match=r"a\.png lacks 1 of the images in .*: b;"):
        open_predictions(tmp_path / "a.png", truth)


def write_result(path, counts=(2, 3, 19), **change):
    segmentation = {"size": [4, 6], "counts": counts}
    result = {"image_id": 1, "category_id": 1, "segmentation": segmentation, "score": 0.5}
    path.write_text(json.dumps([{**result, **change}]))
    return path


@pytest.mark.parametrize("counts", [[2, 30], [2, 3], [2, -3, 25], [2, 3.5, 18.5], None, "5", 7])
def test_results_with_runs_that_do_not_fill_the_image(tmp_path, counts):
    truth = open_ground_truth(write_coco(tmp_path / "t.json", ["a.png"]))
    predictions = open_predictions(write_result(tmp_path / "r.json", counts=counts), truth)
    with pytest.raises(NucleiError, match=r"r\.json: result 0: broken segmentation \(.+\)"):
        predictions.images["a"].read()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_id": [1]}, r"is of image \[1\]"),
        ({"category_id": [1]}, r"category_id \[1\]"),
        ({"bbox": [1, 2]}, r"bbox \[1, 2\]"),
        ({"bbox": "x"}, "bbox 'x'"),
    ],
)
def test_results_with_fields_of_another_kind(tmp_path, change, message):
    truth = open_ground_truth(write_coco(tmp_path / "t.json", ["a.png"]))
    path = write_result(tmp_path / "r.json", **change)
    with pytest.raises(NucleiError, match=rf"r\.json: result 0 .*{message}"):
        open_predictions(path, truth)


def test_an_empty_field_of_a_dsb_folder_has_an_empty_folder_of_masks(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name / "images").mkdir(parents=True)
        Image.fromarray(np.zeros((4, 6), np.uint8)).save(tmp_path / name / "images" / "x.png")
    (tmp_path / "a" / "masks").mkdir()
    with pytest.raises(NucleiError, match=r"b has no folder masks"):
        open_ground_truth(tmp_path)
    (tmp_path / "b" / "masks").mkdir()
    assert open_ground_truth(tmp_path).images["b"].read().count == 0

"""Sets that a study makes: steps of crowding, and parts of a prepared set."""

import json

import numpy as np
import pytest

from nuclei_d2.config import load_config
from nuclei_d2.data.datasets.coco import load_nuclei_json, read_coco_json
from nuclei_d2.data.datasets.statistics import find_touching
from nuclei_d2.data.image_io import read_image, read_label
from nuclei_d2.study.datasets import annotation_file, prepare_datasets
from nuclei_d2.utils.errors import NucleiError


def touching_share(path):
    records = load_nuclei_json(path, path.parents[1])
    touching = [find_touching(read_label(record["label_file_name"])) for record in records]
    return np.concatenate(touching).mean()


def test_crowding_is_a_set_of_its_own_for_every_step(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    entry = {"crowding": [0.0, 1.0], "images": 2}
    prepare_datasets([entry])
    cfg = load_config()
    first, last = (annotation_file(f"synthetic_crowding_{k}", cfg) for k in ("000", "100"))
    assert touching_share(first) == 0
    assert touching_share(last) > 0.4
    assert len(read_coco_json(last)["images"]) == 2
    before = last.stat().st_mtime_ns
    prepare_datasets([entry])
    assert last.stat().st_mtime_ns == before  # it was there
    prepare_datasets([{**entry, "images": 1}])
    assert len(read_coco_json(last)["images"]) == 1


@pytest.mark.parametrize(("by", "edge"), [("diameter", 10.2), ("contrast", 130.0)])
def test_subsets_share_the_images_out(tiny_data, by, edge):
    entry = {"subsets_of": "tiny", "by": by, "edge": edge, "names": ["low", "high"]}
    prepare_datasets([entry])
    folder = tiny_data / "tiny" / "annotations"
    whole = read_coco_json(folder / "tiny_train.json")
    parts = [read_coco_json(folder / f"tiny_{name}_train.json") for name in ("low", "high")]
    ids = [[image["id"] for image in part["images"]] for part in parts]
    expected = [[], []]
    for image in whole["images"]:
        areas = [a["area"] for a in whole["annotations"] if a["image_id"] == image["id"]]
        grey = np.percentile(read_image(tiny_data / "tiny" / image["file_name"]), (1, 99.8))
        if by == "contrast" or areas:  # no nuclei, no size
            value = (
                np.median(2 * np.sqrt(np.divide(areas, np.pi)))
                if by == "diameter"
                else grey[1] - grey[0]
            )
            expected[int(value >= edge)].append(image["id"])
    assert ids == expected
    assert all(expected)
    kept = {a["image_id"] for a in parts[0]["annotations"]}
    assert kept <= set(ids[0])


def test_a_renewed_source_renews_its_subsets(tiny_data):
    entry = {"subsets_of": "tiny", "by": "diameter", "edge": 12.4, "names": ["low", "high"]}
    prepare_datasets([entry])
    folder = tiny_data / "tiny" / "annotations"
    target = folder / "tiny_low_test.json"
    content = json.loads(target.read_text())
    target.write_text(json.dumps({**content, "images": [], "annotations": []}))
    prepare_datasets([entry])
    assert not read_coco_json(target)["images"]  # newer than its source
    (folder / "tiny_test.json").touch()
    prepare_datasets([entry])
    assert read_coco_json(target)["images"]


def test_another_edge_renews_the_subsets(tiny_data):
    entry = {"subsets_of": "tiny", "by": "diameter", "edge": 100.0, "names": ["low", "high"]}
    prepare_datasets([entry])
    low = tiny_data / "tiny" / "annotations" / "tiny_low_test.json"
    assert len(read_coco_json(low)["images"]) == 2
    prepare_datasets([{**entry, "edge": 1.0}])
    assert not read_coco_json(low)["images"]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"crowding": [0]}, "an entry has the keys crowding, images or"),
        ("x", "an entry has the keys"),
        ({"subsets_of": "none", "by": "diameter", "edge": 1, "names": ["a", "b"]}, "no none_train"),
        ({"subsets_of": "tiny", "by": "hue", "edge": 1, "names": ["a", "b"]}, "diameter or con"),
        ({"subsets_of": "tiny", "by": "contrast", "edge": 1, "names": ["a"]}, "two names"),
    ],
)
def test_mistakes_are_one_line(tiny_data, entry, message):
    with pytest.raises(NucleiError, match=message):
        prepare_datasets([entry])

import json
import os

import numpy as np
import pytest
from detectron2.data import DatasetCatalog
from PIL import Image
from tiny import TINY_DATA_OPTS, write_split

from nuclei_d2.config import load_config
from nuclei_d2.data.datasets.builtin import register_from_config
from nuclei_d2.engine.checks import best_metrics, check_run, data_warnings
from nuclei_d2.utils.errors import NucleiError


def warnings(*opts, evaluated=("tiny_test",), trained=()):
    cfg = load_config("", [*TINY_DATA_OPTS, *opts])
    register_from_config(cfg)
    return data_warnings(cfg, evaluated, trained)


def validating(*opts):
    cfg = load_config("", [*TINY_DATA_OPTS, "TEST.EVAL_PERIOD", "1", *opts])
    register_from_config(cfg)
    return cfg


def test_the_best_model_is_not_the_one_with_most_errors(tiny_data):
    names = best_metrics(validating())
    assert {"segm/AP", "nuclei/pooled_accuracy_mean", "boundary/AP_2px"} <= set(names)
    assert not [name for name in names if "errors" in name or "hd95" in name]
    with pytest.raises(NucleiError, match=r"BEST_METRIC is 'nuclei/boundary_hd95'; valid: .*AP75"):
        check_run(validating("TEST.BEST_METRIC", "nuclei/boundary_hd95"), eval_only=False)


def test_pixels_are_measured_of_semantic_models_only(tiny_data):
    assert not [name for name in best_metrics(validating()) if name.startswith("sem_seg")]
    unet = best_metrics(validating("MODEL.META_ARCHITECTURE", "UNet"))
    assert [name for name in unet if name.startswith("sem_seg")]


def touch(path):
    """Make a file younger than any that was written."""
    newer = path.stat().st_mtime + 100
    os.utime(path, (newer, newer))


def test_good_data_give_no_warning(tiny_data):
    assert warnings(evaluated=("tiny_test", "tiny_val"), trained=("tiny_train",)) == []


def test_crowds_are_ignored_by_some_metrics_only(tiny_data):
    path = tiny_data / "tiny" / "annotations" / "tiny_test.json"
    content = json.loads(path.read_text())
    content["annotations"][0]["iscrowd"] = 1
    path.write_text(json.dumps(content))
    (found,) = warnings()
    assert found.startswith("tiny_test has 1 crowd annotations: box and mask AP ignore what is")


def test_a_set_without_nuclei(tiny_data):
    for name in ("tiny_train", "tiny_test"):
        write_split(tiny_data / "tiny", name, [0, 0], seed=0)
    found = warnings(trained=("tiny_train",))
    assert found == [
        "tiny_train has no nuclei at all: training on it finds none",
        "tiny_test has no nuclei at all: AP and F1 are undefined on it",
    ]


def test_rpn_caps_that_leave_less_than_two_proposals_per_nucleus(tiny_data):
    caps = ("MODEL.RPN.PRE_NMS_TOPK_TEST", "MODEL.RPN.POST_NMS_TOPK_TEST")
    register_from_config(load_config("", TINY_DATA_OPTS))
    fullest = max(len(r["annotations"]) for r in DatasetCatalog.get("tiny_test"))
    needed = 2 * fullest
    assert warnings(caps[0], str(needed), caps[1], str(needed)) == []
    (found,) = warnings(caps[0], str(needed), caps[1], str(needed - 1))
    assert found.startswith(
        f"{caps[1]} = {needed - 1} binds: the fullest image of tiny_test has {fullest} nuclei"
    )
    assert found.endswith(f"set it to {needed} or more")
    assert len(warnings(caps[0], "1", caps[1], "1")) == 2
    assert warnings(caps[0], "1", "MODEL.META_ARCHITECTURE", "UNet") == []


def edit(path):
    """Give one pixel of a nucleus to the background."""
    labels = np.array(Image.open(path))
    labels[tuple(np.argwhere(labels == 1)[0])] = 0
    Image.fromarray(labels).save(path)
    touch(path)


def test_label_images_edited_after_the_annotations_were_made(tiny_data):
    folder = tiny_data / "tiny"
    edit(folder / "labels" / "tiny_test_2.png")
    (found,) = warnings()
    assert "tiny_test_2.png: changed after" in found
    assert str(folder / "annotations" / "tiny_test.json") in found
    assert found.endswith("prepare the data set again")
    edit(folder / "labels" / "tiny_test_1.png")
    (found,) = warnings()
    assert "tiny_test_1.png and 1 more: changed after" in found


def test_copies_are_young_but_not_stale(tiny_data):
    for path in (tiny_data / "tiny" / "labels").iterdir():
        touch(path)
    assert warnings(evaluated=("tiny_train", "tiny_test")) == []


def test_annotations_without_label_images_cannot_be_stale(tiny_data):
    for path in (tiny_data / "tiny" / "labels").iterdir():
        path.unlink()
    assert warnings() == []


def test_sets_registered_by_a_function_have_no_file_that_could_be_old(tiny_data):
    cfg = load_config("", TINY_DATA_OPTS)
    register_from_config(cfg)
    edit(tiny_data / "tiny" / "labels" / "tiny_test_1.png")
    DatasetCatalog.register("own_test", lambda: DatasetCatalog.get("tiny_test"))
    try:
        assert data_warnings(cfg, ["own_test"]) == []
    finally:
        DatasetCatalog.remove("own_test")

"""Times and curves of a training, and the predictions of other programs."""

import os

import numpy as np
import pytest
from PIL import Image

from nuclei_d2.data.datasets.coco import read_coco_json
from nuclei_d2.study.collect import (
    collect_other,
    load_results,
    read_json,
    training_seconds,
    validation_curve,
)
from nuclei_d2.study.findings import Findings
from nuclei_d2.study.plan import load_study
from nuclei_d2.utils.errors import NucleiError

ROWS = [
    {"iteration": 19, "time": 1.0},
    {"iteration": 39, "time": 2.0, "segm/AP": 30.0, "val/total_loss": 1.5, "bbox/AP": 1.0},
    {"iteration": 44, "time": 4.0},
    {"iteration": 45, "segm/AP": 40.12345},
]


def test_training_time_is_that_of_the_iterations():
    assert training_seconds(ROWS) == [20.0, 60.0, 80.0, 80.0]


def test_the_curve_has_what_val_said():
    assert validation_curve(ROWS) == [
        {"seconds": 60.0, "segm/AP": 30.0, "val/total_loss": 1.5},
        {"seconds": 80.0, "segm/AP": 40.1234},
    ]


def test_predictions_of_another_program_are_measured_once(study_file, tiny_data, tmp_path):
    folder = tmp_path / "theirs" / "labels"
    folder.mkdir(parents=True)
    (tmp_path / "theirs" / "run.json").write_text('{"training": {"seconds": 1800}}')
    truth = read_coco_json(tiny_data / "tiny" / "annotations" / "tiny_test.json")
    for image in truth["images"]:
        labels = Image.open(tiny_data / "tiny" / image["label_file_name"])
        labels.save(folder / image["file_name"].rpartition("/")[2])
    other = {"task": "a", "predictions": str(folder), "title": "StarDist"}
    study = load_study(study_file(others={"stardist": other}))
    collect_other(study, study.others["stardist"])
    (run,) = load_results(study)
    assert (run.model, run.seed) == ("stardist", 0)
    findings = Findings(study, [run])
    assert findings.models(findings.main) == ["stardist"]
    assert findings.estimate(findings.main, "tiny_test", "stardist", "accuracy").value == 1.0
    assert np.isnan(findings.estimate(findings.main, "tiny_test", "stardist", "ap").value)
    assert findings.training_minutes(findings.main, "stardist") == 30
    assert run.cost("model", "parameters") is None
    (kept,) = study.results_dir.glob("*/stardist/seed0/run.json")
    before = kept.stat().st_mtime_ns
    collect_other(study, study.others["stardist"])
    assert kept.stat().st_mtime_ns == before  # done already

    label, later = next(folder.iterdir()), kept.stat().st_mtime + 10
    os.utime(label, (later, later))  # written anew, in place
    collect_other(study, study.others["stardist"])
    assert kept.stat().st_mtime_ns != before
    os.utime(label, (1, 1))

    label.unlink()
    os.utime(folder, (kept.stat().st_mtime + 10,) * 2)
    said = []
    collect_other(study, study.others["stardist"], said.append)  # made anew, not yet completely
    assert "stardist: " in said[0]
    assert len(said) == 1


def test_predictions_that_are_not_there_yet_are_left_out(study_file, tiny_data):
    other = {"task": "a", "predictions": ["nowhere/seed0", "nowhere/seed1"]}
    study = load_study(study_file(others={"stardist": other}))
    said = []
    collect_other(study, study.others["stardist"], said.append)
    assert [line.rpartition("nowhere/")[2] for line in said] == ["seed0 yet", "seed1 yet"]
    assert load_results(study) == []


def test_broken_files_are_one_line(tmp_path):
    path = tmp_path / "run.json"
    for text in ("{", "[]"):
        path.write_text(text)
        with pytest.raises(NucleiError, match=r"run\.json") as error:
            read_json(path)
        assert "\n" not in str(error.value)
    with pytest.raises(NucleiError, match="cannot read"):
        read_json(tmp_path / "none.json")

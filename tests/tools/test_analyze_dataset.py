import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nuclei_d2.config import load_config
from nuclei_d2.data.datasets.coco import mask_to_annotation, write_coco_json
from nuclei_d2.data.datasets.synthetic import SyntheticConfig, generate, layered_masks
from nuclei_d2.structures.cropped_mask import crop_mask, masks_to_label_image
from nuclei_d2.utils.errors import NucleiError, run_tool

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "analyze_dataset.py"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A prepared set of four synthetic fields ("fields") and of one without nuclei ("void")."""
    root = tmp_path_factory.mktemp("datasets")
    folder = root / "drawn"
    for name in ("images", "labels"):
        (folder / name).mkdir(parents=True)
    common = {"height": 128, "width": 160, "count": (12, 12), "diameter": (16.0, 16.0)}
    entries = []
    for index, empty in enumerate([0.0, 0.0, 0.0, 1.0]):
        image, labels = generate(index, SyntheticConfig(empty=empty, **common))
        masks = [crop_mask(mask) for mask in layered_masks(labels)]
        entry = {
            "id": index + 1,
            "file_name": f"images/{index}.png",
            "label_file_name": f"labels/{index}.png",
            "height": 128,
            "width": 160,
            "modality": "fluorescence",
            "overlaps": bool(labels[1].any()),
            "annotations": [mask_to_annotation(mask, image.shape) for mask in masks],
        }
        Image.fromarray(image).save(folder / entry["file_name"])
        labels = masks_to_label_image(masks, image.shape)
        Image.fromarray(labels).save(folder / entry["label_file_name"])
        entries.append(entry)
    write_coco_json(folder / "annotations" / "fields.json", entries)
    write_coco_json(folder / "annotations" / "void.json", entries[3:])
    return root, entries


def run(root, *arguments):
    environment = {**os.environ, "DETECTRON2_DATASETS": str(root), "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, str(TOOL), *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def load_tool():
    spec = importlib.util.spec_from_file_location("analyze_dataset", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_from_files_to_table_fragment_and_json(prepared, tmp_path):
    root, entries = prepared
    fragment, statistics = tmp_path / "new" / "fragment.yaml", tmp_path / "statistics.json"
    done = run(root, "fields", "void", "--output", fragment, "--json", statistics)
    assert done.returncode == 0, done.stderr
    assert "touching nuclei" in done.stdout
    assert "Proposed for fields + void" in done.stdout

    result = json.loads(statistics.read_text())
    fields = result["datasets"]["fields"]
    areas = np.concatenate([[a["area"] for a in entry["annotations"]] for entry in entries])
    assert (fields["images"], fields["nuclei"]) == (4, len(areas))
    assert fields["empty_share"] == 0.25
    assert fields["sizes"] == {"128 x 160": 4}
    assert fields["diameter_percentiles"]["50"] == pytest.approx(
        np.median(2 * np.sqrt(areas / np.pi))
    )
    assert result["datasets"]["void"]["touching_share"] is None  # no NaN in JSON

    proposal, cfg = result["proposal"], load_config(str(fragment))
    assert cfg.INPUT.SCALE == proposal["scale"] == 1.5  # 27 / 16
    assert proposal["anchors"] == cfg.MODEL.ANCHOR_GENERATOR.SIZES
    assert cfg.TEST.DETECTIONS_PER_IMAGE == 50
    assert cfg.MODEL.RPN.POST_NMS_TOPK_TEST == 1000
    assert [proposal["crop"]] * 2 == cfg.INPUT.CROP.SIZE
    assert str(proposal["anchors"][0]) in done.stdout


def test_unknown_name_is_one_line(prepared, monkeypatch, capsys):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(prepared[0]))
    monkeypatch.setattr(sys, "argv", [str(TOOL), "feilds"])
    with pytest.raises(SystemExit) as stopped:
        run_tool(load_tool().main)
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert "feilds" in line
    assert "synthetic_train" in line  # the known names


@pytest.mark.parametrize("text", ["big", "0", "-1", "nan", "inf", "17"])
def test_scale_that_is_none(text):
    with pytest.raises(NucleiError, match="--scale"):
        load_tool().parse_scale(text)


def test_scale():
    parse_scale = load_tool().parse_scale
    assert parse_scale("auto") is None
    assert parse_scale("0.75") == 0.75


def test_nothing_to_propose_without_nuclei(prepared, monkeypatch, capsys):
    from detectron2.data import DatasetCatalog, MetadataCatalog

    monkeypatch.setenv("DETECTRON2_DATASETS", str(prepared[0]))
    monkeypatch.setattr(sys, "argv", [str(TOOL), "void"])
    try:
        with pytest.raises(NucleiError, match="no nuclei in void"):
            load_tool().main()
    finally:
        DatasetCatalog.remove("void")
        MetadataCatalog.remove("void")
    assert "100.0%" in capsys.readouterr().out  # the table is printed all the same

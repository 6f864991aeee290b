"""Whole packages against the models that they were made from."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import CONFIGS, REPOSITORY, TINY_OPTS

from nuclei_d2 import __version__
from nuclei_d2.config import load_config
from nuclei_d2.export import check
from nuclei_d2.export.build import build_package, export_model
from nuclei_d2.export.check import check_images, compare
from nuclei_d2.inference.predictor import NucleiPredictor
from nuclei_d2.modeling import build_model
from nuclei_d2.utils.errors import NucleiError

RCNN = (
    *TINY_OPTS,
    *("INPUT.SCALE", "1.5", "TEST.SCORE_THRESH_LABELS", "0.0", "INPUT.NUCLEUS_DIAMETER", "17.5"),
    *("MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0", "MODEL.RPN.NMS_THRESH", "0.9"),
)
MANY = (  # more nuclei than the mask head takes at a time
    *("MODEL.RPN.PRE_NMS_TOPK_TEST", "200", "MODEL.RPN.POST_NMS_TOPK_TEST", "200"),
    *("MODEL.ROI_HEADS.NMS_THRESH_TEST", "0.9", "TEST.DETECTIONS_PER_IMAGE", "200"),
)
UNET = (
    *("MODEL.DEVICE", "cpu", "MODEL.UNET.WIDTH", "4", "INPUT.SCALE", "0.8"),
    *("MODEL.UNET.DECODER.MIN_AREA", "0"),
)
# Standard deviations with which random weights find many things, and surely so.
WEIGHTS = {
    **dict.fromkeys(("objectness_logits", "anchor_deltas", "cls_score", "bbox_pred"), 0.05),
    **dict.fromkeys(("mask_head.predictor", "mask_predictor", "boundary_predictor"), 0.3),
    "head.predictor": 3.0,
}


def random_model(folder, config, opts):
    """Config of a model with random weights."""
    torch.manual_seed(0)
    cfg = load_config(str(CONFIGS / config), opts)
    model = build_model(cfg)
    for name, parameter in model.named_parameters():
        std = next((std for part, std in WEIGHTS.items() if part in name), None)
        if std and name.endswith("weight"):
            torch.nn.init.normal_(parameter, std=std)
    cfg.MODEL.WEIGHTS = str(folder / "model.pth")
    torch.save({"model": model.state_dict()}, cfg.MODEL.WEIGHTS)
    return cfg


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Config, file and check of an exported Mask Boundary R-CNN."""
    folder = tmp_path_factory.mktemp("export")
    cfg = random_model(folder, "mask_boundary_rcnn.yaml", (*RCNN, *MANY))
    return cfg, folder / "model.ts", export_model(cfg, folder / "model.ts")


def test_a_detector_agrees_with_its_original(exported):
    cfg, path, results = exported
    assert [result.size for result in results] == [(192, 256), (301, 223), (128, 160)]
    assert all(result.is_close for result in results)
    package = torch.jit.load(path)
    image = check_images()["generated 1"]
    with torch.no_grad():
        nuclei = package(torch.from_numpy(image))
        sure = package(torch.from_numpy(image), float(nuclei["scores"].median()))
        assert len(package(torch.from_numpy(image), 2.0)["scores"]) == 0
    assert len(nuclei["scores"]) == results[0].exported > 128
    assert 0 < len(sure["scores"]) < len(nuclei["scores"])
    original = NucleiPredictor(cfg)(image)
    assert len(original) > 128  # masks were predicted in more than one go
    distance = (nuclei["boxes"][:, None] - original.pred_boxes.tensor).abs().amax(dim=2)
    assert distance.min(dim=1).values.max() < 0.01


def test_what_the_file_tells(exported):
    cfg, path, _ = exported
    files = {"metadata.json": "", "config.yaml": ""}
    torch.jit.load(path, _extra_files=files)
    told = json.loads(files["metadata.json"])
    assert told == {
        "nuclei_d2": __version__,
        "torch": torch.__version__,
        "model": "NucleiRCNN",
        "output": "labels",
        "class_names": ["nucleus"],
        "device": "cpu",
        "scale": 1.5,
        "score_threshold": 0.0,
        "nucleus_diameter": 17.5,
        "pixel_size": 0.0,
    }
    config = path.with_name("config.yaml")
    config.write_bytes(files["config.yaml"])
    assert json.dumps(load_config(str(config))) == json.dumps(cfg)  # tuples become lists


def test_the_example_of_the_documentation(exported, tmp_path):
    page = (REPOSITORY / "docs" / "export.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len([line for line in code.splitlines() if line]) == 10
    _, path, results = exported
    (tmp_path / "model.ts").symlink_to(path)
    image = check_images()["generated 1"][:, :, 0].astype(np.uint8)
    Image.fromarray(image).save(tmp_path / "cells.png")
    command = [sys.executable, "-W", "ignore", "-I", "-c", code]
    printed = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
    assert printed.stdout == f"{results[0].exported} nuclei\n"
    labels = np.asarray(Image.open(tmp_path / "labels.tif"))
    assert labels.shape == image.shape
    assert labels.max() == results[0].exported


@pytest.mark.parametrize(
    ("config", "opts"),
    [
        ("mask_rcnn.yaml", RCNN),
        ("cascade_mask_boundary_rcnn.yaml", RCNN),
        ("unet_boundary.yaml", UNET),
        ("unet_distance.yaml", UNET),
    ],
)
def test_every_kind_of_model(tmp_path, config, opts):
    cfg = random_model(tmp_path, config, opts)
    predictor = NucleiPredictor(cfg)
    package = build_package(cfg, predictor.model)
    images = check_images()
    for name in ("generated 2", "noise"):
        image = images[name]
        with torch.no_grad():
            output = {**package(torch.from_numpy(image)), "seconds": 0.0}
        result = compare(name, image, output, cfg, predictor)
        if "maps" in output:  # the crumbs of a random U-Net hang on rounding
            assert result.difference < 1e-4, result
            assert result.pixels > 0.99, result
            assert output["maps"].std(dim=(1, 2)).max() > 0.001
        else:
            assert result.is_close, result
            assert result.original > 1
            assert result.difference is None


def test_what_cannot_be_exported():
    cfg = load_config(str(CONFIGS / "classical.yaml"), ("MODEL.DEVICE", "cpu"))
    with pytest.raises(NucleiError, match="only an R-CNN or a UNet can be exported"):
        build_package(cfg, build_model(cfg).eval())


@pytest.mark.parametrize("shift", [0, 3])
def test_a_file_that_does_not_agree_is_not_written(tmp_path, monkeypatch, shift):
    cfg = random_model(tmp_path, "unet.yaml", UNET)
    package = build_package(cfg, NucleiPredictor(cfg).model)

    def run(_path, images):
        with torch.no_grad():
            outputs = [package(torch.from_numpy(image)) for image in images]
        return [{"maps": x["maps"].roll(shift, 2), "seconds": 0.0} for x in outputs]

    monkeypatch.setattr(check, "run_package", run)
    path = tmp_path / "model.ts"
    if not shift:
        assert len(export_model(cfg, path)) == 3
        assert path.exists()
        return
    with pytest.raises(NucleiError, match=r"model\.ts is not written: on the image 'generated 1'"):
        export_model(cfg, path)
    assert {file.name for file in tmp_path.iterdir()} == {"model.pth"}

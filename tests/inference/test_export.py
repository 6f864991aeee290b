"""The package against the way of the original, stage by stage and as a whole."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from detectron2.data import transforms as T
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny import CONFIGS, REPOSITORY, TINY_OPTS

from nuclei_d2 import __version__
from nuclei_d2.config import load_config
from nuclei_d2.data.augmentation import build_augmentation
from nuclei_d2.data.image_io import ImageNormalizer
from nuclei_d2.inference import export
from nuclei_d2.inference.export import (
    Agreement,
    DetectorPackage,
    Preprocessing,
    build_package,
    check_images,
    export_model,
    paste,
    pixel_agreement,
    run_package,
)
from nuclei_d2.inference.predictor import NucleiPredictor
from nuclei_d2.modeling import build_model
from nuclei_d2.structures.boxed_masks import paste_masks
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


# ------------------------------------------------------------------- preprocessing


def original_preprocessing(cfg, image):
    network_input = T.AugInput(ImageNormalizer(cfg)(image))
    T.AugmentationList(build_augmentation(cfg, False))(network_input)
    return network_input.image.transpose(2, 0, 1)


@pytest.fixture(scope="module")
def preprocessings():
    """Scripted, by scale, with their configs."""
    made = {}
    for scale in ("0.55", "1.0", "1.5"):
        opts = ("MODEL.DEVICE", "cpu", "INPUT.SCALE", scale, "INPUT.FORMAT", "BGR")
        cfg = load_config("", opts)
        made[scale] = cfg, torch.jit.script(Preprocessing(cfg))
    return made


@settings(deadline=None, max_examples=60)
@given(
    scale=st.sampled_from(["0.55", "1.0", "1.5"]),
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    channels=st.sampled_from([1, 3]),
    kind=st.sampled_from(["integer", "float", "flat", "grey"]),
    peak=st.floats(1, 60000),
    seed=st.integers(0, 1000),
)
def test_the_network_sees_what_it_sees_in_the_original(
    preprocessings, scale, size, channels, kind, peak, seed
):
    image = np.random.default_rng(seed).gamma(1.0, peak / 4, (*size, channels)).astype(np.float32)
    if kind == "integer":
        image = np.rint(image)
    elif kind == "flat":
        image[:] = peak
    elif kind == "grey":
        image[:] = image[:, :, :1]
    cfg, preprocessing = preprocessings[scale]
    expected = original_preprocessing(cfg, image)
    np.testing.assert_allclose(preprocessing(torch.from_numpy(image)), expected, atol=0.01)
    if channels == 1:
        flat = preprocessing(torch.from_numpy(image[:, :, 0]))
        np.testing.assert_allclose(flat, expected, atol=0.01)


def test_sixteen_bits_of_any_type_give_the_same(preprocessings):
    image = np.random.default_rng(0).integers(0, 1 << 16, (20, 30), np.uint16)
    _, preprocessing = preprocessings["1.0"]
    assert torch.equal(
        preprocessing(torch.from_numpy(image)),
        preprocessing(torch.from_numpy(image.astype(np.float64))),
    )


@pytest.mark.parametrize("shape", [(5,), (5, 6, 2), (3, 5, 6), (0, 6)])
def test_what_is_no_image(preprocessings, shape):
    with pytest.raises(Exception, match="image: needs"):
        preprocessings["1.0"][1](torch.zeros(shape))


# ------------------------------------------------------------------ post-processing

corner = st.floats(-10, 40, width=32)
side = st.floats(1 / 64, 60, width=32)


@settings(deadline=None, max_examples=100)
@given(x=corner, y=corner, width=side, height=side, seed=st.integers(0, 1000))
def test_masks_are_pasted_as_in_the_original(x, y, width, height, seed):
    size = (24, 31)
    box = torch.tensor([x, y, x + width, y + height])
    box = torch.minimum(box.clamp(min=0), torch.tensor([31.0, 24.0, 31.0, 24.0]))
    if not (box[2:] > box[:2]).all():
        return  # left out before
    probability = torch.rand(1, 7, 7, generator=torch.Generator().manual_seed(seed))
    labels = torch.zeros(size, dtype=torch.int32)
    paste(labels, probability, box, 5)
    expected = paste_masks(probability, box[None], size).to_tensor()[0]
    assert torch.equal(labels, expected.int() * 5)


def package_of(boxes, scores, threshold=0.5):
    """The package of a network that sees twice the image, and full masks in these boxes of it."""
    boxes = torch.tensor(boxes, dtype=torch.float32).view(-1, 4)
    classes = torch.arange(len(boxes))

    def masks(boxes, _classes):
        assert 0 < len(boxes) <= 128
        return (torch.ones(len(boxes), 1, 28, 28),)

    return DetectorPackage(
        lambda image: torch.zeros(3, 2 * image.shape[0], 2 * image.shape[1]),
        lambda _pixels: (2 * boxes, classes, torch.tensor(scores)),
        masks,
        threshold,
    )


def test_the_pixel_belongs_to_the_highest_score():
    boxes = [[0, 0, 4, 2], [2, 0, 8, 2], [0, 0, 2, 2], [9, 0, 9, 2], [1, 0, 7, 3]]
    package = package_of(boxes, [0.7, 0.9, 0.6, 0.95, 0.4])
    nuclei = package(torch.zeros(4, 10))
    # Row 0 is the second box, row 1 the first; the third is hidden, the fourth has no width, and
    # the fifth is not sure enough.
    expected = np.zeros((4, 10), int)
    expected[:2, 2:8] = 1
    expected[:2, :2] = 2
    np.testing.assert_array_equal(nuclei["labels"], expected)
    assert nuclei["labels"].dtype == torch.int32
    assert nuclei["boxes"].tolist() == [[2, 0, 8, 2], [0, 0, 4, 2]]
    assert nuclei["scores"].tolist() == pytest.approx([0.9, 0.7])
    assert nuclei["classes"].tolist() == [1, 0]
    all_labels = package(torch.zeros(4, 10), 0.3)["labels"]
    expected[:3, 1:7][expected[:3, 1:7] == 0] = 3
    np.testing.assert_array_equal(all_labels, expected)


def test_boxes_are_cut_to_the_image():
    nuclei = package_of([[-5, 2, 3, 9]], [0.9])(torch.zeros(4, 6))
    assert nuclei["boxes"].tolist() == [[0, 2, 3, 4]]


def test_no_nuclei():
    for package in (package_of([], []), package_of([[0, 0, 2, 2]], [0.1])):
        nuclei = package(torch.zeros(4, 6))
        assert not nuclei["labels"].any()
        assert nuclei["boxes"].shape == (0, 4)
        assert nuclei["scores"].shape == nuclei["classes"].shape == (0,)


def test_more_nuclei_than_are_predicted_at_a_time():
    boxes = [[3 * k, 0, 3 * k + 2, 2] for k in range(300)]
    nuclei = package_of(boxes, [1 - k / 1000 for k in range(300)])(torch.zeros(2, 900))
    assert torch.equal(nuclei["labels"][0, ::3], torch.arange(1, 301, dtype=torch.int32))
    assert nuclei["boxes"].tolist() == boxes


# ---------------------------------------------------------------------- whole files


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
        result = export.compare(name, image, output, cfg, predictor)
        assert result.is_close, result
        if "maps" in output:
            assert output["maps"].std(dim=(1, 2)).max() > 0.001
            assert result.difference is not None
        else:
            assert result.original > 1
            assert result.difference is None


@pytest.mark.parametrize(
    ("config", "opts"),
    [("classical.yaml", ()), ("mask_rcnn.yaml", (*TINY_OPTS, "MODEL.MASK_ON", "False"))],
)
def test_what_cannot_be_exported(config, opts):
    cfg = load_config(str(CONFIGS / config), ("MODEL.DEVICE", "cpu", *opts))
    with pytest.raises(NucleiError, match="only an R-CNN with masks or a UNet can be exported"):
        build_package(cfg, build_model(cfg).eval())


@pytest.mark.parametrize("shift", [0, 3])
def test_a_file_that_does_not_agree_is_not_written(tmp_path, monkeypatch, shift):
    cfg = random_model(tmp_path, "unet.yaml", UNET)
    package = build_package(cfg, NucleiPredictor(cfg).model)

    def run(_path, images):
        with torch.no_grad():
            outputs = [package(torch.from_numpy(image)) for image in images]
        return [{"maps": x["maps"].roll(shift, 2), "seconds": 0.0} for x in outputs]

    monkeypatch.setattr(export, "run_package", run)
    path = tmp_path / "model.ts"
    if not shift:
        assert len(export_model(cfg, path)) == 3
        assert path.exists()
        return
    with pytest.raises(NucleiError, match=r"model\.ts is not written: on the image 'generated 1'"):
        export_model(cfg, path)
    assert {file.name for file in tmp_path.iterdir()} == {"model.pth"}


def test_a_file_that_does_not_run(tmp_path):
    (tmp_path / "model.ts").write_bytes(b"PK")
    with pytest.raises(NucleiError, match=r"model\.ts does not run by itself: "):
        run_package(tmp_path / "model.ts", [])


@pytest.mark.parametrize(
    ("changes", "is_close"),
    [
        ({}, True),
        ({"exported": 6}, False),
        ({"original": 99, "exported": 98}, False),
        ({"original": 100, "exported": 101}, True),
        ({"original": 199, "exported": 197}, False),
        ({"pixels": 0.9989}, False),
        ({"difference": 0.002}, False),
        ({"difference": 0.0005}, True),
    ],
)
def test_how_close_is_close(changes, is_close):
    result = Agreement("a", (8, 8), 7, 7, 0.9991, 1.0, 1.0)
    assert result._replace(**changes).is_close == is_close


def test_pixels_are_compared_whatever_the_labels_are_called():
    first = np.array([[0, 0, 1, 1, 2, 2, 0, 0, 0, 0]])
    assert pixel_agreement(first, np.array([[0, 0, 7, 7, 3, 3, 0, 0, 0, 0]])) == 1
    assert pixel_agreement(first, np.array([[0, 0, 1, 1, 1, 1, 0, 0, 0, 0]])) == 0.8
    assert pixel_agreement(first, np.zeros((1, 10), int)) == 0.6

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from PIL import Image

from nuclei_d2.config import load_config

ROOT = Path(__file__).parents[2]
CONFIG = """
MODEL:
  DEVICE: cpu
  BACKBONE: {NAME: build_resnet_fpn_backbone}
  RESNETS: {DEPTH: 18, RES2_OUT_CHANNELS: 64, OUT_FEATURES: [res2, res3, res4, res5]}
  FPN: {IN_FEATURES: [res2, res3, res4, res5], OUT_CHANNELS: 32}
  ANCHOR_GENERATOR: {SIZES: [[8], [16], [32], [64], [128]]}
  RPN: {IN_FEATURES: [p2, p3, p4, p5, p6], POST_NMS_TOPK_TEST: 20}
  ROI_HEADS: {NAME: StandardROIHeads, IN_FEATURES: [p2, p3, p4, p5]}
  ROI_BOX_HEAD: {NAME: FastRCNNConvFCHead, NUM_FC: 1, FC_DIM: 32, POOLER_RESOLUTION: 7}
  ROI_MASK_HEAD:
    NAME: BoundaryMaskHead
    POOLER_TYPE: ""
    NUM_CONV: 1
    CONV_DIM: 16
    POOLER_RESOLUTION: 14
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A config whose MODEL.WEIGHTS is a random network."""
    folder = tmp_path_factory.mktemp("model")
    config = folder / "config.yaml"
    config.write_text(CONFIG)
    torch.manual_seed(0)
    weights = build_model(load_config(str(config))).state_dict()
    torch.save({"model": weights}, folder / "model.pth")
    config.write_text(f"{CONFIG}\n  WEIGHTS: {folder / 'model.pth'}\n")
    return config


def demo(*words):
    return subprocess.run(
        [sys.executable, ROOT / "tools" / "demo.py", *map(str, words)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )


def write_image(path, seed=0, size=(48, 64)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 4000, size, np.uint16)
    Image.fromarray(pixels).save(path)


def size_of(path):
    with Image.open(path) as image:
        return image.size


def test_one_broken_image_among_many(model, tmp_path):
    write_image(tmp_path / "in/cell.png")
    write_image(tmp_path / "in/cell.tif", seed=1)
    (tmp_path / "in/broken.png").write_bytes(b"")
    out = tmp_path / "out"
    run = demo(
        *("--config-file", model, "--input", tmp_path / "in", "--output", out),
        *("--confidence-threshold", 0),
    )
    assert run.returncode == 2
    assert {p.name for p in out.iterdir()} == {"cell.png", "cell_2.png"}
    assert size_of(out / "cell.png") == (64 * 16, 48 * 16)  # no title
    assert (out / "cell.png").read_bytes() != (out / "cell_2.png").read_bytes()
    lines = run.stdout.splitlines()
    assert [line.split(":")[0] for line in lines] == ["cell.png", "cell.tif"]
    assert all(" nuclei, " in line and " s -> " in line for line in lines)
    assert all(int(line.split()[1]) > 0 for line in lines)
    errors = [line for line in run.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 2
    assert "broken.png" in errors[0]
    assert "1 of 3 images failed" in errors[1]
    assert "Traceback" not in run.stderr


def test_panel_with_ground_truth_and_boundaries(model, tmp_path):
    write_image(tmp_path / "in/cell.tif")
    labels = np.zeros((48, 64), np.uint16)
    labels[10:20, 10:20] = 5
    (tmp_path / "labels").mkdir()
    Image.fromarray(labels).save(tmp_path / "labels/cell.png")
    run = demo(
        *("--config-file", model, "--input", tmp_path / "in/*.tif", "--output", tmp_path / "out"),
        *("--boundaries", "--ground-truth", tmp_path / "labels"),
        *("--opts", "TEST.SCORE_THRESH_LABELS", 0.0),  # random weights are sure of nothing
    )
    assert run.returncode == 0, run.stderr
    assert not run.stdout.startswith("cell.tif: 0 nuclei")
    picture = np.array(Image.open(tmp_path / "out/cell.png"))
    assert picture.shape[1] >= 3 * 64 * 16
    top = picture.shape[0] - 48 * 16
    assert top > 0
    truth = picture[top:, 64 * 16 + 12 : 2 * 64 * 16 + 12].astype(int)
    coloured = np.ptp(truth, axis=2) > 60  # the image is grey
    ys, xs = np.nonzero(coloured)
    assert (ys.min(), ys.max(), xs.min(), xs.max()) == pytest.approx((160, 319, 160, 319), abs=3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--input", "{in}/*.bmp"], "no file, folder or pattern of files"),
        (["--input", "{in}/a.png", "--output", "{in}"], "would be overwritten"),
        (["--input", "{in}/a.png", "--output", "{in}/a.png"], "is a file"),
        (["--input", "{in}/a.png", "--confidence-threshold", "50"], "lies in 0 to 1"),
        (["--input", "{in}/*.png", "--ground-truth", "{in}/a.png"], "there are 2 images"),
        (["--input", "{in}/*.png", "--ground-truth", "{in}"], "no label image; they end in _masks"),
        (["--input", "{in}/a.png", "--opts", "MODEL.WEIGHTS", ""], "MODEL.WEIGHTS is empty"),
        (["--input", "{in}/a.png", "--opts", "MODEL.WIEGHTS", "x"], "MODEL.WEIGHTS"),
    ],
)
def test_mistakes_are_told_in_one_line(model, tmp_path, words, message, monkeypatch, capsys):
    write_image(tmp_path / "a.png")
    write_image(tmp_path / "b.png")
    words = [word.format(**{"in": tmp_path}) for word in words]
    output = [] if "--output" in words else ["--output", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["demo.py", "--config-file", str(model), *output, *words])
    with pytest.raises(SystemExit) as stopped:
        run_in_process()
    assert stopped.value.code == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ")
    assert message in error
    assert "\n" not in error
    assert not (tmp_path / "out").exists()


def run_in_process():
    """As ``python tools/demo.py``, without another start of Python."""
    import runpy

    runpy.run_path(str(ROOT / "tools" / "demo.py"), run_name="__main__")


def test_ground_truth_of_another_size_fails_that_image_only(model, tmp_path, monkeypatch, capsys):
    for name in ("a", "b", "c"):
        write_image(tmp_path / f"in/{name}.png")
    (tmp_path / "labels").mkdir()
    Image.fromarray(np.ones((48, 64), np.uint8)).save(tmp_path / "labels/a.png")
    Image.fromarray(np.ones((64, 48), np.uint8)).save(tmp_path / "labels/b.png")
    words = ["--config-file", model, "--input", tmp_path / "in", "--output", tmp_path / "out"]
    words += ["--ground-truth", tmp_path / "labels"]
    monkeypatch.setattr(sys, "argv", ["demo.py", *map(str, words)])
    with pytest.raises(SystemExit) as stopped:
        run_in_process()
    assert stopped.value.code == 2
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["a.png"]
    error = capsys.readouterr().err
    assert "b.png is (64, 48)" in error
    assert "no label image c.* or c_masks.*" in error
    assert "2 of 3 images failed" in error


@pytest.mark.parametrize("truth", ["in/a_masks.png", "labels/a_cp_masks.png"])
def test_ground_truth_of_cellpose(model, tmp_path, monkeypatch, capsys, truth):
    write_image(tmp_path / "in/a_img.png")
    (tmp_path / "labels").mkdir()
    Image.fromarray(np.ones((48, 64), np.uint8)).save(tmp_path / truth)
    words = ["--config-file", model, "--input", tmp_path / "in/a_img.png"]
    words += ["--output", tmp_path / "out", "--ground-truth", (tmp_path / truth).parent]
    monkeypatch.setattr(sys, "argv", ["demo.py", *map(str, words)])
    run_in_process()
    assert capsys.readouterr().err == ""
    assert size_of(tmp_path / "out/a_img.png")[0] >= 2 * 64 * 16  # two pictures


def test_boundaries_of_a_model_without_any(model, tmp_path, monkeypatch, capsys):
    write_image(tmp_path / "a.png")
    opts = ["MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead"]
    opts += ["MODEL.ROI_MASK_HEAD.POOLER_TYPE", "ROIAlignV2"]
    weights = tmp_path / "plain.pth"
    torch.save({"model": build_model(load_config(str(model), opts)).state_dict()}, weights)
    words = ["--config-file", model, "--input", tmp_path / "a.png", "--output", tmp_path / "out"]
    words += ["--boundaries", "--opts", *opts, "MODEL.WEIGHTS", weights]
    monkeypatch.setattr(sys, "argv", ["demo.py", *map(str, words)])
    with pytest.raises(SystemExit):
        run_in_process()
    assert "--boundaries needs a model with boundaries" in capsys.readouterr().err

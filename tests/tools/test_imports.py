"""What all tools have in common: PyTorch prints nothing. And what users import."""

import ast
import subprocess
import sys

import pytest
from tiny import CONFIGS, REPOSITORY

TOOLS = sorted((REPOSITORY / "tools").rglob("*.py"))


def imported(path):
    """Top-level names of what a tool imports, in this order."""
    for node in ast.parse(path.read_text()).body:
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        yield from (name.split(".")[0] for name in names)


@pytest.mark.parametrize("path", TOOLS, ids=lambda path: path.stem)
def test_nuclei_d2_is_imported_before_detectron2(path):
    names = list(imported(path))
    assert "detectron2" not in names[: names.index("nuclei_d2") if "nuclei_d2" in names else None]


def test_nothing_but_the_help_is_printed():
    tool = str(REPOSITORY / "tools" / "train_net.py")
    done = subprocess.run([sys.executable, tool, "--help"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


PREDICT = """
import sys
from nuclei_d2.config import load_config
from nuclei_d2.modeling import build_model
import torch
model = build_model(load_config(sys.argv[1], ["MODEL.DEVICE", "cpu"])).eval()
with torch.no_grad():
    model([{"image": torch.zeros(3, 64, 64)}])
"""


def test_a_prediction_prints_nothing():
    words = [sys.executable, "-c", PREDICT, str(CONFIGS / "cpu" / "mask_rcnn.yaml")]
    done = subprocess.run(words, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_detectron2s_model_zoo_can_be_imported():
    """Our users' scripts begin with it; it needs more of the environment than we do."""
    words = [sys.executable, "-W", "ignore", "-c", "from detectron2 import model_zoo"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

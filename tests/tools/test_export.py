"""export.py as a user runs it."""

import importlib.util
import sys

import pytest
import torch
from PIL import Image
from tiny import CONFIGS, REPOSITORY

from nuclei_d2.config import load_config
from nuclei_d2.modeling import build_model
from nuclei_d2.utils.errors import NucleiError

TINY = ("MODEL.DEVICE", "cpu", "MODEL.UNET.WIDTH", "4")


@pytest.fixture
def run(monkeypatch):
    """Function of the command line's words that runs the tool in this process."""
    spec = importlib.util.spec_from_file_location("export", REPOSITORY / "tools" / "export.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)

    def run(*words, config="unet_boundary.yaml"):
        config = str(CONFIGS / config)
        monkeypatch.setattr(sys, "argv", ["export.py", "--config-file", config, *map(str, words)])
        tool.main()

    return run


def test_a_file_and_a_table_of_its_agreement(tmp_path, run, capsys):
    torch.manual_seed(0)
    model = build_model(load_config(str(CONFIGS / "unet_boundary.yaml"), TINY))
    torch.save({"model": model.state_dict()}, tmp_path / "model.pth")
    Image.new("L", (50, 40), 7).save(tmp_path / "cells.png")
    words = ("--output", tmp_path / "model.ts", "--check-image", tmp_path / "cells.png")
    run(*words, "MODEL.WEIGHTS", tmp_path / "model.pth", *TINY)
    rows = capsys.readouterr().out.splitlines()
    assert [row.split()[0] for row in rows[2:-1]] == [
        *("generated", "generated", "noise"),
        str(tmp_path / "cells.png"),
    ]
    assert all("100.000%" in row for row in rows[2:-1])
    maps = torch.jit.load(tmp_path / "model.ts")(torch.zeros(33, 70))["maps"]
    scale = load_config(str(CONFIGS / "unet_boundary.yaml")).INPUT.SCALE
    assert maps.shape == (3, round(33 * scale), round(70 * scale))


@pytest.mark.parametrize(
    ("words", "config", "message"),
    [
        (TINY, "classical.yaml", "only an R-CNN or a UNet can be exported"),
        (TINY, "unet.yaml", "MODEL.WEIGHTS is empty"),
        (("--check-image", "nowhere.png", *TINY), "unet.yaml", r"nowhere\.png"),
    ],
)
def test_mistakes(tmp_path, run, words, config, message):
    with pytest.raises(NucleiError, match=message):
        run("--output", tmp_path / "model.ts", *words, config=config)
    assert not (tmp_path / "model.ts").exists()

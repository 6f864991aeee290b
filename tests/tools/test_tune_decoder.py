"""tune_decoder.py as a user runs it."""

import importlib.util
import json
import sys

import pytest
import torch
from tiny import CONFIGS, REPOSITORY, TINY_DATA_OPTS

from nuclei_d2.config import load_config
from nuclei_d2.modeling import build_model
from nuclei_d2.utils.errors import NucleiError

TINY = ("MODEL.UNET.WIDTH", "4", "INPUT.SCALE", "1.0", "DATALOADER.NUM_WORKERS", "0")


@pytest.fixture
def run(monkeypatch):
    """Function of the command line's words that runs the tool in this process."""
    spec = importlib.util.spec_from_file_location(
        "tune_decoder", REPOSITORY / "tools" / "tune_decoder.py"
    )
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)

    def run(*words, config="unet_boundary.yaml"):
        config = str(CONFIGS / "cpu" / config)
        argv = ["tune_decoder.py", "--config-file", config, *map(str, words)]
        monkeypatch.setattr(sys, "argv", argv)
        tool.main()

    return run


def test_the_fitted_config_replaces_the_one_it_was_fitted_to(tiny_data, tmp_path, run, capsys):
    opts = (*TINY, *TINY_DATA_OPTS)
    config = str(CONFIGS / "cpu" / "unet_boundary.yaml")
    torch.manual_seed(0)
    model = build_model(load_config(config, opts))
    torch.save({"model": model.state_dict()}, tmp_path / "model.pth")
    tuned, tried = tmp_path / "fits" / "tuned.yaml", tmp_path / "tried.json"
    weights = ("MODEL.WEIGHTS", tmp_path / "model.pth")
    run("--output", tuned, "--json", tried, *weights, *opts)
    assert "MODEL.UNET.DECODER.SEED_THRESHOLD" in capsys.readouterr().out
    tried = json.loads(tried.read_text())
    best = max(tried, key=lambda trial: trial["score"])
    cfg = load_config(str(tuned))
    for key, value in cfg.MODEL.UNET.DECODER.items():
        assert value == best[key.lower()]
    cfg.MODEL.UNET.DECODER = load_config(config).MODEL.UNET.DECODER
    assert cfg == load_config(config)


@pytest.mark.parametrize(
    ("words", "config", "message"),
    [
        (TINY_DATA_OPTS, "mask_rcnn.yaml", "only a UNet has a decoder"),
        ((*TINY, *TINY_DATA_OPTS), "unet.yaml", "MODEL.WEIGHTS is empty"),
        (("DATASETS.VAL", "()"), "unet.yaml", "name the one set"),
    ],
)
def test_mistakes(tiny_data, tmp_path, run, words, config, message):
    with pytest.raises(NucleiError, match=message):
        run("--output", tmp_path / "tuned.yaml", *words, config=config)
    assert not (tmp_path / "tuned.yaml").exists()

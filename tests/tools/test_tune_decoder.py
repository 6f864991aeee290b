"""tune_decoder.py as a user runs it."""

import importlib.util
import json
import sys

import pytest
import torch
from tiny import CONFIGS, REPOSITORY, TINY_DATA_OPTS

from nuclei_d2.config import load_config
from nuclei_d2.evaluation import decoder_tuning
from nuclei_d2.modeling import build_model
from nuclei_d2.utils.errors import NucleiError

TINY = ("MODEL.UNET.WIDTH", "4", "INPUT.SCALE", "1.0", "DATALOADER.NUM_WORKERS", "0")


@pytest.fixture
def tool():
    """tools/tune_decoder.py as a module."""
    spec = importlib.util.spec_from_file_location(
        "tune_decoder", REPOSITORY / "tools" / "tune_decoder.py"
    )
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    return tool


@pytest.fixture
def run(monkeypatch, tool):
    """Function of the command line's words that runs the tool in this process."""

    def run(*words, config="unet_boundary.yaml"):
        config = str(CONFIGS / "cpu" / config)
        argv = ["tune_decoder.py", "--config-file", config, *map(str, words)]
        monkeypatch.setattr(sys, "argv", argv)
        tool.main()

    return run


def test_the_fitted_config_replaces_config_and_options(
    tiny_data, tmp_path, run, capsys, monkeypatch
):
    grid = {"threshold": (0.4, 0.8), "seed_threshold": (0.6,), "min_area": (0, 9)}
    monkeypatch.setattr(decoder_tuning, "CANDIDATES", {**grid, "hole_area": (0,)})
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
    fitted_with = load_config(config, opts)
    cfg.MODEL.UNET.DECODER = fitted_with.MODEL.UNET.DECODER
    assert cfg == fitted_with  # whose MODEL.WEIGHTS is empty


def test_values_at_the_end_of_the_search_are_pointed_out(tool):
    ends = {"threshold": 0.95, "seed_threshold": 0.2, "min_area": 0, "hole_area": 800}
    warnings = tool.end_warnings(ends)
    for key, warning in zip(("THRESHOLD", "SEED_THRESHOLD", "HOLE_AREA"), warnings, strict=True):
        assert warning.startswith(f"MODEL.UNET.DECODER.{key} ")
        assert "beyond" in warning
    assert tool.end_warnings({"threshold": 0.5, "seed_threshold": 0.9, "min_area": 20}) == []


@pytest.mark.parametrize("option", ["--output", "--json"])
def test_the_given_config_is_not_overwritten(tmp_path, run, option):
    config = tmp_path / "config.yaml"
    config.write_text("MODEL:\n  META_ARCHITECTURE: UNet\n")
    (tmp_path / "link.yaml").symlink_to(config)
    with pytest.raises(NucleiError, match=rf"{option} is .*link\.yaml.*--config-file"):
        run("--output", tmp_path / "a.yaml", option, tmp_path / "link.yaml", config=config)
    assert config.read_text() == "MODEL:\n  META_ARCHITECTURE: UNet\n"


@pytest.mark.parametrize("option", ["--output", "--json"])
def test_outputs_are_checked_before_the_work(tmp_path, run, option):
    with pytest.raises(NucleiError, match=r"cannot write .* it is a folder"):
        run("--output", tmp_path / "a.yaml", option, tmp_path, config="unet.yaml")


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

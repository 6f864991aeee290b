import json
from datetime import datetime, timedelta, timezone

import numpy as np
import pytest
import tifffile
import torch

from nuclei_d2 import __version__
from nuclei_d2.inference.manifest import host, manifest
from nuclei_d2.utils.errors import NucleiError

START = datetime(2026, 3, 1, 12, 0, 0, 900_000, timezone(timedelta(hours=2)))


def test_manifest(tmp_path):
    (tmp_path / "model.pth").write_bytes(b"abc")
    config = {"MODEL": {"MASK_ON": True}}
    settings = {"input": ["a.tif"], "tile": 512}
    content = manifest(tmp_path / "model.pth", config, settings, START)
    assert json.loads(json.dumps(content)) == content
    assert content["model"] == {
        "file": str(tmp_path / "model.pth"),
        # FIPS 180-2, appendix B.1
        "sha256": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
    }
    assert content["config"] == config
    assert content["settings"] == settings
    assert content["started"] == "2026-03-01T10:00:00+00:00"
    assert content["finished"] is content["seconds"] is None
    assert content["versions"]["nuclei_d2"] == __version__
    assert content["versions"]["torch"] == torch.__version__.split("+")[0]
    assert content["versions"]["numpy"] == np.__version__
    assert content["versions"]["tifffile"] == tifffile.__version__
    assert "detectron2" in content["versions"]
    assert content["host"]["cores"] >= 1


def test_no_model(tmp_path):
    with pytest.raises(NucleiError, match=r"cannot read .*model\.pth: No such file"):
        manifest(tmp_path / "model.pth", {}, {}, START)


def test_host(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda k: f"GPU {k}")
    assert host()["gpus"] == ["GPU 0"]
    assert host()["processor"]

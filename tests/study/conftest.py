"""A study of three models with stand-ins for the trainer."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from tiny import CONFIGS

from nuclei_d2.study.plan import load_study
from nuclei_d2.study.runner import Commands, Runner

STAND_IN = Path(__file__).parent / "stand_in.py"


@pytest.fixture
def study_file(tmp_path) -> Callable[..., Path]:
    """Writes a study file; keywords replace or add keys."""

    def write(**changes) -> Path:
        content = {
            "name": "test",
            "output": str(tmp_path / "output"),
            "results": str(tmp_path / "results"),
            "seeds": [0, 1],
            "models": {
                "classical": {"config": str(CONFIGS / "classical.yaml")},
                "unet": {"config": str(CONFIGS / "cpu" / "unet_boundary.yaml"), "title": "U-Net"},
                "mask_rcnn": {"config": str(CONFIGS / "cpu" / "mask_rcnn.yaml")},
            },
            "datasets": {"a": {"train": "tiny_train", "val": "tiny_val", "test": "tiny_test"}},
            **changes,
        }
        path = tmp_path / "study.yaml"
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        return path

    return write


@pytest.fixture
def calls(tmp_path, monkeypatch) -> Callable[[], list[str]]:
    """What the stand-ins were called for since the last question: stage and folder."""
    path = tmp_path / "calls.txt"
    path.touch()
    monkeypatch.setenv("CALLS", str(path))

    def take() -> list[str]:
        lines = path.read_text().splitlines()
        path.write_text("")
        return [line.replace(f"{tmp_path}/", "") for line in lines]

    return take


@pytest.fixture
def make_runner(study_file, tiny_data, calls) -> Callable[..., Runner]:
    """Makes a Runner whose stages call the stand-ins; keywords change the study file."""

    def make(jobs: int = 1, **changes) -> Runner:
        commands = ((sys.executable, "-S", str(STAND_IN), s) for s in ("train", "tune", "measure"))
        return Runner(load_study(study_file(**changes)), Commands(*commands), jobs)

    return make

"""A study of three models, with stand-ins for the trainer, and with fabricated results."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import yaml
from skimage.draw import disk
from tiny import CONFIGS

from nuclei_d2.data.datasets.coco import mask_to_annotation, write_coco_json
from nuclei_d2.structures.cropped_mask import crop_mask
from nuclei_d2.study.measure import measure
from nuclei_d2.study.plan import Run, Study, load_study
from nuclei_d2.study.runner import Commands, Runner
from nuclei_d2.utils.files import write_json

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


# -------------------------------------------------------------------- fabricated results

SIZE = (72, 96)


def draw_circles(rng: np.random.Generator, spread: float, radius: float) -> list[np.ndarray]:
    """Twelve discs on a grid, each moved by ``spread`` pixels: (H, W) bool."""
    discs = []
    for y in (14, 36, 58):
        for x in (12, 36, 60, 84):
            disc = np.zeros(SIZE, bool)
            centre = np.add((y, x), rng.normal(0, spread, 2))
            disc[disk(centre, radius, shape=SIZE)] = True
            discs.append(disc)
    return discs


def write_pair(folder: Path, error: float, seed: int, images: int = 6) -> tuple[str, str]:
    """Ground truth, always the same, and predictions that are off by ``error`` pixels."""
    truth, results = [], []
    for k in range(1, images + 1):
        nuclei = draw_circles(np.random.default_rng(k), 0.0, 6.0 + k % 3)
        found = draw_circles(np.random.default_rng((k, seed)), error, 6.0 + k % 3)
        scores = np.random.default_rng((k, seed, 1)).uniform(0.6, 1, len(found)).round(3)
        truth.append(
            {
                **{"id": k, "file_name": f"{k}.png", "height": SIZE[0], "width": SIZE[1]},
                "annotations": [mask_to_annotation(crop_mask(disc), SIZE) for disc in nuclei],
            }
        )
        results += [
            {**mask_to_annotation(crop_mask(disc), SIZE), "image_id": k, "score": score}
            for disc, score in zip(found, scores.tolist(), strict=True)
        ]
    write_coco_json(folder / "truth.json", truth)
    write_json(folder / "results.json", results)
    return str(folder / "truth.json"), str(folder / "results.json")


@pytest.fixture
def fabricate(tmp_path) -> Callable[..., None]:
    """Writes the result files of a study as if it had been run: numbers for tests, no findings.

    ``errors``: how many pixels each model is off, by name; one that is not there was not run.
    """

    def write(
        study: Study,
        errors: dict[str, float],
        seeds: Sequence[int] | None = None,
        images: int = 6,
    ) -> None:
        for run in study.runs():
            if run.model.name not in errors or (seeds is not None and run.seed not in seeds):
                continue
            folder = study.results_dir / run.key
            error = errors[run.model.name] * (1 + 0.02 * run.seed)
            files = write_pair(tmp_path / "pair", error, run.seed, images)
            measure(files, dict.fromkeys(run.task.test, files), str(folder), 100)
            write_json(folder / "run.json", _run_info(run, error))

    return write


def _run_info(run: Run, error: float) -> dict:
    speed = {"images_per_second": 10 * error, "megapixels_per_second": error}
    info = {
        "config": run.model.config,
        "options": list(run.options),
        "hardware": {"device": "Test CPU", "threads": 2, "torch": "0.0"},
        "model": {"parameters": round(1e6 * (5 - error)), "flops": round(1e9 * (50 - error))},
        "evaluation": dict.fromkeys(run.task.test, speed),
    }
    if run.is_trained:
        curve = [{"seconds": 60.0 * k, "segm/AP": 20.0 * k - error} for k in (1, 2, 3)]
        info |= {"iterations": 100, "training": {"seconds": 180.0 + run.seed}, "curve": curve}
    if run.has_decoder:
        info["decoder"] = {"DECODER": {"THRESHOLD": 0.4}}
    return info

"""What is kept of a run: small files, from which alone every report is made.

``<results>/<task>/<model>/seed<k>/run.json`` says how the model was made and what it cost, and
``<test set>.json`` beside it (see ``nuclei_d2.study.measure``) what it found.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from nuclei_d2.config import load_config
from nuclei_d2.inference.identity import file_version
from nuclei_d2.study.datasets import annotation_file
from nuclei_d2.study.measure import Measured, measure, read_measured
from nuclei_d2.study.plan import Other, Run, Study, load_run_config, settings
from nuclei_d2.study.schedule import read_metrics
from nuclei_d2.utils.errors import NucleiError
from nuclei_d2.utils.files import write_json

# Of the numbers on VAL during training those that a curve is drawn of.
CURVE = ("segm/AP", "segm/AP50", "segm/AP75", "val/total_loss")


def collect_run(run: Run, schedule: tuple[str, ...], folder: Path, output: Path) -> None:
    """Write ``<output>/run.json`` from the files in a run's ``folder``."""
    cfg = load_run_config(run, schedule)
    evaluation = read_json(folder / "evaluation" / "results.json").get("efficiency") or {}
    content: dict[str, Any] = {
        "config": run.model.config,
        "options": [*run.options, *schedule],
        "settings": settings(cfg),
        "hardware": evaluation.get("hardware"),
        "model": evaluation.get("model"),
        "evaluation": evaluation.get("evaluation"),
    }
    if run.is_trained:
        rows = read_metrics(folder / "metrics.json")
        training = (read_json(folder / "results.json").get("efficiency") or {}).get("training")
        content["iterations"] = cfg.SOLVER.MAX_ITER
        content["training"] = {"seconds": training_seconds(rows)[-1], **(training or {})}
        content["curve"] = validation_curve(rows)
    if run.has_decoder:
        content["decoder"] = yaml.safe_load((folder / "tuned.yaml").read_text())["MODEL"]["UNET"]
    write_json(output / "run.json", content)


def collect_other(study: Study, other: Other, say: Callable[[str], None] = tqdm.write) -> None:
    """Measure another program's predictions; what is measured already stays, unless they are newer.

    All of them count, whatever their scores. A ``run.json`` beside them, with numbers of training
    and model as :func:`collect_run` writes them, is kept.

    Args:
        say: takes a line about each seed that the report goes without: there are no predictions,
            or they do not fit the test set.
    """
    task = study.tasks[other.task]
    cfg = load_config()
    truth = str(annotation_file(task.test[0], cfg))
    for seed, predictions in enumerate(map(Path, other.predictions)):
        folder = study.results_dir / task.name / other.name / f"seed{seed}"
        if _is_newer(folder / "run.json", predictions):
            continue
        if not predictions.exists():
            say(f"{other.name}: nothing in {predictions} yet")
            continue
        tests = {task.test[0]: (truth, str(predictions))}
        try:
            measure(None, tests, str(folder), cfg.TEST.DETECTIONS_PER_IMAGE)
        except NucleiError as error:
            say(f"{other.name}: {error}")
            continue
        told = predictions.parent / "run.json"
        write_json(folder / "run.json", read_json(told) if told.is_file() else {})


def _is_newer(path: Path, source: Path) -> bool:
    """Whether a file is there, and made after all that is in ``source``, if that is there."""
    if not path.is_file():
        return False
    return not source.exists() or path.stat().st_mtime_ns >= file_version(source)["file_mtime_ns"]


def training_seconds(rows: list[dict[str, Any]]) -> list[float]:
    """Seconds of training, without validation, at every row of ``metrics.json``.

    A row has the median time of an iteration since the one before.
    """
    seconds, iteration, elapsed = [], -1, 0.0
    for row in rows:
        if "time" in row:
            elapsed += (row["iteration"] - iteration) * row["time"]
            iteration = row["iteration"]
        seconds.append(round(elapsed, 1))
    return seconds


def validation_curve(rows: list[dict[str, Any]]) -> list[dict[str, float]]:
    """What VAL said during training: seconds of training so far, and each of :data:`CURVE`."""
    return [
        {"seconds": seconds, **{key: round(row[key], 4) for key in CURVE if key in row}}
        for row, seconds in zip(rows, training_seconds(rows), strict=True)
        if "segm/AP" in row
    ]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        NucleiError: it cannot be read, or is none.
    """
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise NucleiError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise NucleiError(f"{path}: broken JSON ({error}); remove it and run again") from error
    if not isinstance(content, dict):
        raise NucleiError(f"{path}: not a JSON object; remove it and run again")
    return content


# -------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class RunResult:
    """One run as far as it is collected."""

    task: str
    model: str
    seed: int
    info: dict[str, Any] = field(default_factory=dict)  # run.json
    tests: dict[str, Measured] = field(default_factory=dict)

    def cost(self, *place: str) -> Any:
        """A number of ``info`` by its place, such as ``("model", "parameters")``; None: unknown."""
        value: Any = self.info
        for key in place:
            value = value.get(key) if isinstance(value, dict) else None
        return value


def calibration_file(study: Study, task: str, model: str) -> Path:
    """Where the time of a model's training step is kept, if the study has a budget."""
    if model in study.models:
        model = study.models[model].calibrated
    return study.results_dir / task / model / "calibration.json"


def read_calibration(study: Study, task: str, model: str) -> dict[str, Any] | None:
    """The time of a training step ("seconds_per_iteration") and how it was measured, if it was."""
    path = calibration_file(study, task, model)
    return read_json(path) if path.is_file() else None


def load_results(study: Study) -> list[RunResult]:
    """All runs of the study that are collected, in the order of its runs; then other programs.

    Raises:
        NucleiError: a file is broken.
    """
    keys = [(run.task, run.model.name, run.seed) for run in study.runs()]
    for other in study.others.values():
        task = study.tasks[other.task]
        keys += [(task, other.name, seed) for seed in range(len(other.predictions))]
    results = []
    for task, model, seed in keys:
        folder = study.results_dir / task.name / model / f"seed{seed}"
        if not (folder / "run.json").is_file():
            continue
        paths = {name: folder / f"{name}.json" for name in task.test}
        tests = {name: read_measured(path) for name, path in paths.items() if path.is_file()}
        info = read_json(folder / "run.json")
        results.append(RunResult(task.name, model, seed, info, tests))
    return results

"""A study's results, arranged for its report: who was measured on what, and every number of it."""

from collections.abc import Sequence

import numpy as np

from nuclei_d2.study.collect import RunResult, read_calibration
from nuclei_d2.study.measure import Measured
from nuclei_d2.study.plan import Comparison, Study, Task
from nuclei_d2.study.statistics import (
    METRICS,
    TOUCHING_EDGES,
    Estimate,
    Sample,
    difference,
    estimate,
    holm,
    part_of,
    touching_bins,
)

UNKNOWN = Estimate(np.nan, np.nan, np.nan, ())
ENOUGH_SEEDS = 3  # that both have, for a claim


class Findings:
    """What the collected runs of a study say. What was not measured is unknown, never zero."""

    def __init__(self, study: Study, results: Sequence[RunResult]):
        self.study = study
        self.results = list(results)
        self._samples: dict[tuple[str, str, str], Sample | None] = {}

    @property
    def main(self) -> Task:
        """The first task: the study's question is answered on its first test set."""
        return next(iter(self.study.tasks.values()))

    def runs(self, task: str, model: str | None = None) -> list[RunResult]:
        """By seed; of all models unless one is named."""
        return [run for run in self.results if run.task == task and model in (None, run.model)]

    def models(self, task: Task) -> list[str]:
        """Models and other programs with results, in the order of the study file."""
        names = (*self.study.models, *self.study.others)
        return [name for name in names if self.runs(task.name, name)]

    def measured(self, task: Task, test: str, model: str) -> dict[int, Measured]:
        """By seed."""
        runs = self.runs(task.name, model)
        return {run.seed: run.tests[test] for run in runs if test in run.tests}

    def sample(self, task: Task, test: str, model: str) -> Sample | None:
        """All seeds of a model on a test set; None if there are none."""
        key = task.name, test, model
        if key not in self._samples:  # bootstrapping AP takes seconds
            measured = self.measured(task, test, model)
            self._samples[key] = Sample.of(measured) if measured else None
        return self._samples[key]

    def estimate(self, task: Task, test: str, model: str, metric: str) -> Estimate:
        """One of :data:`METRICS`; unknown where there is no result."""
        return _estimate(self.sample(task, test, model), metric)

    def change(
        self, comparison: Comparison, metric: str, place: tuple[Task, str] | None = None
    ) -> Estimate:
        """First minus second; unknown without both.

        Args:
            comparison: of two models.
            metric: one of :data:`METRICS`.
            place: task and test set; else the main task and its first.
        """
        task, test = place or (self.main, self.main.test[0])
        pair = [self.sample(task, test, name) for name in (comparison.first, comparison.second)]
        return difference(*pair, METRICS[metric].compute) if all(pair) else UNKNOWN

    def questions(self) -> list[Comparison]:
        """The comparisons that have enough seeds for a claim."""
        known = {c.name: self.change(c, c.metric) for c in self.study.comparisons.values()}
        return [
            self.study.comparisons[name]
            for name, change in known.items()
            if len(change.seeds) >= ENOUGH_SEEDS and np.isfinite(change.p)
        ]

    def corrected_p(self, comparison: Comparison) -> float:
        """Of one of :meth:`questions`, for their number."""
        asked = self.questions()
        corrected = holm([self.change(c, c.metric).p for c in asked])
        return corrected[[c.name for c in asked].index(comparison.name)]

    def seeds(self, task: Task, model: str) -> int:
        """How many runs there are."""
        return len(self.runs(task.name, model))

    def cost(self, task: Task, model: str, *place: str) -> float | None:
        """Mean over the seeds of a number of ``run.json``; None where none has it."""
        values = [run.cost(*place) for run in self.runs(task.name, model)]
        known = [value for value in values if isinstance(value, (int, float))]
        return float(np.mean(known)) if known else None

    def least_score(self, task: Task, model: str) -> float | None:
        """From which predictions count, as chosen on VAL: mean over the seeds."""
        measured = self.measured(task, task.test[0], model).values()
        return float(np.mean([m.score_threshold for m in measured])) if measured else None

    def seconds_per_megapixel(self, task: Task, model: str) -> float | None:
        """Network and post-processing of the first test set, see :meth:`speed`."""
        speed = self.speed(task, model, "megapixels")
        return 1 / speed if speed else None

    def speed(self, task: Task, model: str, unit: str) -> float | None:
        """ "images" or "megapixels" per second, of the fastest seed."""
        place = "evaluation", task.test[0], f"{unit}_per_second"
        speeds = [run.cost(*place) for run in self.runs(task.name, model)]
        return max((speed for speed in speeds if speed is not None), default=None)

    def training_minutes(self, task: Task, model: str) -> float | None:
        """Without validation; of the fastest seed, as other programs disturb."""
        known = [run.cost("training", "seconds") for run in self.runs(task.name, model)]
        known = [seconds for seconds in known if seconds is not None]
        return min(known) / 60 if known else None

    def step_seconds(self, task: Task, model: str) -> float | None:
        """Of a training step: as calibrated, else, without a calibration, as in training."""
        named = self.study.models.get(model)
        calibrated = read_calibration(self.study, task.name, model)
        if calibrated and not (named and named.steps_of):
            return calibrated["seconds_per_iteration"]
        minutes, iterations = (
            self.training_minutes(task, model),
            self.cost(task, model, "iterations"),
        )
        return 60 * minutes / iterations if minutes and iterations else None

    def best(self, task: Task, models: Sequence[str]) -> str | None:
        """The model that did best on VAL, mean over seeds; the test images choose nothing.

        Of the trained ones those with the most seeds take part: the fewer, the more luck.
        """
        trained = [name for name in models if self.cost(task, name, "iterations") is not None]
        most = max((self.seeds(task, name) for name in trained), default=0)
        known = {}
        for name in models:
            if name in trained and self.seeds(task, name) < most:
                continue
            runs = self.measured(task, task.test[0], name).values()
            values = [run.validation for run in runs if run.validation is not None]
            if values:
                known[name] = np.mean(values)
        return max(known, key=known.__getitem__) if known else None

    def images(self, task: Task, test: str) -> Measured | None:
        """Any run's results of a test set, for what they say about the set itself."""
        for run in self.results:
            if run.task == task.name and test in run.tests:
                return run.tests[test]
        return None

    def contested(self, task: Task, model: str) -> tuple[float, float] | None:
        """Of the first test set: share of the predicted pixels that several predictions cover, and
        the accuracy if all were divided rightly; means over seeds. None where nothing is known.
        """
        measured = self.measured(task, task.test[0], model).values()
        known = [m.contested for m in measured if m.contested]
        if not known:
            return None
        # The accuracy of the report leaves out the last threshold.
        accuracies = [np.mean(contested["accuracy"][:-1]) for contested in known]
        return float(np.mean([c["pixels"] for c in known])), float(np.mean(accuracies))

    def by_touching(self, task: Task, model: str, metric: str) -> list[Estimate]:
        """A metric in images with few, some and many touching nuclei."""
        return [_estimate(sample, metric) for sample in self._touching_samples(task, model)]

    def _touching_samples(self, task: Task, model: str) -> list[Sample | None]:
        measured = self.measured(task, task.test[0], model)
        samples = []
        for k in range(len(TOUCHING_EDGES) - 1):
            key = task.name, f"{task.test[0]}, touching {k}", model
            if key not in self._samples:
                parts = {seed: part_of(m, touching_bins(m)[k]) for seed, m in measured.items()}
                filled = parts and all(part.images for part in parts.values())
                self._samples[key] = Sample.of(parts) if filled else None
            samples.append(self._samples[key])
        return samples

    def by_size(self, task: Task, model: str) -> list[Estimate]:
        """Recall at IoU 0.5 by ``SIZE_NAMES``."""
        sample = self.sample(task, task.test[0], model)
        if sample is None:
            return []
        sizes = range(4)
        return [estimate(sample, lambda s, k=k: s.recall_by_size()[:, k], 1) for k in sizes]

    def curve(self, task: Task, model: str, metric: str = "segm/AP") -> list[tuple[float, float]]:
        """(minutes of training, a number on VAL), mean over seeds, in order.

        The minutes are those of the fastest seed.
        """
        curves = [run.info.get("curve") or [] for run in self.runs(task.name, model)]
        curves = [[row for row in curve if row.get(metric) is not None] for curve in curves]
        points = zip(*(curve for curve in curves if curve), strict=False)
        return [
            (
                min(r["seconds"] for r in rows) / 60,
                float(np.mean([r[metric] for r in rows])),
            )
            for rows in points
        ]

    def steps(self, task: Task) -> dict[str, float]:
        """The measured test sets of a ladder, with the share of their nuclei that touch another."""
        measured = {test: self.images(task, test) for test in task.test[1:]}
        return {test: touching_share(images) for test, images in measured.items() if images}


def _estimate(sample: Sample | None, metric: str) -> Estimate:
    if sample is None:
        return UNKNOWN
    return estimate(sample, METRICS[metric].compute, METRICS[metric].highest)


def machines(runs: Sequence[RunResult]) -> list[str]:
    """Device, threads, PyTorch and precision of runs, each combination once.

    Those of trained runs, if there are any: others have no precision.
    """
    trained = [run for run in runs if run.cost("iterations") is not None]
    names: dict[str, None] = {}
    for run in trained or runs:
        device, threads, torch = (
            run.cost("hardware", key) for key in ("device", "threads", "torch")
        )
        threads = threads and f"{threads} CPU thread{'s' if threads > 1 else ''}"
        torch = torch and f"PyTorch {torch}"
        precision = run.cost("training", "precision")
        parts = (device, threads, torch, precision)
        names[", ".join(part for part in parts if part)] = None
    return [name for name in names if name]


def touching_share(measured: Measured) -> float:
    """Share of the nuclei of a test set that touch another one."""
    nuclei = sum(image.n_gt for image in measured.images)
    return float(measured.touching.sum() / nuclei) if nuclei else float("nan")


def pareto_front(points: dict[str, tuple[float, float]]) -> list[str]:
    """Names of the (cost, accuracy) points that no other point beats in both, by cost."""
    front, best = [], -np.inf
    for name, (_, accuracy) in sorted(points.items(), key=lambda item: (item[1][0], -item[1][1])):
        if accuracy > best:
            front.append(name)
            best = accuracy
    return front

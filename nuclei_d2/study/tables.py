"""The numbers of a study as CSV and Markdown. What is unknown is an empty cell."""

import csv
import io
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from nuclei_d2.evaluation.scores import SIZE_NAMES
from nuclei_d2.study.findings import Findings
from nuclei_d2.study.plan import Task
from nuclei_d2.study.statistics import METRICS, TOUCHING_EDGES, Estimate

_ESTIMATE = ("value", "low", "high", "seed_min", "seed_max", "seeds")
TOUCHING_NAMES = tuple(
    f"{100 * low:.0f}-{100 * high:.0f} %" for low, high in pairwise(TOUCHING_EDGES)
)


def number(value: float | None, digits: int = 1, sign: bool = False) -> str:
    """A number for people; empty where it is unknown."""
    if value is None or not np.isfinite(value):
        return ""
    value = round(value, digits) + 0.0  # no -0.0
    return f"{value:{'+' if sign and value else ''}.{digits}f}"


def with_interval(estimate: Estimate, digits: int, sign: bool = False) -> str:
    """``62.3 [60.1, 64.0]``; the number alone where there is no interval, or nothing varied."""
    if not estimate.is_known:
        return ""
    if estimate.low == estimate.high:  # other images may vary
        return number(estimate.value, digits, sign)
    value, low, high = (
        number(v, digits, sign) for v in (estimate.value, estimate.low, estimate.high)
    )
    return f"{value} [{low}, {high}]" if low else value


def seed_range(estimate: Estimate, digits: int, sign: bool = False) -> str:
    """``61.9 to 62.8``; empty for one seed."""
    if not estimate.is_known or len(estimate.seeds) < 2:
        return ""
    ends = min(estimate.seeds), max(estimate.seeds)
    return " to ".join(number(end, digits, sign) for end in ends)


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; columns in which no row has anything are left out."""
    rows = [list(row) for row in rows]
    kept = [k for k in range(len(header)) if any(row[k] for row in rows)]
    lines = [[header[k] for k in kept], ["---"] * len(kept)]
    lines += [[row[k] for k in kept] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def to_csv(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Comma-separated, with line feeds, the same on every system."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return file.getvalue()


def _cells(estimate: Estimate) -> list[str]:
    ends = (min(estimate.seeds), max(estimate.seeds)) if estimate.seeds else (None, None)
    values = (estimate.value, estimate.low, estimate.high, *ends)
    return [*(number(value, 4) for value in values), str(len(estimate.seeds))]


def metrics_csv(findings: Findings, task: Task, test: str) -> str:
    """Every metric of every model of a task on a test set."""
    rows = [
        [model, key, metric.unit, *_cells(found)]
        for model in findings.models(task)
        for key, metric in METRICS.items()
        if (found := findings.estimate(task, test, model, key)).is_known
    ]
    return to_csv(["model", "metric", "unit", *_ESTIMATE], rows)


def differences_csv(findings: Findings) -> str:
    """Every comparison of the study: first minus second, paired."""
    rows = [
        [c.name, c.first, c.second, key, metric.unit, *_cells(found), number(found.p, 4)]
        for c in findings.study.comparisons.values()
        for key, metric in METRICS.items()
        if (found := findings.change(c, key)).is_known
    ]
    return to_csv(["comparison", "first", "second", "metric", "unit", *_ESTIMATE, "p"], rows)


def strata_csv(findings: Findings) -> str:
    """Where models fail: by size and by touching nuclei, on the main test set."""
    task, rows = findings.main, []
    for model in findings.models(task):
        for name, found in zip(SIZE_NAMES, findings.by_size(task, model), strict=False):
            rows.append([model, "recall at IoU 0.5", f"area {name} px2", *_cells(found)])
        for metric in ("merges", "splits", "accuracy"):
            strata = findings.by_touching(task, model, metric)
            for name, found in zip(TOUCHING_NAMES, strata, strict=True):
                rows.append([model, metric, f"touching {name}", *_cells(found)])
    return to_csv(["model", "metric", "stratum", *_ESTIMATE], rows)


_COSTS = {
    "device": ("hardware", "device"),
    "threads": ("hardware", "threads"),
    "torch": ("hardware", "torch"),
    "precision": ("training", "precision"),
    "parameters": ("model", "parameters"),
    "multiply_adds": ("model", "flops"),
    "iterations": ("iterations",),
    "training_seconds": ("training", "seconds"),
    "training_images_per_second": ("training", "images_per_second"),
    "training_peak_device_memory_mb": ("training", "peak_device_memory_mb"),
    "training_peak_host_memory_mb": ("training", "peak_host_memory_mb"),
}
_SPEEDS = (
    "images_per_second",
    "megapixels_per_second",
    "load_s_per_image",
    "network_s_per_image",
    "postprocess_s_per_image",
    "evaluation_s_per_image",
    "peak_device_memory_mb",
    "peak_host_memory_mb",
)


def runs_csv(findings: Findings) -> str:
    """What every run cost; speeds are those on the task's first test set."""
    rows = []
    for run in findings.results:
        test = findings.study.tasks[run.task].test[0]
        measured = run.tests.get(test)
        values = [run.cost(*place) for place in _COSTS.values()]
        values += [run.cost("evaluation", test, name) for name in _SPEEDS]
        threshold = None if measured is None else measured.score_threshold
        cells = [_cell(value) for value in (threshold, *values)]
        rows.append([run.task, run.model, run.seed, *cells])
    return to_csv(["task", "model", "seed", "score_threshold", *_COSTS, *_SPEEDS], rows)


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def curves_csv(findings: Findings) -> str:
    """Validation during training, run by run."""
    rows = [
        [
            run.task,
            run.model,
            run.seed,
            row["seconds"],
            row.get("segm/AP"),
            row.get("val/total_loss"),
        ]
        for run in findings.results
        for row in run.info.get("curve") or ()
    ]
    return to_csv(["task", "model", "seed", "seconds", "val_ap", "val_loss"], rows)

"""Schedules that give every model the same training time."""

import json
import math
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode

from nuclei_d2.study.plan import option_words
from nuclei_d2.utils.errors import NucleiError

# Iterations of a calibration, of which the last quarter is measured: at first caches are cold, and
# few proposals of a detector are nuclei, which its mask head works on.
CALIBRATION_ITERATIONS = 400


def calibration_options(seed: int) -> tuple[str, ...]:
    """Options of a short training that measures the time of an iteration, and nothing else."""
    return option_words(
        {
            "SEED": seed,
            "SOLVER.MAX_ITER": CALIBRATION_ITERATIONS,
            "SOLVER.CHECKPOINT_PERIOD": 10**9,
            "TEST.EVAL_PERIOD": 0,
            "DATASETS.TEST": (),
        }
    )


def schedule_options(
    cfg: CfgNode,
    seconds_per_iteration: float | None = None,
    minutes: float | None = None,
    validations: int | None = None,
) -> tuple[str, ...]:
    """Options that make a training of ``cfg`` last ``minutes``.

    Every length of the schedule is scaled by the same factor, so its shape is kept.

    Args:
        cfg: its ``SOLVER`` is the schedule to scale.
        seconds_per_iteration: of this model on this computer; not needed without ``minutes``.
        minutes: without validation; None keeps the schedule.
        validations: evaluations on VAL, evenly spread; None scales ``TEST.EVAL_PERIOD``, too.
    """
    options: dict[str, Any] = {}
    iterations = cfg.SOLVER.MAX_ITER
    if minutes is not None:
        iterations = max(1, round(60 * minutes / seconds_per_iteration))
        factor = iterations / cfg.SOLVER.MAX_ITER
        options = {
            "SOLVER.MAX_ITER": iterations,
            "SOLVER.WARMUP_ITERS": round(factor * cfg.SOLVER.WARMUP_ITERS),
            "SOLVER.CHECKPOINT_PERIOD": math.ceil(factor * cfg.SOLVER.CHECKPOINT_PERIOD),
            "TEST.EVAL_PERIOD": math.ceil(factor * cfg.TEST.EVAL_PERIOD),
        }
        if cfg.SOLVER.LR_SCHEDULER_NAME == "WarmupMultiStepLR":
            options["SOLVER.STEPS"] = tuple(round(factor * step) for step in cfg.SOLVER.STEPS)
    if validations is not None:
        options["TEST.EVAL_PERIOD"] = math.ceil(iterations / validations) if validations else 0
    return option_words(options)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a run's ``metrics.json`` in the order of their iterations.

    What a stopped process wrote after its last checkpoint was done again by the one that went on:
    of equal iterations the later lines count. A line cut short by a kill is left out.

    Raises:
        NucleiError: there is no such file.
    """
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise NucleiError(f"cannot read {path}: {error.strerror or error}") from error
    rows: dict[tuple, dict[str, Any]] = {}
    for row in _parsed(lines):
        kind = "time" in row  # training and validation of one iteration are separate lines
        rows[row["iteration"], not kind] = row
    return [rows[key] for key in sorted(rows)]


def _parsed(lines: Iterable[str]) -> Iterable[dict[str, Any]]:
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and "iteration" in row:
            yield row


def seconds_per_iteration(rows: list[dict[str, Any]]) -> float:
    """The time of an iteration at the end of a calibration: the median of the last quarter of the
    rows, which other programs disturb less than any one of them.

    Raises:
        NucleiError: the rows hold no time.
    """
    times = [row["time"] for row in rows if "time" in row]
    if not times:
        raise NucleiError("the calibration measured no time; look at its log")
    return statistics.median(times[3 * len(times) // 4 :])

"""Schedules for a time budget, and what a training's metrics.json says."""

import json

import pytest
from tiny import CONFIGS

from nuclei_d2.config import load_config
from nuclei_d2.study.schedule import read_metrics, schedule_options, seconds_per_iteration
from nuclei_d2.utils.errors import NucleiError

OPTIONS = (
    *("SOLVER.MAX_ITER", "2000", "SOLVER.WARMUP_ITERS", "200", "SOLVER.STEPS", "(1000, 1500)"),
    *("SOLVER.LR_SCHEDULER_NAME", "WarmupMultiStepLR"),
    *("SOLVER.CHECKPOINT_PERIOD", "250", "TEST.EVAL_PERIOD", "1000"),
)


def scheduled(*args, **kwargs):
    config = str(CONFIGS / "cpu" / "mask_rcnn.yaml")
    words = schedule_options(load_config(config, OPTIONS), *args, **kwargs)
    return load_config(config, (*OPTIONS, *words))


def test_a_budget_scales_every_length_of_the_schedule():
    cfg = scheduled(0.6, 30)  # 30 minutes of 0.6 s each: 3,000 iterations instead of 2,000
    assert cfg.SOLVER.MAX_ITER == 3000
    assert cfg.SOLVER.WARMUP_ITERS == 300
    assert cfg.SOLVER.STEPS == (1500, 2250)
    assert cfg.SOLVER.CHECKPOINT_PERIOD == 375
    assert cfg.TEST.EVAL_PERIOD == 1500


def test_a_tiny_budget_still_is_a_training():
    cfg = scheduled(5.0, 0.01)
    assert cfg.SOLVER.MAX_ITER == 1
    assert cfg.SOLVER.CHECKPOINT_PERIOD == 1


def test_validations_are_spread_evenly_and_the_last_one_is_at_the_end():
    assert scheduled(0.6, 30, validations=7).TEST.EVAL_PERIOD == 429  # 3000 / 7 = 428.6
    assert scheduled(validations=4).TEST.EVAL_PERIOD == 500
    assert scheduled(validations=0).TEST.EVAL_PERIOD == 0


def test_without_a_budget_the_schedule_stays():
    assert schedule_options(load_config("", OPTIONS)) == ()


def test_of_repeated_iterations_the_later_ones_count(tmp_path):
    path = tmp_path / "metrics.json"
    rows = [
        {"iteration": 19, "time": 1.0},
        {"iteration": 39, "time": 9.0},  # then it was killed, and began again at 20
        {"iteration": 39, "time": 2.0},
        {"iteration": 40, "segm/AP": 3.0},
    ]
    path.write_text("\n".join(map(json.dumps, rows)) + '\n{"iteration": 59, "ti')
    assert read_metrics(path) == [rows[0], rows[2], rows[3]]
    assert seconds_per_iteration(read_metrics(path)) == 2.0


def test_a_disturbed_moment_does_not_change_the_time_of_an_iteration():
    times = (9.0, *(0.5,) * 8, 1.1, 4.0, 1.2)  # caches, then few proposals, then what is measured
    rows = [{"iteration": k, "time": time} for k, time in enumerate(times)]
    assert seconds_per_iteration(rows) == pytest.approx(1.2)
    assert seconds_per_iteration(rows[:1]) == 9.0


def test_no_metrics_are_an_error(tmp_path):
    with pytest.raises(NucleiError, match="cannot read"):
        read_metrics(tmp_path / "metrics.json")
    with pytest.raises(NucleiError, match="measured no time"):
        seconds_per_iteration([{"iteration": 1}])

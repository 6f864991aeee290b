"""Order, resumption, failures and budgets of runs, with stand-ins for the trainer."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict

import pytest
from tiny import CONFIGS

from nuclei_d2.utils.errors import NucleiError
from nuclei_d2.utils.hardware import cpu_name


def stages(calls, key):
    """Stages that were called for one run, in order."""
    return [line.split(" ", 1)[0] for line in calls if f"/{key}" in line]


def read(path):
    return json.loads(path.read_text())


def test_every_run_goes_through_its_stages_and_is_collected(make_runner, calls):
    runner = make_runner()
    runs = runner.study.runs()
    assert runner.run_all(runs) == []
    done = calls()
    assert stages(done, "a/classical/seed0") == ["evaluate", "measure"]
    assert stages(done, "a/unet/seed1") == ["train", "tune", "evaluate", "measure"]
    assert stages(done, "a/mask_rcnn/seed1") == ["train", "evaluate", "measure"]
    assert {runner.state(run) for run in runs} == {"done"}
    info = read(runner.results_folder(runs[1]) / "run.json")
    assert info["training"]["seconds"] == 20.0  # 40 iterations of 0.5 s
    assert info["curve"] == [{"seconds": 20.0, "segm/AP": 50.0}]
    assert info["decoder"] == {"DECODER": {"THRESHOLD": 0.4}}
    assert info["hardware"] == {"device": "none"}
    # Nothing but the final weights stays of the checkpoints.
    assert [p.name for p in runner.folder(runs[1]).glob("*.pth")] == ["model_final.pth"]


def test_what_is_done_is_not_done_again(make_runner, calls):
    make_runner().run_all(make_runner().study.runs())
    calls()
    assert make_runner().run_all(make_runner().study.runs()) == []
    assert calls() == []


def test_a_training_that_died_is_resumed(make_runner, calls, monkeypatch):
    monkeypatch.setenv("STOP", "a/unet/seed0")
    runs = make_runner().study.runs()
    failed = make_runner().run_all(runs, say=lambda line: None)
    assert [run.key for run in failed] == ["a/unet/seed0"]
    assert make_runner().state(failed[0]) == "begun"
    calls()
    monkeypatch.delenv("STOP")
    assert make_runner().run_all(runs) == []
    assert calls()[0] == "train output/a/unet/seed0 resumed"


def test_a_failure_is_one_line_and_the_others_go_on(make_runner, calls, monkeypatch):
    monkeypatch.setenv("FAIL", "a/mask_rcnn/seed0/evaluation")
    said = []
    runs = make_runner().study.runs()
    failed = make_runner().run_all(runs, said.append)
    assert [run.key for run in failed] == ["a/mask_rcnn/seed0"]
    (line,) = [line for line in said if "mask_rcnn/seed0" in line]
    assert "evaluate failed (error: told to fail)" in line
    assert "evaluate.log" in line
    assert sum("done" in line for line in said) == len(runs) - 1
    calls()
    monkeypatch.delenv("FAIL")
    assert make_runner().run_all(runs) == []  # from the stage that failed
    assert stages(calls(), "a/mask_rcnn/seed0") == ["evaluate", "measure"]


def test_other_settings_are_refused(make_runner):
    runner = make_runner()
    runner.run_all(runner.study.runs())
    changed = make_runner(options={"SOLVER.BASE_LR": 0.5})
    with pytest.raises(NucleiError, match=r"made with SOLVER.BASE_LR 0.0\d+, now it is 0.5"):
        changed.run_all(changed.study.runs())


def test_another_test_set_is_measured_without_training_again(make_runner, calls, tiny_data):
    runner = make_runner()
    runner.run_all(runner.study.runs())
    calls()
    task = {"train": "tiny_train", "val": "tiny_val", "test": ["tiny_test", "tiny_train"]}
    runner = make_runner(datasets={"a": task})
    assert runner.run_all(runner.study.runs()) == []
    done = calls()
    assert stages(done, "a/unet/seed0") == ["evaluate", "measure"]
    request = read(runner.folder(runner.study.runs()[0]) / "measure.json")
    assert list(request["tests"]) == ["tiny_train"]


def test_a_budget_is_calibrated_once_for_each_model(make_runner, calls):
    runner = make_runner(budget=5)
    runs = runner.study.runs()
    assert runner.run_all(runs) == []
    done = calls()
    assert sum("calibration" in line for line in done) == 2  # not the classical baseline
    assert runner.state(runs[1]) == "done"
    info = read(runner.results_folder(runs[1]) / "run.json")
    assert info["iterations"] == 600  # 5 minutes of 0.5 s each
    for run in runs[1:]:
        plan = read(runner.folder(run) / "plan.json")
        assert "600" in plan["options"]
    other = make_runner(budget=6)
    with pytest.raises(NucleiError, match=r"made with SOLVER.\w+ \d+, now it is"):
        other.run_all(runs)


def test_a_calibration_holds_both_locks(make_runner, monkeypatch):
    """They are the child's, too: it may outlive this process."""
    runner = make_runner(budget=5)
    run, held = runner.study.runs()[1], []

    def call(words, folder, stage, *locks):
        if stage == "calibrate":
            held.extend(os.fstat(lock).st_ino for lock in locks)
        return real(words, folder, stage, *locks)

    real = runner._call
    monkeypatch.setattr(runner, "_call", call)
    assert runner.run_all([run]) == []
    folders = (runner.folder(run), runner.folder(run).parent / "calibration")
    assert held == [(folder / "lock").stat().st_ino for folder in folders]


def test_models_of_one_network_get_the_same_number_of_steps(make_runner, calls):
    unet = str(CONFIGS / "cpu" / "unet_boundary.yaml")
    thick = {"config": unet, "options": {"MODEL.UNET.BOUNDARY": "thick"}, "steps_of": "unet"}
    runner = make_runner(budget=5, models={"thick": thick, "unet": {"config": unet}})
    runs = runner.study.runs()
    assert runner.run_all(runs) == []
    assert [line for line in calls() if "calibration" in line] == [
        "train output/a/unet/calibration"
    ]
    assert {read(runner.results_folder(run) / "run.json")["iterations"] for run in runs} == {600}


def test_a_calibration_holds_for_its_threads_and_device(make_runner):
    runner = make_runner(budget=5)
    run = runner.study.runs()[1]
    assert runner.run_all([run]) == []
    (path,) = runner.study.results_dir.glob("a/unet/calibration.json")
    (runner.results_folder(run) / "run.json").unlink()
    measured = read(path)
    for key, value, words in (
        ("threads", 7, "measured with threads 7, now it is"),
        ("device", "cuda", "measured with device cuda, now it is cpu; go on with the device"),
    ):
        path.write_text(json.dumps({**measured, key: value}))
        said = []
        assert runner.run_all([run], said.append) == [run]
        assert words in said[0]


def test_a_calibration_of_another_computer_holds_with_a_warning(make_runner):
    runner = make_runner(budget=5)
    run = runner.study.runs()[1]
    assert runner.run_all([run]) == []
    (path,) = runner.study.results_dir.glob("a/unet/calibration.json")
    measured = read(path)
    assert measured["processor"] == cpu_name()
    older = {key: value for key, value in measured.items() if key != "processor"}
    for content, warned in (({**measured, "processor": "Abacus"}, True), (older, False)):
        (runner.results_folder(run) / "run.json").unlink()
        path.write_text(json.dumps(content))
        said = []
        assert runner.run_all([run], said.append) == []
        assert any("fit the time on Abacus" in line for line in said) is warned


def test_several_at_a_time_share_the_cores(make_runner, calls):
    runner = make_runner(jobs=2, budget=5)
    assert runner.run_all(runner.study.runs()) == []
    assert sum("calibration" in line for line in calls()) == 2
    assert runner._environment["OMP_NUM_THREADS"] == str(max(1, len(os.sched_getaffinity(0)) // 2))


@pytest.mark.parametrize(("jobs", "used"), [(1, {"3,5"}), (2, {"3", "5"})])
def test_several_at_a_time_share_the_gpus(make_runner, calls, monkeypatch, jobs, used):
    monkeypatch.setattr("nuclei_d2.study.runner.usable_gpus", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    runner = make_runner(jobs=jobs)
    assert runner.run_all(runner.study.runs()) == []
    gpus = defaultdict(set)
    for line in calls():
        run, gpu = re.search(r"(a/\w+/seed\d).* gpu(\S+)", line).groups()
        gpus[run].add(gpu)
    assert all(len(numbers) == 1 for numbers in gpus.values())
    assert set().union(*gpus.values()) == used


def test_the_gpus_that_jobs_may_use(make_runner, monkeypatch):
    monkeypatch.setattr("nuclei_d2.study.runner.usable_gpus", lambda: 2)
    cuda = {"MODEL.DEVICE": "cuda"}
    for named, gpus in ((None, ["0", "1"]), ("", ["0", "1"]), ("7,8,9", ["7", "8"])):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if named is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
        runner = make_runner(jobs=3, options=cuda)
        assert runner._gpus == gpus
        assert runner._hardware(runner.study.runs()[1])["jobs_per_gpu"] == 2


def test_what_was_done_on_one_device_is_done_on_all_but_begun_on_one(make_runner, monkeypatch):
    monkeypatch.setenv("STOP", "a/unet/seed1")
    there, here = (make_runner(options={"MODEL.DEVICE": name}) for name in ("cuda", "cpu"))
    runs = here.study.runs()
    (begun,) = there.run_all(there.study.runs(), say=lambda line: None)
    assert begun.key == "a/unet/seed1"
    assert {here.state(run) for run in runs if run.key != begun.key} == {"done"}
    with pytest.raises(NucleiError, match=r"made with MODEL\.DEVICE cuda, now it is cpu"):
        here.state(next(run for run in runs if run.key == begun.key))


def test_a_changed_run_is_refused_though_a_test_of_it_is_missing(make_runner):
    runner = make_runner()
    run = runner.study.runs()[0]
    assert runner.run_all([run]) == []
    (runner.results_folder(run) / "tiny_test.json").unlink()
    (runner.folder(run) / "plan.json").unlink()  # the results alone came from elsewhere
    assert runner.state(run) == "waiting"
    changed = make_runner(options={"TEST.DETECTIONS_PER_IMAGE": 7})
    with pytest.raises(NucleiError, match=r"run\.json: made with TEST\.DETECTIONS_PER_IMAGE"):
        changed.state(changed.study.runs()[0])


def test_a_run_that_another_process_does_is_left_alone(make_runner):
    runner = make_runner()
    run = runner.study.runs()[0]
    folder = runner.folder(run)
    folder.mkdir(parents=True)
    hold = "import fcntl, sys, time; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); "
    hold += "print('held', flush=True); time.sleep(60)"
    with subprocess.Popen(
        [sys.executable, "-c", hold, str(folder / "lock")], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "held\n"
        said = []
        assert runner.run_all([run], said.append) == [run]
        assert "is being done by another process" in said[0]
        process.kill()
    assert runner.run_all([run]) == []


@pytest.fixture
def interruptible():
    """SIGINT raises KeyboardInterrupt; a shell's background jobs are started to ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_ends_the_processes(make_runner, monkeypatch):
    runner = make_runner()
    sleeper = (sys.executable, "-c", "import time; time.sleep(60)")
    monkeypatch.setattr(runner, "_commands", type(runner._commands)(sleeper, sleeper, sleeper))

    def interrupt(*_):
        while not runner._processes:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        runner.run_all(runner.study.runs())
    while runner._processes:  # the last thread may have to notice
        assert time.monotonic() - started < 30
        time.sleep(0.01)

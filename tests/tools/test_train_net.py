"""train_net.py as a user runs it: train, evaluate, resume after kill -9, and mistakes."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from tiny import CONFIGS, REPOSITORY, TINY_DATA_OPTS, TINY_OPTS


def command(out, *words, config="mask_boundary_rcnn.yaml"):
    tool = str(REPOSITORY / "tools" / "train_net.py")
    config = str(CONFIGS / config)
    return [
        *(sys.executable, "-W", "ignore", tool, "--config-file", config, *words),
        *TINY_OPTS,
        *TINY_DATA_OPTS,
        *("SOLVER.WARMUP_ITERS", "1", "TEST.EVAL_PERIOD", "0", "OUTPUT_DIR", str(out)),
    ]


def run(*args, **kwargs):
    return subprocess.run(command(*args, **kwargs), capture_output=True, text=True, timeout=300)


def test_train_then_evaluate_gives_the_same_results(tiny_data, tmp_path):
    out = tmp_path / "out"
    low = ("MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0")
    # Options follow flags: the tiny ones come after these words.
    trained = run(out, "SOLVER.MAX_ITER", "3", *low)
    assert trained.returncode == 0, trained.stderr
    assert "tiny_test (AP in percent)" in trained.stdout
    results = json.loads((out / "results.json").read_text())
    assert set(results["tiny_test"]) >= {"bbox", "segm"}
    assert "forward_s_per_iteration" in trained.stdout
    weights = ("MODEL.WEIGHTS", str(out / "model_final.pth"))
    config = (out / "config.yaml").read_text()
    evaluated = run(out, "--eval-only", *weights, *low)
    assert evaluated.returncode == 0, evaluated.stderr
    again = json.loads((out / "evaluation" / "results.json").read_text())
    assert json.loads((out / "results.json").read_text()) == results
    assert (out / "config.yaml").read_text() == config
    assert again["tiny_test"] == results["tiny_test"]
    assert again["efficiency"]["model"] == results["efficiency"]["model"]
    assert again["efficiency"]["training"] is None


def test_a_killed_run_resumes_and_ends_at_the_same_iteration(tiny_data, tmp_path):
    out = tmp_path / "out"
    words = ("SOLVER.MAX_ITER", "12", "SOLVER.CHECKPOINT_PERIOD", "2")
    process = subprocess.Popen(
        command(out, *words), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.time() + 200
    while not (out / "last_checkpoint").exists() and process.poll() is None:
        assert time.time() < deadline
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (out / "model_final.pth").exists()
    resumed = run(out, "--resume", *words)
    assert resumed.returncode == 0, resumed.stderr
    assert "Starting training from iteration 0" not in resumed.stdout + resumed.stderr
    state = torch.load(out / "model_final.pth", weights_only=True)
    assert state["iteration"] == 11
    assert (out / "results.json").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["DATASETS.TRAIN", "('tinny_train',)"], "no data set tinny_train"),
        (["MODEL.ROI_MASK_HEAD.NAME", "BoundryMaskHead"], "valid: "),
        (["INPUT.SCAL", "2"], "did you mean INPUT.SCALE"),
        (["MODEL.DEVICE", "cuda:9"], "MODEL.DEVICE"),
        (["--eval-only", "MODEL.WEIGHTS", "nowhere.pth"], "nowhere.pth"),
        (["--eval-only"], "MODEL.WEIGHTS is empty"),
        (["SOLVER.BASE_LR", "1e30", "SOLVER.MAX_ITER", "5"], "loss is not finite at iteration"),
        (["--num-gpus", "64"], "--num-gpus"),
    ],
)
def test_mistakes_are_one_line(tiny_data, tmp_path, words, message):
    whole = command(tmp_path / "out")
    # Flags come first; options last, where they override the tiny ones.
    position = whole.index("MODEL.DEVICE") if words[0].startswith("--") else len(whole)
    done = subprocess.run(
        [*whole[:position], *words, *whole[position:]], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stdout + done.stderr
    assert message in done.stderr.splitlines()[-1]
    assert done.stderr.splitlines()[-1].startswith("error: ")

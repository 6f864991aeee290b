"""study.py as a user calls it. Its parts are tested in tests/study."""

import re
import runpy
import subprocess
import sys

import pytest
import yaml
from tiny import CONFIGS, REPOSITORY, TINY_OPTS

TOOL = str(REPOSITORY / "tools" / "study.py")


@pytest.fixture
def study(tmp_path, monkeypatch):
    """One model for two steps; the working folder is that of the study file."""
    content = {
        "name": "tiny",
        "title": "A test",
        "seeds": [0],
        "validations": 1,
        "options": {
            **dict(zip(TINY_OPTS[::2], TINY_OPTS[1::2], strict=True)),
            "SOLVER.MAX_ITER": 2,
            "SOLVER.WARMUP_ITERS": 1,
        },
        "models": {"ours": {"config": str(CONFIGS / "mask_boundary_rcnn.yaml")}},
        "datasets": {"tiny": {"train": "tiny_train", "val": "tiny_val", "test": "tiny_test"}},
    }
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(content))
    monkeypatch.chdir(tmp_path)
    return path


@pytest.fixture
def call(monkeypatch, capsys):
    """Calls the tool in this process, which saves the imports: exit status, stdout, stderr."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", [TOOL, *words])
        status = 0
        try:
            runpy.run_path(TOOL, run_name="__main__")
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()

    return run


def all_bytes(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_study_runs_reports_and_is_then_done(tiny_data, study, call, tmp_path):
    assert "tiny/ours/seed0" in call("study.yaml", "--dry-run", "--only", "*/seed0", "tiny/*")[1]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", TOOL, "study.yaml"],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    results = tmp_path / "results" / "tiny"
    assert (results / "study.md").read_text().startswith("# A test\n")
    assert (results / "study" / "answer.svg").is_file()
    before = all_bytes(results)
    assert call("study.yaml", "--report-only")[0] == 0
    assert all_bytes(results) == before  # byte for byte, from another process
    assert "done" in call("study.yaml", "--dry-run")[1]


def test_runs_are_chosen_in_the_order_asked_for(study, call):
    content = yaml.safe_load(study.read_text())
    study.write_text(yaml.safe_dump({**content, "seeds": [0, 1, 2]}))
    shown = call("study.yaml", "--dry-run", "--only", "*/seed2", "tiny/*")[1]
    assert re.findall(r"seed\d", shown) == ["seed2", "seed0", "seed1"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["none.yaml"], "cannot read none.yaml"),
        (["study.yaml", "--jobs", "0"], "--jobs is 0"),
        (["study.yaml", "--only", "tiny/*", "x/*"], "--only x/*: no such run"),
        (["study.yaml", "--report-only"], "no results of tiny to report yet"),
    ],
)
def test_mistakes_are_one_line(study, call, words, message):
    status, _, errors = call(*words)
    assert status == 2
    assert errors.startswith("error: ")
    assert message in errors
    assert errors.count("\n") == 1

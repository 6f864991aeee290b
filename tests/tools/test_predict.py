"""The tool as it is started by people, by torchrun and by a scheduler that kills it."""

import json
import os
import runpy
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image
from tiny import CONFIGS, draw_nuclei

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "predict.py"
GOOD, EMPTY = 12, 2


@pytest.fixture
def images(tmp_path):
    """14 good images, two of them without nuclei, and 6 broken ones."""
    folder = tmp_path / "in"
    folder.mkdir()
    for k in range(GOOD):
        pixels, _ = draw_nuclei(np.random.default_rng(k), (64, 80), 6)
        Image.fromarray(pixels).save(folder / f"good_{k:02}.png")
    tifffile.imwrite(folder / "empty_black.tif", np.zeros((64, 80), np.uint16))
    noise = np.random.default_rng(0).poisson(200, (64, 80)).astype(np.uint16)
    tifffile.imwrite(folder / "empty_noise.tif", noise)
    (folder / "bad_text.png").write_text("this is no image")
    (folder / "bad_empty.png").write_bytes(b"")
    (folder / "bad_truncated.png").write_bytes((folder / "good_00.png").read_bytes()[:900])
    tifffile.imwrite(folder / "bad_axes.tif", np.zeros((5, 7, 64, 80), np.uint8))
    nan = np.full((64, 80), np.nan, np.float32)
    tifffile.imwrite(folder / "bad_nan.tif", nan)
    tiff = (folder / "empty_noise.tif").read_bytes()
    (folder / "bad_truncated_too.tif").write_bytes(tiff[:3000])
    return folder


def words(images, *more):
    output = images.parent / "out"
    start = ("--config-file", CONFIGS / "classical.yaml", "--device", "cpu", "--input", images)
    return [str(word) for word in (*start, "--output", output, *more)]


def start(*arguments, **environment):
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(
        [sys.executable, TOOL, *arguments],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    out, err = process.communicate(timeout=600)
    assert "Traceback" not in err, err
    return process.returncode, out, err


def in_process(monkeypatch, *arguments):
    """As ``python tools/predict.py``, without another start of Python; the exit status."""
    monkeypatch.setattr(sys, "argv", ["predict.py", *arguments])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(TOOL), run_name="__main__")
    return stopped.value.code


def done_images(out):
    return [line.split(":")[0] for line in out.splitlines() if " nuclei, " in line]


def check_results(folder):
    names = {path.stem for path in (folder / "in").iterdir() if not path.name.startswith("bad")}
    out = folder / "out"
    assert {path.stem for path in (out / "records").iterdir()} == names
    for name in names:
        nuclei = json.loads((out / "records" / f"{name}.json").read_text())["nuclei"]
        assert nuclei == tifffile.imread(out / f"{name}_labels.tif").max()
        assert (nuclei == 0) == name.startswith("empty")
        assert len((out / f"{name}.csv").read_text().splitlines()) == 1 + nuclei
        json.loads((out / f"{name}.geojson").read_text())
    assert list((out / "claims").iterdir()) == []
    assert not (out / "work").exists()
    assert not [path for path in out.rglob("*") if ".tmp" in path.name]


def test_broken_files_are_listed_and_the_others_predicted(images, tmp_path, monkeypatch, capsys):
    assert in_process(monkeypatch, *words(images)) == 1
    out, err = capsys.readouterr()
    check_results(tmp_path)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["images"], summary["done"], summary["failed"]) == (20, 14, 6)
    reasons = {Path(entry["file"]).name: entry["reason"] for entry in summary["failures"]}
    assert set(reasons) == {path.name for path in images.glob("bad_*")}
    assert "empty" in reasons["bad_empty.png"]
    assert "NaN" in reasons["bad_nan.tif"]
    assert "axes" in reasons["bad_axes.tif"]
    assert all(reason in err for reason in reasons.values())
    assert all("\n" not in reason for reason in reasons.values())
    assert sorted(done_images(out)) == sorted(
        path.name for path in images.iterdir() if not path.name.startswith("bad")
    )
    assert "good_00.png: PNG YX 64x80 uint8: grey" in out
    assert "warning: empty_black.tif" in err

    # Again: only what is missing, which is what failed and what has changed.
    (images / "bad_nan.tif").write_bytes((images / "empty_noise.tif").read_bytes())
    (images / "good_00.png").write_bytes((images / "good_01.png").read_bytes())
    assert in_process(monkeypatch, *words(images)) == 1
    out = capsys.readouterr().out
    assert done_images(out) == ["bad_nan.tif", "good_00.png"]
    assert "good_00.png: changed since its results were made; done again" in out


def test_a_good_folder_ends_well(images, monkeypatch, capsys):
    arguments = words(images / "good_0*.png", "--formats", "labels", "--tta")
    arguments[arguments.index("--output") + 1] = str(images.parent / "out")
    assert in_process(monkeypatch, *arguments) == 0
    assert len(done_images(capsys.readouterr().out)) == 10
    assert in_process(monkeypatch, *arguments) == 0
    assert done_images(capsys.readouterr().out) == []
    assert in_process(monkeypatch, *arguments, "--overwrite") == 0
    assert len(done_images(capsys.readouterr().out)) == 10


def test_two_processes_share_a_folder_and_one_is_killed(images, tmp_path, monkeypatch, capsys):
    """Each image is done once, and that of the killed process by the other. No file is half."""
    records = tmp_path / "out" / "records"
    arguments = words(images, "--formats", "labels,csv,geojson,overlay")
    workers = [start(*arguments, RANK=str(rank), WORLD_SIZE="2") for rank in range(2)]
    while not records.exists() or len(list(records.iterdir())) < 3:
        assert [worker.poll() for worker in workers] == [None, None]
        time.sleep(0.005)
    workers[1].kill()
    complete = {path.stem for path in records.glob("[!.]*.json")}
    for name in complete:
        assert tifffile.imread(tmp_path / "out" / f"{name}_labels.tif").shape == (64, 80)
    lost, _ = workers[1].communicate()
    returncode, out, _ = finish(workers[0])
    assert returncode == 1
    check_results(tmp_path)
    done = [*done_images(lost), *done_images(out)]
    assert len(done) == len(set(done))
    assert {Path(name).stem for name in done_images(out)} >= {p.stem for p in records.iterdir()} - (
        complete | {Path(name).stem for name in done_images(lost)}
    )
    assert in_process(monkeypatch, *arguments) == 1  # nothing is left but what fails
    assert done_images(capsys.readouterr().out) == []


def test_other_ranks_leave_the_verdict_to_the_first(images, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(sys, "argv", ["predict.py", *words(images, "--formats", "labels")])
    runpy.run_path(str(TOOL), run_name="__main__")  # ends without an exit status of its own
    done = done_images(capsys.readouterr().out)
    assert len(done) == GOOD + EMPTY
    assert done[0] != "empty_black.tif"  # it begins in the middle


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--formats", "labels,svg"], "no output format 'svg'"),
        (["--confidence-threshold", "50"], "lies in 0 to 1"),
        (["--tile", "100", "--overlap", "100"], "--overlap"),
        (["--diameter", "20", "--pixel-size", "0.5"], "give one of them"),
        (["--weights", "missing.pth"], "missing.pth"),
        (["--opts", "MODEL.CLASSICAL.SIGMAS", "2"], "did you mean MODEL.CLASSICAL.SIGMA"),
    ],
)
def test_mistakes_are_told_in_one_line(images, tmp_path, more, message, monkeypatch, capsys):
    assert in_process(monkeypatch, *words(images, *more)) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ")
    assert message in error
    assert "\n" not in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "mistake",
    [
        ["--weights", "typo.pth"],
        ["--confidence-threshold", "7"],
        ["--opts", "MODEL.DEVICE", "cuda:99"],
    ],
)
def test_a_mistake_removes_nothing(images, tmp_path, mistake, monkeypatch, capsys):
    arguments = words(images / "good_00.png")
    arguments[arguments.index("--output") + 1] = str(tmp_path / "out")
    assert in_process(monkeypatch, *arguments) == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    assert in_process(monkeypatch, *arguments, "--overwrite", *mistake) == 2
    assert mistake[-1] in capsys.readouterr().err
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    assert after == before


def test_overwrite_is_for_one_process(images, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert in_process(monkeypatch, *words(images, "--overwrite")) == 2
    assert "remove" in capsys.readouterr().err

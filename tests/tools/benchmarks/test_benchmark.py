"""benchmark.py: what it measures is the same on both sides, and its arithmetic is right."""

import json
import sys

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image
from tiny import CONFIGS, REPOSITORY

sys.path.insert(0, str(REPOSITORY / "tools" / "benchmarks"))  # as for a script that lies there
import benchmark
import benchmark_stages as stages
from benchmark_stages import BOUNDARY, MIXED, OURS, PLAIN, STARDIST, STOCK, Job, Options

from nuclei_d2.utils.errors import NucleiError

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")


@pytest.fixture
def options(tmp_path):
    yield Options(tmp_path, str(CONFIGS / "cpu" / "mask_rcnn.yaml"), "", "", 1, 8e9)
    for name in [name for name in DatasetCatalog.list() if name.startswith("benchmark_")]:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def results(stage, options, nuclei=12, size=128):
    found = []
    for rival in (OURS, STOCK):
        job = Job(stage, rival, nuclei, size)
        stages.draw_images(options.folder, job)
        stages.torch.manual_seed(0)
        found.append(stages.measure(job, options)["result"])
    return found


def test_both_rivals_read_the_same_nuclei(options):
    ours, stock = results("mapper", options)
    assert ours == stock > 5


def test_mask_targets_are_equal(options):
    targets = results("mask targets", options)
    assert len(targets[0]) == 128 * 28 * 28 / 8
    assert benchmark.percent_equal(*targets) > 99.9


def test_masks_are_equal_bit_for_bit(options):
    assert benchmark.same(*results("post-processing", options)) == 1


def test_average_precision_is_equal(options):
    ours, stock = results("metrics", options)
    assert benchmark.apart(ours, stock) < 1e-9
    assert 20 < ours["segm"] < 100


def test_measuring_in_a_process_of_its_own_with_bounded_memory(options):
    job = Job("post-processing", STOCK, 60, 1024)
    stages.draw_images(options.folder, job)
    enough = benchmark.run_job(job, options)
    assert 55 < enough["peak_mb"] < 200  # 60 frames of 1 MB and little else
    assert enough["seconds"] > 0
    less = Options(**{**vars(options), "memory_limit": 30e6})
    assert benchmark.run_job(job, less) == {"error": "> 0 GB"}


def test_every_nucleus_is_labelled_behind_perfect_detections(options):
    job = Job("label image", OURS, 12, 128)
    stages.draw_images(options.folder, job)
    labels = np.asarray(Image.open(options.folder / f"{job.data}_0_label.png"))
    assert stages.measure(job, options)["result"] == labels.max() > 5


def fake_python(tmp_path, body):
    path = tmp_path / "python"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return str(path)


def test_stardist_is_measured_by_its_own_interpreter(options, tmp_path):
    says = """echo noise; echo '{"seconds": '$OMP_NUM_THREADS', "peak_mb": '$4', "result": 9}'"""
    other = Options(**{**vars(options), "stardist": fake_python(tmp_path, says), "threads": 2})
    job = Job("label image", STARDIST, 12, 128)
    assert benchmark.run_job(job, other) == {"seconds": 2, "peak_mb": 2, "result": 9}
    broken = fake_python(tmp_path, "echo 'no tensors today' >&2; exit 1")
    with pytest.raises(NucleiError, match="no tensors today"):
        benchmark.run_job(job, Options(**{**vars(other), "stardist": broken}))


def test_bfloat16_finds_the_same_nuclei(options, monkeypatch):
    monkeypatch.setattr("nuclei_d2.utils.precision.bfloat16_support", lambda: "fast")
    for rival in (OURS, MIXED):
        job = Job("label image", rival, 12, 128)
        stages.draw_images(options.folder, job)
        enabled = stages.config(job, options).TEST.AMP.ENABLED
        assert enabled is (rival == MIXED)
        assert stages.measure(job, options)["result"] == 12


def test_an_interpreter_without_stardist_is_refused(tmp_path):
    with pytest.raises(NucleiError, match="pip install stardist"):
        benchmark.check_stardist(fake_python(tmp_path, "exit 1"))
    with pytest.raises(NucleiError, match="No such file"):
        benchmark.check_stardist(str(tmp_path / "nothing"))


def measured(seconds, peak_mb, result=None, flops=0, traffic=0):
    return {
        "seconds": seconds, "peak_mb": peak_mb, "result": result, "flops": flops, "bytes": traffic,
    }  # fmt: skip


def test_exponents_of_power_laws():
    found = {
        Job("mapper", rival, n, 2048): measured(0.01 * n**time, 2 * n**memory)
        for rival, time, memory in ((OURS, 0.1, 0.0), (STOCK, 1.0, 2.0))
        for n in (50, 200, 2000)
    }
    found[Job("mapper", STOCK, 5000, 2048)] = {"error": "> 8 GB"}
    found[Job("mapper", OURS, 7, 1024)] = measured(9.0, 9.0)  # another size: no part of the curve
    ours, stock = benchmark.growth(found)
    assert (ours["time"], ours["memory"]) == pytest.approx((0.1, 0.0), abs=1e-9)
    assert (stock["time"], stock["memory"]) == pytest.approx((1.0, 2.0))


def test_promises_are_checked_against_what_was_measured():
    jobs = benchmark.promised_jobs(1)
    mask = np.packbits(np.arange(2000) % 2 == 0)
    values = {
        "mapper": (measured(0.1, 1), measured(1.9, 1)),
        "mask targets": (measured(1, 1, mask), measured(10, 20, mask)),
        "post-processing": (measured(1, 1, "a"), {"error": "> 8 GB"}),
        "training step": (measured(1.3, 1), measured(1.0, 1)),
        "inference": (measured(1.2, 1), measured(1.0, 1)),
    }
    assert [job.rival for job in jobs["inference"]] == [BOUNDARY, PLAIN]
    found = {
        job: v for stage, pair in values.items() for job, v in zip(jobs[stage], pair, strict=True)
    }
    rows = benchmark.promises(jobs, found)
    assert [(row["what"], row["measured"], row["kept"]) for row in rows] == [
        ("mapper: times faster", pytest.approx(19), False),
        ("mask targets: times faster", 10, True),
        ("mask targets: times less memory", 20, True),
        ("mask targets: % of equal pixels", 100, True),
        ("boundary head: training, times Mask R-CNN", pytest.approx(1.3), False),
        ("boundary head: inference, times Mask R-CNN", pytest.approx(1.2), True),
    ]


def test_the_floor_is_the_slower_of_compute_and_traffic():
    found = {
        Job("network", OURS, 5, 64): measured(3.0, 1, flops=1e9, traffic=2e9),
        Job("network", STOCK, 5, 64): measured(9.0, 1, flops=1e9, traffic=2e9),
    }
    (row,) = benchmark.floors(found, {"flops_per_s": 1e9, "bytes_per_s": 1e9})
    assert (row["compute_s"], row["traffic_s"], row["times_the_floor"]) == (1, 2, 1.5)


@pytest.mark.parametrize("option", ["--shrink", "--size", "--nuclei", "--threads"])
@pytest.mark.parametrize("value", ["0", "-2"])
def test_numbers_below_one_are_refused(monkeypatch, option, value):
    monkeypatch.setattr(sys, "argv", ["benchmark.py", option, value])
    with pytest.raises(NucleiError, match=rf"{option} is {value}; .* from 1"):
        benchmark.main()


def test_writes_a_table_json_and_a_plot(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "GROWTH", ("mask targets",))
    monkeypatch.setattr(benchmark, "promised_jobs", lambda shrink: {})
    paths = [tmp_path / "b.json", tmp_path / "b.png"]
    config = ["--config-file", str(CONFIGS / "cpu" / "mask_rcnn.yaml"), "--memory-limit", "4"]
    images = ["--nuclei", "512", "2048", "--shrink", "16", "--threads", "1"]
    words = [*config, *images, "--output", str(paths[0]), "--plot", str(paths[1])]
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *words])
    benchmark.main()
    content = json.loads(paths[0].read_text())
    assert [(m["rival"], m["nuclei"]) for m in content["measurements"]] == [
        (OURS, 2), (STOCK, 2), (OURS, 8), (STOCK, 8),
    ]  # fmt: skip
    assert content["hardware"]["flops_per_s"] > 1e9
    assert Image.open(paths[1]).size[0] > 500
    assert "mask targets" in capsys.readouterr().out

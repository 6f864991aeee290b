#!/usr/bin/env python
"""Measure our way from image to metrics beside stock Detectron2's, stage by stage.

tools/benchmarks/benchmark.py --output benchmark.json --plot benchmark.png
tools/benchmarks/benchmark.py --config-file output/config.yaml --weights output/model_best.pth \\
    --dataset dsb2018_fluorescence_test

Both get the same images, weights and threads. Every measurement has a process of its own; memory is
what that process' resident set grows by at its peak. Without --weights the network is not trained:
what it finds means nothing, what it costs does. Linux only. docs/performance.md says what each
stage contains.
"""

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from benchmark_stages import (
    BOUNDARY,
    MIXED,
    OURS,
    PLAIN,
    STARDIST,
    STOCK,
    Job,
    Options,
    draw_images,
    run_apart,
)
from tabulate import tabulate
from tqdm import tqdm

from nuclei_d2.config import load_config
from nuclei_d2.evaluation.efficiency import hardware
from nuclei_d2.utils.errors import NucleiError, run_tool
from nuclei_d2.utils.files import atomic_path, write_json
from nuclei_d2.utils.hardware import usable_cores

matplotlib.use("Agg")
from matplotlib import pyplot as plt

GROWTH = ("mapper", "mask targets", "network", "post-processing", "metrics")
IMAGES = 20  # of the whole evaluation

Found = Mapping[Job, dict[str, Any]]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config-file",
        default="configs/cpu/mask_rcnn.yaml",
        help="a Mask R-CNN (default: %(default)s)",
    )
    parser.add_argument("--weights", default="", metavar="FILE", help="checkpoint")
    parser.add_argument(
        "--dataset",
        default="",
        metavar="NAME",
        help="measure only the evaluation of this registered data set",
    )
    parser.add_argument(
        "--nuclei",
        type=int,
        nargs="+",
        default=[50, 200, 500, 1000, 2000],
        help="per image (default: %(default)s)",
    )
    parser.add_argument("--size", type=int, default=2048, help="pixels (default: %(default)s)")
    parser.add_argument(
        "--shrink",
        type=int,
        default=1,
        metavar="K",
        help="divide all sides by K and all nuclei by K^2, to try the tool (default: %(default)s)",
    )
    parser.add_argument("--threads", type=int, default=usable_cores(), help="(default: all cores)")
    parser.add_argument(
        "--memory-limit",
        type=float,
        metavar="GB",
        help="of a measurement (default: half of what is free)",
    )
    parser.add_argument(
        "--stardist",
        default="",
        metavar="PYTHON",
        help="measure StarDist beside us, from grey levels to the label image; the interpreter of "
        "an environment with stardist and tensorflow. Both networks run in full, and what they "
        "say is replaced by what a good network would: StarDist's is the untrained default with "
        "32 rays on a 2 x 2 grid",
    )
    parser.add_argument("--output", metavar="JSON")
    parser.add_argument("--plot", metavar="PNG", help="time and memory over nuclei, log-log")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if not sys.platform.startswith("linux"):
        raise NucleiError("benchmark.py measures memory in /proc, which only Linux has")
    check_numbers(args)
    load_config(args.config_file)  # fail early
    limit = args.memory_limit * 1e9 if args.memory_limit else free_memory() / 2
    promised = promised_jobs(args.shrink)
    jobs = [*growth_jobs(args), *(job for pair in promised.values() for job in pair)]
    if args.dataset:
        jobs = promised["data set"] = [Job("data set", rival, 0, 0, 0) for rival in (OURS, STOCK)]
    if args.stardist:
        check_stardist(args.stardist)
        jobs += stardist_jobs(args)
    with tempfile.TemporaryDirectory() as folder:
        options = Options(
            Path(folder),
            args.config_file,
            args.weights,
            args.dataset,
            args.threads,
            limit,
            args.stardist,
        )
        for job in tqdm({job.data: job for job in jobs}.values(), "drawing"):
            draw_images(options.folder, job)
        found = {job: run_job(job, options) for job in tqdm(dict.fromkeys(jobs), "measuring")}
        rates = run_job(None, options)
    summary = {
        "hardware": {**hardware(torch.device("cpu")), "threads": args.threads, **rates},
        "growth": growth(found),
        "promises": promises(promised, found),
        "floors": floors(found, rates),
    }
    print_summary(found, summary)
    if args.plot:
        draw_growth(found, summary["growth"], args.plot)
    if args.output:
        rows = [{**asdict(job), **without_result(values)} for job, values in found.items()]
        write_json(args.output, {**summary, "measurements": rows, "arguments": vars(args)})


def free_memory() -> float:
    """Bytes."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(1024 * float(x.split()[1]) for x in lines if x.startswith("MemAvailable"))


def check_numbers(args: argparse.Namespace) -> None:
    """Raise NucleiError unless pixels, nuclei, threads and the divisor are at least 1."""
    for name in ("nuclei", "size", "shrink", "threads"):
        least = int(np.min(getattr(args, name)))
        if least < 1:
            raise NucleiError(f"--{name} is {least}; give whole numbers from 1")


def growth_jobs(args: argparse.Namespace) -> list[Job]:
    counts = [max(1, nuclei // args.shrink**2) for nuclei in args.nuclei]
    return [
        Job(stage, rival, nuclei, args.size // args.shrink)
        for stage in GROWTH
        for nuclei in counts
        for rival in (OURS, STOCK)
    ]


def promised_jobs(shrink: int) -> dict[str, list[Job]]:
    """{stage: (first, second rival)}: what :func:`promises` looks at."""

    def pair(stage: str, nuclei: int, size: int, images: int = 1, rivals=(OURS, STOCK)):
        nuclei, size = max(1, nuclei // shrink**2), size // shrink
        return [Job(stage, rival, nuclei, size, images) for rival in rivals]

    return {
        "mapper": pair("mapper", 500, 1024),
        "mask targets": pair("mask targets", 300, 1024),
        "post-processing": pair("post-processing", 1000, 2048),
        "whole evaluation": pair("whole evaluation", 500, 1024, IMAGES),
        "training step": pair("training step", 500, 1024, 4, (BOUNDARY, PLAIN)),
        "inference": pair("inference", 500, 1024, 1, (BOUNDARY, PLAIN)),
    }


def stardist_jobs(args: argparse.Namespace) -> list[Job]:
    """500 nuclei in 1,024 x 1,024 pixels, and the images of the growth."""
    images = [(max(1, 500 // args.shrink**2), 1024 // args.shrink)]
    images += [(job.nuclei, job.size) for job in growth_jobs(args)]
    return [
        Job("label image", rival, nuclei, size)
        for nuclei, size in dict.fromkeys(images)
        for rival in (OURS, MIXED, STARDIST)
    ]


def check_stardist(python: str) -> None:
    """
    Raises:
        NucleiError: the interpreter is none, or has no StarDist.
    """
    try:
        done = subprocess.run([python, "-c", "import stardist, tensorflow"], capture_output=True)
    except OSError as error:
        raise NucleiError(f"--stardist {python}: {error.strerror}") from None
    if done.returncode:
        install = f"{python} -m pip install stardist tensorflow-cpu"
        raise NucleiError(f"--stardist {python} cannot import it: {install}")


def run_stardist(job: Job, options: Options) -> dict[str, Any]:
    """What benchmark_stardist.py measures, in the other interpreter."""
    script = Path(__file__).with_name("benchmark_stardist.py")
    files = [options.folder / f"{job.data}_0{end}.png" for end in ("", "_label")]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(options.threads),
        "CUDA_VISIBLE_DEVICES": "",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    command = [options.stardist, str(script), *map(str, files), str(options.threads)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise NucleiError(f"{job}: {last}")
    return json.loads(done.stdout.splitlines()[-1])


def run_job(job: Job | None, options: Options) -> dict[str, Any]:
    """Measure in a process of its own, which begins with the modules loaded and little else."""
    if job and job.rival == STARDIST:
        return run_stardist(job, options)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmark_stages"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=run_apart, args=(sender, job, options))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        process.join()
        raise NucleiError(
            f"{job}: the measuring process died, exit code {process.exitcode}; see above"
        ) from None


# --------------------------------------------------------------------------- summary


def growth(found: Found) -> list[dict[str, Any]]:
    """How time and memory of a stage grow with the nuclei: exponents, by least squares."""
    rows = []
    for stage in GROWTH:
        for rival in (OURS, STOCK):
            points = curve(found, stage, rival)
            if len(points) > 1:
                nuclei, seconds, megabytes = np.log(points).T
                time, memory = (np.polyfit(nuclei, y, 1)[0] for y in (seconds, megabytes))
                rows.append({"stage": stage, "rival": rival, "time": time, "memory": memory})
    return rows


def curve(found: Found, stage: str, rival: str) -> list[tuple[float, float, float]]:
    """(nuclei, seconds, MB) by nuclei, in images of the largest size."""
    same = {j: v for j, v in found.items() if (j.stage, j.rival) == (stage, rival)}
    size = max((job.size for job in same), default=0)
    return sorted(
        (job.nuclei, values["seconds"], values["peak_mb"])
        for job, values in same.items()
        if job.size == size and "error" not in values
    )


def promises(jobs: Mapping[str, Sequence[Job]], found: Found) -> list[dict[str, Any]]:
    """What is asked of us beside what was measured, where it was."""

    def both(stage: str, key: str) -> list:
        values = [found.get(job, {}).get(key) for job in jobs.get(stage, [])]
        return [] if any(value is None for value in values) else values

    def ratio(stage: str, key: str) -> float | None:
        values = both(stage, key)
        return values[1] / values[0] if values else None

    def compare(stage: str, function) -> float | None:
        values = both(stage, "result")
        return function(*values) if values else None

    def cost(stage: str) -> float | None:
        faster = ratio(stage, "seconds")
        return 1 / faster if faster else None

    exponents = [row[key] for row in growth(found) for key in ("time", "memory") if is_ours(row)]
    asked = [
        ("mapper: times faster", ">=", 20, ratio("mapper", "seconds")),
        ("mask targets: times faster", ">=", 10, ratio("mask targets", "seconds")),
        ("mask targets: times less memory", ">=", 20, ratio("mask targets", "peak_mb")),
        ("mask targets: % of equal pixels", ">=", 99.9, compare("mask targets", percent_equal)),
        ("post-processing: times faster", ">=", 20, ratio("post-processing", "seconds")),
        ("post-processing: times less memory", ">=", 20, ratio("post-processing", "peak_mb")),
        ("post-processing: all masks equal", ">=", 1, compare("post-processing", same)),
        ("whole evaluation: times faster", ">=", 1.5, ratio("whole evaluation", "seconds")),
        ("data set: difference of AP", "<=", 0.1, compare("data set", apart)),
        ("boundary head: training, times Mask R-CNN", "<=", 1.25, cost("training step")),
        ("boundary head: inference, times Mask R-CNN", "<=", 1.25, cost("inference")),
        ("largest exponent of our growth", "<=", 1, max(exponents, default=None)),
    ]
    return [
        {"what": what, "asked": f"{sign} {bound:g}", "measured": value,
         "kept": bool(value >= bound if sign == ">=" else value <= bound)}
        for what, sign, bound, value in asked
        if value is not None
    ]  # fmt: skip


def is_ours(row: Mapping[str, Any]) -> bool:
    return row["rival"] == OURS


def percent_equal(ours: np.ndarray, stock: np.ndarray) -> float:
    """Of two arrays of packed bits."""
    return 100 * float((np.unpackbits(ours) == np.unpackbits(stock)).mean())


def same(ours: str, stock: str) -> float:
    return float(ours == stock)


def apart(ours: dict[str, float], stock: dict[str, float]) -> float:
    """Largest difference of two sets of average precisions."""
    return max(abs(ours[task] - stock[task]) for task in ours)


def floors(found: Found, rates: Mapping[str, float]) -> list[dict[str, Any]]:
    """What the device needs at its measured rates for the work of our stages, and our time."""
    rows = []
    for job, values in found.items():
        if job.rival == OURS and values.get("bytes"):
            compute = values["flops"] / rates["flops_per_s"]
            traffic = values["bytes"] / rates["bytes_per_s"]
            rows.append(
                {
                    "stage": job.stage,
                    "nuclei": job.nuclei,
                    "size": job.size,
                    "compute_s": compute,
                    "traffic_s": traffic,
                    "measured_s": values["seconds"],
                    "times_the_floor": values["seconds"] / max(compute, traffic),
                }
            )
    return rows


def print_summary(found: Found, summary: Mapping[str, Any]) -> None:
    machine = summary["hardware"]
    print(
        f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}: "
        f"{machine['flops_per_s'] / 1e9:.0f} GFLOP/s, {machine['bytes_per_s'] / 1e9:.1f} GB/s"
    )
    rows = []
    for job, values in found.items():
        if job.rival in (OURS, MIXED, BOUNDARY):
            other = STOCK if job.rival == OURS else PLAIN
            other = STARDIST if job.stage == "label image" else other
            rival = next(
                v for j, v in found.items()
                if j == Job(job.stage, other, job.nuclei, job.size, job.images)
            )  # fmt: skip
            numbers = [cell(v, key) for key in ("seconds", "peak_mb") for v in (values, rival)]
            rows.append([job.stage, f"{job.size}", job.nuclei, f"{job.rival} : {other}", *numbers])
    headers = ["stage", "pixels", "nuclei", "a : b", "a s", "b s", "a MB", "b MB"]
    print(f"\n{tabulate(rows, headers, disable_numparse=True)}")
    for job, values in found.items():
        if job.stage == "label image" and "error" not in values:
            print(f"{job.rival} labelled {values['result']} of {job.nuclei} nuclei")
    for part in ("growth", "floors", "promises"):
        if summary[part]:
            print(f"\n{part}\n{tabulate(summary[part], 'keys', floatfmt='.3g')}")


def cell(values: Mapping[str, Any], key: str) -> str:
    return values["error"] if "error" in values else f"{values[key]:.3g}"


def without_result(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key != "result"}


def draw_growth(found: Found, exponents: Sequence[Mapping[str, Any]], path: str) -> None:
    """Time and memory over the nuclei, log-log; the exponents in the legend."""
    figure, axes = plt.subplots(1, 2, figsize=(12, 5), layout="constrained")
    for axis, column, key, unit in zip(
        axes, (1, 2), ("time", "memory"), ("seconds", "MB at the peak"), strict=True
    ):
        for row in exponents:
            points = np.array(curve(found, row["stage"], row["rival"]))
            axis.loglog(
                points[:, 0],
                points[:, column],
                "o-" if is_ours(row) else "x--",
                color=f"C{GROWTH.index(row['stage'])}",
                label=f"{row['stage']}, {row['rival']}: {row[key]:.2f}",
            )
        axis.set(xlabel="nuclei", ylabel=unit)
        axis.legend(title="exponent", fontsize="x-small")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")


if __name__ == "__main__":
    run_tool(main)

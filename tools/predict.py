#!/usr/bin/env python
"""Find the nuclei of images of any size and number, and write label images, outlines and tables.

tools/predict.py --config-file output/config.yaml --weights output/model_best.pth \\
    --input images/ --output output/results --formats labels,geojson,csv

Call it again to do what is missing. Several processes, on one machine or many, may share the work:
start the same command several times, or `torchrun --nproc-per-node 4 tools/predict.py ...`.
docs/prediction.md tells more.
"""

import argparse
import sys
import time
from dataclasses import fields
from pathlib import Path

import nuclei_d2  # noqa: F401 - first, as it silences what importing Detectron2 prints

# isort: split
from detectron2.config import CfgNode
from tabulate import tabulate
from tqdm import tqdm

from nuclei_d2.config import load_config
from nuclei_d2.inference.folder import FolderPrediction, Outcome
from nuclei_d2.inference.inputs import find_images
from nuclei_d2.inference.pipeline import PredictionOptions
from nuclei_d2.inference.work import worker_place
from nuclei_d2.inference.writers import FORMATS
from nuclei_d2.utils.errors import NucleiError, run_tool
from nuclei_d2.utils.hardware import usable_gpus

COUNT_EVERY = 5.0  # seconds


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, metavar="FILE", help="config of the model")
    parser.add_argument(
        "--weights", metavar="FILE", help="checkpoint (default: the config's MODEL.WEIGHTS)"
    )
    parser.add_argument(
        "--input", required=True, nargs="+", help="images, folders of images, quoted patterns"
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for the results")
    parser.add_argument(
        "--formats",
        default="labels,geojson,csv",
        help=f"of {','.join(FORMATS)} (default: %(default)s)",
    )
    parser.add_argument("--overwrite", action="store_true", help="do again what was done before")
    parser.add_argument("--device", help="cuda, cuda:1, cpu or mps (default: MODEL.DEVICE)")
    parser.add_argument(
        "--confidence-threshold",
        type=float,
        help="least score, 0 to 1, of the nuclei (default: TEST.SCORE_THRESH_LABELS)",
    )
    parser.add_argument(
        "--least-contrast",
        type=float,
        default=PredictionOptions.least_contrast,
        metavar="SD",
        help="of nuclei against their surroundings, in standard deviations of the image's noise; 0 "
        "keeps all (default: %(default)s)",
    )
    image = parser.add_argument_group("what to look at (docs/inputs.md)")
    image.add_argument("--channel", help="number, name, or rgb")
    image.add_argument("--z", help="number of a plane, or max (default)")
    image.add_argument("--time", help="number of a point in time")
    image.add_argument("--series", type=int, help="number of an image in the file")
    image.add_argument(
        "--diameter",
        type=number_or_auto,
        metavar="PX",
        help="of the nuclei in pixels, or auto to estimate it from every image",
    )
    image.add_argument(
        "--pixel-size", type=float, metavar="UM", help="in micrometres (default: the file's)"
    )
    tiling = parser.add_argument_group("how to look at it (docs/prediction.md)")
    defaults = PredictionOptions()
    tiling.add_argument(
        "--tile",
        type=int,
        default=defaults.tile,
        help="side of a tile, in pixels as the network sees them (default: %(default)s)",
    )
    tiling.add_argument(
        "--overlap",
        type=int,
        default=defaults.overlap,
        help="of neighbouring tiles, likewise; at least twice the largest nucleus "
        "(default: %(default)s)",
    )
    tiling.add_argument(
        "--tta",
        action="store_true",
        help="look at eight flips and rotations: eight times as slow, with the agreement of the "
        "eight for every nucleus",
    )
    parser.add_argument(
        "--opts",
        nargs=argparse.REMAINDER,
        default=[],
        help="last: config options as KEY VALUE pairs",
    )
    return parser.parse_args()


def number_or_auto(text: str) -> float | str:
    return text if text == "auto" else float(text)


def main() -> None:
    args = parse_args()
    rank, world_size, local_rank = worker_place()
    cfg = build_config(args, local_rank)
    options = PredictionOptions(
        **{f.name: getattr(args, f.name) for f in fields(PredictionOptions)}
    )
    images = find_images(args.input)
    formats = [name.strip() for name in args.formats.split(",") if name.strip()]
    if not formats:
        raise NucleiError(f"--formats is empty; choose from {', '.join(FORMATS)}")
    folder = FolderPrediction(cfg, options, images, Path(args.output), formats)
    if args.overwrite:
        if world_size > 1:
            raise NucleiError(f"--overwrite is for one process; remove {args.output} instead")
        folder.clear()
    for path in folder.prepare():
        print(f"{path.name}: changed since its results were made; done again")
    already = folder.count_finished()
    with tqdm(total=len(images), initial=already, unit="image", disable=rank > 0) as bar:
        counted = time.monotonic()
        for outcome in folder.run(rank * len(images) // world_size):
            print_outcome(outcome)
            bar.update()
            if time.monotonic() - counted > COUNT_EVERY:  # what other processes did
                bar.update(folder.count_finished() - bar.n)
                counted = time.monotonic()
        bar.update(folder.count_finished() - bar.n)
    summary = folder.summarize()
    if rank == 0:  # torchrun ends the other processes when one of them reports a failure
        print_summary(summary, already, args.output)
        sys.exit(1 if summary["failed"] else 0)


def build_config(args: argparse.Namespace, local_rank: int) -> CfgNode:
    """The config with the options of the command line; each process gets a GPU of its own."""
    opts = ["MODEL.WEIGHTS", args.weights] if args.weights else []
    opts += ["MODEL.DEVICE", args.device] if args.device else []
    cfg = load_config(args.config_file, [*opts, *args.opts])
    if cfg.MODEL.DEVICE == "cuda" and usable_gpus() > 1:
        cfg.MODEL.DEVICE = f"cuda:{local_rank % usable_gpus()}"
    return cfg


def print_outcome(outcome: Outcome) -> None:
    name, content = outcome.path.name, outcome.content
    if outcome.failed:
        tqdm.write(f"error: {content['reason']}", file=sys.stderr)
        return
    tqdm.write(
        f"{name}: {content['description']}; {content['scale_explanation']}; "
        f"{content['nuclei']} nuclei, {content['seconds']:.2f} s"
    )
    for warning in content["warnings"]:
        tqdm.write(f"warning: {name}: {warning}", file=sys.stderr)


def print_summary(summary: dict, already: int, output: str) -> None:
    rows = [
        ("images", summary["images"]),
        ("with results", summary["done"]),
        ("  of these before", already),
        ("failed", summary["failed"]),
        ("with warnings", len(summary["warnings"])),
        ("nuclei", summary["nuclei"]),
    ]
    print(tabulate(rows, tablefmt="plain"))
    print(f"images to look at first: {Path(output) / 'report.html'}")
    if summary["failures"]:
        print(f"failed, with reasons also in {output}/summary.json:", file=sys.stderr)
    for failure in summary["failures"]:
        print(f"  {failure['reason']}", file=sys.stderr)


if __name__ == "__main__":
    run_tool(main)

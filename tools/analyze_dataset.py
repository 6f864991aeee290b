#!/usr/bin/env python
"""Describe data sets, and propose the settings that fit all of them together.

tools/analyze_dataset.py dsb2018_fluorescence_train --output fragment.yaml

The fragment is a config that goes over that of a model, as in
`_BASE_: [configs/cpu/mask_boundary_rcnn.yaml, fragment.yaml]`.
"""

import argparse
import dataclasses
from collections.abc import Sequence

import nuclei_d2  # noqa: F401 - first, as it silences what importing Detectron2 prints

# isort: split
import yaml
from detectron2.data import DatasetCatalog
from tabulate import tabulate
from tqdm import tqdm

from nuclei_d2.config import load_config
from nuclei_d2.data.datasets.builtin import register_from_config
from nuclei_d2.data.datasets.statistics import (
    DatasetStatistics,
    ImageStatistics,
    Proposal,
    measure_record,
    propose,
    summarize,
)
from nuclei_d2.data.normalization import ImageNormalizer
from nuclei_d2.utils.errors import NucleiError, run_tool
from nuclei_d2.utils.files import atomic_path, check_writable, jsonable, write_json


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("datasets", nargs="+", metavar="DATASET", help="registered name")
    parser.add_argument(
        "--config-file", default="", help="for its DATASETS.CUSTOM and normalisation"
    )
    parser.add_argument("--output", metavar="YAML", help="write the proposed settings here")
    parser.add_argument("--json", metavar="FILE", help="write statistics and proposal here")
    parser.add_argument(
        "--scale",
        default="auto",
        help='enlargement of the images: a number, or "auto" (default) to bring the median '
        "nucleus to --target-diameter",
    )
    parser.add_argument(
        "--target-diameter", type=float, default=27.0, help="network pixels (default 27)"
    )
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    scale = parse_scale(args.scale)
    if not args.target_diameter > 0:
        raise NucleiError(f"--target-diameter is {args.target_diameter}; it counts pixels, above 0")
    for path in filter(None, (args.output, args.json)):
        check_writable(path)
    measured = measure_datasets(args.datasets, args.config_file)
    statistics = {name: summarize(images) for name, images in measured.items()}
    print(statistics_table(statistics))
    images = [image for part in measured.values() for image in part]
    if not any(len(image.areas) for image in images):
        raise NucleiError(f"no nuclei in {', '.join(measured)}: nothing to propose settings from")
    proposal = propose(images, scale, args.target_diameter)
    print(f"\nProposed for {' + '.join(measured)}\n{proposal_table(proposal)}")
    if args.output:
        write_fragment(args.output, proposal, args.datasets)
    if args.json:
        parts = {name: dataclasses.asdict(part) for name, part in statistics.items()}
        write_json(args.json, {"datasets": parts, "proposal": dataclasses.asdict(proposal)})


def parse_scale(text: str) -> float | None:
    if text == "auto":
        return None
    try:
        scale = float(text)
    except ValueError:
        scale = 0.0
    if not 0 < scale <= 16:
        raise NucleiError(f'--scale is {text!r}; give "auto" or a number above 0, up to 16')
    return scale


def measure_datasets(
    names: Sequence[str], config_file: str = ""
) -> dict[str, list[ImageStatistics]]:
    cfg = load_config(config_file)
    cfg.DATASETS.TRAIN, cfg.DATASETS.VAL, cfg.DATASETS.TEST = tuple(names), (), ()
    register_from_config(cfg)
    normalizer = ImageNormalizer(cfg)
    measured = {}
    for name in names:
        records = DatasetCatalog.get(name)
        bar = tqdm(records, name, unit="image")
        measured[name] = [measure_record(record, normalizer) for record in bar]
    return measured


def statistics_table(statistics: dict[str, DatasetStatistics]) -> str:
    columns = [dict(_rows(part)) for part in statistics.values()]
    rows = [[label, *(column[label] for column in columns)] for label in columns[0]]
    return tabulate(rows, ["", *statistics], disable_numparse=True, stralign="right")


def _rows(part: DatasetStatistics) -> list[tuple[str, str]]:
    percentiles = "/".join(map(str, part.diameter_percentiles))
    sizes = [f"{size}: {count}" for size, count in part.sizes.items()]
    more = [f"{len(sizes) - 4} more"] if len(sizes) > 5 else []
    return [
        ("images", str(part.images)),
        ("of which empty", f"{part.empty_share:.1%}"),
        ("sizes (height x width)", "\n".join(sizes[: 4 if more else 5] + more)),
        ("modalities", "\n".join(f"{kind}: {count}" for kind, count in part.modalities.items())),
        ("nuclei", str(part.nuclei)),
        ("nuclei per image: median, max", f"{part.count_median:g}, {part.count_max}"),
        ("touching nuclei", f"{part.touching_share:.1%}"),
        (f"diameter (of the same area), px: {percentiles} %", _join(part.diameter_percentiles)),
        (f"box side = sqrt(w h), px: {percentiles} %", _join(part.box_side_percentiles)),
        ("raw range, INPUT.PERCENTILES: 5/50/95 %", _spread(part.range_percentiles)),
        ("nuclei, normalised: 5/50/95 %", _spread(part.foreground_percentiles)),
        ("background, normalised: 5/50/95 %", _spread(part.background_percentiles)),
        ("contrast, normalised: 5/50/95 %", _spread(part.contrast_percentiles)),
    ]


def _join(percentiles: dict[int, float]) -> str:
    return "/".join(f"{value:.1f}" for value in percentiles.values())


def _spread(percentiles: dict[int, float]) -> str:
    return "/".join(f"{percentiles[p]:.0f}" for p in (5, 50, 95))


def proposal_table(proposal: Proposal) -> str:
    rpn = proposal.to_config()["MODEL"]["RPN"]
    sizes = ", ".join(str(list(sizes)) for sizes in proposal.anchors)
    rows = [
        ["INPUT.SCALE", f"{proposal.scale:g}"],
        ["INPUT.CROP.SIZE", f"{proposal.crop} x {proposal.crop}"],
        ["MODEL.ANCHOR_GENERATOR.SIZES", sizes],
        ["  boxes with an anchor on the grid at IoU >= 0.5", f"{proposal.recall_50:.1%}"],
        ["  boxes with an anchor on the grid at IoU >= 0.7", f"{proposal.recall_70:.1%}"],
        ["TEST.DETECTIONS_PER_IMAGE", proposal.detections],
        *([f"MODEL.RPN.{key}", value] for key, value in rpn.items()),
    ]
    return tabulate(rows, tablefmt="plain", disable_numparse=True)


def write_fragment(path: str, proposal: Proposal, names: Sequence[str]) -> None:
    head = (
        f"# Proposed by tools/analyze_dataset.py for {', '.join(names)}.\n"
        f"# Anchors on the grid reach IoU 0.5 for {proposal.recall_50:.1%} of the boxes, "
        f"0.7 for {proposal.recall_70:.1%}.\n"
    )
    body = yaml.safe_dump(jsonable(proposal.to_config()), default_flow_style=None, sort_keys=False)
    with atomic_path(path) as temporary:
        temporary.write_text(head + body)


if __name__ == "__main__":
    run_tool(main)

#!/usr/bin/env python
"""Compare any program's nuclei with ground truth: F1, PQ, AJI, boundaries, merges and splits, AP.

tools/evaluate.py --ground-truth labels --predictions my_labels --output metrics.json
tools/evaluate.py --ground-truth dsb2018_test.json --predictions results_a.json results_b.json \
  --report report.html

Ground truth and predictions: a label image (PNG or TIFF) or a folder of them, matched by name, a
DSB 2018 folder (<image>/masks/*.png), or COCO JSON; predictions also COCO results with scores. What
each number means is in docs/metrics.md.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tabulate import tabulate

from nuclei_d2.evaluation.bootstrap import FEW_IMAGES, LEVEL, RESAMPLES, bootstrap_weights
from nuclei_d2.evaluation.comparison import Evaluation, compare, evaluate_files, to_json
from nuclei_d2.evaluation.inputs import open_ground_truth, open_predictions
from nuclei_d2.evaluation.scores import HEADLINE, definition, write_per_image
from nuclei_d2.utils.errors import NucleiError, run_tool
from nuclei_d2.utils.files import atomic_path, check_writable, write_json
from nuclei_d2.visualization.report import find_raw_images, render_report


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ground-truth", required=True, metavar="PATH")
    parser.add_argument(
        "--predictions", required=True, nargs="+", metavar="PATH", help="one set or several"
    )
    parser.add_argument("--names", nargs="+", help="of the prediction sets (default: their files')")
    parser.add_argument("--output", metavar="JSON", help="write every number here")
    parser.add_argument(
        "--per-image", metavar="CSV", help="write one line per image; of several sets, NAME in "
        "this path stands for the set's name",
    )  # fmt: skip
    parser.add_argument(
        "--report",
        metavar="HTML",
        help="write one page with tables, curves and the worst images here",
    )
    parser.add_argument(
        "--images",
        metavar="FOLDER",
        help="raw images for the report, matched by name (default: those that lie beside the "
        "ground truth, if any)",
    )
    parser.add_argument(
        "--results",
        nargs="+",
        metavar="JSON",
        help="results.json of the training run of each prediction set, in order: the report shows "
        "what they cost",
    )
    parser.add_argument(
        "--score-threshold",
        type=float,
        default=0.5,
        help="predictions with a lower score count for AP only (default: %(default)s); of the "
        "others, a pixel that several cover belongs to the one of highest score, unless nuclei "
        "of the image overlap",
    )
    parser.add_argument(
        "--max-dets", type=int, help="most predictions of an image that AP counts (default: all)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    names = set_names(args)
    check_outputs(args, names)
    results = [read_results(path) for path in args.results or ()]
    truth = open_ground_truth(args.ground_truth)
    raw_images = find_raw_images(truth, args.images) if args.report else {}
    predictions = [open_predictions(path, truth) for path in args.predictions]
    evaluations = evaluate_files(truth, predictions, args.score_threshold, args.max_dets)
    weights = bootstrap_weights(len(truth.images), seed=args.seed)

    settings = {
        "ground_truth": args.ground_truth,
        "score_threshold": args.score_threshold,
        "bootstrap_seed": args.seed,
    }
    contents = [to_json(evaluation, weights, settings) for evaluation in evaluations]
    differences = compare(names, evaluations, weights)
    page = ""
    if args.report:
        page = render_report(names, truth, evaluations, weights, settings, raw_images, results)
    write_files(args, names, evaluations, contents, differences, page)
    print(headline_table(names, contents, differences))
    print(counts_line(names, contents))
    print_coco(names, evaluations)
    for warning in dict.fromkeys(w for evaluation in evaluations for w in evaluation.warnings):
        print(f"warning: {warning}", file=sys.stderr)


def write_files(
    args: argparse.Namespace,
    names: Sequence[str],
    evaluations: Sequence[Evaluation],
    contents: Sequence[dict],
    differences: dict,
    page: str,
) -> None:
    if args.per_image:
        for name, evaluation in zip(names, evaluations, strict=True):
            write_per_image(per_image_path(args, name), evaluation.names, evaluation.images)
    if args.output:
        several = {
            "predictions": dict(zip(names, contents, strict=True)),
            "differences": differences,
        }
        write_json(args.output, contents[0] if len(contents) == 1 else several)
    if args.report:
        with atomic_path(args.report) as temporary:
            # Names of files need not be Unicode.
            temporary.write_text(page, encoding="utf-8", errors="backslashreplace")


def per_image_path(args: argparse.Namespace, name: str) -> str:
    """Table of the set called ``name``."""
    return args.per_image.replace("NAME", name)


def check_outputs(args: argparse.Namespace, names: Sequence[str]) -> None:
    """Raise NucleiError, before the work, unless every file can be written."""
    tables = [per_image_path(args, name) for name in names] if args.per_image else []
    for path in (args.output, args.report, *tables):
        if path:
            check_writable(path)


def set_names(args: argparse.Namespace) -> list[str]:
    """Check the arguments, and name the sets: as told, by file name, or by path."""
    paths = args.predictions
    names = args.names or [Path(path).stem for path in paths]
    if not args.names and len(set(names)) < len(paths):
        names = [path.strip("/").replace("/", "_") for path in paths]
    if len(names) != len(paths):
        raise NucleiError(f"--names gives {len(names)} names for {len(paths)} prediction sets")
    if len(set(names)) < len(names):
        raise NucleiError(f"prediction sets need different names, got {', '.join(names)}; --names")
    if args.per_image and len(names) > 1 and "NAME" not in Path(args.per_image).name:
        raise NucleiError(
            f"--per-image {args.per_image}: put NAME into it, such as NAME.csv; there are "
            f"{len(names)} sets"
        )
    if (args.images or args.results) and not args.report:
        raise NucleiError("--images and --results are for the report; add --report report.html")
    if args.results and len(args.results) != len(names):
        raise NucleiError(
            f"--results gives {len(args.results)} files for {len(names)} prediction sets"
        )
    if args.max_dets is not None and args.max_dets < 1:
        raise NucleiError(f"--max-dets is {args.max_dets}; it counts instances, from 1")
    if not np.isfinite(args.score_threshold):
        raise NucleiError(f"--score-threshold is {args.score_threshold}; give a number")
    if args.seed < 0:
        raise NucleiError(f"--seed is {args.seed}; it counts from 0")
    return names


def read_results(path: str) -> dict:
    """A training run's ``results.json``."""
    try:
        content = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise NucleiError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise NucleiError(f"{path}: broken JSON ({error}); give a run's results.json") from error
    if not isinstance(content, dict):
        raise NucleiError(f"{path}: no results.json of a training run")
    return content


def headline_table(names: Sequence[str], contents: Sequence[dict], differences: dict) -> str:
    header = ["", *names, *differences, "definition"]
    rows, enough = [], contents[0]["n_images"] >= FEW_IMAGES
    for path in HEADLINE:
        cells = [_value(content, path) for content in contents]
        changes = [_difference(part, path, enough) for part in differences.values()]
        rows.append([" ".join(path), *cells, *changes, definition(path)])
    note = "Fractions of 1"
    if contents[0]["settings"]["resamples"]:
        note += f"; {LEVEL:.0%} intervals over images in brackets ({RESAMPLES} bootstrap samples)"
        if differences and enough:
            note += "; * without 0: so on other images, not with other trainings"
    return f"{tabulate(rows, header, disable_numparse=True)}\n{note}."


def _at(content: dict, path: Sequence[str]):
    for part in path:
        content = content[part]
    return content


def _value(content: dict, path: Sequence[str]) -> str:
    form = ".0f" if path[0] == "errors" else ".3f"
    return f"{_at(content, path):{form}}{_interval(*_at(content['intervals'], path), form)}"


def _difference(part: dict, path: Sequence[str], enough: bool) -> str:
    """With a star where its interval excludes 0, if there are enough images for intervals."""
    change = _at(part, path)
    form = "+.0f" if path[0] == "errors" else "+.3f"
    star = " *" if enough and (change["low"] > 0 or change["high"] < 0) else ""
    interval = _interval(change["low"], change["high"], form)
    return f"{change['difference']:{form}}{interval}{star}"


def _interval(low: float, high: float, form: str) -> str:
    """Nothing where it is undefined."""
    return "" if np.isnan(low) else f" [{low:{form}}, {high:{form}}]"


def counts_line(names: Sequence[str], contents: Sequence[dict]) -> str:
    first = contents[0]
    parts = [f"{first['n_images']} images", f"{first['n_gt']} nuclei"]
    for name, content in zip(names, contents, strict=True):
        parts.append(f"{name}: {content['n_pred']} predictions")
        if content["n_images_empty"]:
            parts.append(f"{content['n_images_empty']} images empty in both, in no mean")
    return ", ".join(parts)


def print_coco(names: Sequence[str], evaluations: Sequence[Evaluation]) -> None:
    """COCO's numbers, in percent as Detectron2 prints them."""
    for name, evaluation in zip(names, evaluations, strict=True):
        if evaluation.coco is None:
            continue
        coco = evaluation.coco
        parts = {"bbox": coco["bbox"], "segm": coco["segm"]}
        parts.update({f"boundary {key}": ap for key, ap in coco["boundary"].items()})
        columns = list(coco["segm"])
        rows = [[task, *(ap.get(c, float("nan")) for c in columns)] for task, ap in parts.items()]
        print(f"\n{name}: COCO, percent, at most {coco['max_dets']} predictions an image")
        print(tabulate(rows, ["", *columns], floatfmt=".2f"))


if __name__ == "__main__":
    run_tool(main)

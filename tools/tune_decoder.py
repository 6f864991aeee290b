#!/usr/bin/env python
"""Fit the thresholds of a trained U-Net's decoder to DATASETS.VAL.

tools/tune_decoder.py --config-file output/unet_boundary/config.yaml --output tuned.yaml \\
    MODEL.WEIGHTS output/unet_boundary/model_best.pth

What is written is a config: use it in place of the one given here, with every tool. It holds the
options given here too, but for MODEL.WEIGHTS.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import nuclei_d2  # noqa: F401 - first, as it silences what importing Detectron2 prints

# isort: split
import yaml
from detectron2.config import CfgNode
from tabulate import tabulate
from tqdm import tqdm

from nuclei_d2.config import load_config
from nuclei_d2.data.datasets.builtin import check_available, register_from_config
from nuclei_d2.engine.trainer import NucleiTrainer, build_checkpointer
from nuclei_d2.evaluation.decoder_tuning import CANDIDATES, TuningSet, tune_settings
from nuclei_d2.modeling import UNet, build_model
from nuclei_d2.utils.errors import NucleiError, run_tool
from nuclei_d2.utils.files import atomic_path, check_writable, write_json
from nuclei_d2.utils.hardware import use_device


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, metavar="FILE", help="config of the model")
    parser.add_argument("--output", required=True, metavar="YAML", help="write the config here")
    parser.add_argument("--json", metavar="FILE", help="write everything that was tried here")
    parser.add_argument(
        "opts",
        nargs=argparse.REMAINDER,
        help="config options as KEY VALUE pairs, such as MODEL.WEIGHTS model_best.pth",
    )
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    cfg = load_config(args.config_file, args.opts)
    check_outputs(args)
    use_device(cfg.MODEL.DEVICE)
    if len(cfg.DATASETS.VAL) != 1:
        raise NucleiError(f"DATASETS.VAL is {cfg.DATASETS.VAL}; name the one set to tune on")
    (name,) = cfg.DATASETS.VAL
    register_from_config(cfg)
    check_available([name])
    model = build_model(cfg).eval()
    if not isinstance(model, UNet):
        raise NucleiError(
            f"MODEL.META_ARCHITECTURE is {cfg.MODEL.META_ARCHITECTURE}; only a UNet has a decoder"
        )
    build_checkpointer(cfg, model).load_exactly(cfg.MODEL.WEIGHTS)
    start = model.decoder.settings
    images = TuningSet(
        model, NucleiTrainer.build_test_loader(cfg, name), name, cfg.TEST.SCORE_THRESH_LABELS
    )
    with tqdm(desc="decoder", unit="setting") as progress:

        def score(settings: dict) -> float:
            progress.update()
            return images.score(settings)

        best, tried = tune_settings(score, start)
    scores = {tuple(settings.items()): value for settings, value in tried}
    before, after = (scores[tuple(settings.items())] for settings in (start, best))
    rows = [[f"MODEL.UNET.DECODER.{k.upper()}", start[k], best[k]] for k in start]
    rows.append([f"pooled TP / (TP + FP + FN), mean over IoU .5:.05:.95, on {name}", before, after])
    print(tabulate(rows, ["", "before", "after"], floatfmt=".4g"))
    for warning in end_warnings(best):
        print(f"warning: {warning}", file=sys.stderr)
    options = {key: value_of(cfg, key) for key in args.opts[::2] if key != "MODEL.WEIGHTS"}
    options |= {f"MODEL.UNET.DECODER.{k.upper()}": value for k, value in best.items()}
    comment = f"{name}: {before:.4f} -> {after:.4f}"
    write_config(Path(args.output), args.config_file, options, comment)
    if args.json:
        write_json(args.json, [{**settings, "score": value} for settings, value in tried])


def check_outputs(args: argparse.Namespace) -> None:
    """Raise NucleiError, before the work, for a file that cannot be written or is the config."""
    for option, path in (("--output", args.output), ("--json", args.json)):
        if not path:
            continue
        check_writable(path)
        if Path(path).exists() and Path(path).samefile(args.config_file):
            raise NucleiError(f"{option} is {path}, which --config-file names; name another file")


def end_warnings(settings: dict[str, float]) -> list[str]:
    """One line for each fitted value with none tried beyond it; an area of 0 has none."""
    return [
        f"MODEL.UNET.DECODER.{name.upper()} {value} is at the end of what was tried; "
        "the optimum may lie beyond: try a value there by giving it as an option"
        for name, value in settings.items()
        if value != 0 and not CANDIDATES[name][0] < value < CANDIDATES[name][-1]
    ]


def value_of(cfg: CfgNode, key: str) -> Any:
    """The value that an option was understood as, in YAML's own types."""
    values = yaml.safe_load(cfg.dump())
    for part in key.split("."):
        values = values[part]
    return values


def write_config(path: Path, base: str, options: dict[str, Any], comment: str) -> None:
    content = {"_BASE_": os.path.relpath(base, path.parent)}
    for key, value in options.items():
        *groups, name = key.split(".")
        group = content
        for part in groups:
            group = group.setdefault(part, {})
        group[name] = value
    with atomic_path(path) as temporary:
        temporary.write_text(
            f"# Fitted by tools/tune_decoder.py to {comment}\n"
            + yaml.safe_dump(content, sort_keys=False)
        )


if __name__ == "__main__":
    run_tool(main)

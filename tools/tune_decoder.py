#!/usr/bin/env python
"""Fit the thresholds of a trained U-Net's decoder to DATASETS.VAL.

tools/tune_decoder.py --config-file output/unet_boundary/config.yaml --output tuned.yaml \\
    MODEL.WEIGHTS output/unet_boundary/model_best.pth

What is written is a config: use it in place of the one given here, with every tool.
"""

import argparse
import os
from pathlib import Path

import yaml
from tabulate import tabulate
from tqdm import tqdm

from nuclei_d2.config import check_device, load_config
from nuclei_d2.data.datasets.builtin import check_available, register_from_config
from nuclei_d2.engine.trainer import NucleiTrainer, build_checkpointer
from nuclei_d2.evaluation.decoder_tuning import TuningSet, tune_settings
from nuclei_d2.modeling import UNet, build_model
from nuclei_d2.utils.errors import NucleiError, run_tool
from nuclei_d2.utils.files import atomic_path, write_json


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
    check_device(cfg)
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
    write_config(Path(args.output), args.config_file, best, f"{name}: {before:.4f} -> {after:.4f}")
    if args.json:
        write_json(args.json, [{**settings, "score": value} for settings, value in tried])


def write_config(path: Path, base: str, settings: dict, comment: str) -> None:
    keys = {key.upper(): value for key, value in settings.items()}
    content = {
        "_BASE_": os.path.relpath(base, path.parent),
        "MODEL": {"UNET": {"DECODER": keys}},
    }
    with atomic_path(path) as temporary:
        temporary.write_text(
            f"# Fitted by tools/tune_decoder.py to {comment}\n"
            + yaml.safe_dump(content, sort_keys=False)
        )


if __name__ == "__main__":
    run_tool(main)

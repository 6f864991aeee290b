#!/usr/bin/env python
"""Write a trained model as one TorchScript file that runs with torch and torchvision alone.

tools/export.py --config-file output/mask_boundary_rcnn/config.yaml --output model.ts \\
    MODEL.WEIGHTS output/mask_boundary_rcnn/model_best.pth

The file is compared with the model, in a process of its own, and only kept if they agree.
docs/export.md shows how it is loaded.
"""

import argparse

from tabulate import tabulate

from nuclei_d2.config import load_config
from nuclei_d2.data.image_io import read_image
from nuclei_d2.export.build import export_model
from nuclei_d2.utils.errors import run_tool
from nuclei_d2.utils.files import check_writable


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, metavar="FILE", help="config of the model")
    parser.add_argument("--output", required=True, metavar="FILE", help="write the model here")
    parser.add_argument(
        "--check-image",
        action="append",
        default=[],
        metavar="IMAGE",
        help="compare on this image too, not only on generated ones; may be repeated",
    )
    parser.add_argument(
        "opts",
        nargs=argparse.REMAINDER,
        help="config options as KEY VALUE pairs, such as MODEL.WEIGHTS model_best.pth",
    )
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    check_writable(args.output)
    cfg = load_config(args.config_file, args.opts)
    images = {path: read_image(path) for path in args.check_image}
    results = export_model(cfg, args.output, images)
    rows = [
        [
            result.image,
            "{} x {}".format(*result.size),
            result.original,
            result.exported,
            f"{result.pixels:.3%}",
            result.original_seconds,
            result.exported_seconds,
        ]
        for result in results
    ]
    headers = ["image", "size", "nuclei", "exported", "same pixels", "s", "s exported"]
    print(tabulate(rows, headers, floatfmt=".3f"))
    print(f"{args.output}: runs on {cfg.MODEL.DEVICE}, with torch and torchvision alone")


if __name__ == "__main__":
    run_tool(main)

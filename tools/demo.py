#!/usr/bin/env python
"""Draw what a model finds: one picture per image, contours over the contrast-stretched image.

Of several predictions that are the same nucleus the best is drawn, as tools/predict.py keeps it.

tools/demo.py --config-file output/config.yaml --input images/*.png --output pictures \\
    --opts MODEL.WEIGHTS output/model_best.pth MODEL.DEVICE cpu
"""

import argparse
import sys
import time
from pathlib import Path

import nuclei_d2  # noqa: F401 - first, as it silences what importing Detectron2 prints

# isort: split
import numpy as np
from detectron2.config import CfgNode
from detectron2.structures import Instances
from PIL import Image
from tqdm import tqdm

from nuclei_d2.config import load_config
from nuclei_d2.data.datasets.formats.folder import image_key, labels_by_key
from nuclei_d2.data.image_io import read_image, read_label
from nuclei_d2.data.normalization import ImageNormalizer
from nuclei_d2.inference.duplicates import drop_duplicates
from nuclei_d2.inference.inputs import find_images, is_image_name, unique_stems
from nuclei_d2.inference.predictor import NucleiPredictor
from nuclei_d2.utils.errors import NucleiError, run_tool
from nuclei_d2.utils.files import atomic_path
from nuclei_d2.visualization.overlay import draw_boundaries, draw_contours, panel, stretch


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, metavar="FILE", help="config of the model")
    parser.add_argument(
        "--input", required=True, nargs="+", help="images, folders of images, quoted patterns"
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for the pictures")
    parser.add_argument(
        "--confidence-threshold",
        type=float,
        help="least score, 0 to 1, of the nuclei to draw (default: the config's "
        "TEST.SCORE_THRESH_LABELS, as in evaluation and tools/predict.py)",
    )
    parser.add_argument(
        "--boundaries", action="store_true", help="draw the predicted boundaries beside them"
    )
    parser.add_argument(
        "--ground-truth",
        metavar="PATH",
        help="draw this label image beside them; or a folder, paired as in "
        "datasets/prepare_folder.py: a.png, a_masks.png, a_labels.tif ... for a.tif",
    )
    parser.add_argument(
        "--opts",
        nargs=argparse.REMAINDER,
        default=[],
        help="last: config options as KEY VALUE pairs, such as MODEL.WEIGHTS model_best.pth",
    )
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    cfg = load_config(args.config_file, args.opts)
    threshold = args.confidence_threshold
    if threshold is None:
        threshold = cfg.TEST.SCORE_THRESH_LABELS
    if not 0 <= threshold <= 1:
        raise NucleiError(f"--confidence-threshold is {threshold}; it lies in 0 to 1")
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = float(threshold)
    images = find_images(args.input)
    outputs = output_paths(images, Path(args.output))
    labels = find_labels(args.ground_truth, images) if args.ground_truth else None
    predictor = NucleiPredictor(cfg)

    failed = []
    for image, output in tqdm(
        list(zip(images, outputs, strict=True)), unit="image", disable=len(images) == 1
    ):
        start = time.perf_counter()
        try:
            raw = read_image(image)
            truth = read_truth(labels, image, raw.shape[:2]) if labels is not None else None
        except NucleiError as error:
            tqdm.write(f"error: {error}", file=sys.stderr)
            failed.append(str(image))
            continue
        instances = drop_duplicates(predictor(raw))
        picture = draw(cfg, raw, instances, truth, args.boundaries)
        with atomic_path(output) as temporary:
            Image.fromarray(picture).save(temporary)
        seconds = time.perf_counter() - start
        tqdm.write(f"{image.name}: {len(instances)} nuclei, {seconds:.2f} s -> {output}")
    if failed:
        raise NucleiError(f"{len(failed)} of {len(images)} images failed: {', '.join(failed)}")


def output_paths(images: list[Path], folder: Path) -> list[Path]:
    if folder.exists() and not folder.is_dir():
        raise NucleiError(f"--output {folder} is a file; name a folder")
    outputs = [folder / f"{stem}.png" for stem in unique_stems(images)]
    overwritten = {p.resolve() for p in images} & {p.resolve() for p in outputs}
    if overwritten:
        raise NucleiError(f"{min(overwritten)} would be overwritten; name another --output folder")
    return outputs


def find_labels(ground_truth: str, images: list[Path]) -> dict[str, Path]:
    """{image_key of an image: its label image}."""
    path = Path(ground_truth)
    if path.is_dir():
        files = [p for p in sorted(path.iterdir()) if is_image_name(p)]
        among_images = any(image.parent.samefile(path) for image in images)
        labels = labels_by_key(files, among_images)
        if not labels:
            raise NucleiError(f"{path}: no label image; they end in _masks where images lie too")
        return labels
    if len(images) > 1:
        raise NucleiError(f"--ground-truth {path} is no folder, and there are {len(images)} images")
    return {image_key(images[0]): path}


def read_truth(labels: dict[str, Path], image: Path, size: tuple[int, int]) -> np.ndarray:
    key = image_key(image)
    if key not in labels:
        raise NucleiError(f"{image}: no label image {key}.* or {key}_masks.* in the ground truth")
    truth = read_label(labels[key])
    if truth.shape != size:
        raise NucleiError(f"{labels[key]} is {truth.shape}, but {image} is {size} pixels")
    return truth


def draw(
    cfg: CfgNode,
    raw: np.ndarray,
    instances: Instances,
    truth: np.ndarray | None,
    boundaries: bool,
) -> np.ndarray:
    """The picture of one image: contours alone, or a panel with what else was asked for."""
    background = stretch(raw, ImageNormalizer(cfg).range_of(raw))
    pictures = [
        (f"prediction: {len(instances)} nuclei", draw_contours(background, instances.pred_masks))
    ]
    if truth is not None:
        count = np.count_nonzero(np.unique(truth))
        pictures.append((f"ground truth: {count} nuclei", draw_contours(background, truth)))
    if boundaries:
        if not instances.has("pred_boundaries"):
            raise NucleiError("--boundaries needs a model with boundaries (BoundaryMaskHead)")
        pictures.append(("boundary probability", draw_boundaries(instances.pred_boundaries)))
    return pictures[0][1] if len(pictures) == 1 else panel(pictures)


if __name__ == "__main__":
    run_tool(main)

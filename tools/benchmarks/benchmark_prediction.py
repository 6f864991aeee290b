#!/usr/bin/env python
"""Measure what tools/predict.py promises, with a model of your own: the tables of the docs.

tools/benchmarks/benchmark_prediction.py tiling --config-file config.yaml --weights model_best.pth
tools/benchmarks/benchmark_prediction.py empty --config-file ... --weights ...
tools/benchmarks/benchmark_prediction.py unlike --config-file ... --weights ... \\
    --datasets dsb2018_fluorescence_test dsb2018_histology_train
tools/benchmarks/benchmark_prediction.py trust --config-file ... --weights ... \\
    --datasets dsb2018_fluorescence_val --tta
tools/benchmarks/benchmark_prediction.py scale --config-file ... --weights ... \\
    --datasets dsb2018_fluorescence_val

tiling: a large generated image in tiles and as a whole. empty: nuclei found where there are none,
and the contrast of annotated ones. unlike: how often images, and those of the first data set that
were spoilt, are said to be unlike the training images. trust: how well what is known of a nucleus
tells whether it is right. scale: how well the size of nuclei is estimated, in images as they are,
shrunk and enlarged, and what that does to F1.
"""

import argparse
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import nuclei_d2  # noqa: F401 - first, as it silences what importing Detectron2 prints

# isort: split
import cv2
import numpy as np
import tifffile
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from scipy.stats import rankdata
from tabulate import tabulate
from tqdm import tqdm

from nuclei_d2.config import load_config
from nuclei_d2.data.augmentation import ResampleTransform, scaled_size
from nuclei_d2.data.datasets.builtin import register_from_config
from nuclei_d2.data.datasets.statistics import equivalent_diameter, median_diameter
from nuclei_d2.data.datasets.synthetic import SyntheticConfig, generate
from nuclei_d2.data.image_io import read_image
from nuclei_d2.data.image_measures import MEASURES, count_pixels, image_measures, judge
from nuclei_d2.data.normalization import ImageNormalizer
from nuclei_d2.evaluation.bootstrap import RESAMPLES, bootstrap_weights, percentile_interval
from nuclei_d2.evaluation.instances import rle_to_mask
from nuclei_d2.inference.contrast import LEAST_CONTRAST, nuclear_contrast
from nuclei_d2.inference.duplicates import find_overlaps
from nuclei_d2.inference.nuclei import Nuclei
from nuclei_d2.inference.pipeline import NucleiPipeline, PredictionOptions
from nuclei_d2.inference.tiling import Grid, make_grid
from nuclei_d2.structures.cropped_mask import label_image_to_masks, masks_to_label_image
from nuclei_d2.utils.errors import NucleiError, run_tool
from nuclei_d2.utils.files import write_json

Rows = list[dict[str, Any]]
_SAME, _FOUND, _RIGHT = 0.9, 0.5, 0.75  # IoU
_SIZES = (0.5, 1, 2)  # of an image, times its own
_LOW, _HIGH = 1, 99.8  # percentiles between which an image's range is spoilt


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("measure", choices=list(_MEASUREMENTS))
    parser.add_argument("--config-file", required=True, metavar="FILE")
    parser.add_argument("--weights", default="", metavar="FILE", help="checkpoint")
    parser.add_argument(
        "--datasets", nargs="+", default=[], metavar="NAME", help="registered ones; not for tiling"
    )
    parser.add_argument("--size", type=int, default=3000, help="pixels (default: %(default)s)")
    parser.add_argument("--nuclei", type=int, default=3000, help="(default: %(default)s)")
    parser.add_argument("--tta", action="store_true", help="trust: look at eight views")
    parser.add_argument("--output", metavar="JSON")
    parser.add_argument("--opts", nargs=argparse.REMAINDER, default=[], help="last: KEY VALUE ..")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    cfg = load_config(args.config_file, ["MODEL.WEIGHTS", args.weights, *args.opts])
    if args.measure in ("unlike", "trust", "scale") and not args.datasets:
        raise NucleiError(f"{args.measure}: name registered data sets, --datasets")
    cfg.DATASETS.TRAIN, cfg.DATASETS.VAL, cfg.DATASETS.TEST = tuple(args.datasets), (), ()
    register_from_config(cfg)
    cv2.setNumThreads(1)
    rows = _MEASUREMENTS[args.measure](cfg, args)
    print(tabulate(rows, headers="keys", floatfmt=".4g"))
    if args.output:
        write_json(args.output, {"measure": args.measure, "rows": rows})


# --------------------------------------------------------------------------------- tiling


def measure_tiling(cfg: CfgNode, args: argparse.Namespace) -> Rows:
    """A generated image in tiles and as a whole, compared with each other and with the truth."""
    drawn = SyntheticConfig(
        height=args.size, width=args.size, bits=16, count=(args.nuclei, args.nuclei), empty=0.0,
        diameter=(22.0, 24.0), crowding=0.3,
    )  # fmt: skip
    image, labels = generate(3, drawn)
    options = PredictionOptions()
    grid = make_grid(image.shape, cfg.INPUT.SCALE, options.tile, options.overlap)
    whole_options = replace(options, tile=1 << 16)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "field.tif"
        tifffile.imwrite(path, image)
        tiled, _ = NucleiPipeline(cfg, options)(path)
        whole, _ = NucleiPipeline(raise_caps(cfg, len(grid.tiles)), whole_options)(path)
    masks = [mask for layer in labels for _, mask in label_image_to_masks(layer)]
    truth = Nuclei.from_masks(masks, np.ones(len(masks)), image.shape)
    return [
        {"answer": name, "nuclei": len(nuclei), "tiles": tiles,
         "F1 with the other": f1_score(nuclei, other, _SAME),
         **by_place("without partner", nuclei, unmatched(nuclei, other, _SAME), grid),
         **by_place("true nuclei missed", truth, unmatched(truth, nuclei, _FOUND), grid)}
        for name, nuclei, other, tiles in (
            ("whole", whole, tiled, 1), ("tiled", tiled, whole, len(grid.tiles))
        )
    ]  # fmt: skip


def raise_caps(cfg: CfgNode, factor: int) -> CfgNode:
    """As many proposals and nuclei of one image as of ``factor`` tiles."""
    raised = cfg.clone()
    raised.TEST.DETECTIONS_PER_IMAGE *= factor
    raised.MODEL.RPN.PRE_NMS_TOPK_TEST *= factor
    raised.MODEL.RPN.POST_NMS_TOPK_TEST *= factor
    return raised


def unmatched(first: Nuclei, second: Nuclei, iou: float) -> np.ndarray:
    """(N,) bool: those of ``first`` without one of ``second`` of at least that IoU."""
    overlaps = find_overlaps(first, second)
    alone = np.ones(len(first), bool)
    alone[overlaps.first[overlaps.iou >= iou]] = False
    return alone


def f1_score(first: Nuclei, second: Nuclei, iou: float) -> float:
    """2 pairs / (N + M); above an IoU of 0.5 no nucleus of a label image has two partners."""
    pairs = min((~unmatched(a, b, iou)).sum() for a, b in ((first, second), (second, first)))
    return float(2 * pairs / max(len(first) + len(second), 1))


def by_place(name: str, nuclei: Nuclei, chosen: np.ndarray, grid: Grid) -> dict[str, str]:
    """ "chosen of all" nuclei close to a cut (half the overlap), and elsewhere."""
    boxes = nuclei.boxes * np.tile(grid.scale, 2)
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    near = np.zeros(len(nuclei), bool)
    for tile in grid.tiles:
        for axis, span in enumerate((tile.rows, tile.columns)):
            if span.first:
                near |= np.abs(centres[:, axis] - span.first) < grid.overlap / 2
    return {
        f"{name} {where}": f"{(chosen & part).sum()} of {part.sum()}"
        for where, part in (("at cuts", near), ("elsewhere", ~near))
    }


# ---------------------------------------------------------------------------------- empty


def empty_fields() -> dict[str, np.ndarray]:
    """Images of 512 x 512 pixels without nuclei."""
    rng, size = np.random.default_rng(0), (512, 512)
    y, x = np.mgrid[-1:1:512j, -1:1:512j]
    smooth = cv2.GaussianBlur(rng.normal(size=size), (0, 0), 20)
    hot = rng.normal(1000, 20, size)
    hot[rng.random(size) < 1e-3] = 20000

    def camera(light: np.ndarray, noise: float, bits: int) -> np.ndarray:
        exposed = np.rint(light + rng.normal(0, noise, size))
        return exposed.clip(0, 2**bits - 1).astype(f"uint{bits}")

    flat = np.zeros(size)
    return {
        "constant, 16 bits": camera(flat + 1000, 0, 16),
        **{f"noise of {s}, 8 bits": camera(flat + 50, s, 8) for s in (1, 3, 10)},
        **{f"noise of {s}, 16 bits": camera(flat + 1000, s, 16) for s in (2, 20, 200)},
        "few photons": rng.poisson(3, size).astype(np.uint16),
        "gradient, 8 bits": camera(60 + 40 * x, 3, 8),
        "vignette, 16 bits": camera(2000 * (1 - 0.4 * (x**2 + y**2)), 20, 16),
        "haze, 16 bits": camera(1000 + 100 * smooth / smooth.std(), 20, 16),
        "hot pixels": hot.clip(0).astype(np.uint16),
    }


def measure_empty(cfg: CfgNode, args: argparse.Namespace) -> Rows:
    """Nuclei found in empty fields, with and without the least contrast; annotated nuclei's."""
    rows = []
    scales = {"known size": cfg.INPUT.NUCLEUS_DIAMETER or None, "estimated size": "auto"}
    pipelines = {
        f"{scale}, contrast >= {least:g}": NucleiPipeline(
            cfg, PredictionOptions(diameter=diameter, least_contrast=least)
        )
        for scale, diameter in scales.items()
        for least in (LEAST_CONTRAST, 0.0)
    }
    with tempfile.TemporaryDirectory() as folder:
        for name, image in tqdm(empty_fields().items(), unit="field"):
            path = Path(folder) / "field.tif"
            tifffile.imwrite(path, image)
            found = {key: len(pipeline(path).nuclei) for key, pipeline in pipelines.items()}
            rows.append({"field": name, **found})
    for name in args.datasets:
        records = DatasetCatalog.get(name)
        contrast = np.concatenate([annotated_contrast(record, cfg) for record in records])
        known = contrast[np.isfinite(contrast)]
        rows.append(
            {"field": f"{name}: {len(known)} annotated nuclei, contrast of the least 0.1 %, 1 %, "
             f"below {LEAST_CONTRAST:g}: {np.percentile(known, 0.1):.1f}, "
             f"{np.percentile(known, 1):.1f}, {(known < LEAST_CONTRAST).sum()}"}
        )  # fmt: skip
    return rows


def annotated_contrast(record: dict[str, Any], cfg: CfgNode) -> np.ndarray:
    """Of every annotated nucleus of a Detectron2 dataset dict."""
    normalize = ImageNormalizer(cfg)
    image = read_image(record["file_name"])
    contrast = normalize.range_of(image)
    nuclei = annotated(record)
    return nuclear_contrast(
        nuclei.masks, normalize(image, contrast), normalize.visible_noise(contrast)
    )


# --------------------------------------------------------------------------------- unlike


def spoilers() -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    """What can go wrong with an image, (H, W, C) float32 grey levels of 8 bits."""
    rng = np.random.default_rng(0)

    def noisy(image: np.ndarray) -> np.ndarray:
        low, high = np.percentile(image, (_LOW, _HIGH))
        noise = rng.normal(0, 0.05 * (high - low), image.shape[:2])
        return np.rint(image + noise[..., None]).clip(0)

    def overexposed(image: np.ndarray) -> np.ndarray:
        low, high = np.percentile(image, (_LOW, _HIGH))
        return np.rint(3 * 255 * (image - low) / max(high - low, 1)).clip(0, 255)

    def blurred(sigma: float) -> Callable[[np.ndarray], np.ndarray]:
        return lambda image: np.atleast_3d(np.rint(cv2.GaussianBlur(image, (0, 0), sigma)))

    def enlarged(factor: int) -> Callable[[np.ndarray], np.ndarray]:
        size = {"dsize": None, "fx": factor, "fy": factor, "interpolation": cv2.INTER_CUBIC}
        return lambda image: np.atleast_3d(np.rint(cv2.resize(image, **size)).clip(0, 255))

    return {
        **{f"blurred, Gaussian of {sigma} px": blurred(sigma) for sigma in (2, 3, 4)},
        "noise of 5 % of the range": noisy,
        "inverted": lambda image: 255 - image,
        "overexposed three times": overexposed,
        "enlarged twice, untold": enlarged(2),
        "enlarged four times, untold": enlarged(4),
        "half the contrast": lambda image: np.rint(image.min() + (image - image.min()) / 2),
    }


def measure_unlike(cfg: CfgNode, args: argparse.Namespace) -> Rows:
    """Share of images outside the ranges of the training, by measure; in percent."""
    records = {name: DatasetCatalog.get(name) for name in args.datasets}
    sets = {name: (name, np.copy) for name in args.datasets}
    sets |= {name: (args.datasets[0], spoil) for name, spoil in spoilers().items()}
    return [
        {"images": name, "number": len(records[source]), **outside(cfg, records[source], change)}
        for name, (source, change) in tqdm(sets.items(), unit="set")
    ]


def outside(
    cfg: CfgNode, records: Sequence[dict[str, Any]], change: Callable[[np.ndarray], np.ndarray]
) -> dict[str, float]:
    """Percent of the changed images that any measure, and each of them, calls unlike training.

    Their nuclei's diameter is that of the ground truth.
    """
    found = []
    for record in records:
        image = change(read_image(record["file_name"]))
        sides = image.shape[:2]
        scaled = scaled_size(sides, cfg.INPUT.SCALE)
        pixels = ResampleTransform(*sides, *scaled).apply_image(ImageNormalizer(cfg)(image))
        diameter = median_diameter([record]) * scaled[0] / record["height"]
        values = image_measures(count_pixels(pixels), diameter)
        judged = judge(values, cfg.INPUT.TRAINING_RANGES)
        found.append([judged[name]["inside"] is False for name in MEASURES])
    shares = 100 * np.mean(found, axis=0)
    return {"any": 100 * np.any(found, axis=1).mean(), **dict(zip(MEASURES, shares, strict=True))}


# ---------------------------------------------------------------------------------- trust


def measure_trust(cfg: CfgNode, args: argparse.Namespace) -> Rows:
    """Area under the ROC curve for an IoU of 0.75 with the truth, and its gain over the score."""
    pipeline = NucleiPipeline(cfg, PredictionOptions(tta=args.tta))
    owner, right, known = [], [], []
    records = [record for name in args.datasets for record in DatasetCatalog.get(name)]
    for k, record in enumerate(tqdm(records, unit="image")):
        nuclei = pipeline(record["file_name"]).nuclei
        owner += [k] * len(nuclei)
        right.append(~unmatched(nuclei, annotated(record), _RIGHT))
        known.append(predictors(nuclei))
    owner, right = np.array(owner), np.concatenate(right)
    columns = {name: np.concatenate([part[name] for part in known]) for name in known[0]}
    weights = bootstrap_weights(len(known))[:, owner]
    base = [area_under_roc(columns["score"], right, w) for w in weights]
    rows = []
    for name, values in columns.items():
        drawn = [area_under_roc(values, right, w) for w in tqdm(weights, name)]
        low, high = percentile_interval(np.subtract(drawn, base))
        area = area_under_roc(values, right, np.ones(len(right), int))
        rows.append({"predictor": name, "AUROC": area, "gain, low": low, "gain, high": high})
    print(f"{len(known)} images, {len(right)} nuclei, {right.mean():.1%} right, {RESAMPLES} draws")
    return rows


def predictors(nuclei: Nuclei) -> dict[str, np.ndarray]:
    """What could tell whether a nucleus is right, (N,) each; more is better."""
    score, measures = nuclei.scores, nuclei.measures
    found = {"score": score}
    if "boundary_uncertainty" in measures:
        sure = 1 - measures["boundary_uncertainty"]
        found |= {
            "1 - boundary_uncertainty": sure,
            "score x (1 - boundary_uncertainty)": score * sure,
        }
    if "agreement" in measures:
        agreement = measures["agreement"]
        found |= {"agreement": agreement, "score x agreement": score * agreement}
    return found


def area_under_roc(values: np.ndarray, right: np.ndarray, weights: np.ndarray) -> float:
    """Chance that a right nucleus has the higher value than a wrong one; equal ones count half.

    Args:
        values, right: (N,) numbers and bool.
        weights: (N,) how often each nucleus counts, integers.
    """
    values, right = np.repeat(values, weights), np.repeat(right, weights)
    positive, negative = right.sum(), (~right).sum()
    if not positive or not negative:
        return float("nan")
    ranks = rankdata(values)[right].sum()
    return float((ranks - positive * (positive + 1) / 2) / (positive * negative))


# ---------------------------------------------------------------------------------- scale


def measure_scale(cfg: CfgNode, args: argparse.Namespace) -> Rows:
    """Estimated over annotated median diameter, and mean F1 with and without the estimate."""
    pipeline = NucleiPipeline(cfg)
    records = [record for name in args.datasets for record in DatasetCatalog.get(name)]
    records = [record for record in records if len(annotated(record))]
    rows = []
    for size in _SIZES:
        ratios, scores = [], []
        for record in tqdm(records, f"x {size:g}", unit="image"):
            ratio, score = judge_scale(pipeline, record, size)
            ratios.append(ratio)
            scores.append(score)
        low, middle, high = np.percentile(ratios, (5, 50, 95))
        wrong = np.mean(np.abs(np.log2(ratios)) > 0.5)
        means = {name: np.mean([score[name] for score in scores]) for name in scores[0]}
        rows.append(
            {"size": size, "images": len(records), "estimated / true, 5 %": low, "median": middle,
             "95 %": high, "off by more than sqrt(2), %": 100 * wrong, **means}
        )  # fmt: skip
    return rows


def judge_scale(
    pipeline: NucleiPipeline, record: dict[str, Any], size: float
) -> tuple[float, dict[str, float]]:
    """Estimated over annotated diameter, and F1 by what the pipeline is told of the diameter."""
    image, truth = resized(read_image(record["file_name"]), size), annotated(record, size)
    true, model = np.median(equivalent_diameter(truth.areas)), pipeline.cfg.INPUT.NUCLEUS_DIAMETER
    scores = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "image.tif"
        tifffile.imwrite(path, image, photometric="minisblack" if image.ndim == 2 else "rgb")
        for name, diameter in (("not scaled", model), ("annotated", true), ("estimated", "auto")):
            pipeline.options = PredictionOptions(diameter=diameter)
            nuclei, found = pipeline(path)
            scores[f"F1, {name}"] = f1_score(nuclei, truth, _FOUND)
    return model * pipeline.cfg.INPUT.SCALE / found["scale"] / true, scores


# ----------------------------------------------------------------------------------- data


def resized(image: np.ndarray, size: float, nearest: bool = False) -> np.ndarray:
    """An image, ``size`` times as wide and high, of its dtype: (h, w), or (h, w, C) if C > 1."""
    smooth = cv2.INTER_AREA if size < 1 else cv2.INTER_LINEAR
    how = cv2.INTER_NEAREST if nearest else smooth
    return cv2.resize(image, None, fx=size, fy=size, interpolation=how)


def annotated(record: dict[str, Any], size: float = 1) -> Nuclei:
    """The true nuclei of a dataset dict, in an image ``size`` times as wide and high."""
    masks = [rle_to_mask(a["segmentation"]) for a in record["annotations"] if not a.get("iscrowd")]
    shape = (record["height"], record["width"])
    if size != 1:
        labels = masks_to_label_image(masks, shape).astype(np.uint16)
        labels = resized(labels, size, nearest=True)
        masks, shape = [mask for _, mask in label_image_to_masks(labels)], labels.shape
    return Nuclei.from_masks(masks, np.ones(len(masks)), shape)


_MEASUREMENTS = {
    "tiling": measure_tiling,
    "empty": measure_empty,
    "unlike": measure_unlike,
    "trust": measure_trust,
    "scale": measure_scale,
}

if __name__ == "__main__":
    run_tool(main)

#!/usr/bin/env python
"""Write what StarDist's and Cellpose's own metrics say about pairs of label images.

    pip install --no-deps stardist cellpose csbdeep numba llvmlite fastremap fill-voids natsort
    python tests/evaluation/metric_agreement.py [--labels FOLDER]

The pairs are drawn by this file; FOLDER adds real label images (those of the prepared DSB 2018
set), each against a disturbed copy. test_metric_agreement.py compares our numbers with the file
written, and needs neither package.
"""

import argparse
import json
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

FIXTURE = Path(__file__).parent / "fixtures" / "metric_agreement.json"
GENERATED = 210
REAL = 24
THRESHOLDS = [0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95]
# StarDist compares float32 with >=; this makes it IoU > 0.5, as PQ is defined.
ABOVE_HALF = float(np.nextafter(np.float32(0.5), np.float32(1)))


def generated_pairs() -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Name, ground truth and prediction, (H, W) int32; every 30th pair lacks one side or both."""
    for seed in range(GENERATED):
        rng = np.random.default_rng(seed)
        gt = draw(rng, int(rng.integers(1, 45)))
        pred = disturb(rng, gt) if seed % 10 else draw(rng, 20, gt.shape)
        empty = np.zeros_like(gt)
        if seed % 30 == 7:
            gt = empty
        if seed % 30 in (17, 27):
            pred = empty
        if seed % 90 == 27:
            gt = empty
        yield f"generated {seed}", gt, pred


def draw(rng: np.random.Generator, count: int, size=None) -> np.ndarray:
    """Up to ``count`` touching ellipses."""
    size = size or tuple(rng.integers(48, 160, 2).tolist())
    labels = np.zeros(size, np.int32)
    y, x = np.mgrid[: size[0], : size[1]]
    for label in range(1, count + 1):
        (cy, cx), (ry, rx) = rng.uniform(0, size), rng.uniform(3, 16, 2)
        labels[((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2 <= 1] = label
    return labels


def disturb(rng: np.random.Generator, labels: np.ndarray) -> np.ndarray:
    """Drop, split, merge and shift nuclei, add false ones, and renumber them with gaps."""
    result = np.zeros_like(labels)
    values = rng.permutation(np.unique(labels[labels > 0]))
    numbers = rng.permutation(np.arange(1, 4 * len(values) + 9))
    for k, value in enumerate(values):
        kind = rng.random()
        if kind < 0.1:
            continue
        rows, columns = np.nonzero(labels == value)
        number = np.full(rows.shape, numbers[2 * k])
        if kind < 0.2:  # split along a row
            number[rows > np.median(rows)] = numbers[2 * k + 1]
        elif kind < 0.3 and k:  # merge with the one before
            number[:] = numbers[2 * k - 2]
        shift = rng.integers(-2, 3, 2)
        rows = (rows + shift[0]).clip(0, labels.shape[0] - 1)
        columns = (columns + shift[1]).clip(0, labels.shape[1] - 1)
        result[rows, columns] = number
    for number in numbers[-4:]:
        top, left = (rng.integers(0, side) for side in labels.shape)
        result[top : top + 6, left : left + 5] = number
    return result


def real_pairs(folder: Path) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """:data:`REAL` label images spread over ``folder``, each with a disturbed copy."""
    files = sorted(folder.glob("*.png"))
    for seed, file in enumerate(files[:: max(1, len(files) // REAL)][:REAL]):
        gt = np.array(Image.open(file)).astype(np.int32)
        yield file.stem, gt, disturb(np.random.default_rng(seed), gt)


def checksum(gt: np.ndarray, pred: np.ndarray) -> int:
    """Changes if a pair is not the one that the references saw."""
    return zlib.crc32(np.stack([gt, pred]).astype("<i4").tobytes())


def reference_numbers(name: str, gt: np.ndarray, pred: np.ndarray) -> dict:
    """What the packages say about one pair."""
    from cellpose.metrics import aggregated_jaccard_index, average_precision
    from stardist.matching import matching

    at = matching(gt, pred, thresh=[*THRESHOLDS, ABOVE_HALF])
    _, tp, fp, fn = average_precision(gt, pred, threshold=THRESHOLDS)
    both = gt.any() and pred.any()
    return {
        "name": name,
        "checksum": checksum(gt, pred),
        "n_true": at[0].n_true,
        "n_pred": at[0].n_pred,
        "stardist_tp": [int(m.tp) for m in at[:-1]],
        "stardist_matched_iou": float(at[0].mean_matched_score),
        "stardist_pq": float(at[-1].panoptic_quality),
        "cellpose_tp": tp.astype(int).tolist(),
        "cellpose_fp": fp.astype(int).tolist(),
        "cellpose_fn": fn.astype(int).tolist(),
        # Cellpose cannot take the maximum of no nuclei.
        "cellpose_aji": float(aggregated_jaccard_index([gt], [pred])[0]) if both else None,
    }


def dataset_numbers(pairs: list[tuple[str, np.ndarray, np.ndarray]]) -> dict:
    """StarDist's pooled and image-averaged numbers."""
    from stardist.matching import matching_dataset

    _, gt, pred = zip(*pairs, strict=True)
    keys = ("f1", "precision", "recall", "accuracy", "panoptic_quality")
    result = {}
    for name, by_image in (("pooled", False), ("by_image", True)):
        stats = matching_dataset(gt, pred, THRESHOLDS, by_image=by_image, show_progress=False)
        result[name] = {key: [float(getattr(s, key)) for s in stats] for key in keys}
    return result


def main() -> None:
    from importlib.metadata import version

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--labels", type=Path, help="folder of real label images")
    args = parser.parse_args()
    pairs = list(generated_pairs())
    content = {
        "versions": {name: version(name) for name in ("stardist", "cellpose")},
        "dataset": dataset_numbers(pairs),
        "generated": [reference_numbers(*pair) for pair in pairs],
        "real": [reference_numbers(*pair) for pair in real_pairs(args.labels)]
        if args.labels
        else json.loads(FIXTURE.read_text())["real"],
    }
    FIXTURE.write_text(json.dumps(content).replace('{"name"', '\n{"name"') + "\n")
    print(f"{len(content['generated'])} + {len(content['real'])} pairs written to {FIXTURE}")


if __name__ == "__main__":
    main()

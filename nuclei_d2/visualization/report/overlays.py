"""Images with what went wrong drawn over them, for the report: which, and how."""

import base64
import io
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path

import numpy as np
from PIL import Image
from skimage.measure import approximate_polygon, find_contours

from nuclei_d2.data.datasets.sources import IMAGE_SUFFIXES, SourceFile, list_images
from nuclei_d2.data.image_io import read_image
from nuclei_d2.evaluation.boundary import compute_overlaps
from nuclei_d2.evaluation.inputs import GroundTruth, ImageSource, ScoredMasks
from nuclei_d2.evaluation.instances import LabelLayers, layers_from_predictions
from nuclei_d2.evaluation.matching import segmentation_errors
from nuclei_d2.structures.cropped_mask import CroppedMask, label_image_to_masks
from nuclei_d2.utils.errors import NucleiError
from nuclei_d2.visualization.overlay import stretch

WORST, MEDIAN = 4, 2  # images shown
# What the report draws, bottom first; a key is also the CSS class of its line.
KINDS = {
    "merged": "a prediction that covers several nuclei (IoU above 0.1 with each)",
    "split": "a nucleus that is cut into several predictions (IoU above 0.1 with each)",
    "matched": "a prediction that agrees with a nucleus (IoU above 0.7)",
    "spurious": "any other prediction: it agrees with no nucleus",
    "missed": "any other nucleus: no prediction agrees with it",
}
_MOST_PIXELS = 1000  # of a shown image's longer side
# Outlines run so near the centres of a nucleus' outermost pixels that those of touching nuclei lie
# side by side; 0.5 would be the edge of the pixels, which they share.
_LEVEL = 0.8


@dataclass(frozen=True)
class Overlay:
    """One image and its prediction."""

    width: int
    height: int
    picture: str  # data URI of the image, or of black
    paths: dict[str, str]  # SVG path data by kind, in pixels of the image
    counts: dict[str, int]  # nuclei or predictions by kind
    line: float  # width of an outline, in pixels of the image


# ------------------------------------------------------------------------- which images


def pick_images(scores: np.ndarray) -> tuple[list[int], list[int]]:
    """The images to show: every set's worst in turn, and every set's median in turn.

    Args:
        scores: (S, n) of the images of each set; NaN where undefined.

    Returns:
        At least one worst image of each set, :data:`WORST` in all, worst first, and
        :data:`MEDIAN` others likewise; fewer where there are no more.
    """
    ranked = [np.argsort(row, kind="stable")[: np.isfinite(row).sum()].tolist() for row in scores]
    worst = _take_in_turn(ranked, max(WORST, len(scores)), ())
    from_middle = [
        sorted(order, key=lambda k, order=order: abs(order.index(k) - (len(order) - 1) / 2))
        for order in ranked
    ]
    median = _take_in_turn(from_middle, max(MEDIAN, len(scores)), worst)
    lowest = np.min(np.where(np.isfinite(scores), scores, np.inf), axis=0)
    return sorted(worst, key=lambda k: lowest[k]), sorted(median, key=lambda k: lowest[k])


def _take_in_turn(orders: Sequence[Sequence[int]], most: int, taken: Sequence[int]) -> list[int]:
    """Everybody's first, everybody's second .., each once."""
    turns = chain.from_iterable(zip_longest(*orders))
    return list(dict.fromkeys(k for k in turns if k is not None and k not in taken))[:most]


# -------------------------------------------------------------------------- raw images


def find_raw_images(
    truth: GroundTruth, folder: str | os.PathLike | None = None
) -> dict[str, SourceFile]:
    """The raw images of a ground truth by name.

    Args:
        truth: from ``open_ground_truth``.
        folder: folder or zip with an image, at any depth, for each name; None: those that lie
            where data sets keep them (beside COCO JSON or its folder; in ``images`` beside a
            folder of labels or in a DSB 2018 folder; beside Cellpose's masks), if any.

    Raises:
        NucleiError: ``folder`` lacks an image or has two of one name.
    """
    if folder is not None:
        return _images_in(Path(folder), truth.images)
    return {
        name: SourceFile(str(path.parent), path.name)
        for name, source in truth.images.items()
        if (path := _image_beside(truth, name, source)) is not None
    }


def _images_in(folder: Path, names: Iterable[str]) -> dict[str, SourceFile]:
    by_name: dict[str, list[SourceFile]] = {}
    for file in list_images(folder):
        for name in {file.stem, str(file.path.with_suffix(""))}:
            by_name.setdefault(name, []).append(file)
    names = sorted(names)
    for name in names:
        found = by_name.get(name, [])
        if not found:
            raise NucleiError(f"--images {folder} lacks an image called {name}")
        if len(found) > 1:
            raise NucleiError(
                f"--images {folder} has two images called {name}: {found[0]}, {found[1]}"
            )
    return {name: by_name[name][0] for name in names}


def _image_beside(truth: GroundTruth, name: str, source: ImageSource) -> Path | None:
    root = Path(truth.path).absolute()
    if truth.records:
        file = truth.records[name]["file_name"]
        candidates = [Path(file), root.parent.parent / os.path.relpath(file, root.parent)]
    else:
        own = Path(source.where)
        folders = [root.parent / "images", own.parent, own / "images"]
        candidates = [folder / f"{name}{suffix}" for folder in folders for suffix in IMAGE_SUFFIXES]
        candidates = [path for path in candidates if path != own.absolute()]
    return next((path for path in candidates if path.is_file()), None)


# ---------------------------------------------------------------------------- pictures


def draw_overlay(
    truth: ImageSource, found: ImageSource, score_threshold: float, raw: SourceFile | None
) -> Overlay:
    """Read one image's nuclei and predictions, and sort them by :data:`KINDS`.

    Args:
        truth: its nuclei.
        found: its predictions.
        score_threshold: scored predictions below it are left out.
        raw: the image; None shows black.

    Raises:
        NucleiError: a file is unreadable, or the image is of another size than its nuclei.
    """
    gt, pred = truth.read(), found.read()
    if isinstance(pred, ScoredMasks):
        pred = layers_from_predictions(pred.masks, pred.scores, score_threshold, gt)
    overlap, _ = compute_overlaps(gt, pred)
    wrong = segmentation_errors(overlap)
    merged, split = wrong["merges"], wrong["splits"]
    nuclei, predictions = _masks(gt), _masks(pred)
    kinds = {
        "merged": (predictions, merged),
        "split": (nuclei, split),
        "matched": (predictions, ~merged & ~wrong["spurious"]),
        "spurious": (predictions, ~merged & wrong["spurious"]),
        "missed": (nuclei, ~split & wrong["missed"]),
    }
    height, width = gt.size
    tolerance = max(0.25, max(gt.size) / (2 * _MOST_PIXELS))  # under a pixel of the page
    paths = {
        kind: "".join(_outline(masks[k], tolerance) for k in np.flatnonzero(chosen) if k in masks)
        for kind, (masks, chosen) in kinds.items()
    }
    counts = {kind: int(chosen.sum()) for kind, (_, chosen) in kinds.items()}
    line = _line_width(np.concatenate([overlap.gt_areas, overlap.pred_areas]), width)
    return Overlay(width, height, _picture(raw, gt.size, truth.where), paths, counts, line)


def _line_width(areas: np.ndarray, width: int) -> float:
    """Visible in the whole image, but thinner where nuclei are small, as outlines hide them."""
    diameter = float(np.sqrt(np.median(areas))) if areas.size else np.inf
    return max(width / 1000, min(width / 300, diameter / 10))


def _masks(layers: LabelLayers) -> dict[int, CroppedMask]:
    """By index, 0..N-1; empty ones are left out."""
    return {
        label - 1: mask for layer in layers.labels for label, mask in label_image_to_masks(layer)
    }


def _outline(boxed: CroppedMask, tolerance: float) -> str:
    """SVG path data of a nonempty mask's outlines, holes included."""
    path = ""
    for contour in find_contours(np.pad(boxed.mask, 1).astype(np.float32), _LEVEL):
        few = approximate_polygon(contour, tolerance)
        points = (few if len(few) > 3 else contour)[:-1]  # the last is the first
        # In SVG a pixel's centre is at + 0.5; the padding moved it by 1.
        y, x = (points + np.array([boxed.top, boxed.left]) - 0.5).T
        path += "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in zip(x, y, strict=True)) + "Z"
    return path


def _picture(raw: SourceFile | None, size: tuple[int, int], where: str) -> str:
    """Data URI of the image as the network sees it, or of black."""
    pixels = stretch(raw.read(read_image)) if raw else np.zeros((*size, 3), np.uint8)
    if pixels.shape[:2] != size:
        sizes = [" x ".join(map(str, s)) for s in (pixels.shape[:2], size)]
        raise NucleiError(
            f"{raw} is {sizes[0]} pixels, its ground truth {where} {sizes[1]}; name the folder of "
            "the images with --images"
        )
    image = Image.fromarray(pixels)
    image.thumbnail((_MOST_PIXELS, _MOST_PIXELS))
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=85)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()

"""What a data set looks like, and the settings that follow from it.

Pure functions, arrays in and dataclasses out, except :func:`measure_record`, which reads one
image's files for them.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
from numpy.typing import ArrayLike

from nuclei_d2.data.datasets.coco import annotations_as_rle
from nuclei_d2.data.image_io import read_image, read_label
from nuclei_d2.data.normalization import ImageNormalizer
from nuclei_d2.structures.cropped_mask import crop_mask, masks_to_label_image
from nuclei_d2.utils.errors import NucleiError

PERCENTILES = (1, 5, 25, 50, 75, 95, 99)

# Detectron2's R-CNN with a feature pyramid: strides of p2 to p6, anchor shapes (height / width).
STRIDES = (4, 8, 16, 32, 64)
ASPECT_RATIOS = (0.5, 1.0, 2.0)
_SMALLEST_ANCHORS = (4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32)  # network pixels, tried on p2


@dataclass(frozen=True)
class ImageStatistics:
    """One image and its N nuclei. Lengths are pixels of the file."""

    height: int
    width: int
    modality: str
    areas: np.ndarray  # (N,) pixels
    boxes: np.ndarray  # (N, 4) x1, y1, x2, y2; x2 and y2 lie one past the last pixel
    touching: np.ndarray  # (N,) bool
    # Raw grey levels at the normaliser's percentiles, by default the 1st and 99.8th.
    low: float
    high: float
    # Medians of the normalised image, 0..255; NaN where there is no such pixel.
    foreground: float
    background: float

    @property
    def diameters(self) -> np.ndarray:
        """(N,) of the circles of the same area, in pixels."""
        return equivalent_diameter(self.areas)

    @property
    def box_sides(self) -> np.ndarray:
        """(N,) geometric mean of the box's width and height, in pixels."""
        return _box_sides(self.boxes)


def equivalent_diameter(area: ArrayLike) -> np.ndarray:
    """Diameter of the circle of the same area (pixels, of any shape), as in scikit-image."""
    return np.sqrt(4 / np.pi * np.asarray(area))


def _box_sides(boxes: np.ndarray) -> np.ndarray:
    return np.sqrt(np.prod(boxes[:, 2:] - boxes[:, :2], axis=1))


def find_touching(labels: np.ndarray) -> np.ndarray:
    """Which nuclei have another one directly beside them, diagonals included.

    Args:
        labels: (H, W) integers, 0 background, 1..N nuclei.

    Returns:
        (N,) bool with N = ``labels.max()``; entry k - 1 belongs to label k.
    """
    found = np.zeros(int(labels.max(initial=0)) + 1, bool)
    neighbours = (
        (labels[:, :-1], labels[:, 1:]),
        (labels[:-1], labels[1:]),
        (labels[:-1, :-1], labels[1:, 1:]),
        (labels[:-1, 1:], labels[1:, :-1]),
    )
    for first, second in neighbours:
        contact = (first != second) & (first > 0) & (second > 0)
        found[first[contact]] = True
        found[second[contact]] = True
    return found[1:]


def measure_image(
    image: np.ndarray,
    labels: np.ndarray,
    areas: np.ndarray,
    boxes: np.ndarray,
    normalizer: ImageNormalizer,
    modality: str = "unknown",
) -> ImageStatistics:
    """Measure one image.

    Args:
        image: (H, W, C) raw grey levels.
        labels: (H, W) label image; label k is the k-th nucleus of ``areas`` and ``boxes``.
        areas: (N,) pixels, of the whole nucleus where it is partly hidden in ``labels``.
        boxes: (N, 4) x1, y1, x2, y2.
        normalizer: as in training.
    """
    touching = np.zeros(len(areas), bool)
    found = find_touching(labels)
    touching[: len(found)] = found
    low, high = np.percentile(image, normalizer.percentiles)
    grey = normalizer(image).mean(axis=2)
    foreground, background = grey[labels > 0], grey[labels == 0]
    return ImageStatistics(
        height=image.shape[0],
        width=image.shape[1],
        modality=modality,
        areas=np.asarray(areas, float),
        boxes=np.asarray(boxes, float).reshape(-1, 4),
        touching=touching,
        low=float(low),
        high=float(high),
        foreground=float(np.median(foreground)) if foreground.size else math.nan,
        background=float(np.median(background)) if background.size else math.nan,
    )


def measure_record(record: dict[str, Any], normalizer: ImageNormalizer) -> ImageStatistics:
    """:func:`measure_image` of a Detectron2 dataset dict; crowds are left out.

    Raises:
        NucleiError: the image or label image cannot be read, or has another size than stated.
    """
    image = read_image(record["file_name"])
    size = (record["height"], record["width"])
    rles = [a["segmentation"] for a in annotations_as_rle(record) if not a.get("iscrowd", 0)]
    if "label_file_name" in record:
        labels = read_label(record["label_file_name"])
    else:
        labels = masks_to_label_image([crop_mask(mask_util.decode(rle)) for rle in rles], size)
    for array, key in ((image, "file_name"), (labels, "label_file_name")):
        if array.shape[:2] != size:
            raise NucleiError(f"{record[key]} is {array.shape[:2]} pixels, its entry says {size}")
    boxes = np.array(mask_util.toBbox(rles)).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    # One by one: pycocotools 2.0.11 with numpy 2 fails on a list of more than 255 masks.
    areas = np.array([mask_util.area(rle) for rle in rles])
    modality = record.get("modality", "unknown")
    return measure_image(image, labels, areas, boxes, normalizer, modality)


def median_diameter(records: Iterable[dict[str, Any]]) -> float:
    """Median over all nuclei of :func:`equivalent_diameter`, in pixels of the files.

    Args:
        records: Detectron2 dataset dicts; crowds are left out.

    Returns:
        0 without nuclei.
    """
    areas = [
        mask_util.area(annotation["segmentation"])
        for record in records
        for annotation in annotations_as_rle(record)
        if not annotation.get("iscrowd", 0)
    ]
    return float(equivalent_diameter(np.median(areas))) if areas else 0.0


@dataclass(frozen=True)
class DatasetStatistics:
    """A data set in numbers. A ``*_percentiles`` field maps :data:`PERCENTILES` to values."""

    images: int
    empty_share: float  # share of images without a nucleus
    sizes: dict[str, int]  # "HEIGHT x WIDTH" -> images, the most frequent first
    modalities: dict[str, int]  # modality -> images
    nuclei: int
    count_median: float  # nuclei per image
    count_max: int
    diameter_percentiles: dict[int, float]  # pixels
    box_side_percentiles: dict[int, float]  # pixels
    touching_share: float  # of the nuclei; NaN without nuclei
    # Over images: raw levels between the two percentiles of the image; medians of
    # nuclei and background after normalisation, 0..255, and their difference.
    range_percentiles: dict[int, float]
    foreground_percentiles: dict[int, float]
    background_percentiles: dict[int, float]
    contrast_percentiles: dict[int, float]


def summarize(images: Sequence[ImageStatistics]) -> DatasetStatistics:
    """Put the measurements of at least one image together."""
    counts = np.array([len(image.areas) for image in images])
    foreground = np.array([image.foreground for image in images])
    background = np.array([image.background for image in images])
    touching = np.concatenate([image.touching for image in images])
    sizes = Counter(f"{image.height} x {image.width}" for image in images)
    return DatasetStatistics(
        images=len(images),
        empty_share=float(np.mean(counts == 0)),
        sizes=dict(sizes.most_common()),
        modalities=dict(Counter(image.modality for image in images).most_common()),
        nuclei=int(counts.sum()),
        count_median=float(np.median(counts)),
        count_max=int(counts.max()),
        diameter_percentiles=_percentiles(np.concatenate([i.diameters for i in images])),
        box_side_percentiles=_percentiles(np.concatenate([i.box_sides for i in images])),
        touching_share=float(touching.mean()) if touching.size else math.nan,
        range_percentiles=_percentiles(np.array([i.high - i.low for i in images])),
        foreground_percentiles=_percentiles(foreground),
        background_percentiles=_percentiles(background),
        contrast_percentiles=_percentiles(foreground - background),
    )


def _percentiles(values: np.ndarray) -> dict[int, float]:
    values = values[np.isfinite(values)]
    if not values.size:
        return dict.fromkeys(PERCENTILES, math.nan)
    return dict(zip(PERCENTILES, np.percentile(values, PERCENTILES).tolist(), strict=True))


# ------------------------------------------------------------------------- proposals


@dataclass(frozen=True)
class Proposal:
    """Settings that fit a data set. Lengths are network pixels, after scaling."""

    scale: float
    anchors: tuple[tuple[int, ...], ...]  # sizes on p2 to p6
    recall_50: float  # share of boxes that some anchor of the grid meets with IoU >= 0.5
    recall_70: float
    detections: int  # per image
    crop: int  # side of the training crops

    def to_config(self) -> dict:
        """The settings as nested config keys."""
        # Proposals are counted before classification and suppression, so twice the cap.
        # Training sees crops: its own numbers are a matter of speed, and stay.
        topk = max(1000, 2 * self.detections)
        return {
            "INPUT": {"SCALE": self.scale, "CROP": {"SIZE": [self.crop, self.crop]}},
            "MODEL": {
                "ANCHOR_GENERATOR": {"SIZES": [list(sizes) for sizes in self.anchors]},
                "RPN": {
                    "PRE_NMS_TOPK_TEST": topk,  # for each pyramid level
                    "POST_NMS_TOPK_TEST": topk,  # for each image
                },
            },
            "TEST": {"DETECTIONS_PER_IMAGE": self.detections},
        }


def propose(
    images: Sequence[ImageStatistics], scale: float | None = None, target: float = 27.0
) -> Proposal:
    """Settings for images like these; ``scale`` None stands for :func:`propose_scale`.

    The detection cap is 1.5 times the fullest image, rounded up to 50: enough for a fuller one,
    little enough to keep the false ones out. The crop shows about nine median diameters, and at
    least twice the 99th percentile of the box sides, rounded up to 32 and within 128..1024.

    Raises:
        ValueError: the images hold no nucleus.
    """
    diameters = np.concatenate([image.diameters for image in images])
    if not diameters.size:
        raise ValueError("no nuclei to derive settings from")
    if scale is None:
        scale = propose_scale(float(np.median(diameters)), target)
    boxes = scale * np.concatenate([image.boxes for image in images])
    frames = scale * np.concatenate(
        [np.tile((image.width, image.height), (len(image.areas), 1)) for image in images]
    )
    anchors = fit_anchors(boxes, frames)
    iou = best_anchor_iou(boxes, frames, anchors)
    largest = np.percentile(_box_sides(boxes), 99)
    view = max(9 * scale * np.median(diameters), 2 * largest)
    return Proposal(
        scale=scale,
        anchors=anchors,
        recall_50=float(np.mean(iou >= 0.5)),
        recall_70=float(np.mean(iou >= 0.7)),
        detections=math.ceil(1.5 * max(len(image.areas) for image in images) / 50) * 50,
        crop=int(np.clip(math.ceil(view / 32) * 32, 128, 1024)),
    )


def propose_scale(diameter: float, target: float = 27.0) -> float:
    """Enlargement that brings the median ``diameter`` (pixels) to about ``target`` pixels.

    The finest features that a mask is cut from have one value in 4 x 4 pixels, and the box head
    looks at 7 x 7 of them, so 27 px across (7 x 7 values) is about the least that shows an
    outline; below it nuclei gain from up-sampling, above it time and memory are spent for
    little. In steps of 0.5, since finer ones make no measurable difference, within 0.25..4.
    """
    return float(np.clip(round(2 * target / diameter) / 2, 0.25, 4.0))


def fit_anchors(boxes: np.ndarray, frames: np.ndarray) -> tuple[tuple[int, int], ...]:
    """Two anchor sizes, half an octave apart, for each of p2 to p6; they double like the strides.

    The smallest size is the one whose anchors meet most of the boxes with IoU >= 0.5, positions
    included, among the boxes between the 1st and 99th percentile of the sides. One size per
    level would leave out many boxes: between two octaves size alone costs up to half of the IoU.

    Args:
        boxes: (N, 4) x1, y1, x2, y2 in network pixels, N > 0.
        frames: (N, 2) width and height of each box's image, in network pixels.
    """
    sides = _box_sides(boxes)
    low, high = np.percentile(sides, (1, 99))
    usual = (sides >= low) & (sides <= high)

    def quality(anchors: Sequence[Sequence[float]]) -> tuple[float, float]:
        iou = best_anchor_iou(boxes[usual], frames[usual], anchors)
        return np.mean(iou >= 0.5), iou.mean()

    candidates = [
        tuple((first * 2**level, round(first * 2 ** (level + 0.5))) for level in range(5))
        for first in _SMALLEST_ANCHORS
    ]
    return max(candidates, key=quality)


def best_anchor_iou(
    boxes: np.ndarray, frames: np.ndarray, anchors: Sequence[Sequence[float]]
) -> np.ndarray:
    """IoU of each box with the best anchor of Detectron2's grid, positions included.

    Among anchors of one size and shape the one whose centre lies nearest to the box's overlaps
    it most, so one candidate per level, size and shape is enough and the result is exact.

    Args:
        boxes: (N, 4) x1, y1, x2, y2 in network pixels.
        frames: (N, 2) width and height of each box's image, in network pixels.
        anchors: sizes (square root of the area, network pixels) for each of p2 to p6.

    Returns:
        (N,) in 0..1.
    """
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    areas = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
    best = np.zeros(len(boxes))
    for stride, sizes in zip(STRIDES, anchors, strict=True):
        last = np.ceil(frames / stride) - 1  # the grid ends with the image
        points = stride * np.clip(np.round(centres / stride), 0, last)
        for size in sizes:
            for ratio in ASPECT_RATIOS:
                half = size / 2 * np.array((ratio**-0.5, ratio**0.5))
                sides = np.minimum(boxes[:, 2:], points + half)
                sides -= np.maximum(boxes[:, :2], points - half)
                overlap = np.prod(np.maximum(sides, 0), axis=1)
                best = np.maximum(best, overlap / (areas + size**2 - overlap))
    return best

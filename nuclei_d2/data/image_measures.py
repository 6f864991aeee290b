"""Is an image like those that the model learnt from? Measured alike in training and prediction.

Contrast is no measure: normalisation undoes a change of it. What normalisation cannot undo, the
noise that is stretched with it, is one. docs/prediction.md tells how well they separate.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np
from detectron2.config import CfgNode

from nuclei_d2.data.augmentation import ResampleTransform, scaled_size
from nuclei_d2.data.datasets.statistics import median_diameter
from nuclei_d2.data.image_io import read_image
from nuclei_d2.data.normalization import ImageNormalizer, estimate_noise

TRAINING_IMAGES = 100  # at most, evenly spread over the training sets
_PERCENTILES = (1, 99)  # of the training images
_FINE, _COARSE = 2, 8  # network pixels, the scales at which edges are compared
_LEVELS = 256


class Measure(NamedTuple):
    """What can be wrong with an image, in words.

    Attributes:
        low, high: values beyond which nothing can harm; None where too little or too much does.
        problem: a word for the reader.
        remedy: what to do about it.
        slack: how far the range goes beyond the percentiles of training, share of its width.
    """

    low: float | None
    high: float | None
    problem: str
    remedy: str
    slack: float = 0.1


MEASURES = {
    "focus": Measure(None, 1.0, "blurred", "refocus, or train with such images"),
    "noise": Measure(0.0, None, "noisy", "expose longer, or train with such images"),
    # Normalisation alone puts 0.2 % at full scale, so training says little about the next image.
    "saturated": Measure(
        0.0, None, "overexposed", "expose shorter: bright nuclei lose their shape", slack=1.0
    ),
    "background": Measure(
        0.0,
        None,
        "bright background",
        "invert it if nuclei are dark, or use a model of such images",
    ),
    "diameter": Measure(None, None, "nuclei of another size", "give their --diameter"),
}


def count_pixels(pixels: np.ndarray) -> np.ndarray:
    """What the measures need to know of an image, or of a part: parts add up to the whole.

    Args:
        pixels: (h, w, 3) float32, 0..255, as the network sees them.

    Returns:
        (259,) float64: pixels of each grey level, then the pixels times the gradients' mean square
        at 2 and at 8 network pixels, and times the noise's standard deviation.
    """
    grey = np.ascontiguousarray(pixels.mean(axis=2))
    levels = np.bincount(np.rint(grey).astype(np.intp).ravel(), minlength=_LEVELS)
    means = (_mean_gradient(grey, _FINE), _mean_gradient(grey, _COARSE), estimate_noise(grey))
    return np.concatenate([levels, np.multiply(means, grey.size)]).astype(float)


def _mean_gradient(grey: np.ndarray, size: int) -> float:
    """Mean squared gradient between squares of ``size`` pixels; 0 without two of them."""
    sides = [length // size for length in grey.shape]
    if min(sides) < 2:
        return 0.0
    small = cv2.resize(grey, sides[::-1], interpolation=cv2.INTER_AREA)
    return float(sum(np.square(np.diff(small, axis=axis)).mean() for axis in (0, 1)))


def image_measures(counts: np.ndarray, diameter: float | None) -> dict[str, float | None]:
    """The value of each of :data:`MEASURES`; None where there is nothing to measure.

    Args:
        counts: the sum of :func:`count_pixels` over the image.
        diameter: median of the nuclei, in pixels as the network sees them.

    Returns:
        "focus": gradients' mean square at 2 network pixels over that at 8, up to 1, whatever the
        contrast and the number of nuclei; blur lowers it. "noise": standard deviation, share of
        full scale. "saturated": share of pixels at full scale. "background": median grey level,
        share of full scale. "diameter": as given.
    """
    levels, (fine, coarse, noise) = counts[:_LEVELS], counts[_LEVELS:]
    pixels = levels.sum()
    median = np.searchsorted(levels.cumsum(), pixels / 2)
    return {
        "focus": float(min(fine / coarse, 1)) if coarse > 0 else None,
        "noise": float(noise / pixels / (_LEVELS - 1)),
        "saturated": float(levels[-1] / pixels),
        "background": float(median / (_LEVELS - 1)),
        "diameter": diameter or None,
    }


def judge(values: Mapping[str, float | None], ranges: CfgNode) -> dict[str, dict[str, Any]]:
    """Compare with the ranges in training.

    Args:
        values: from :func:`image_measures`.
        ranges: the config's INPUT.TRAINING_RANGES.

    Returns:
        By measure: "value", "range" (two numbers) and "inside"; None where unknown.
    """
    judged = {}
    for name, value in values.items():
        known = list(ranges[name.upper()]) or None
        inside = None if value is None or known is None else known[0] <= value <= known[1]
        judged[name] = {"value": value, "range": known, "inside": inside}
    return judged


def measure_warnings(judged: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """One line for every measure outside, with the remedy."""
    return [
        f"{MEASURES[name].problem}: {name} {entry['value']:.2g}, training "
        f"{entry['range'][0]:.2g} to {entry['range'][1]:.2g}; {MEASURES[name].remedy}"
        for name, entry in judged.items()
        if entry["inside"] is False
    ]


def training_ranges(records: Sequence[dict[str, Any]], cfg: CfgNode) -> dict[str, list[float]]:
    """The ranges of the measures in up to :data:`TRAINING_IMAGES` training images.

    From the 1st to the 99th percentile, with some slack; an end at which nothing can
    harm is the limit of the measure.

    Args:
        records: Detectron2 dataset dicts with RLE masks.
        cfg: says how images are normalised and scaled.

    Returns:
        [low, high] by the keys of INPUT.TRAINING_RANGES, [] for a measure without a value.

    Raises:
        NucleiError: an image cannot be read.
    """
    chosen = np.linspace(0, len(records) - 1, min(len(records), TRAINING_IMAGES))
    found = [_measure_record(records[k], cfg) for k in np.rint(chosen).astype(int)]
    ranges = {}
    for name, measure in MEASURES.items():
        values = [values[name] for values in found if values[name] is not None]
        ranges[name.upper()] = _range(values, measure) if values else []
    return ranges


def _measure_record(record: dict[str, Any], cfg: CfgNode) -> dict[str, float | None]:
    image = ImageNormalizer(cfg)(read_image(record["file_name"]))
    sides = image.shape[:2]
    pixels = ResampleTransform(*sides, *scaled_size(sides, cfg.INPUT.SCALE)).apply_image(image)
    return image_measures(count_pixels(pixels), median_diameter([record]) * cfg.INPUT.SCALE)


def _range(values: Sequence[float], measure: Measure) -> list[float]:
    low, high = np.percentile(values, _PERCENTILES)
    slack = measure.slack * (high - low)
    low = max(low - slack, 0) if measure.low is None else measure.low
    high = high + slack if measure.high is None else measure.high
    return [float(f"{end:.4g}") for end in (low, high)]

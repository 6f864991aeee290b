"""How much to enlarge an image so that its nuclei are as large as those the model learnt from."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from detectron2.config import CfgNode
from torch import nn

from nuclei_d2.data.augmentation import ResampleTransform, scaled_size
from nuclei_d2.data.datasets.statistics import equivalent_diameter
from nuclei_d2.data.normalization import ContrastRange, ImageNormalizer
from nuclei_d2.inference.contrast import LEAST_CONTRAST, nuclear_contrast
from nuclei_d2.inference.image_source import ImageSource
from nuclei_d2.structures.cropped_mask import split_masks
from nuclei_d2.utils.errors import NucleiError

# The automatic choice looks at windows of up to so many of the model's diameters, at these scales
# but those at which the whole image would be smaller than LEAST_VIEW diameters.
VIEW, LEAST_VIEW = 12.5, 3.0
FACTORS = tuple(2 ** (half_octaves / 2) for half_octaves in range(-6, 5))  # 1/8 to 4
_MOST_GIVEN = 64  # times larger or smaller, by what the user gives
# Standard deviation of the logarithm of the diameters that are taken for usual: wider than one
# image's, so that what the model finds decides, unless it is pieces of nuclei, or clumps.
_SPREAD = 0.6
# The measured diameter moves the factor by at most one step of FACTORS, to either side.
_STEP = math.sqrt(2)
# Evidence for nuclei that a factor needs, in nuclei of the model's diameter.
_LEAST_EVIDENCE = 0.1
# The search ends where this many factors in a row have less than this share of the best evidence.
_PATIENCE, _SHARE = 2, 0.6
# Probes along each side of a part of the image in which nothing was found yet, and their side.
_PROBES, _PROBE_SIDE = 5, 256


class ScaleChoice(NamedTuple):
    """
    Attributes:
        factor: enlargement, on top of INPUT.SCALE.
        explanation: where it comes from, for people.
    """

    factor: float
    explanation: str


def load_choice(path: Path) -> ScaleChoice:
    """One that was written as JSON."""
    return ScaleChoice(**json.loads(path.read_bytes()))


class Window(NamedTuple):
    """A part of the image, in its pixels."""

    top: int
    left: int
    height: int
    width: int

    @property
    def slices(self) -> tuple[slice, slice]:
        """Rows and columns."""
        bottom, right = self.top + self.height, self.left + self.width
        return slice(self.top, bottom), slice(self.left, right)

    def crop(self, centre: np.ndarray, side: int) -> "Window":
        """The window of up to ``side`` pixels around (y, x) that fits into this one."""
        height, width = min(self.height, side), min(self.width, side)
        top = np.clip(round(centre[0] - height / 2), self.top, self.top + self.height - height)
        left = np.clip(round(centre[1] - width / 2), self.left, self.left + self.width - width)
        return Window(int(top), int(left), height, width)

    def contains(self, points: np.ndarray) -> np.ndarray:
        """(N,) bool for (N, 2) points (y, x)."""
        offsets = points - (self.top, self.left)
        return ((offsets >= 0) & (offsets < (self.height, self.width))).all(axis=1)


class Found(NamedTuple):
    """Nuclei that a look at a part of the image found, in pixels of the image.

    Attributes:
        centres: (N, 2) y, x.
        diameters: (N,) of the circles of the same area.
        scores: (N,) 0 to 1.
    """

    centres: np.ndarray
    diameters: np.ndarray
    scores: np.ndarray


# The sure nuclei of a window, looked at with a factor.
Finder = Callable[[Window, float], Found]


def choose_scale(
    source: ImageSource,
    cfg: CfgNode,
    find: Finder,
    *,
    diameter: float | str | None = None,
    pixel_size: float | None = None,
) -> ScaleChoice:
    """Decide how much to enlarge an image before the model sees it.

    What is given decides: the diameter, or the pixel size. Else the image's own pixel size, where
    the model's is known too; else an estimate from the image (:func:`estimate_factor`).

    Args:
        cfg: the model's; INPUT.NUCLEUS_DIAMETER and INPUT.PIXEL_SIZE say what it learnt from.
        find: called for the estimate only.
        diameter: of the image's nuclei in pixels, or "auto" for the estimate.
        pixel_size: of the image, in micrometres.

    Raises:
        NucleiError: both are given, one is no positive number, or the model's own is unknown.
    """
    model_diameter, model_pixel = cfg.INPUT.NUCLEUS_DIAMETER, cfg.INPUT.PIXEL_SIZE
    if diameter is not None and pixel_size is not None:
        raise NucleiError("--diameter and --pixel-size both set the scale; give one of them")
    if diameter not in (None, "auto"):
        diameter = _positive("--diameter", diameter)
        factor = _known(model_diameter, "--diameter", "INPUT.NUCLEUS_DIAMETER") / diameter
        _check_factor(factor, "--diameter")
        reason = f"nuclei of {diameter:.3g} px as given, the model's have {model_diameter:.3g} px"
    elif pixel_size is not None:
        pixel_size = _positive("--pixel-size", pixel_size)
        factor = pixel_size / _known(model_pixel, "--pixel-size", "INPUT.PIXEL_SIZE")
        _check_factor(factor, "--pixel-size")
        reason = f"{pixel_size:.3g} um/px as given, the model's {model_pixel:.3g}"
    elif diameter is None and source.pixel_size and model_pixel > 0:
        factor = source.pixel_size / model_pixel
        reason = f"{source.pixel_size:.3g} um/px in the file, the model's {model_pixel:.3g}"
    elif diameter is None and not model_diameter > 0:
        factor = 1.0
        reason = "the model's nuclear size is unknown; --opts INPUT.NUCLEUS_DIAMETER gives it"
    else:
        model_diameter = _known(model_diameter, "--diameter auto", "INPUT.NUCLEUS_DIAMETER")
        factor, width = estimate_factor(source, model_diameter, find)
        reason = (
            f"nuclei of about {width:.2g} px by estimate, the model's have {model_diameter:.3g} px"
        )
        if not width:
            reason = "no nuclei found at any scale"
    return ScaleChoice(factor, f"factor {factor:.3g}: {reason}")


def _positive(option: str, value: float | str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise NucleiError(f"{option} is {value!r}; it is a number above 0, or auto for --diameter")
    return number


def _check_factor(factor: float, option: str) -> None:
    if not 1 / _MOST_GIVEN <= factor <= _MOST_GIVEN:
        raise NucleiError(
            f"{option} would scale the image by {factor:.3g}; a diameter is in pixels, a pixel's "
            "size in micrometres"
        )


def _known(value: float, option: str, key: str) -> float:
    if not value > 0:
        raise NucleiError(
            f"{option} needs the model's own, which its config does not know; add --opts {key} and "
            "the value of the images that it was trained on"
        )
    return value


def estimate_factor(
    source: ImageSource, model_diameter: float, find: Finder
) -> tuple[float, float]:
    """The factor that brings the nuclei to the model's diameter, and their median one in pixels.

    A coarse pass, from the smallest factor up, looks for the factor with which the model finds
    most; the diameter of what it found then makes it exact. The evidence for a factor is the sum
    over the nuclei that are found with it of score x diameter x usual, where usual is 1 for nuclei
    that the network sees in the model's diameter, and falls off as a Gaussian of the logarithm. Too
    small, nuclei are missed, or clumps found instead; too large, they are missed or fall to pieces.

    The view is bounded, so a larger factor sees less of the image: the part where the last factor
    found most, or, where it found nothing, of most contrast. The evidence is compared within that
    part, and the ratios multiplied.

    Returns:
        (factor, pixels); (1, 0) where nothing is found.
    """
    window = Window(0, 0, *source.size)
    found = Found(np.zeros((0, 2)), np.zeros(0), np.zeros(0))
    evidence, ratios, widths = np.zeros(0), [], []
    level, best, behind = 0.0, -math.inf, 0
    least_factor = LEAST_VIEW * model_diameter / min(source.size)
    factors = [factor for factor in FACTORS if factor >= least_factor] or [1.0]
    for factor in factors:
        side = math.ceil(VIEW * model_diameter / factor)
        window = _richest(source, window, side, found.centres, evidence)
        before = evidence[window.contains(found.centres)].sum()
        found = find(window, factor)
        seen = found.diameters * factor / model_diameter  # 1: as in training
        usual = np.exp(-0.5 * (np.log(seen) / _SPREAD) ** 2)
        evidence = found.scores * found.diameters * usual
        least = _LEAST_EVIDENCE * model_diameter / factor
        level += math.log((evidence.sum() + least) / (before + least))
        ratios.append(level if evidence.sum() > least else -math.inf)
        widths.append(float(np.median(found.diameters)) if len(found.diameters) else 0.0)
        best = max(best, ratios[-1])
        behind = behind + 1 if level < best + math.log(_SHARE) else 0
        if behind == _PATIENCE:
            break
    if best == -math.inf:
        return 1.0, 0.0
    chosen = int(np.argmax(ratios))
    factor, width = factors[chosen], widths[chosen]
    return float(np.clip(model_diameter / width, factor / _STEP, factor * _STEP)), width


def _richest(
    source: ImageSource, window: Window, side: int, centres: np.ndarray, evidence: np.ndarray
) -> Window:
    """The part of up to ``side`` pixels with most evidence, or contrast, among some parts."""
    if max(window.height, window.width) <= side:
        return window
    if not len(centres):
        return window.crop(_most_contrast(source, window), side)
    parts = [window.crop(centre, side) for centre in centres]
    return max(parts, key=lambda part: evidence[part.contains(centres)].sum())


def _most_contrast(source: ImageSource, window: Window) -> tuple[float, float]:
    """Centre (y, x) of the probe with the largest standard deviation."""
    steps = (np.arange(_PROBES) + 0.5) / _PROBES
    centres = [
        (window.top + y * window.height, window.left + x * window.width)
        for y in steps
        for x in steps
    ]
    return max(centres, key=lambda c: source.read(*window.crop(c, _PROBE_SIDE).slices).std())


def make_finder(
    source: ImageSource,
    contrast: ContrastRange,
    cfg: CfgNode,
    model: nn.Module,
    least_contrast: float = LEAST_CONTRAST,
) -> Finder:
    """How a model of this package looks at a window: as in prediction, at the factor's size.

    Args:
        contrast: of the whole image.
        model: in evaluation mode.
        least_contrast: see :class:`~nuclei_d2.inference.pipeline.PredictionOptions`.
    """
    normalize = ImageNormalizer(cfg)
    noise = normalize.visible_noise(contrast)

    @torch.no_grad()
    def find(window: Window, factor: float) -> Found:
        image = normalize(source.read(*window.slices), contrast)
        sides = image.shape[:2]
        new = scaled_size(sides, factor * cfg.INPUT.SCALE)
        pixels = ResampleTransform(*sides, *new).apply_image(image)
        inputs = {"image": torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))}
        instances = model([inputs])[0]["instances"].to("cpu")
        masks, scores = split_masks(instances.pred_masks), instances.scores.numpy()
        areas = np.array([np.count_nonzero(mask.mask) for mask in masks])
        sure = np.flatnonzero((scores >= cfg.TEST.SCORE_THRESH_LABELS) & (areas > 0))
        seen = nuclear_contrast([masks[k] for k in sure], pixels, noise)
        sure = sure[~(seen < least_contrast)]
        shrink = np.divide(sides, new)
        centres = [
            (masks[k].top + masks[k].mask.shape[0] / 2, masks[k].left + masks[k].mask.shape[1] / 2)
            for k in sure
        ]
        centres = np.array(centres).reshape(-1, 2) * shrink + (window.top, window.left)
        diameters = equivalent_diameter(areas[sure] * shrink.prod())
        return Found(centres, diameters, scores[sure].astype(float))

    return find

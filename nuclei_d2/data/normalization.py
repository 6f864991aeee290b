"""The one normalisation that images go through, in training, evaluation and prediction."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import cv2
import numpy as np
from detectron2.config import CfgNode, configurable

from nuclei_d2.utils.errors import NucleiError

# Immerkaer's noise mask: the difference of two Laplacians, zero on any quadratic surface.
_NOISE_MASK = np.array([[1, -2, 1], [-2, 4, -2], [1, -2, 1]], np.float32)
_NORMAL_MAD = 0.6745  # median of |x| for x ~ N(0, 1)
_ROUNDING = 12**-0.5  # standard deviation of rounding to whole grey levels
_TINY = 1e-20  # grey levels; keeps the scale of an all-black image finite in float32
_MAX_LEVELS = 1 << 20  # integer images with a wider range are sorted instead of counted
_MAX_SAMPLES = 1 << 24  # values of an image whose levels cannot be counted band by band
_BAND_ROWS, _BAND_PIXELS = 256, 1 << 22  # least rows (of whole tiles) and usual size of a band


def normalize(
    image: np.ndarray,
    percentiles: tuple[float, float] = (1.0, 99.8),
    noise_floor: float = 12.0,
    min_levels: float = 4.0,
) -> np.ndarray:
    """Stretch the image's percentiles to 0 and 255, but not its noise.

    The percentiles (linear interpolation, all channels jointly) are taken over the whole array:
    normalise an image once, before it is cropped or tiled. The range that becomes 0..255 spans at
    least ``noise_floor`` standard deviations of the noise (:func:`estimate_noise`) and, for
    integer-valued images, ``min_levels`` grey levels, so an empty field stays flat and dark.

    Args:
        image: (H, W) or (H, W, C) finite grey levels of any range.
        percentiles: (low, high) in 0..100.

    Returns:
        float32 of the same shape, 0..255.
    """
    return contrast_range(image, percentiles, noise_floor, min_levels).apply(image)


@dataclass(frozen=True)
class ContrastRange:
    """Grey levels of an image that become 0 (``low``) and 255 (``low + span``).

    Attributes:
        noise: standard deviation of the pixel noise of every channel, in grey levels of the image;
            of integers at least that of rounding to them.
    """

    low: float
    span: float
    noise: tuple[float, ...] = (0.0,)

    @property
    def visible_noise(self) -> np.ndarray:
        """The noise in the normalised image, where full scale is 255; at least 0.1 % of that."""
        return 255 * np.maximum(np.divide(self.noise, self.span), 1e-3)

    def apply(self, image: np.ndarray) -> np.ndarray:
        """Grey levels of any shape, of the whole image or a window of it -> float32, 0..255."""
        image = np.asarray(image, np.float32)
        scaled = (image - np.float32(self.low)) * np.float32(255 / self.span)
        return np.clip(scaled, 0, 255, out=scaled)


def contrast_range(
    image: np.ndarray,
    percentiles: tuple[float, float] = (1.0, 99.8),
    noise_floor: float = 12.0,
    min_levels: float = 4.0,
) -> ContrastRange:
    """The range that :func:`normalize` stretches; it takes the same arguments."""
    image = np.asarray(image, np.float32)
    if image.size == 0:
        return ContrastRange(0.0, 255.0)
    integer = bool((np.rint(image) == image).all())
    low, high = _percentiles(image, percentiles, integer)
    noise = channel_noise(image)
    floor = max(noise_floor * max(noise), min_levels if integer else 0.0)
    span = _span(high - low, floor, image.min(), image.max())
    return ContrastRange(low, span, _with_rounding(noise, integer))


def _with_rounding(noise: Sequence[float], integer: bool) -> tuple[float, ...]:
    return tuple(max(value, _ROUNDING if integer else 0.0) for value in noise)


def _span(stretch: float, floor: float, darkest: float, brightest: float) -> float:
    rounding = np.finfo(np.float32).eps * max(brightest, -darkest, _TINY)
    return float(max(stretch, floor, rounding))


def estimate_noise(image: np.ndarray) -> float:
    """Standard deviation of the pixel noise, in grey levels, whatever the image shows.

    Of several channels the noisiest counts: where a dye has one channel, the others are empty.

    The response to the mask of Immerkaer, "Fast noise variance estimation", CVIU 64 (1996),
    section 2, with the median absolute deviation in place of the mean, which edges would raise.
    Noise that is correlated between pixels (up-scaled or JPEG images) is underestimated.

    Args:
        image: (H, W) or (H, W, C) finite floats. Below 3 x 3 pixels the estimate is 0.
    """
    return max(channel_noise(image))


def channel_noise(image: np.ndarray) -> tuple[float, ...]:
    """:func:`estimate_noise` of every channel."""
    image = np.asarray(image, np.float32)
    image = image[:, :, None] if image.ndim == 2 else image
    if min(image.shape[:2]) < 3:
        return (0.0,) * image.shape[2]
    magnitude = _noise_magnitude(image)
    integer = bool((np.rint(magnitude) == magnitude).all())
    medians = (_percentiles(channel, (50.0,), integer)[0] for channel in magnitude)
    return tuple(map(_noise_from_median, medians))


def _noise_magnitude(image: np.ndarray) -> np.ndarray:
    """Of (H, W, C): (C, H - 2, W - 2)."""
    filtered = np.abs(cv2.filter2D(image, cv2.CV_32F, _NOISE_MASK)[1:-1, 1:-1])
    return np.moveaxis(np.atleast_3d(filtered), 2, 0)


def _noise_from_median(median: float) -> float:
    return median / _NORMAL_MAD / float(np.linalg.norm(_NOISE_MASK))


def _percentiles(values: np.ndarray, percentiles: tuple[float, ...], integer: bool) -> list[float]:
    """``np.percentile`` (linear), by counting instead of sorting where values are integers."""
    low = values.min()
    if not integer or values.max() - low >= _MAX_LEVELS:
        return np.percentile(values, percentiles).tolist()
    counts = np.bincount((values - low).ravel().astype(np.intp))
    return _counted_percentiles(counts, float(low), percentiles)


def _counted_percentiles(
    counts: np.ndarray, low: float, percentiles: tuple[float, ...]
) -> list[float]:
    """Percentiles of values of which ``counts[k]`` are ``low + k``."""
    below_or_at = counts.cumsum()
    ranks = np.asarray(percentiles) / 100 * (below_or_at[-1] - 1)
    below = np.searchsorted(below_or_at, np.floor(ranks), side="right")
    above = np.searchsorted(below_or_at, np.ceil(ranks), side="right")
    return (low + below + (above - below) * (ranks % 1)).tolist()


class PixelSource(Protocol):
    """An image that may be too large for memory (:class:`~nuclei_d2.inference.ImageSource`)."""

    size: tuple[int, int]
    channels: Sequence[str]
    dtype: np.dtype

    def read(self, rows: slice, cols: slice) -> np.ndarray:
        """A window, (h, w, C) float32 raw grey levels."""


def contrast_range_of_source(
    source: PixelSource,
    percentiles: tuple[float, float] = (1.0, 99.8),
    noise_floor: float = 12.0,
    min_levels: float = 4.0,
) -> ContrastRange:
    """:func:`contrast_range` of the whole image, which is read once, in bands of rows.

    The same numbers, to the last bit, for pixels of 8 and 16 bits, which are counted. Of others
    there are up to 2^24 values in memory, and as many of the noise: from an image with more pixels,
    every second (third ..)
    in both directions.
    """
    pool = _PixelPool(source)
    for band in _bands(source):
        pool.add(band)
    if pool.darkest > pool.brightest:
        return ContrastRange(0.0, 255.0)
    low, high = pool.levels.percentiles(percentiles, pool.grey)
    channels = pool.noise[:1] if pool.grey else pool.noise
    noise = [_noise_from_median(c.percentiles((50.0,), False)[0]) for c in channels]
    floor = max(noise_floor * max(noise), min_levels if pool.integer else 0.0)
    span = _span(high - low, floor, pool.darkest, pool.brightest)
    return ContrastRange(low, span, _with_rounding(noise, pool.integer))


def _bands(source: PixelSource) -> Iterator[np.ndarray]:
    """The image from top to bottom; each band begins with the last two rows of the one before."""
    height, width = source.size
    rows = max(_BAND_ROWS, _BAND_PIXELS // max(width, 1) // _BAND_ROWS * _BAND_ROWS)
    above = np.zeros((0, width, len(source.channels)), np.float32)
    for start in range(0, height, rows):
        band = np.concatenate([above, source.read(slice(start, start + rows), slice(None))])
        yield band
        above = band[-2:]


class _PixelPool:
    """What :func:`contrast_range` needs to know of an image that comes in bands."""

    def __init__(self, source: PixelSource) -> None:
        channels = range(len(source.channels))
        if source.dtype.kind in "bui" and source.dtype.itemsize <= 2:
            self.levels = _Counts(-(1 << 15), 3 << 15)
            # The mask's weights of either sign add up to 8.
            self.noise = [_Counts(0, 8 << 16) for _ in channels]
        else:
            values = source.size[0] * source.size[1] * len(channels)
            step = math.ceil(math.sqrt(values / _MAX_SAMPLES))
            self.levels, self.noise = _Samples(step), [_Samples(step) for _ in channels]
        self.grey = self.integer = True
        self.darkest, self.brightest = math.inf, -math.inf
        self._rows = 0

    def add(self, band: np.ndarray) -> None:
        """The next of :func:`_bands`."""
        new = band[min(self._rows, 2) :]
        self.grey &= bool((new == new[:, :, :1]).all())
        self.integer &= bool((np.rint(new) == new).all())
        self.darkest = min(self.darkest, new.min())
        self.brightest = max(self.brightest, new.max())
        self.levels.add(new, self._rows)
        self._rows += len(new)
        if min(band.shape[:2]) >= 3:
            for noise, magnitude in zip(self.noise, _noise_magnitude(band), strict=True):
                noise.add(magnitude[:, :, None], self._rows)


class _Counts:
    """How often each integer from ``low`` on occurs in the channels of an image."""

    def __init__(self, low: int, size: int) -> None:
        self._low, self._counts, self._channels = low, np.zeros(size, np.int64), 1

    def add(self, values: np.ndarray, _row: int) -> None:
        places = (values - self._low).ravel().astype(np.intp)
        self._counts += np.bincount(places, minlength=len(self._counts))
        self._channels = values.shape[2]

    def percentiles(self, percentiles: tuple[float, ...], grey: bool) -> list[float]:
        """Of one channel, where all are the same, else of all; 0 without values."""
        if not self._counts.any():
            return [0.0] * len(percentiles)
        counts = self._counts // (self._channels if grey else 1)
        return _counted_percentiles(counts, float(self._low), percentiles)


class _Samples:
    """Every ``step``-th value of an image in both directions."""

    def __init__(self, step: int) -> None:
        self._step, self._values = step, []

    def add(self, values: np.ndarray, row: int) -> None:
        step = self._step
        self._values.append(values[-row % step :: step, ::step].reshape(-1, values.shape[2]))

    def percentiles(self, percentiles: tuple[float, ...], grey: bool) -> list[float]:
        """Of one channel, where all are the same, else of all; 0 without values."""
        values = np.concatenate(self._values or [np.zeros((1, 1), np.float32)])
        return np.percentile(values[:, :1] if grey else values, percentiles).tolist()


class ImageNormalizer:
    """Raw image -> what the network sees; shared by mapper, predictor and demo.

    Called with an (H, W, 1 or 3) image of :func:`read_image`, returns (H, W, 3) float32 in 0..255,
    normalised by :func:`normalize`, grey replicated, channels in ``image_format`` order. A window
    of an image becomes what it is in the whole image if it comes with :meth:`range_of` the image.
    """

    @configurable
    def __init__(
        self,
        *,
        percentiles: tuple[float, float],
        noise_floor: float,
        min_levels: float,
        image_format: str = "RGB",
    ) -> None:
        """See :func:`normalize`; ``image_format`` is "RGB" or "BGR"."""
        low, high = percentiles
        if not 0 <= low < high <= 100:
            raise NucleiError(f"INPUT.PERCENTILES is {percentiles}; needs 0 <= low < high <= 100")
        self.percentiles = (low, high)
        self.noise_floor = noise_floor
        self.min_levels = min_levels
        self.image_format = image_format

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        return {
            "percentiles": cfg.INPUT.PERCENTILES,
            "noise_floor": cfg.INPUT.NOISE_FLOOR,
            "min_levels": cfg.INPUT.MIN_LEVELS,
            "image_format": cfg.INPUT.FORMAT,
        }

    def range_of(self, image: "np.ndarray | PixelSource") -> ContrastRange:
        """The grey levels of a whole image that become 0 and 255.

        Args:
            image: an array as for calling, or a source that is read in bands where it has more than
                2^24 values (:func:`contrast_range_of_source`).
        """
        settings = (self.percentiles, self.noise_floor, self.min_levels)
        if not isinstance(image, np.ndarray):
            if image.size[0] * image.size[1] * len(image.channels) > _MAX_SAMPLES:
                return contrast_range_of_source(image, *settings)
            image = image.read(slice(None), slice(None))
        return contrast_range(_without_copies(image), *settings)

    def visible_noise(self, contrast: ContrastRange) -> np.ndarray:
        """Of every channel that this returns, or (1,) for all: see :class:`ContrastRange`."""
        noise = contrast.visible_noise
        return noise[::-1] if self.image_format == "BGR" else noise

    def __call__(self, image: np.ndarray, contrast: ContrastRange | None = None) -> np.ndarray:
        image = _without_copies(image)
        image = (contrast or self.range_of(image)).apply(image)
        if image.shape[2] == 1:
            return cv2.cvtColor(image, cv2.COLOR_GRAY2RGB)
        return np.ascontiguousarray(image[:, :, ::-1]) if self.image_format == "BGR" else image


def _without_copies(image: np.ndarray) -> np.ndarray:
    """Grey stored as RGB costs no more than grey."""
    return image[:, :, :1] if (image == image[:, :, :1]).all() else image

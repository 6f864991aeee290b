"""Reading microscopy images and label images, and the one normalisation they all go through."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
import tifffile
from detectron2.config import CfgNode, configurable
from PIL import Image, ImageOps, UnidentifiedImageError

from nuclei_d2.utils.errors import NucleiError

_TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
# Immerkaer's noise mask: the difference of two Laplacians, zero on any quadratic surface.
_NOISE_MASK = np.array([[1, -2, 1], [-2, 4, -2], [1, -2, 1]], np.float32)
_NORMAL_MAD = 0.6745  # median of |x| for x ~ N(0, 1)
_TINY = 1e-20  # grey levels; keeps the scale of an all-black image finite in float32
_MAX_LEVELS = 1 << 20  # integer images with a wider range are sorted instead of counted


def read_image(path: str | os.PathLike) -> np.ndarray:
    """Read a PNG, TIFF, JPEG or BMP image of 8 or 16 bits, grey or colour, at full bit depth.

    Alpha is dropped, palettes are expanded, a 1-bit image becomes 0 and 255. A TIFF may hold
    (H, W), (H, W, 3), (H, W, 4) or (3, H, W), in any integer or float type and compression.

    Returns:
        (H, W, C) float32 raw grey levels; C is 1 (grey) or 3 (RGB).

    Raises:
        NucleiError: the file is missing, empty, truncated or no image, holds NaN or infinity,
            or more than one grey or colour image (a z-stack, a time series, other channels).
    """
    return to_float32(read_pixels(path), path)


def read_pixels(path: str | os.PathLike) -> np.ndarray:
    """Read what :func:`read_image` reads, in the file's own type: bool, integer or float.

    Returns:
        (H, W) grey or (H, W, 3) RGB.

    Raises:
        NucleiError: as :func:`read_image`, but NaN and infinity pass.
    """
    pixels = _read(path, as_grey_levels=True)
    return pixels if pixels.ndim == 2 else pixels[:, :, :3]


def to_float32(pixels: np.ndarray, path: str | os.PathLike) -> np.ndarray:
    """Grey levels of the file ``path``, (H, W) or (H, W, C), as (H, W, C) float32; True is 255.

    Raises:
        NucleiError: NaN or infinity among them.
    """
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    if pixels.dtype == bool:
        pixels = pixels * np.uint8(255)
    image = np.ascontiguousarray(pixels, np.float32)
    if pixels.dtype.kind == "f" and not np.isfinite(image).all():
        raise NucleiError(f"{path}: holds NaN or infinite pixels; replace them by numbers")
    return image


def read_label(path: str | os.PathLike) -> np.ndarray:
    """Read a label image: 0 is background, every other value one nucleus. Palettes stay indices.

    Returns:
        (H, W) int32.

    Raises:
        NucleiError: as :func:`read_image`, and for a colour image, negative values, values of
            2^31 and more, and floats that are no integers.
    """
    array = _read(path, as_grey_levels=False)
    if array.ndim == 3:
        raise NucleiError(f"{path}: a label image has one channel, this one is in colour")
    if array.dtype.kind == "f" and not (np.isfinite(array) & (array == np.rint(array))).all():
        raise NucleiError(f"{path}: a label image holds integers, this one has other numbers")
    if array.size and array.min() < 0:
        raise NucleiError(f"{path}: a label image has no negative values; use 0 for background")
    if array.size and int(array.max()) > np.iinfo(np.int32).max:
        raise NucleiError(f"{path}: labels reach {array.max()}; relabel them below 2^31")
    return array.astype(np.int32)


def _read(path: str | os.PathLike, as_grey_levels: bool) -> np.ndarray:
    """(H, W) grey or (H, W, 3) RGB or (H, W, 4) RGBA in the file's own type."""
    path = Path(path)
    decode = _read_tiff if is_tiff(path) else _read_pillow
    with decoding(path):
        return decode(path, as_grey_levels)


def is_tiff(path: Path) -> bool:
    """Whether a file's first bytes are those of a TIFF, whatever its name.

    Raises:
        NucleiError: the file is missing, no file, or empty.
    """
    try:
        with path.open("rb") as file:
            head = file.read(4)
    except OSError as error:
        raise NucleiError(f"cannot read {path}: {error.strerror or error}") from error
    if not head:
        raise NucleiError(f"{path}: the file is empty; copy or download it again")
    return head in _TIFF_MAGIC


@contextmanager
def decoding(path: str | os.PathLike) -> Iterator[None]:
    """Turn whatever a decoder raises on a broken file into one :class:`NucleiError`."""
    try:
        yield
    except NucleiError:
        raise
    except UnidentifiedImageError as error:
        raise NucleiError(
            f"{path}: not a PNG, TIFF, JPEG or BMP image; convert it to one"
        ) from error
    except Image.DecompressionBombError as error:
        raise NucleiError(f"{path}: too large for this format; save it as TIFF") from error
    except Exception as error:  # decoders raise errors of every kind on broken files
        reason = " ".join(str(error).split()) or type(error).__name__
        raise NucleiError(f"{path}: truncated or damaged, cannot decode it ({reason})") from error


def _read_pillow(path: Path, as_grey_levels: bool) -> np.ndarray:
    with Image.open(path) as image:
        if getattr(image, "is_animated", False):
            raise NucleiError(f"{path}: holds {image.n_frames} frames; save one image per file")
        image.load()
        if image.format == "PNG" and _png_bit_depth(path) == 16 and not image.mode.startswith("I"):
            return _read_colour_png16(path, has_grey_alpha=image.mode == "LA")
        image = ImageOps.exif_transpose(image)
        if image.mode == "P" and not as_grey_levels:
            return np.array(image)
        if image.mode in ("LA", "La"):
            image = image.getchannel("L")
        elif image.mode not in ("1", "L", "F", "RGB", "RGBA") and not image.mode.startswith("I"):
            image = image.convert("RGB")
        return np.array(image)


def _png_bit_depth(path: Path) -> int:
    with path.open("rb") as file:
        return file.read(25)[24]  # IHDR is the first chunk of every PNG


def _read_colour_png16(path: Path, has_grey_alpha: bool) -> np.ndarray:
    """Pillow reduces these to 8 bits; OpenCV does not (but reads truncated files silently)."""
    image = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_UNCHANGED)
    if image is None or image.dtype != np.uint16:
        raise NucleiError(f"{path}: cannot decode this 16-bit PNG; save it as TIFF")
    return image[:, :, 0] if has_grey_alpha else image[:, :, 2::-1]


def _read_tiff(path: Path, as_grey_levels: bool) -> np.ndarray:
    with tifffile.TiffFile(path) as tiff:
        if len(tiff.series) != 1:
            raise NucleiError(f"{path}: holds {len(tiff.series)} images; save one image per file")
        series, page = tiff.series[0], tiff.pages.first
        array = _channels_last(series.asarray(), series.axes, path)
        if as_grey_levels and array.ndim == 2 and page.photometric == tifffile.PHOTOMETRIC.PALETTE:
            return np.moveaxis(page.colormap[:, array], 0, -1)
        is_inverted = page.photometric == tifffile.PHOTOMETRIC.MINISWHITE
        if as_grey_levels and is_inverted and array.dtype.kind in "bu":
            return ~array  # bool and unsigned integers: the largest value minus the pixel
    return array


def _channels_last(array: np.ndarray, axes: str, path: Path) -> np.ndarray:
    """Bring a TIFF's array to (H, W) or (H, W, 3 or 4) by its declared axes, else its shape.

    Axes are tifffile's: S samples, C channels; Q and I are undeclared (a plain array written
    to a TIFF, a sequence of pages).
    """
    if array.dtype.kind not in "buif":
        raise NucleiError(f"{path}: pixels of type {array.dtype} are no grey levels")
    if array.ndim == 2:
        return array
    if array.ndim == 3 and axes[2] in "SCYX" and array.shape[2] in (3, 4) and axes[0] in "YQI":
        return array
    if array.ndim == 3 and axes[0] in "SCQI" and array.shape[0] == 3:
        return np.moveaxis(array, 0, -1)
    raise NucleiError(
        f"{path}: shape {array.shape} with axes {axes} is not one grey or RGB image; "
        "save one plane or channel per file"
    )


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
    image = np.asarray(image, np.float32)
    if image.size == 0:
        return image.copy()
    integer = bool((np.rint(image) == image).all())
    low, high = _percentiles(image, percentiles, integer)
    floor = max(noise_floor * estimate_noise(image), min_levels if integer else 0.0)
    rounding = np.finfo(np.float32).eps * max(image.max(), -image.min(), _TINY)
    span = max(high - low, floor, rounding)
    scaled = (image - np.float32(low)) * np.float32(255 / span)
    return np.clip(scaled, 0, 255, out=scaled)


def estimate_noise(image: np.ndarray) -> float:
    """Standard deviation of the pixel noise, in grey levels, whatever the image shows.

    The response to the mask of Immerkaer, "Fast noise variance estimation", CVIU 64 (1996),
    section 2, with the median absolute deviation in place of the mean, which edges would raise.
    Noise that is correlated between pixels (up-scaled or JPEG images) is underestimated.

    Args:
        image: (H, W) or (H, W, C) finite floats. Below 3 x 3 pixels the estimate is 0.
    """
    image = np.asarray(image, np.float32)
    if min(image.shape[:2]) < 3:
        return 0.0
    response = cv2.filter2D(image, cv2.CV_32F, _NOISE_MASK)[1:-1, 1:-1]
    magnitude = np.abs(response)
    integer = bool((np.rint(magnitude) == magnitude).all())
    (median,) = _percentiles(magnitude, (50.0,), integer)
    return median / _NORMAL_MAD / float(np.linalg.norm(_NOISE_MASK))


def _percentiles(values: np.ndarray, percentiles: tuple[float, ...], integer: bool) -> list[float]:
    """``np.percentile`` (linear), by counting instead of sorting where values are integers."""
    low = values.min()
    if not integer or values.max() - low >= _MAX_LEVELS:
        return np.percentile(values, percentiles).tolist()
    counts = np.bincount((values - low).ravel().astype(np.intp)).cumsum()
    ranks = np.asarray(percentiles) / 100 * (values.size - 1)
    below = np.searchsorted(counts, np.floor(ranks), side="right")
    above = np.searchsorted(counts, np.ceil(ranks), side="right")
    return (float(low) + below + (above - below) * (ranks % 1)).tolist()


class ImageNormalizer:
    """Raw image -> what the network sees; shared by mapper, predictor and demo.

    Called with an (H, W, 1 or 3) image of :func:`read_image`, returns (H, W, 3) float32 in 0..255,
    normalised by :func:`normalize`, grey replicated, channels in ``image_format`` order.
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

    def __call__(self, image: np.ndarray) -> np.ndarray:
        if (image == image[:, :, :1]).all():  # grey stored as RGB costs no more than grey
            image = image[:, :, :1]
        image = normalize(image, self.percentiles, self.noise_floor, self.min_levels)
        if image.shape[2] == 1:
            return cv2.cvtColor(image, cv2.COLOR_GRAY2RGB)
        return np.ascontiguousarray(image[:, :, ::-1]) if self.image_format == "BGR" else image

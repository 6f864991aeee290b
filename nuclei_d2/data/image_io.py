"""Reading microscopy images and label images."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
import tifffile
from PIL import Image, ImageOps, UnidentifiedImageError

from nuclei_d2.data.ome_tiff import open_tiff
from nuclei_d2.utils.errors import NucleiError

_ALPHA = ((tifffile.EXTRASAMPLE.ASSOCALPHA,), (tifffile.EXTRASAMPLE.UNASSALPHA,))
_TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def read_image(path: str | os.PathLike) -> np.ndarray:
    """Read a PNG, TIFF, JPEG or BMP image of 8 or 16 bits, grey or colour, at full bit depth.

    Alpha is dropped, palettes are expanded (but for ImageJ's and OME's display LUTs), a 1-bit image
    becomes 0 and 255. A TIFF may hold (H, W), (H, W, 3) or (3, H, W), in any integer or float type
    and compression, if it says that the three are colours or channels.

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
        NucleiError: as :func:`read_image`, and for a JPEG, a colour image, negative values, values
            of 2^31 and more, and floats that are no integers.
    """
    if Path(path).suffix.lower() in (".jpg", ".jpeg"):
        raise NucleiError(f"{path}: JPEG changes the numbers of labels; save them as PNG or TIFF")
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
    """Turn whatever a decoder raises on a broken file into one :class:`NucleiError`.

    Raises:
        MemoryError: as it is; it says nothing about the file.
    """
    try:
        yield
    except (NucleiError, MemoryError):
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
    with open_tiff(path) as tiff:
        if len(tiff.series) != 1:
            raise NucleiError(f"{path}: holds {len(tiff.series)} images; save one image per file")
        series, page = tiff.series[0], tiff.pages.first
        array = _channels_last(series.asarray(), tiff_axes(series), path)
        if as_grey_levels and array.ndim == 2 and has_palette(tiff, series):
            return np.moveaxis(page.colormap[:, array], 0, -1)
        is_inverted = page.photometric == tifffile.PHOTOMETRIC.MINISWHITE
        if as_grey_levels and is_inverted and array.dtype.kind in "bu":
            return ~array  # bool and unsigned integers: the largest value minus the pixel
    return array


def has_palette(tiff: tifffile.TiffFile, series: tifffile.TiffPageSeries) -> bool:
    """Whether pixels are indices of colours. A LUT of ImageJ or OME only colours the display."""
    is_lut = tiff.is_imagej or tiff.is_ome
    return series.keyframe.photometric == tifffile.PHOTOMETRIC.PALETTE and not is_lut


def tiff_axes(series: tifffile.TiffPageSeries) -> str:
    """The axes of a TIFF's image, in which S stands for the samples of a pixel: two are grey and
    alpha, three are colours, a fourth is their alpha. Others are channels (C).

    Raises:
        NucleiError: the colours are those of print.
    """
    page = series.keyframe
    is_print = page.photometric == tifffile.PHOTOMETRIC.SEPARATED
    if is_print and page.tags.valueof("InkSet", 1) == 1:
        raise NucleiError(f"{page.parent.filename}: has CMYK colours; save it as RGB")
    is_colour = page.photometric in (tifffile.PHOTOMETRIC.RGB, tifffile.PHOTOMETRIC.YCBCR)
    has_alpha = page.samplesperpixel == 2 and page.extrasamples in _ALPHA
    if "C" in series.axes or is_colour or has_alpha:
        return series.axes
    return series.axes.replace("S", "C")


def _channels_last(array: np.ndarray, axes: str, path: Path) -> np.ndarray:
    """Bring a TIFF's array to (H, W) or (H, W, 3 or 4) by its declared axes.

    Axes are tifffile's: S samples (as in RGB), C channels. Q and I are undeclared (a plain array
    written to a TIFF, a sequence of pages): three of them may as well be planes of a stack.
    """
    if array.dtype.kind not in "buif":
        raise NucleiError(f"{path}: pixels of type {array.dtype} are no grey levels")
    if array.ndim == 2:
        return array
    is_first = axes in ("SYX", "CYX")
    pixels, order = (np.moveaxis(array, 0, -1), f"YX{axes[0]}") if is_first else (array, axes)
    if order == "YXS" and pixels.shape[2] == 2:  # the second is alpha
        return pixels[:, :, 0]
    if (order == "YXS" and pixels.shape[2] in (3, 4)) or (order == "YXC" and pixels.shape[2] == 3):
        return pixels
    raise NucleiError(
        f"{path}: shape {array.shape} with axes {axes} is not one grey or RGB image; "
        "save one plane or channel per file, or colours as RGB"
    )

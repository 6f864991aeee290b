"""Image files of any format as one array with named axes, opened but not yet read."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import tifffile
import zarr

from nuclei_d2.data.image_io import decoding, has_palette, is_tiff, read_pixels, tiff_axes
from nuclei_d2.data.ome_tiff import open_tiff
from nuclei_d2.utils.errors import NucleiError

# A TIFF up to this size is decoded at once.
_SMALL = 1 << 28  # bytes
_MICROMETRES = {
    "nanometer": 1e-3,
    "nm": 1e-3,
    "micrometer": 1.0,
    "micron": 1.0,
    "microns": 1.0,
    "um": 1.0,
    "\u00b5m": 1.0,
    "\u03bcm": 1.0,
    "\\u00b5m": 1.0,  # as ImageJ writes it
    "millimeter": 1e3,
    "mm": 1e3,
    "centimeter": 1e4,
    "cm": 1e4,
    "meter": 1e6,
    "m": 1e6,
    "inch": 25400.0,
}
# A TIFF's resolution above this is that of a print or a screen (72 dpi: 353 um).
_LARGEST_PIXEL = 10.0  # micrometres
_VENDOR_SUFFIXES = (".czi", ".ims", ".lif", ".nd2", ".oib", ".oif", ".oir", ".vsi")
_ZARR_METADATA = ("zarr.json", ".zgroup", ".zattrs", ".zarray")
_UNKNOWN_SIZE = "pixel size unknown"


@dataclass(frozen=True)
class Stack:
    """One image of a file.

    Attributes:
        kind: format, for people.
        array: a numpy array, memory map or Zarr array; it is read when it is indexed.
        axes: a letter for each axis: Y, X; T time; C channels; Z planes; S colours of a pixel;
            another letter where the file does not say.
        channel_names: of axis C, or empty.
        pixel_size: micrometres; None where it is unknown or y and x differ.
        pixel_note: the pixel size in words.
        series: which image of the file this is, in words; empty where there is one.
        inverted: whether 0 is white.
        close: closes the file.
    """

    path: Path
    kind: str
    array: Any
    axes: str
    channel_names: tuple[str, ...] = ()
    pixel_size: float | None = None
    pixel_note: str = _UNKNOWN_SIZE
    series: str = ""
    inverted: bool = False
    close: Callable[[], None] = lambda: None


def open_stack(path: Path, series: int | None = None) -> Stack:
    """Open an image file, or a folder that is an OME-Zarr image.

    Args:
        series: which image, where the file holds several.

    Raises:
        NucleiError: not a readable image, or several images and no ``series``.
    """
    if path.suffix.lower() in _VENDOR_SUFFIXES:
        raise NucleiError(
            f"{path}: {path.suffix} files are not read; export it as OME-TIFF, "
            "with Fiji or Bio-Formats' bfconvert"
        )
    if path.is_dir():
        with decoding(path):
            return _open_zarr(path, series)
    if is_tiff(path):
        with decoding(path):
            return _open_tiff(path, series)
    _choose_series(path, [path.name], series)
    return _picture(path, path.suffix.lstrip(".").upper())


def _picture(path: Path, kind: str, **known: Any) -> Stack:
    pixels = read_pixels(path)
    return Stack(path, kind, pixels, "YXS"[: pixels.ndim], **known)


def _choose_series(path: Path, names: Sequence[str], series: int | None) -> int:
    if series is None and len(names) > 1:
        listed = ", ".join(f"{index}: {name}" for index, name in enumerate(names))
        raise NucleiError(f"{path}: holds {len(names)} images; choose a --series ({listed})")
    index = series or 0
    if not 0 <= index < len(names):
        raise NucleiError(f"{path}: has no series {index}; it has {len(names)}, counted from 0")
    return index


# ------------------------------------------------------------------------------- TIFF


def _open_tiff(path: Path, series: int | None) -> Stack:
    with _whole_file(path):
        tiff = open_tiff(path)
        try:
            return _tiff_stack(path, tiff, series)
        except BaseException:
            tiff.close()
            raise


class _Complaints(logging.Handler):
    """Collects what tifffile logs about data or page lists that are not all there."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        is_private = "TiffTag" in message and "TiffTag 270" not in message  # 270: the metadata
        is_error = record.levelno >= logging.ERROR and not is_private
        if is_error or "zeroed" in message or "out of range" in message:
            self.messages.append(message)


@contextmanager
def _whole_file(path: Path) -> Iterator[None]:
    """Refuse a file of which tifffile reads a part and says so in its log alone."""
    log, complaints = logging.getLogger("tifffile"), _Complaints()
    propagates = log.propagate
    log.addHandler(complaints)
    log.propagate = False
    try:
        yield
    finally:
        log.removeHandler(complaints)
        log.propagate = propagates
    if complaints.messages:
        raise NucleiError(f"{path}: truncated or damaged ({complaints.messages[0]})")


def _tiff_stack(path: Path, tiff: tifffile.TiffFile, series: int | None) -> Stack:
    names = [f"{s.name} {_shape_words(s.axes, s.shape)}".strip() for s in tiff.series]
    index = _choose_series(path, names, series)
    chosen = tiff.series[index]
    kind = "OME-TIFF" if tiff.is_ome else "ImageJ TIFF" if tiff.is_imagej else "TIFF"
    channel_names, size, note = _tiff_metadata(tiff, index)
    known = {
        "channel_names": channel_names,
        "pixel_size": size,
        "pixel_note": note,
        "series": f"series {index} of {len(names)}" if len(names) > 1 else "",
    }
    is_plane = _is_plane(chosen)
    if len(names) == 1 and chosen.nbytes <= _SMALL and is_plane:
        tiff.close()
        return _picture(path, kind, **known)
    if is_plane and has_palette(tiff, chosen):
        raise NucleiError(
            f"{path}: the palette of a file this large, or of several images, is not read; "
            "save it in RGB or grey levels"
        )
    inverted = chosen.keyframe.photometric == tifffile.PHOTOMETRIC.MINISWHITE
    array = _tiff_array(path, tiff, chosen)
    return Stack(path, kind, array, tiff_axes(chosen), inverted=inverted, close=tiff.close, **known)


def _is_plane(series: tifffile.TiffPageSeries) -> bool:
    """Whether it is one grey or colour picture, which needs no choice."""
    sizes = dict(zip(tiff_axes(series), series.shape, strict=True))
    return set(sizes) <= set("YXS") and sizes.get("S", 3) in (2, 3, 4)


def _tiff_array(path: Path, tiff: tifffile.TiffFile, series: tifffile.TiffPageSeries) -> Any:
    """Memory-mapped where the pixels lie in the file as they are, else decoded by tile."""
    if series.dataoffset is not None and series.keyframe.is_memmappable:
        dtype = np.dtype(tiff.byteorder + series.dtype.char)
        return np.memmap(path, dtype, "r", series.dataoffset, series.shape)
    return zarr.open(series.aszarr(level=0), mode="r")


def _tiff_metadata(
    tiff: tifffile.TiffFile, index: int
) -> tuple[tuple[str, ...], float | None, str]:
    """Channel names, pixel size in micrometres, and the latter in words."""
    if tiff.is_ome:
        return _ome_metadata(tiff, index)
    page = tiff.series[index].keyframe
    units = {2: "inch", 3: "cm"}
    unit = units.get(int(page.resolutionunit), "")
    if tiff.is_imagej:
        unit = str(tiff.imagej_metadata.get("unit", "")).strip().lower()
    x, y = page.resolution  # pixels in a unit
    if not (unit in _MICROMETRES and x > 0 and y > 0):
        return (), None, _UNKNOWN_SIZE
    size_x, size_y = _MICROMETRES[unit] / x, _MICROMETRES[unit] / y
    if min(size_x, size_y) > _LARGEST_PIXEL:
        return (), None, _UNKNOWN_SIZE
    return (), *_square(size_y, size_x)


def _ome_metadata(tiff: tifffile.TiffFile, index: int) -> tuple[tuple[str, ...], float | None, str]:
    images = ElementTree.fromstring(tiff.ome_metadata).findall("{*}Image/{*}Pixels")
    images = [pixels for pixels in images if pixels.find("{*}TiffData") is not None]
    if len(images) != len(tiff.series):  # tifffile left one out, or found no metadata
        return (), None, _UNKNOWN_SIZE
    pixels = images[index]
    names = [c.get("Name") for c in pixels.findall("{*}Channel")]
    sizes = []
    for axis in "YX":
        unit = pixels.get(f"PhysicalSize{axis}Unit", "um").lower()
        size = float(pixels.get(f"PhysicalSize{axis}", 0))
        sizes.append(size * _MICROMETRES.get(unit, 0.0))
    return tuple(names) if all(names) else (), *_square(*sizes)


def _square(y: float, x: float) -> tuple[float | None, str]:
    """Pixel size in micrometres and in words; None unless known and, to 1 %, square."""
    if not (0 < y < np.inf and 0 < x < np.inf):
        return None, _UNKNOWN_SIZE
    if abs(y - x) > 0.01 * min(y, x):
        return None, f"pixel size not used: {y:.4g} x {x:.4g} um is not square"
    return (y + x) / 2, f"{(y + x) / 2:.4g} um/px"


def _shape_words(axes: str, shape: Sequence[int]) -> str:
    return f"{axes} {'x'.join(map(str, shape))}"


# --------------------------------------------------------------------------- OME-Zarr


def has_zarr_metadata(path: Path) -> bool:
    """Whether a folder is a Zarr group or array, whatever its name."""
    return any((path / name).is_file() for name in _ZARR_METADATA)


def _open_zarr(path: Path, series: int | None) -> Stack:
    """The full resolution of an OME-Zarr image (OME-NGFF 0.1 to 0.5), or a plain Zarr array."""
    if not has_zarr_metadata(path):
        raise NucleiError(f"{path}: a folder, and no OME-Zarr image; name the image files in it")
    node = zarr.open(str(path), mode="r")
    if isinstance(node, zarr.Array):
        _choose_series(path, [path.name], series)
        return Stack(path, "Zarr", node, "Q" * (node.ndim - 2) + "YX")
    images = _zarr_images(path, node)
    index = _choose_series(path, [name for name, _ in images], series)
    group = images[index][1]
    label = f"series {index} of {len(images)}" if len(images) > 1 else ""
    return _multiscale_stack(path, group, label)


def _ome_attributes(group: zarr.Group) -> dict[str, Any]:
    attributes = dict(group.attrs)
    return attributes.get("ome", attributes)  # below "ome" from 0.5 on


def _zarr_images(path: Path, group: zarr.Group) -> list[tuple[str, zarr.Group]]:
    """Names and groups of the images: the group itself, or those of a conversion's output."""
    attributes = _ome_attributes(group)
    if "multiscales" in attributes:
        return [(path.name, group)]
    if "plate" in attributes:
        raise _not_one_image(path, "plate", f"{_first(attributes['plate'], 'wells', 'A/1')}/0")
    if "well" in attributes:
        raise _not_one_image(path, "well", _first(attributes["well"], "images", "0"))
    inside = sorted((name for name in group if name.isdecimal()), key=int)
    images = [(name, group[name]) for name in inside]
    images = [(n, g) for n, g in images if isinstance(g, zarr.Group)]
    if not images:
        raise NucleiError(f"{path}: no OME-Zarr image, it has no multiscales metadata")
    return images


def _first(parts: dict[str, Any], key: str, default: str) -> str:
    return next((part["path"] for part in parts.get(key, ())), default)


def _not_one_image(path: Path, kind: str, example: str) -> NucleiError:
    return NucleiError(f"{path}: a {kind}; name one image in it, such as {path}/{example}")


def _multiscale_stack(path: Path, group: zarr.Group, series: str) -> Stack:
    attributes = _ome_attributes(group)
    multiscale = attributes["multiscales"][0]
    level = multiscale["datasets"][0]
    array = group[level["path"]]
    axes = multiscale.get("axes") or list("tczyx")  # 0.1 and 0.2 knew no others
    axes = [axis if isinstance(axis, dict) else {"name": axis} for axis in axes]
    letters = "".join(str(axis["name"])[:1].upper() for axis in axes)
    if len(letters) != array.ndim:
        raise NucleiError(
            f"{path}: wrong axes: {letters} for an array of shape "
            f"{'x'.join(map(str, array.shape))}; mend its multiscales metadata"
        )
    sizes = _zarr_scale(multiscale, level, len(axes))
    sizes = {
        letter: size * _MICROMETRES.get(str(axis.get("unit", "")).lower(), 0.0)
        for letter, size, axis in zip(letters, sizes, axes, strict=True)
    }
    size, note = _square(sizes.get("Y", 0.0), sizes.get("X", 0.0))
    channels = attributes.get("omero", {}).get("channels", [])
    names = tuple(str(channel.get("label", "")) for channel in channels)
    return Stack(
        path,
        "OME-Zarr",
        array,
        letters,
        channel_names=names if all(names) else (),
        pixel_size=size,
        pixel_note=note,
        series=series,
    )


def _zarr_scale(multiscale: dict, level: dict, count: int) -> np.ndarray:
    """(count,) size of a pixel along each axis, in the axis' unit; 1 where none is stated."""
    scale = np.ones(count)
    for node in (level, multiscale):
        for transform in node.get("coordinateTransformations", []):
            if transform.get("type") == "scale":
                scale = scale * np.asarray(transform["scale"], float)
    return scale

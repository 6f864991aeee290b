"""One image to predict on: a file reduced to rows, columns and channels, read by windows."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from nuclei_d2.data.image_io import decoding, to_float32
from nuclei_d2.inference.stacks import Stack, open_stack
from nuclei_d2.utils.errors import NucleiError

# What was selected of an image up to this size is read once and kept, in the file's own type.
_KEPT = 1 << 28  # bytes
_COLOURS = ("red", "green", "blue")


class ImageSource:
    """The pixels of one image, in memory or read from its file as windows of it are asked for.

    A context manager; leaving it closes the file. Made by :func:`open_image`.

    Attributes:
        path: of the file.
        size: (H, W) pixels.
        channels: names of the C channels.
        dtype: of the pixels in the file.
        pixel_size: side of a pixel in micrometres, or None where it is unknown or not square.
        description: one line that says how the file was understood.
    """

    def __init__(
        self,
        path: Path,
        fetch: Callable[[slice, slice], np.ndarray],
        *,
        size: tuple[int, int],
        channels: tuple[str, ...],
        dtype: np.dtype,
        pixel_size: float | None,
        description: str,
        close: Callable[[], None] = lambda: None,
    ) -> None:
        """
        Args:
            fetch: function of rows and columns, slices with bounds inside the image, that
                returns their pixels, (h, w) or (h, w, C), as the file has them.
        """
        self.path = path
        self.size = size
        self.channels = channels
        self.dtype = dtype
        self.pixel_size = pixel_size
        self.description = description
        self._fetch = fetch
        self._close = close
        self._pixels: np.ndarray | None = None

    def __enter__(self) -> "ImageSource":
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; pixels that were not read before cannot be read any more."""
        self._close()

    @property
    def nbytes(self) -> int:
        """Size of the whole image in memory, in the file's own type."""
        return self.size[0] * self.size[1] * len(self.channels) * self.dtype.itemsize

    def read(self, rows: slice, cols: slice) -> np.ndarray:
        """Raw grey levels of a window; a small image is read as a whole the first time.

        Args:
            rows, cols: slices of step 1, as for an array; what lies outside is cut off.

        Returns:
            (h, w, C) float32.

        Raises:
            NucleiError: the file cannot be decoded there, or holds NaN or infinity.
        """
        bounds = [range(n)[part] for n, part in zip(self.size, (rows, cols), strict=True)]
        if any(bound.step != 1 for bound in bounds):
            raise ValueError(f"windows have step 1, got {rows} and {cols}")
        rows, cols = (slice(bound.start, max(bound.start, bound.stop)) for bound in bounds)
        if self._pixels is None and self.nbytes <= _KEPT:
            self._pixels = self._decode(slice(0, self.size[0]), slice(0, self.size[1]))
        if self._pixels is not None:
            return to_float32(self._pixels[rows, cols], self.path)
        return to_float32(self._decode(rows, cols), self.path)

    def read_all(self) -> np.ndarray:
        """The whole image, (H, W, C) float32 raw grey levels; raises as :meth:`read`."""
        return self.read(slice(None), slice(None))

    def _decode(self, rows: slice, cols: slice) -> np.ndarray:
        with decoding(self.path):
            return self._fetch(rows, cols)


def open_image(
    path: str | os.PathLike,
    *,
    channel: int | str | None = None,
    z: int | str | None = None,
    time: int | str | None = None,
    series: int | None = None,
) -> ImageSource:
    """Open a PNG, JPEG, BMP, TIFF, OME-TIFF, ImageJ hyperstack or OME-Zarr for prediction.

    Where a file holds more than one grey or colour image, what is not chosen is refused, but for
    z: its planes become their maximum. An axis that the file does not name takes the meaning of
    the one option that is given.

    Args:
        channel: index or name (in any case) of the channel to look at; an int, or a number of
            which no channel has the name, is an index. "rgb" takes a stack's three channels as
            colours. Colours of a picture need no choice.
        z: index of a plane, or "max" (default) for the maximum over all planes.
        time: index of a point in time.
        series: index of an image, where the file holds several; levels of a pyramid are none.

    Raises:
        NucleiError: the file is missing, no image or damaged; a choice is missing, or is none of
            those that the file has.
    """
    stack = open_stack(Path(path), series)
    try:
        with decoding(path):
            stack = _name_axes(stack, channel, z, time)
            return _build(stack, _select(stack, channel, z, time))
    except BaseException:
        stack.close()
        raise


@dataclass(frozen=True)
class _Selection:
    """What to read of a stack: for each axis an index, a slice (colours), or planes."""

    index: dict[str, int | slice | range]
    channels: tuple[str, ...]
    words: list[str]


def _build(stack: Stack, selection: _Selection) -> ImageSource:
    sizes = _sizes(stack)
    dtype = np.dtype(stack.array.dtype)
    words = [stack.series, *selection.words, stack.pixel_note]
    shape = "x".join(map(str, stack.array.shape))
    return ImageSource(
        stack.path,
        lambda rows, cols: _fetch(stack, selection.index, rows, cols),
        size=(sizes["Y"], sizes["X"]),
        channels=selection.channels,
        dtype=dtype,
        pixel_size=stack.pixel_size,
        description=f"{stack.kind} {stack.axes} {shape} {dtype}: {', '.join(filter(None, words))}",
        close=stack.close,
    )


def _fetch(stack: Stack, index: dict, rows: slice, cols: slice) -> np.ndarray:
    """(h, w) or (h, w, 3) pixels; of several planes the maximum, one plane in memory at a time."""
    planes = index.get("Z")
    where = {**index, "Y": rows, "X": cols}
    if not isinstance(planes, range):
        return _fetch_plane(stack, where)
    result = _fetch_plane(stack, {**where, "Z": planes[0]})
    for plane in planes[1:]:
        result = np.maximum(result, _fetch_plane(stack, {**where, "Z": plane}))
    return result


def _fetch_plane(stack: Stack, where: dict[str, int | slice]) -> np.ndarray:
    pixels = np.asarray(stack.array[tuple(where[axis] for axis in stack.axes)])
    kept = [axis for axis in stack.axes if isinstance(where[axis], slice)]
    order = sorted(kept, key=lambda axis: "YXCS".index(axis))
    pixels = pixels.transpose([kept.index(axis) for axis in order])
    return ~pixels if stack.inverted and pixels.dtype.kind in "bu" else pixels


# -------------------------------------------------------------------------- selection


def _sizes(stack: Stack) -> dict[str, int]:
    return dict(zip(stack.axes, stack.array.shape, strict=True))


def _describe(stack: Stack) -> str:
    return f"{stack.path}: axes {stack.axes}, shape {'x'.join(map(str, stack.array.shape))}"


def _name_axes(stack: Stack, channel, z, time) -> Stack:
    """Give an axis without a meaning the one that the options imply.

    Raises:
        NucleiError: they do not imply it, or the axes are not those of an image.
    """
    axes = stack.axes
    if np.dtype(stack.array.dtype).kind not in "buif":
        raise NucleiError(f"{stack.path}: pixels of type {stack.array.dtype} are no grey levels")
    known = [axis for axis in axes if axis in "TCZYXS"]
    if not {"Y", "X"} <= set(known) or len(set(known)) < len(known):
        raise NucleiError(f"{_describe(stack)}: not an image with one Y and one X axis")
    if 0 in stack.array.shape:
        raise NucleiError(f"{_describe(stack)}: holds no pixels")
    unknown = [axis for axis in axes if axis not in "TCZYXS"]
    if not unknown:
        return stack
    options = {"C": channel, "Z": z, "T": time}
    meanings = [axis for axis, option in options.items() if option is not None and axis not in axes]
    if len(unknown) > 1 or len(meanings) != 1:
        raise NucleiError(
            f"{_describe(stack)}: it is ambiguous what axis {unknown[0]} is; choose by --channel, "
            "--z (or --z max) or --time, or save it as OME-TIFF"
        )
    return replace(stack, axes=axes.replace(unknown[0], meanings[0]))


def _select(stack: Stack, channel, z, time) -> _Selection:
    sizes = _sizes(stack)
    index, channels, words = _select_channel(stack, sizes, channel)
    moment = _select_index(stack, "time", sizes.get("T", 1), time)
    if "T" in sizes:
        index["T"] = moment
        words.insert(0, f"time {moment} of {sizes['T']}")
    count = sizes.get("Z", 1)
    plane = None if z in (None, "max") else _select_index(stack, "z", count, z)
    if "Z" in sizes:
        index["Z"] = range(count) if plane is None else plane
        words.append(
            f"max-projection of {count} z-planes"
            if plane is None
            else f"z-plane {plane} of {count}"
        )
    return _Selection(index, channels, words)


def _select_index(stack: Stack, option: str, count: int, value: int | str | None) -> int:
    if value is None and count > 1:
        raise NucleiError(
            f"{_describe(stack)}: {count} points in {option}; choose --{option} 0 to {count - 1}"
        )
    index = _as_index(value or 0)
    if index is None or not 0 <= index < count:
        raise NucleiError(
            f"{_describe(stack)}: --{option} {value} is not there; it goes from 0 to {count - 1}"
        )
    return index


def _as_index(value: int | str) -> int | None:
    if isinstance(value, str):
        return int(value) if value.isdecimal() else None
    return int(value)


def _select_channel(
    stack: Stack, sizes: dict[str, int], channel: int | str | None
) -> tuple[dict[str, int | slice], tuple[str, ...], list[str]]:
    """Indices of axes C and S, the channels' names, and the choice in words."""
    if "S" in sizes and sizes.get("C", 1) > 1:
        raise NucleiError(f"{_describe(stack)}: channels and colours; save one channel in a file")
    index = {axis: 0 for axis in "CS" if axis in sizes}
    axis = "S" if "S" in sizes else "C" if "C" in sizes else None
    names = _channel_names(stack, sizes, axis)
    in_colour = (axis == "S" and channel is None) or str(channel).lower() == "rgb"
    if in_colour and len(names) == 3:
        return {**index, axis: slice(0, 3)}, names, [f"colour ({', '.join(names)})"]
    if channel is None and len(names) > 1:
        colours = ", rgb: all three as colours" if len(names) == 3 else ""
        raise NucleiError(
            f"{_describe(stack)}: {len(names)} channels; choose a --channel "
            f"({_listed(names)}{colours})"
        )
    number = _find_channel(stack, names, 0 if channel is None else channel)
    if axis:
        index[axis] = number
    return index, (names[number],), [_channel_words(number, names)]


def _channel_names(stack: Stack, sizes: dict[str, int], axis: str | None) -> tuple[str, ...]:
    if axis == "S" and sizes["S"] in (3, 4):  # the fourth is alpha
        return _COLOURS
    if axis == "S" and sizes["S"] == 2:  # the second is alpha
        return ("grey",)
    count = sizes[axis] if axis else 1
    if len(stack.channel_names) == count and axis != "S":
        return stack.channel_names
    return ("grey",) if count == 1 else tuple(f"channel {number}" for number in range(count))


def _channel_words(number: int, names: Sequence[str]) -> str:
    name = names[number]
    return name if name in ("grey", f"channel {number}") else f"channel {number} '{name}'"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f"{number}: {name}" for number, name in enumerate(names))


def _find_channel(stack: Stack, names: Sequence[str], channel: int | str) -> int:
    is_name = isinstance(channel, str)
    named = [k for k, name in enumerate(names) if is_name and name.lower() == channel.lower()]
    numbered = [k for k in range(len(names)) if k == _as_index(channel)]
    if len(named) > 1:
        raise NucleiError(
            f"{_describe(stack)}: several channels are called {channel!r}; choose a --channel by "
            f"its number ({_listed(names)})"
        )
    meant = {*named, *numbered}
    if len(meant) > 1:
        raise NucleiError(
            f"{_describe(stack)}: --channel {channel} is the number of one channel and the name of "
            f"another; for the number write --channel 0{channel} ({_listed(names)})"
        )
    if not meant:
        raise NucleiError(f"{_describe(stack)}: no --channel {channel!r}; it has {_listed(names)}")
    return meant.pop()

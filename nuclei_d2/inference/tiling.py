"""Large images in overlapping tiles, and one answer from what was found in each of them.

Tiles are windows of the network's image: the whole image after scaling, which is never made.
Every tile owns a part of it; the owned parts cover the image without overlap. A nucleus is kept by
the tile that owns its centre. With an overlap of at least twice the largest nucleus that tile sees
it whole, so nothing is ever stitched together.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.sparse import csr_array

from nuclei_d2.data.augmentation import scaled_size
from nuclei_d2.inference.duplicates import (
    DUPLICATE_IOU,
    find_overlaps,
    find_own_overlaps,
    keep_best,
)
from nuclei_d2.inference.nuclei import Nuclei, concatenate, sort, take
from nuclei_d2.structures.cropped_mask import CroppedMask
from nuclei_d2.utils.errors import NucleiError
from nuclei_d2.utils.files import atomic_path

# Tiles begin at multiples of the coarsest feature map's stride (p6), network pixels: the features
# of a tile lie on the grid of the whole image's.
ALIGNMENT = 64
_NUMBERS = 4  # of a tile's result, in its file
_EDGE = 2  # network pixels; a nucleus that ends so close to a tile's inner edge is cut by it


class Span(NamedTuple):
    """A tile along one axis, network pixels: it covers start:stop and owns first:last."""

    start: int
    stop: int
    first: int
    last: int


class Tile(NamedTuple):
    """A window of the network's image, and its place in the grid of tiles."""

    rows: Span
    columns: Span
    index: tuple[int, int]

    @property
    def shape(self) -> tuple[int, int]:
        """(h, w), network pixels."""
        return tuple(span.stop - span.start for span in (self.rows, self.columns))

    @property
    def owned(self) -> tuple[slice, slice]:
        """The owned part, as an index into the tile's pixels."""
        spans = (self.rows, self.columns)
        return tuple(slice(s.first - s.start, s.last - s.start) for s in spans)


@dataclass(frozen=True)
class Grid:
    """How an image of ``size`` pixels is cut.

    Attributes:
        size: (H, W) of the file.
        network_size: (H, W) of the whole image as the network would see it.
        overlap: of neighbouring tiles, network pixels.
        tiles: row by row.
    """

    size: tuple[int, int]
    network_size: tuple[int, int]
    overlap: int
    tiles: tuple[Tile, ...]

    @property
    def scale(self) -> np.ndarray:
        """(2,) network pixels per pixel of the file, down and across."""
        return np.divide(self.network_size, self.size)

    @property
    def margin(self) -> int:
        """Network pixels beyond its owned part in which a tile's nuclei are kept for comparison.

        A quarter of half the overlap: a nucleus there still is far from the tile's edge, and one
        whose centre is seen on the other side of a cut by each tile is not lost.
        """
        return self.overlap // 8


def make_grid(size: tuple[int, int], scale: float, tile: int, overlap: int) -> Grid:
    """Cut an image into tiles; one, where it fits.

    Args:
        size: (H, W) of the file.
        scale: network pixels per pixel of the file.
        tile: side of a tile, network pixels; rounded up to a multiple of :data:`ALIGNMENT`.
        overlap: likewise.

    Raises:
        NucleiError: tiles that overlap by more than half.
    """
    tile, overlap = (-(-length // ALIGNMENT) * ALIGNMENT for length in (tile, overlap))
    if overlap < 0 or tile < max(2 * overlap, ALIGNMENT):
        raise NucleiError(f"--tile {tile} is less than twice --overlap {overlap}; enlarge it")
    network_size = scaled_size(size, scale)
    rows, columns = (_split(length, tile, overlap) for length in network_size)
    tiles = tuple(Tile(r, c, (i, j)) for i, r in enumerate(rows) for j, c in enumerate(columns))
    return Grid(tuple(size), network_size, overlap, tiles)


def _split(length: int, tile: int, overlap: int) -> list[Span]:
    starts = [0]
    while starts[-1] + tile < length:
        starts.append(starts[-1] + tile - overlap)
    cuts = [0, *(start + overlap // 2 for start in starts[1:]), length]
    return [
        Span(start, min(start + tile, length), first, last)
        for start, first, last in zip(starts, cuts[:-1], cuts[1:], strict=True)
    ]


# ------------------------------------------------------------------------- resampling


def source_window(grid: Grid, tile: Tile) -> tuple[slice, slice]:
    """The file's rows and columns that :func:`resample_tile` needs."""
    axes = zip(grid.size, grid.network_size, (tile.rows, tile.columns), strict=True)
    return tuple(_resampling(old, new, span)[1] for old, new, span in axes)


def resample_tile(window: np.ndarray, grid: Grid, tile: Tile) -> np.ndarray:
    """The tile's part of the resized whole image, from the part of the file that it needs.

    Every pixel has the value that resizing the whole image would give it (linear, or averaging
    over areas when shrinking, as :class:`~nuclei_d2.data.augmentation.ResampleTransform`).

    Args:
        window: (h, w, C) float32, the file's :func:`source_window`.

    Returns:
        (*tile.shape, C) float32.
    """
    if grid.size == grid.network_size:
        return window
    axes = zip(grid.size, grid.network_size, (tile.rows, tile.columns), strict=True)
    down, across = (_resampling(old, new, span)[0] for old, new, span in axes)
    height, width, channels = window.shape
    tall = (down @ window.reshape(height, width * channels)).reshape(-1, width, channels)
    wide = across @ tall.transpose(1, 0, 2).reshape(width, -1)
    return wide.reshape(len(wide), -1, channels).transpose(1, 0, 2)


def _resampling(old: int, new: int, span: Span) -> tuple[csr_array, slice]:
    """Weights that turn ``old`` samples into samples span.start:span.stop of ``new``.

    Returns:
        (span's length, n) float32, and which n of the old samples they are for.
    """
    out = np.arange(span.start, span.stop)
    step = old / new
    if step == 1:
        first, weights = out, np.ones((len(out), 1))
    elif step < 1:  # linear between pixel centres
        centre = np.clip((out + 0.5) * step - 0.5, 0, old - 1)
        first = np.minimum(np.floor(centre).astype(int), max(old - 2, 0))
        far = (centre - first)[:, None]
        weights = np.hstack([1 - far, far])
    else:  # the share of every old pixel in the new one
        low, high = out * step, np.minimum((out + 1) * step, old)
        first = np.floor(low).astype(int)
        pixel = first[:, None] + np.arange(int(np.ceil(step)) + 1)
        shares = np.minimum(high[:, None], pixel + 1) - np.maximum(low[:, None], pixel)
        weights = np.maximum(shares, 0)
        weights /= weights.sum(axis=1, keepdims=True)
    lines, places = np.nonzero(weights)
    pixels = first[lines] + places
    start, stop = int(pixels.min()), int(pixels.max()) + 1
    values = weights[lines, places].astype(np.float32)
    shape = (len(out), stop - start)
    return csr_array((values, (lines, pixels - start)), shape=shape), slice(start, stop)


# ---------------------------------------------------------------------------- merging


class TileResult(NamedTuple):
    """What one tile has to say.

    Attributes:
        tile: which.
        nuclei: whole ones with their centre in the tile's owned part or its margin, in the
            coordinates of the full image.
        cut: nuclei with their centre in the owned part that the tile's edge cuts.
        largest: longer side of the largest nucleus in the owned part, network pixels.
        capped: whether the model returned as many nuclei as it may.
        invisible: nuclei with their centre in the owned part that the noise hides; they count
            nowhere else.
        counts: :func:`~nuclei_d2.data.image_measures.count_pixels` of the owned part.
    """

    tile: Tile
    nuclei: Nuclei
    cut: int
    largest: float
    capped: bool
    invisible: int
    counts: np.ndarray


class Seams(NamedTuple):
    """How well neighbouring tiles agree on what both of them see."""

    nuclei: int  # how often a nucleus close to a cut was looked at by two tiles
    agreed: int  # how often both found it, mask IoU >= 0.5


def judge_tile(
    found: Nuclei, visible: np.ndarray, tile: Tile, grid: Grid, capped: bool, counts: np.ndarray
) -> TileResult:
    """Keep what can be seen and the tile owns, with a margin; leave out what its edges cut.

    Args:
        found: all nuclei of the tile, in the coordinates of the full image.
        visible: (N,) bool.
        capped, counts: see :class:`TileResult`.
    """
    boxes = found.boxes * np.tile(grid.scale, 2)
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    spans = list(zip((tile.rows, tile.columns), grid.network_size, strict=True))
    cut = np.zeros(len(found), bool)
    for axis, (span, length) in enumerate(spans):
        cut |= (span.start > 0) & (boxes[:, axis] < span.start + _EDGE)
        cut |= (span.stop < length) & (boxes[:, axis + 2] > span.stop - _EDGE)
    owned = _inside(centres, tile, grid, 0)
    sides = (boxes[:, 2:] - boxes[:, :2])[owned & visible].max(initial=0)
    kept = _inside(centres, tile, grid, grid.margin) & visible & ~cut
    numbers = [int((owned & of).sum()) for of in (visible & cut, ~visible)]
    nuclei = take(found, kept)
    return TileResult(tile, nuclei, numbers[0], float(sides), capped, numbers[1], counts)


def save_result(path: Path, result: TileResult) -> None:
    """Write a result as NPZ, atomically."""
    nuclei = result.nuclei
    pixels = [boxed.mask.ravel() for boxed in nuclei.masks]
    with atomic_path(path) as temporary:
        np.savez_compressed(
            temporary,
            pixels=np.packbits(np.concatenate([np.zeros(0, bool), *pixels])),
            boxes=nuclei.boxes,
            scores=nuclei.scores,
            rest=np.array([result.cut, result.largest, result.capped, result.invisible], float),
            counts=result.counts,
            **{f"measure_{name}": values for name, values in nuclei.measures.items()},
        )


def load_result(path: Path, tile: Tile, grid: Grid) -> TileResult | None:
    """What :func:`save_result` wrote for ``tile``; None without a whole file of this version."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
    except MemoryError:
        raise
    except Exception:  # none, or damaged by a power cut: a ZIP may be wrong in many ways
        return None
    if "counts" not in arrays or len(arrays["rest"]) != _NUMBERS:
        return None
    boxes = arrays["boxes"]
    shapes = boxes[:, 2:] - boxes[:, :2]
    ends = shapes.prod(axis=1).cumsum()
    pixels = np.unpackbits(arrays["pixels"], count=int(ends[-1]) if len(ends) else 0).view(bool)
    masks = [
        CroppedMask(flat.reshape(shape), int(box[0]), int(box[1]))
        for flat, shape, box in zip(np.split(pixels, ends[:-1]), shapes, boxes, strict=False)
    ]
    measures = {k.removeprefix("measure_"): v for k, v in arrays.items() if k[:8] == "measure_"}
    nuclei = Nuclei(masks, arrays["scores"], grid.size, measures)
    cut, largest, capped, invisible = arrays["rest"].tolist()
    counts = arrays["counts"]
    return TileResult(tile, nuclei, int(cut), largest, bool(capped), int(invisible), counts)


def merge_tiles(results: Sequence[TileResult], grid: Grid) -> tuple[Nuclei, Seams]:
    """One answer from all tiles: duplicates are removed, along the seams and inside of tiles.

    Two nuclei of a tile or of neighbouring tiles are the same if their IoU is at least 0.5, or one
    contains 70 % of the other: a detector's suppression compares boxes, and lets a fragment of a
    nucleus pass. The one whose tile owns its centre stays, of two such the one of higher score.
    """
    starts = np.cumsum([0, *(len(result.nuclei) for result in results)])
    owned, centres = [], []
    for result in results:
        boxes = result.nuclei.boxes * np.tile(grid.scale, 2)
        centres.append((boxes[:, :2] + boxes[:, 2:]) / 2)
        owned.append(_inside(centres[-1], result.tile, grid, 0))
    pairs, looked_at, agreed = [np.zeros((0, 2), int)], 0, 0
    for start, result in zip(starts, results, strict=False):
        pairs.append(start + find_own_overlaps(result.nuclei).duplicates)
    for a, b in _neighbours([result.tile for result in results]):
        overlap = find_overlaps(results[a].nuclei, results[b].nuclei)
        pairs.append(starts[[a, b]] + overlap.duplicates)
        for own, partner in ((a, overlap.first), (b, overlap.second)):
            shared = np.ones(len(centres[own]), bool)
            for side in (a, b):
                shared &= _inside(centres[own], results[side].tile, grid, grid.margin // 2)
            looked_at += int(shared.sum())
            agreed += int(shared[np.unique(partner[overlap.iou >= DUPLICATE_IOU])].sum())
    everything = concatenate([result.nuclei for result in results], grid.size)
    owned = np.concatenate(owned)
    best_first = np.lexsort((-everything.scores, ~owned))
    kept = keep_best(np.concatenate(pairs), best_first)
    return sort(take(everything, kept)), Seams(looked_at, agreed)


def _inside(centres: np.ndarray, tile: Tile, grid: Grid, margin: int) -> np.ndarray:
    """Whether (N, 2) points lie in the owned part or, at its inner sides, up to a margin beyond."""
    inside = np.ones(len(centres), bool)
    spans = zip((tile.rows, tile.columns), grid.network_size, strict=True)
    for axis, (span, length) in enumerate(spans):
        low = span.first - (margin if span.start > 0 else 0)
        high = span.last + (margin if span.stop < length else 0)
        inside &= (centres[:, axis] >= low) & (centres[:, axis] < high)
    return inside


def _neighbours(tiles: Sequence[Tile]) -> Iterable[tuple[int, int]]:
    """Pairs of indices of tiles that touch in the grid, corners included."""
    places = {tile.index: k for k, tile in enumerate(tiles)}
    for (row, column), k in places.items():
        for step in ((0, 1), (1, -1), (1, 0), (1, 1)):
            other = places.get((row + step[0], column + step[1]))
            if other is not None:
                yield k, other

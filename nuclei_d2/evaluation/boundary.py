"""Overlaps of masks and of their boundaries, and distances between outlines.

The boundary of a nucleus at distance d is its mask minus the mask eroded d times by a 3 x 3
square, where what lies outside the image is background: Boundary IoU, Cheng et al., CVPR 2021.
"""

from collections.abc import Sequence

import cv2
import numpy as np
from scipy.spatial import cKDTree

from nuclei_d2.evaluation.instances import LabelLayers, sorted_unique
from nuclei_d2.evaluation.matching import Overlap

# How thick a boundary is: 2 % of the image diagonal (the published default, which swallows a
# nucleus whole), and widths that suit nuclei, in pixels.
BOUNDARIES = ("2%", "1px", "2px", "3px")
# Outlines count as equal up to this distance, in pixels.
TOLERANCE = 2.0


def boundary_distances(size: tuple[int, int]) -> tuple[int, ...]:
    """Pixels that each of :data:`BOUNDARIES` means in an image of ``size`` (H, W)."""
    return max(1, round(0.02 * float(np.hypot(*size)))), 1, 2, 3


def compute_overlaps(
    gt: LabelLayers, pred: LabelLayers, distances: Sequence[int] = ()
) -> tuple[Overlap, list[Overlap]]:
    """Overlap of the masks, and of their boundaries at each of ``distances``, for the same pairs.

    Args:
        gt: N nuclei.
        pred: M predictions of the same image.
        distances: boundary widths in pixels, at least 1.
    """
    order = np.argsort(distances, kind="stable")
    widths = [distances[k] for k in order]
    levels = [_levels(side, widths) for side in (gt, pred)]
    areas = [
        _areas(side, level, len(widths)) for side, level in zip((gt, pred), levels, strict=True)
    ]
    parts = [
        _pairs(gt, g, pred, p, levels[0][g], levels[1][p], len(widths))
        for g in range(len(gt.labels))
        for p in range(len(pred.labels))
    ]
    key = np.concatenate([part[0] for part in parts])
    common = np.concatenate([part[1] for part in parts])
    first, second = np.divmod(key, pred.count + 1)
    overlaps = [
        Overlap(areas[0][:, k], areas[1][:, k], first - 1, second - 1, common[:, k])
        for k in range(len(widths) + 1)
    ]
    return overlaps[-1], [overlaps[k] for k in np.argsort(order, kind="stable")]


def _levels(layers: LabelLayers, widths: Sequence[int]) -> list[np.ndarray]:
    """(H, W) uint8 per layer: at how many of the increasing ``widths`` a pixel is no boundary."""
    levels = []
    for inside in layers.interior if widths else layers.labels:
        level, reached = np.zeros(layers.size, np.uint8), 1
        for width in widths:
            # Neighbouring interior pixels have one label, so it no longer matters which.
            if width > reached and inside.any():
                square = np.ones((2 * (width - reached) + 1,) * 2, np.uint8)
                inside = cv2.erode(inside, square, borderType=cv2.BORDER_CONSTANT, borderValue=0)
                reached = width
            if inside.any():
                level += inside
        levels.append(level)
    return levels


def _areas(layers: LabelLayers, levels: Sequence[np.ndarray], depth: int) -> np.ndarray:
    """(N, depth + 1) pixels with a level of at most 0, 1 .. depth."""
    counts = np.zeros((layers.count + 1) * (depth + 1), np.int64)
    for labels, places, level in zip(layers.labels, layers.places, levels, strict=True):
        key = labels.reshape(-1)[places].astype(np.intp) * (depth + 1) + level.reshape(-1)[places]
        counts += np.bincount(key, minlength=counts.size)
    return counts.reshape(-1, depth + 1)[1:].cumsum(axis=1)


def _pairs(gt: LabelLayers, g: int, pred: LabelLayers, p: int, gt_level, pred_level, depth: int):
    """Keys gt * (M + 1) + pred of the pairs in two layers, and their common pixels.

    Returns:
        (K,) int64 increasing and (K, depth + 1): pixels with both levels at most 0 .. depth.
    """
    places = gt.places[g]
    second = pred.labels[p].reshape(-1)[places]
    places, second = places[second > 0], second[second > 0]
    key = gt.labels[g].reshape(-1)[places].astype(np.int64) * (pred.count + 1) + second
    # Along a row the pair seldom changes: sorting the runs is enough.
    starts = np.flatnonzero(np.diff(key, prepend=-1))
    keys = sorted_unique(key[starts])
    pair = np.repeat(np.searchsorted(keys, key[starts]), np.diff(starts, append=len(key)))
    level = np.maximum(gt_level.reshape(-1)[places], pred_level.reshape(-1)[places])
    counts = np.bincount(pair * (depth + 1) + level, minlength=len(keys) * (depth + 1))
    return keys, counts.reshape(-1, depth + 1).cumsum(axis=1)


def outline_matches(
    gt: LabelLayers, pred: LabelLayers, tolerance: float = TOLERANCE
) -> tuple[int, int, int, int]:
    """Counts behind the boundary F1 (Csurka et al., What is a good evaluation measure for
    semantic segmentation?, BMVC 2013), with the outlines of all nuclei taken together.

    Precision is the share of predicted outline pixels within ``tolerance`` (Euclidean, pixels)
    of a true one, recall the converse.

    Returns:
        Predicted pixels within reach, predicted pixels, true pixels within reach, true pixels.
    """
    radius = int(tolerance)
    offset = np.arange(-radius, radius + 1)
    disk = (np.hypot(offset[:, None], offset) <= tolerance).astype(np.uint8)
    masks = []
    for side in (gt, pred):
        mask = np.zeros(side.size, np.uint8)
        mask.reshape(-1)[np.concatenate(side.outlines)] = 1
        masks.append(mask)
    near_gt, near_pred = (cv2.dilate(mask, disk) for mask in masks)
    return (
        int(np.count_nonzero(masks[1] & near_gt)),
        int(np.count_nonzero(masks[1])),
        int(np.count_nonzero(masks[0] & near_pred)),
        int(np.count_nonzero(masks[0])),
    )


def surface_distances(
    gt: LabelLayers,
    pred: LabelLayers,
    overlap: Overlap,
    pairs: np.ndarray,
    tolerance: float = TOLERANCE,
) -> tuple[np.ndarray, np.ndarray]:
    """How far the outlines of matched nuclei lie apart.

    From every pixel of the one 1-px boundary the Euclidean distance to the nearest of the other
    is taken, both ways.

    Args:
        gt: N nuclei.
        pred: M predictions.
        overlap: theirs.
        pairs: (T,) indices of matched pairs in ``overlap``.
        tolerance: pixels.

    Returns:
        (T,) 95 % Hausdorff distance in pixels: the larger of both ways' 95th percentiles, with
        linear interpolation; (T,) normalised surface distance, 0 to 1: the share of both
        boundaries' pixels within ``tolerance`` (Nikolov et al., J Med Internet Res 2021).
    """
    gt_labels, pred_labels = overlap.gt[pairs] + 1, overlap.pred[pairs] + 1
    there = _directed(gt, pred, gt_labels, pred_labels)
    back = _directed(pred, gt, pred_labels, gt_labels)
    hausdorff = np.maximum(*(_percentile_95(*way, len(pairs)) for way in (there, back)))
    pair, squared = (np.concatenate(arrays) for arrays in zip(there, back, strict=True))
    within = np.bincount(pair[squared <= tolerance**2], minlength=len(pairs))
    return hausdorff, within / np.bincount(pair, minlength=len(pairs))


def _directed(source: LabelLayers, target: LabelLayers, source_labels, target_labels):
    """Per pixel of the sources' outlines: its pair, and the squared distance to the target's."""
    pair_of = np.full(source.count + 1, -1)
    pair_of[source_labels] = np.arange(len(source_labels))
    pair, place = [], []
    for labels, outline in zip(source.labels, source.outlines, strict=True):
        found = pair_of[labels.reshape(-1)[outline]]
        pair.append(found[found >= 0])
        place.append(outline[found >= 0])
    pair, place = np.concatenate(pair), np.concatenate(place)
    wanted = target_labels[pair]

    width = source.size[1] + 2 * _REACH
    rows, columns = np.divmod(place, source.size[1])
    padded = _padded_outlines(target)
    start = (rows + _REACH) * width + columns + _REACH
    squared = np.zeros(len(pair), np.int64)
    todo = np.arange(len(pair))
    for distance, dy, dx in _RINGS:
        around = start[todo, None] + (dy * width + dx)
        hit = np.zeros(len(todo), bool)
        for outlines in padded:
            hit |= (outlines[around] == wanted[todo, None]).any(axis=1)
        squared[todo[hit]] = distance
        todo = todo[~hit]
    if todo.size:
        squared[todo] = _far(target, wanted[todo], rows[todo], columns[todo])
    return pair, squared


def _padded_outlines(layers: LabelLayers) -> list[np.ndarray]:
    """Flat label images of the outlines with a margin of ``_REACH``, one per layer."""
    padded = []
    for labels, outline in zip(layers.labels, layers.outlines, strict=True):
        image = np.zeros((labels.shape[0] + 2 * _REACH, labels.shape[1] + 2 * _REACH), labels.dtype)
        rows, columns = np.divmod(outline, labels.shape[1])
        image[rows + _REACH, columns + _REACH] = labels.reshape(-1)[outline]
        padded.append(image.reshape(-1))
    return padded


def _rings(reach: int) -> list[tuple[int, np.ndarray, np.ndarray]]:
    """Offsets on the pixel grid by increasing squared distance, up to ``reach`` pixels."""
    dy, dx = np.mgrid[-reach : reach + 1, -reach : reach + 1].reshape(2, -1)
    squared = dy**2 + dx**2
    distances = np.unique(squared[squared <= reach**2]).tolist()
    return [(d, dy[squared == d], dx[squared == d]) for d in distances]


# Matched outlines are nearly always this near; farther away a search tree is faster.
_REACH = 4
_RINGS = _rings(_REACH)


def _far(target: LabelLayers, wanted: np.ndarray, rows, columns) -> np.ndarray:
    """Squared distances to the nearest outline pixel of the label that each place wants."""
    is_wanted = np.zeros(target.count + 1, bool)
    is_wanted[wanted] = True
    # Labels become a third axis, so far apart that no other label can be nearest.
    apart = sum(target.size)
    points = []
    for labels, outline in zip(target.labels, target.outlines, strict=True):
        label = labels.reshape(-1)[outline].astype(np.int64)
        use = is_wanted[label]
        points.append(np.stack([*np.divmod(outline[use], target.size[1]), label[use] * apart], 1))
    distances, _ = cKDTree(np.concatenate(points)).query(
        np.stack([rows, columns, wanted * apart], axis=1)
    )
    return np.rint(distances**2).astype(np.int64)


def _percentile_95(pair: np.ndarray, squared: np.ndarray, count: int) -> np.ndarray:
    """(count,) 95th percentile of the distances of each pair."""
    step = int(squared.max(initial=0)) + 1
    distances = np.sqrt(np.sort(pair * step + squared) % step)
    sizes = np.bincount(pair, minlength=count)
    place = np.cumsum(sizes) - sizes + 0.95 * (sizes - 1)
    low = np.floor(place).astype(np.intp)
    high = np.ceil(place).astype(np.intp)
    return distances[low] + (place - low) * (distances[high] - distances[low])

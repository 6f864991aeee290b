"""Overlaps of masks and of their boundaries, and distances between outlines.

The boundary of a nucleus at distance d is its mask minus the mask eroded d times by a 3 x 3
square, where what lies outside the image is background: Boundary IoU, Cheng et al., CVPR 2021.
"""

from collections.abc import Sequence

import cv2
import numpy as np
from scipy.spatial import cKDTree

from nuclei_d2.evaluation.instances import LabelLayers
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
    gt_levels = [_levels(layer, widths) for layer in gt.labels]
    pred_levels = [_levels(layer, widths) for layer in pred.labels]
    gt_areas = _areas(gt, gt_levels, len(widths))
    pred_areas = _areas(pred, pred_levels, len(widths))
    parts = [
        _pairs(g, p, pred.count, g_level, p_level, len(widths))
        for g, g_level in zip(gt.labels, gt_levels, strict=True)
        for p, p_level in zip(pred.labels, pred_levels, strict=True)
    ]
    key = np.concatenate([part[0] for part in parts])
    common = np.concatenate([part[1] for part in parts])
    index = np.divmod(key, pred.count + 1)
    overlaps = [
        Overlap(gt_areas[:, k], pred_areas[:, k], index[0] - 1, index[1] - 1, common[:, k])
        for k in range(len(widths) + 1)
    ]
    boundaries = [overlaps[k] for k in np.argsort(order, kind="stable")]
    return overlaps[-1], boundaries


def _levels(labels: np.ndarray, widths: Sequence[int]) -> np.ndarray:
    """(H, W) uint8: at how many of the increasing ``widths`` a pixel is no boundary any more."""
    levels = np.zeros(labels.shape, np.uint8)
    for width in widths:
        levels += _interior(labels, width)
    return levels


def _interior(labels: np.ndarray, width: int) -> np.ndarray:
    """Pixels whose (2 width + 1)-square has their own label only: all nuclei eroded at once."""
    if labels.dtype != np.uint16:
        labels = labels.astype(np.float32)  # OpenCV has no filters for int32; exact below 2^24
    kernel = np.ones((2 * width + 1, 2 * width + 1), np.uint8)
    smallest = cv2.erode(labels, kernel, borderType=cv2.BORDER_CONSTANT, borderValue=0)
    largest = cv2.dilate(labels, kernel)
    return (smallest == largest) & (smallest > 0)


def _areas(layers: LabelLayers, levels: Sequence[np.ndarray], depth: int) -> np.ndarray:
    """(N, depth + 1) pixels with a level of at most 0, 1 .. depth."""
    counts = np.zeros((layers.count + 1) * (depth + 1), np.int64)
    for labels, level in zip(layers.labels, levels, strict=True):
        inside = np.flatnonzero(labels)
        key = labels.reshape(-1)[inside].astype(np.intp) * (depth + 1) + level.reshape(-1)[inside]
        counts += np.bincount(key, minlength=counts.size)
    return counts.reshape(-1, depth + 1)[1:].cumsum(axis=1)


def _pairs(gt, pred, n_pred: int, gt_level, pred_level, depth: int):
    """Keys gt * (n_pred + 1) + pred of the pairs in two layers, and their common pixels.

    Returns:
        (K,) int64 increasing and (K, depth + 1): pixels with both levels at most 0 .. depth.
    """
    both = np.flatnonzero((gt > 0) & (pred > 0))
    key = gt.reshape(-1)[both].astype(np.int64) * (n_pred + 1) + pred.reshape(-1)[both]
    # Along a row the pair seldom changes: sorting the runs is enough.
    starts = np.flatnonzero(np.diff(key, prepend=-1))
    keys, inverse = np.unique(key[starts], return_inverse=True)
    pair = np.repeat(inverse, np.diff(starts, append=len(key)))
    level = np.maximum(gt_level.reshape(-1)[both], pred_level.reshape(-1)[both])
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
    masks = [_outlines(side).any(axis=0).astype(np.uint8) for side in (gt, pred)]
    near_gt, near_pred = (cv2.dilate(mask, disk) for mask in masks)
    return (
        int(np.count_nonzero(masks[1] & near_gt)),
        int(np.count_nonzero(masks[1])),
        int(np.count_nonzero(masks[0] & near_pred)),
        int(np.count_nonzero(masks[0])),
    )


def _outlines(layers: LabelLayers) -> np.ndarray:
    """(L, H, W) labels of the 1-px boundaries."""
    return np.stack([np.where(_interior(labels, 1), 0, labels) for labels in layers.labels])


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
    gt_outlines, pred_outlines = _outlines(gt), _outlines(pred)
    there = _directed(gt_outlines, pred_outlines, overlap.gt[pairs] + 1, overlap.pred[pairs] + 1)
    back = _directed(pred_outlines, gt_outlines, overlap.pred[pairs] + 1, overlap.gt[pairs] + 1)
    hausdorff = np.maximum(*(_percentile_95(*way, len(pairs)) for way in (there, back)))
    pair, squared = (np.concatenate(arrays) for arrays in zip(there, back, strict=True))
    within = np.bincount(pair[squared <= tolerance**2], minlength=len(pairs))
    return hausdorff, within / np.bincount(pair, minlength=len(pairs))


def _directed(source, target, source_labels, target_labels) -> tuple[np.ndarray, np.ndarray]:
    """Per pixel of the sources' outlines: its pair, and the squared distance to the target's."""
    pair_of = np.full(int(source.max(initial=0)) + 1, -1)
    pair_of[source_labels] = np.arange(len(source_labels))
    _, rows, columns = places = np.nonzero(source)
    pair = pair_of[source[places]]
    pair, rows, columns = pair[pair >= 0], rows[pair >= 0], columns[pair >= 0]
    wanted = target_labels[pair]
    squared = np.zeros(len(pair), np.int64)
    todo = np.arange(len(pair))
    for distance, dy, dx in _RINGS:
        # Clipping moves a place nearer, where an earlier ring has looked: no false hit.
        y = (rows[todo, None] + dy).clip(0, target.shape[1] - 1)
        x = (columns[todo, None] + dx).clip(0, target.shape[2] - 1)
        hit = (target[:, y, x] == wanted[todo, None]).any(axis=(0, 2))
        squared[todo[hit]] = distance
        todo = todo[~hit]
    if todo.size:
        squared[todo] = _far(target, wanted[todo], rows[todo], columns[todo])
    return pair, squared


def _rings(radius: int) -> list[tuple[int, np.ndarray, np.ndarray]]:
    """Offsets on the pixel grid by increasing squared distance, up to ``radius``."""
    dy, dx = np.mgrid[-radius : radius + 1, -radius : radius + 1].reshape(2, -1)
    squared = dy**2 + dx**2
    distances = np.unique(squared[squared <= radius**2]).tolist()
    return [(d, dy[squared == d], dx[squared == d]) for d in distances]


# Matched outlines are nearly always this near; farther away a search tree is faster.
_RINGS = _rings(4)


def _far(target: np.ndarray, wanted: np.ndarray, rows, columns) -> np.ndarray:
    """Squared distances to the nearest pixel of the label that each place wants."""
    place = np.nonzero(np.isin(target, wanted))
    # Labels become a third axis, so far apart that no other label can be nearest.
    apart = sum(target.shape)
    tree = cKDTree(np.stack([*place[1:], target[place].astype(np.int64) * apart], axis=1))
    distances, _ = tree.query(np.stack([rows, columns, wanted * apart], axis=1))
    return np.rint(distances**2).astype(np.int64)


def _percentile_95(pair: np.ndarray, squared: np.ndarray, count: int) -> np.ndarray:
    """(count,) 95th percentile of the distances of each pair."""
    distances = np.sqrt(squared[np.lexsort((squared, pair))])
    sizes = np.bincount(pair, minlength=count)
    place = np.cumsum(sizes) - sizes + 0.95 * (sizes - 1)
    low = np.floor(place).astype(np.intp)
    high = np.ceil(place).astype(np.intp)
    return distances[low] + (place - low) * (distances[high] - distances[low])

"""Which prediction is which nucleus: sparse overlaps, one-to-one matching, and what follows.

Conventions of every function here:

* An :class:`Overlap` lists only the pairs that share a pixel, so memory and time grow with the
  number of neighbours, not with (nuclei x predictions).
* IoU thresholds are inclusive (IoU >= t), as in StarDist, Cellpose and COCO; where a source asks
  for more (PQ: IoU > 0.5; Caicedo's errors: IoU > 0.1 and > 0.7), the docstring says so.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

# IoU 0.50, 0.55 .. 0.95; rounded, so that an IoU of exactly 11/20 reaches 0.55.
IOU_THRESHOLDS = np.round(np.arange(0.5, 1.0, 0.05), 2)
# Nuclei by area, in px^2: [0, 250), [250, 625), [625, 900), [900, infinity).
SIZE_EDGES = (250, 625, 900)
# Caicedo et al. 2019: two objects concern each other above the first, agree above the second.
CONTACT_IOU = 0.1
DETECTION_IOU = 0.7


@dataclass(frozen=True)
class Overlap:
    """Sparse intersections of N nuclei (ground truth) and M predictions of one image."""

    gt_areas: np.ndarray  # (N,) pixels
    pred_areas: np.ndarray  # (M,) pixels
    gt: np.ndarray  # (K,) index 0..N-1 of a pair's nucleus
    pred: np.ndarray  # (K,) index 0..M-1 of its prediction
    intersection: np.ndarray  # (K,) common pixels; may be 0 for boundaries

    @cached_property
    def union(self) -> np.ndarray:
        """(K,) pixels of either."""
        return self.gt_areas[self.gt] + self.pred_areas[self.pred] - self.intersection

    @cached_property
    def iou(self) -> np.ndarray:
        """(K,) intersection over union, 0 to 1."""
        return self.intersection / self.union


def match(overlap: Overlap, iou: np.ndarray, threshold: float) -> np.ndarray:
    """Largest one-to-one matching of pairs with IoU >= ``threshold``; ties go to the larger sum.

    Above 0.5 the masks of non-overlapping nuclei admit one matching only (Kirillov et al.,
    Panoptic Segmentation, CVPR 2019, section 4.1); below, at exactly 0.5, and for overlapping
    nuclei this is the optimal assignment, as in StarDist and Cellpose.

    Args:
        overlap: of one image.
        iou: (K,) of its pairs: ``overlap.iou``, or the boundary IoU.
        threshold: above 0.

    Returns:
        (T,) indices of the matched pairs, increasing; T true positives.
    """
    candidates = np.flatnonzero(iou >= threshold)
    gt, pred = overlap.gt[candidates], overlap.pred[candidates]
    if _is_unique(gt) and _is_unique(pred):
        return candidates
    # One match more always outweighs any gain in IoU.
    profit = 1 + iou[candidates] / (2 * len(candidates))
    return candidates[assign(gt, pred, profit)]


def _is_unique(indices: np.ndarray) -> bool:
    return indices.size < 2 or np.bincount(indices).max() == 1


def assign(rows: np.ndarray, columns: np.ndarray, profit: np.ndarray) -> np.ndarray:
    """Sparse assignment: the one-to-one choice of pairs with the largest total profit.

    A pair that gains more than the best other pairs of its row and of its column together is
    in every optimal assignment, which settles nearly all; the Hungarian method does the rest,
    one connected component at a time.

    Args:
        rows: (K,) nonnegative integers.
        columns: (K,) nonnegative integers; no (row, column) occurs twice.
        profit: (K,) above 0.

    Returns:
        Indices of the chosen pairs, increasing.
    """
    chosen = []
    left = np.arange(len(rows))
    while left.size:
        gain = profit[left]
        rival = _best_other(rows[left], gain) + _best_other(columns[left], gain)
        sure = left[gain > rival]
        if not sure.size:
            break
        chosen.append(sure)
        taken = np.isin(rows[left], rows[sure]) | np.isin(columns[left], columns[sure])
        left = left[~taken]
    if left.size:
        for part in _components(rows[left], columns[left]):
            chosen.append(left[part][_assign_dense(rows, columns, profit, left[part])])
    return np.sort(np.concatenate(chosen)) if chosen else left


def _best_other(groups: np.ndarray, values: np.ndarray) -> np.ndarray:
    """(K,) largest value among the other members of each one's group; 0 if it is alone."""
    order = np.lexsort((-values, groups))
    first = np.flatnonzero(np.diff(groups[order], prepend=-1))
    sizes = np.diff(first, append=len(groups))
    second = np.where(sizes > 1, values[order[np.minimum(first + 1, len(groups) - 1)]], 0)
    result = np.empty(len(groups))
    result[order] = np.repeat(values[order[first]], sizes)
    result[order[first]] = second
    return result


def _components(rows: np.ndarray, columns: np.ndarray) -> list[np.ndarray]:
    """Index arrays of the pairs of each connected component."""
    rows = np.unique(rows, return_inverse=True)[1]
    columns = np.unique(columns, return_inverse=True)[1] + rows.max() + 1
    size = columns.max() + 1
    graph = coo_array((np.ones(len(rows), np.int8), (rows, columns)), shape=(size, size))
    component = connected_components(graph, directed=False)[1][rows]
    order = np.argsort(component, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(component[order])) + 1)


def _assign_dense(rows, columns, profit, pairs: np.ndarray) -> np.ndarray:
    """Positions in ``pairs`` of the optimal choice."""
    row_values, row = np.unique(rows[pairs], return_inverse=True)
    column_values, column = np.unique(columns[pairs], return_inverse=True)
    matrix = np.zeros((len(row_values), len(column_values)))
    matrix[row, column] = profit[pairs]
    position = np.full(matrix.shape, -1)
    position[row, column] = np.arange(len(pairs))
    found = position[linear_sum_assignment(matrix, maximize=True)]
    return found[found >= 0]


def true_positives(overlap: Overlap, iou: np.ndarray) -> np.ndarray:
    """(10,) matches at each of :data:`IOU_THRESHOLDS`."""
    return np.array([len(match(overlap, iou, t)) for t in IOU_THRESHOLDS], np.int64)


def panoptic_sums(overlap: Overlap) -> tuple[int, float]:
    """Matches with IoU > 0.5, and the sum of their IoU.

    From these PQ = sum / (TP + FP/2 + FN/2), SQ = sum / TP and DQ = TP / (TP + FP/2 + FN/2)
    (Kirillov et al., CVPR 2019, section 4; DQ is called RQ there).
    """
    pairs = match(overlap, overlap.iou, np.nextafter(0.5, 1))
    return len(pairs), float(overlap.iou[pairs].sum())


def aji(overlap: Overlap) -> float:
    """Aggregated Jaccard index (Kumar et al., IEEE TMI 2017, algorithm 1).

    Every nucleus takes the prediction of largest IoU, which several may take; a nucleus without
    any adds its area to the union, and so does a prediction that nobody took. Of predictions
    with equal IoU that of larger intersection is taken, and if those are equal too, all count
    as taken, so that the numbering does not matter.

    Returns:
        0 to 1; 0 if either side is empty, NaN if both are.
    """
    order = np.lexsort((-overlap.intersection, -overlap.iou, overlap.gt))
    gt, iou = overlap.gt[order], overlap.iou[order]
    intersection = overlap.intersection[order]
    first = np.flatnonzero(np.diff(gt, prepend=-1))
    sizes = np.diff(first, append=len(gt))
    is_best = (iou == np.repeat(iou[first], sizes)) & (
        intersection == np.repeat(intersection[first], sizes)
    )
    union = overlap.union[order][first].sum()
    union += _area_without(overlap.gt_areas, gt[first])
    union += _area_without(overlap.pred_areas, overlap.pred[order][is_best])
    return _jaccard(overlap, intersection[first].sum(), union)


def aji_plus(overlap: Overlap) -> float:
    """AJI+ (Graham et al., HoVer-Net, Medical Image Analysis 2019): AJI with one-to-one pairs.

    Pairs are the assignment of largest total IoU; unpaired nuclei and predictions add their
    areas to the union.

    Returns:
        0 to 1; 0 if either side is empty, NaN if both are.
    """
    pairs = assign(overlap.gt, overlap.pred, overlap.iou)
    union = overlap.union[pairs].sum()
    union += _area_without(overlap.gt_areas, overlap.gt[pairs])
    union += _area_without(overlap.pred_areas, overlap.pred[pairs])
    return _jaccard(overlap, overlap.intersection[pairs].sum(), union)


def _area_without(areas: np.ndarray, used: np.ndarray) -> int:
    free = np.ones(len(areas), bool)
    free[used] = False
    return int(areas[free].sum())


def _jaccard(overlap: Overlap, common: int, union: int) -> float:
    if not len(overlap.gt_areas) + len(overlap.pred_areas):
        return float("nan")
    return float(common / union) if union else 0.0


def segmentation_errors(overlap: Overlap) -> dict[str, np.ndarray]:
    """What goes wrong (Caicedo et al., Cytometry A 2019), object by object.

    A merge is a prediction with IoU > 0.1 to more than one nucleus, a split a nucleus with
    IoU > 0.1 to more than one prediction. A nucleus is missed if no prediction has IoU > 0.7
    with it, a prediction is spurious if it has IoU > 0.7 with no nucleus.

    Returns:
        bool arrays: "merges" and "spurious" (M,), "splits" and "missed" (N,).
    """
    contact = overlap.iou > CONTACT_IOU
    agree = overlap.iou > DETECTION_IOU
    n_gt, n_pred = len(overlap.gt_areas), len(overlap.pred_areas)
    return {
        "merges": np.bincount(overlap.pred[contact], minlength=n_pred) > 1,
        "splits": np.bincount(overlap.gt[contact], minlength=n_gt) > 1,
        "missed": np.bincount(overlap.gt[agree], minlength=n_gt) == 0,
        "spurious": np.bincount(overlap.pred[agree], minlength=n_pred) == 0,
    }


def size_bins(areas: np.ndarray) -> np.ndarray:
    """(N,) index 0..3 of each area's bin between :data:`SIZE_EDGES`."""
    return np.searchsorted(SIZE_EDGES, areas, side="right")

import itertools

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.optimize import linear_sum_assignment

from nuclei_d2.evaluation.boundary import compute_overlaps
from nuclei_d2.evaluation.instances import layers_from_label_image
from nuclei_d2.evaluation.matching import (
    IOU_THRESHOLDS,
    Overlap,
    aji,
    aji_plus,
    assign,
    match,
    panoptic_sums,
    segmentation_errors,
    size_bins,
    true_positives,
)
from nuclei_d2.evaluation.scores import ScoreTable, score_image


def overlap_of(gt, pred):
    return compute_overlaps(*layers_of(gt, pred))[0]


def layers_of(gt, pred):
    return [layers_from_label_image(np.asarray(side)) for side in (gt, pred)]


def rows(*parts):
    """A one-row label image: rows((3, 1), (2, 0)) is 1 1 1 0 0."""
    return np.concatenate([np.full(length, label) for length, label in parts])[None]


# Two nuclei of 10 px. The first prediction covers 8 of nucleus 1 and 2 of background, the second
# covers 6 of nucleus 2, the third its other 4 and 4 of background.
GT = rows((10, 1), (5, 0), (10, 2), (5, 0))
PRED = rows((2, 0), (10, 1), (3, 0), (6, 2), (8, 3), (1, 0))


def test_overlaps_by_hand():
    overlap = overlap_of(GT, PRED)
    assert overlap.gt_areas.tolist() == [10, 10]
    assert overlap.pred_areas.tolist() == [10, 6, 8]
    assert list(zip(overlap.gt, overlap.pred, strict=True)) == [(0, 0), (1, 1), (1, 2)]
    assert overlap.intersection.tolist() == [8, 6, 4]
    assert overlap.iou == pytest.approx([8 / 12, 6 / 10, 4 / 14])


def test_metrics_by_hand():
    overlap = overlap_of(GT, PRED)
    # IoU 2/3 and 3/5 (which is 0.60 exactly: thresholds are inclusive).
    assert true_positives(overlap, overlap.iou).tolist() == [2, 2, 2, 1, 0, 0, 0, 0, 0, 0]
    assert panoptic_sums(overlap) == (2, pytest.approx(2 / 3 + 3 / 5))
    # Greedy and one-to-one agree here: unions 12 + 10, and the third prediction's 8 px.
    assert aji(overlap) == pytest.approx((8 + 6) / (12 + 10 + 8))
    assert aji_plus(overlap) == pytest.approx((8 + 6) / (12 + 10 + 8))
    errors = segmentation_errors(overlap)
    assert errors["splits"].tolist() == [False, True]
    assert errors["merges"].tolist() == [False, False, False]
    assert errors["missed"].tolist() == [True, True]  # no IoU above 0.7
    assert errors["spurious"].tolist() == [True, True, True]


def test_aji_reuses_a_prediction_and_aji_plus_does_not():
    """One prediction covers two nuclei of 6 and 4 px wholly."""
    overlap = overlap_of(rows((6, 1), (4, 2)), rows((10, 1)))
    assert aji(overlap) == pytest.approx((6 + 4) / (10 + 10))
    assert aji_plus(overlap) == pytest.approx(6 / (10 + 4))
    assert segmentation_errors(overlap)["merges"].tolist() == [True]


def test_iou_of_exactly_one_half_matches_once_but_not_in_pq():
    """Halves of a nucleus: both pairs have IoU 0.5, one of them is a true positive."""
    overlap = overlap_of(rows((8, 1)), rows((4, 1), (4, 2)))
    assert overlap.iou.tolist() == [0.5, 0.5]
    assert true_positives(overlap, overlap.iou).tolist() == [1] + [0] * 9
    assert panoptic_sums(overlap) == (0, 0)


def test_nothing_on_one_side_is_zero_on_both_undefined():
    some, none = rows((3, 1), (3, 0)), rows((6, 0))
    for pair in ((some, none), (none, some)):
        overlap = overlap_of(*pair)
        assert true_positives(overlap, overlap.iou).sum() == 0
        assert aji(overlap) == aji_plus(overlap) == 0
    empty = overlap_of(none, none)
    assert np.isnan(aji(empty))
    assert np.isnan(aji_plus(empty))
    nowhere = Overlap(np.zeros(1, int), *[np.zeros(0, int)] * 4)  # a nucleus without pixels
    assert aji(nowhere) == aji_plus(nowhere) == 0


def test_size_bins_are_half_open():
    assert size_bins(np.array([1, 249, 250, 624, 625, 899, 900])).tolist() == [0, 0, 1, 1, 2, 2, 3]


@given(hnp.arrays(int, (5, 6), elements=st.integers(0, 8)))
@settings(max_examples=150, deadline=None)
def test_assignment_is_optimal(matrix):
    row, column = np.nonzero(matrix)
    profit = matrix[row, column].astype(float)
    chosen = assign(row, column, profit)
    assert len(set(row[chosen])) == len(set(column[chosen])) == len(chosen)
    best = matrix[linear_sum_assignment(matrix, maximize=True)].sum()
    assert profit[chosen].sum() == best


labels = hnp.arrays(np.int32, (6, 7), elements=st.integers(0, 4))


@given(labels, labels)
@settings(max_examples=100, deadline=None)
def test_against_full_masks(gt, pred):
    """Everything recomputed from N x M boolean masks, the slow and obvious way."""
    overlap = overlap_of(gt, pred)
    gt_masks, pred_masks = (
        [side == v for v in dict.fromkeys(side[side > 0].tolist())] for side in (gt, pred)
    )
    inter = np.array([[(g & p).sum() for p in pred_masks] for g in gt_masks], float)
    inter = inter.reshape(len(gt_masks), len(pred_masks))
    union = np.array([[(g | p).sum() for p in pred_masks] for g in gt_masks], float)
    iou = inter / np.maximum(union.reshape(inter.shape), 1)
    dense = np.zeros(inter.shape)
    dense[overlap.gt, overlap.pred] = overlap.iou
    np.testing.assert_allclose(dense, iou)

    for threshold in (0.2, 0.5, 0.75):
        reached = iou >= threshold
        most = len(list(zip(*linear_sum_assignment(reached, maximize=True), strict=True)))
        most = reached[linear_sum_assignment(reached, maximize=True)].sum() if most else 0
        assert len(match(overlap, overlap.iou, threshold)) == most
    if gt_masks and pred_masks:
        pairs = [p for p in zip(*linear_sum_assignment(-iou), strict=True) if iou[p] > 0]
        best = sum(iou[p] for p in pairs)
        ours = assign(overlap.gt, overlap.pred, overlap.iou)
        assert overlap.iou[ours].sum() == pytest.approx(best)
        errors = segmentation_errors(overlap)
        assert errors["merges"].tolist() == ((iou > 0.1).sum(axis=0) > 1).tolist()
        assert errors["splits"].tolist() == ((iou > 0.1).sum(axis=1) > 1).tolist()
        assert errors["missed"].tolist() == (~(iou > 0.7).any(axis=1)).tolist()
        assert errors["spurious"].tolist() == (~(iou > 0.7).any(axis=0)).tolist()
        assert kumar(gt_masks, pred_masks, iou, inter) == pytest.approx(aji(overlap))


def kumar(gt_masks, pred_masks, iou, inter):
    """Algorithm 1 of Kumar et al. 2017, line by line; ties as in our docstring."""
    common = total = 0
    used = set()
    for i, g in enumerate(gt_masks):
        best = max(range(len(pred_masks)), key=lambda j: (iou[i, j], inter[i, j]))
        if iou[i, best] == 0:
            total += g.sum()
            continue
        common += inter[i, best]
        total += (g | pred_masks[best]).sum()
        used |= {
            j
            for j in range(len(pred_masks))
            if (iou[i, j], inter[i, j]) == (iou[i, best], inter[i, best])
        }
    total += sum(p.sum() for j, p in enumerate(pred_masks) if j not in used)
    return common / total


# A nucleus and two predictions of IoU 0.3: 3 common pixels of 10, and 6 of 20.
EQUAL_IOU = rows((10, 0), (10, 1), (15, 0)), rows((10, 0), (3, 1), (1, 0), (16, 2), (5, 0))
# A nucleus in two parts of equal area and unequal shape, both of IoU 0.5.
HALVES = np.ones((8, 16), int), np.repeat([1, 2], 64).reshape(8, 16)
HALVES[1][0, 8:12], HALVES[1][5, 4:8] = 2, 1


@given(labels, labels, st.permutations(range(1, 5)), st.permutations(range(1, 5)))
@example(*EQUAL_IOU, [1, 2, 3, 4], [2, 1, 3, 4])
@example(*HALVES, [1, 2, 3, 4], [2, 1, 3, 4])
@settings(max_examples=100, deadline=None)
def test_renumbering_changes_nothing(gt, pred, gt_order, pred_order):
    first = score_image(*layers_of(gt, pred))
    second = score_image(*layers_of(np.array([0, *gt_order])[gt], np.array([0, *pred_order])[pred]))
    np.testing.assert_equal(ScoreTable([first]).summary(), ScoreTable([second]).summary())


def test_thresholds_are_what_they_print():
    assert [repr(float(t)) for t in IOU_THRESHOLDS] == [
        *("0.5", "0.55", "0.6", "0.65", "0.7", "0.75", "0.8", "0.85", "0.9", "0.95")
    ]


def test_large_connected_chain_is_assigned_optimally():
    """Every nucleus touches two predictions equally: nothing to peel off at first."""
    n = 200
    row = np.repeat(np.arange(n), 2)
    column = np.array(list(itertools.chain.from_iterable((k, k + 1) for k in range(n))))
    assert len(assign(row, column, np.ones(2 * n))) == n

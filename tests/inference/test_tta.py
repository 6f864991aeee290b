import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nuclei_d2.inference.duplicates import DUPLICATE_IOU, find_overlaps
from nuclei_d2.inference.nuclei import Nuclei
from nuclei_d2.inference.tta import UPRIGHT, VIEWS, _gather, vote
from nuclei_d2.structures.cropped_mask import CroppedMask, crop_mask

SIZE = (60, 80)


def squares(*boxes):
    """Nuclei from (top, left, side, score)."""
    masks = [CroppedMask(np.ones((side, side), bool), y, x) for y, x, side, _ in boxes]
    return Nuclei.from_masks(masks, np.array([box[3] for box in boxes]), SIZE)


def test_the_eight_views_differ_and_turn_back():
    image = np.arange(2 * 3, dtype=np.float32).reshape(2, 3, 1)
    seen = set()
    for view in VIEWS:
        transform = view.transform(2, 3)
        turned = transform.apply_image(image)
        seen.add((turned.shape, turned.tobytes()))
        np.testing.assert_array_equal(transform.inverse().apply_image(turned), image)
    assert len(seen) == 8
    np.testing.assert_array_equal(UPRIGHT.transform(2, 3).apply_image(image), image)


@pytest.mark.parametrize("view", VIEWS)
def test_boxes_turn_back_with_the_pixels(view):
    image = np.zeros((20, 30), np.uint8)
    image[2:7, 11:25] = 1
    transform = view.transform(20, 30)
    turned = crop_mask(transform.apply_image(image))
    height, width = turned.mask.shape
    box = np.array([[turned.left, turned.top, turned.left + width, turned.top + height]], float)
    assert transform.inverse().apply_box(box).tolist() == [[11, 2, 25, 7]]


def test_nuclei_that_half_of_the_views_find_stay():
    always, half, rarely = (5, 5, 10, 0.9), (30, 30, 10, 0.6), (5, 60, 10, 0.99)
    views = [squares(always, half, rarely)] * 3 + [squares(always, half)] + [squares(always)] * 4
    nuclei = vote(views)
    assert [(m.top, m.left) for m in nuclei.masks] == [(5, 5), (30, 30)]
    np.testing.assert_allclose(nuclei.scores, [0.9, 0.6])
    assert nuclei.measures["agreement"].tolist() == [1, 0.5]


def test_masks_and_scores_are_those_of_the_majority():
    views = [squares((10, 10, 10, 0.8))] * 5 + [squares((10, 11, 10, 0.4))] * 3
    nuclei = vote(views)
    (mask,) = nuclei.masks
    assert (mask.top, mask.left, mask.mask.shape) == (10, 10, (10, 10))
    assert nuclei.scores[0] == pytest.approx((5 * 0.8 + 3 * 0.4) / 8)


def test_a_small_overlap_is_no_agreement():
    # 5 of 15 columns in common: IoU 1/3.
    nuclei = vote([squares((10, 10, 10, 0.8)), squares((10, 15, 10, 0.7))])
    assert nuclei.measures["agreement"].tolist() == [0.5, 0.5]


def test_a_view_counts_once_in_a_group():
    nuclei = vote([squares((10, 10, 10, 0.9), (10, 11, 10, 0.8)), squares(), squares()])
    assert len(nuclei) == 0


def test_of_one_nucleus_or_two_the_more_frequent_stays():
    whole, halves = squares((10, 10, 12, 0.9)), squares((10, 10, 7, 0.95), (16, 16, 6, 0.95))
    assert len(vote([whole] * 5 + [halves] * 3)) == 1
    assert len(vote([whole] * 3 + [halves] * 5)) == 2
    assert len(vote([whole] * 4 + [halves] * 4)) == 2  # equally often: the better scores


def gathered_by_comparing_all(members, view_of):
    """The rule as it is said: each nucleus against all, by the matrix of all pairs."""
    overlaps = find_overlaps(members, members)
    iou = np.zeros((len(members),) * 2)
    iou[overlaps.first, overlaps.second] = overlaps.iou
    groups, free = [], np.ones(len(members), bool)
    for seed in np.argsort(-members.scores, kind="stable"):
        if free[seed]:
            group = {view_of[seed]: seed}
            for k in np.argsort(-iou[seed], kind="stable"):
                if free[k] and iou[seed, k] >= DUPLICATE_IOU:
                    group.setdefault(view_of[k], k)
            groups.append(list(group.values()))
            free[groups[-1]] = False
    return groups


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_groups_are_those_of_comparing_all(seed):
    rng = np.random.default_rng(seed)
    count = rng.integers(0, 40)
    # Few places, sizes and scores: many overlaps, many of them the same.
    masks = [
        CroppedMask(np.ones(rng.integers(6, 9, 2), bool), *rng.integers(0, 8, 2).tolist())
        for _ in range(count)
    ]
    members = Nuclei(masks, rng.integers(0, 4, count) / 4, SIZE)
    view_of = np.sort(rng.integers(0, 8, count))
    assert _gather(members, view_of) == gathered_by_comparing_all(members, view_of)


def test_memory_does_not_grow_with_the_square_of_the_nuclei():
    """Of 8 x 400 nuclei all pairs would be 10 million."""
    boxes = [(12 * (k // 20), 12 * (k % 20), 8, 0.5) for k in range(400)]
    views = [squares(*boxes)] * 8
    tracemalloc.start()
    assert len(vote(views)) == 400
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10e6


def test_measures_are_averaged():
    views = [squares((10, 10, 10, 0.8)), squares((10, 10, 10, 0.6))]
    for nuclei, value in zip(views, (0.2, 0.4), strict=True):
        nuclei.measures["boundary_uncertainty"] = np.array([value])
    assert vote(views).measures["boundary_uncertainty"] == pytest.approx([0.3])


def test_nothing_found():
    nuclei = vote([squares()] * 8)
    assert len(nuclei) == 0
    assert nuclei.measures["agreement"].shape == (0,)

import numpy as np
import torch
from detectron2.structures import Boxes, Instances
from hypothesis import given, settings
from hypothesis import strategies as st

from nuclei_d2.inference.duplicates import (
    drop_duplicates,
    find_overlaps,
    find_own_overlaps,
    keep_best,
)
from nuclei_d2.inference.nuclei import Nuclei
from nuclei_d2.structures.cropped_mask import CroppedMask


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_overlaps_equal_those_of_full_masks(seed):
    rng = np.random.default_rng(seed)
    sets, full = [], []
    for _ in range(2):
        masks = []
        for _ in range(rng.integers(0, 6)):
            top, left, h, w = *rng.integers(0, 20, 2), *rng.integers(1, 12, 2)
            mask = rng.random((h, w)) < 0.5
            mask[0, 0] = mask[-1, -1] = True
            masks.append(CroppedMask(mask, int(top), int(left)))
        sets.append(Nuclei.from_masks(masks, np.zeros(len(masks)), (40, 40)))
        full.append(np.zeros((len(masks), 40, 40), bool))
        for canvas, mask in zip(full[-1], masks, strict=True):
            canvas[mask.window] = mask.mask
    overlaps = find_overlaps(*sets)
    expected = np.einsum("aij,bij->ab", full[0].astype(int), full[1].astype(int))
    found = np.zeros_like(expected)
    found[overlaps.first, overlaps.second] = overlaps.common
    np.testing.assert_array_equal(found, expected)
    union = (full[0][overlaps.first] | full[1][overlaps.second]).sum(axis=(1, 2))
    np.testing.assert_allclose(overlaps.iou, overlaps.common / union)
    own = find_own_overlaps(sets[0])
    pairs = {frozenset(pair) for pair in zip(own.first.tolist(), own.second.tolist(), strict=True)}
    common = np.einsum("aij,bij->ab", full[0].astype(int), full[0].astype(int))
    assert len(pairs) == len(own.first) == np.triu(common, 1).astype(bool).sum()
    np.testing.assert_array_equal(own.common, common[own.first, own.second])


def test_what_goes_takes_nothing_with_it():
    pairs = np.array([[0, 1], [1, 2]])
    assert keep_best(pairs, np.array([0, 1, 2])).tolist() == [True, False, True]
    assert keep_best(pairs, np.array([1, 0, 2])).tolist() == [False, True, False]


def prediction(*boxes):
    """A detector's prediction of filled boxes (x1, y1, x2, y2, score)."""
    masks = torch.zeros((len(boxes), 30, 40), dtype=torch.bool)
    for mask, (x1, y1, x2, y2, _) in zip(masks, boxes, strict=True):
        mask[y1:y2, x1:x2] = True
    return Instances(
        (30, 40),
        pred_masks=masks,
        pred_boxes=Boxes(torch.tensor([box[:4] for box in boxes]).float().reshape(-1, 4)),
        scores=torch.tensor([box[4] for box in boxes]),
    )


def test_of_duplicates_the_better_one_stays():
    nuclei = (2, 2, 12, 12, 0.7), (12, 2, 22, 12, 0.9)
    both = (2, 2, 22, 12, 0.8)  # covers two neighbours
    other, empty = (30, 20, 36, 26, 0.5), (5, 5, 5, 5, 0.6)
    kept = drop_duplicates(prediction(nuclei[0], both, other, nuclei[1], empty))
    # The sure neighbour removes what covers both, so the other neighbour stays.
    assert kept.scores.tolist() == torch.tensor([0.7, 0.5, 0.9, 0.6]).tolist()
    assert kept.pred_masks.sum(dim=(1, 2)).tolist() == [100, 36, 100, 0]
    assert kept.pred_boxes.tensor[:, 0].tolist() == [2, 30, 12, 5]


def test_without_nuclei_there_are_no_duplicates():
    assert len(drop_duplicates(prediction())) == 0

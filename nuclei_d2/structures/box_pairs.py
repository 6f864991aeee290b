"""Which boxes lie close to each other, without looking at every pair."""

from collections.abc import Iterator

import numpy as np


def near_pairs(boxes: np.ndarray, distance: float) -> Iterator[tuple[int, int]]:
    """Each pair of boxes with a gap below ``distance`` along both axes, once.

    A sweep along the first axis: the cost grows with N times the boxes at the same height.

    Args:
        boxes: (N, 4) low and high ends along the first axis and the second, that is top, left,
            bottom, right or x1, y1, x2, y2; no high end lies below its low end.
        distance: in the unit of the boxes, above 0; 1 means that boxes of pixels touch or overlap.

    Yields:
        Two different indices, in no particular order.
    """
    order = np.argsort(boxes[:, 0], kind="stable")
    lows, lefts, highs, rights = boxes[order].T
    # Those that begin before a box ends lie behind it without a gap.
    ends = np.searchsorted(lows, highs + distance, side="left")
    for i, end in enumerate(ends.tolist()):
        behind = slice(i + 1, end)
        near = (lefts[behind] < rights[i] + distance) & (lefts[i] < rights[behind] + distance)
        for j in np.flatnonzero(near).tolist():
            yield int(order[i]), int(order[i + 1 + j])

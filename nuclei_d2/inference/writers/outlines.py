"""From a mask to the polygons along the edges of its pixels: valid, and of exactly its area."""

import cv2
import numpy as np

from nuclei_d2.structures.cropped_mask import CroppedMask

Polygon = list[np.ndarray]  # closed rings (K, 2) of integer x, y: the exterior, then the holes


def mask_to_polygons(boxed: CroppedMask) -> list[Polygon]:
    """Outline a nonempty mask, one polygon for each of its 4-connected parts.

    x goes right and y down; pixel (row, column) spans columns column..column + 1 and rows
    row..row + 1. Vertices are corners only; a ring's last equals its first. Exteriors run
    clockwise as one looks at the image (their shoelace area is positive), holes the other way.
    No ring crosses or touches itself; holes may touch each other or the exterior at a vertex, and
    so may two parts, as the OGC's "Simple feature access" (06-103r4, section 6.1.11) allows.
    """
    count, parts = cv2.connectedComponents(boxed.mask.view(np.uint8), connectivity=4)
    offset = np.array([boxed.left, boxed.top])
    masks = [boxed.mask] if count == 2 else [parts == part for part in range(1, count)]
    return [[ring + offset for ring in _rings(mask)] for mask in masks]


def _rings(mask: np.ndarray) -> Polygon:
    """Rings of one 4-connected part.

    Along every row of the grid between the pixels, corners alternately start and end a horizontal
    edge, so neighbours in row order are its ends; likewise for columns and vertical edges. A
    corner where two pixels of the part touch diagonally (a saddle) is listed twice, once for each
    of the two background pixels whose edges meet there. These two lie on different sides of the
    part, which is 4-connected, so no ring comes by twice.
    """
    padded = np.zeros((mask.shape[0] + 2, mask.shape[1] + 2), bool)
    padded[1:-1, 1:-1] = mask
    top_left, top_right = padded[:-1, :-1], padded[:-1, 1:]
    bottom_left, bottom_right = padded[1:, :-1], padded[1:, 1:]
    upper, lower = top_left ^ top_right, bottom_left ^ bottom_right
    saddle = upper & lower & (top_left ^ bottom_left)
    y, x = np.nonzero((upper ^ lower) | saddle)
    source = np.repeat(np.arange(len(x)), 1 + saddle[y, x])
    y, x = y[source], x[source]
    # In row order a saddle's copy with the left edge comes first. In column order it does so only
    # if its background pixel is the top left one.
    is_first = np.diff(source, prepend=-1) == 1
    comes_late = is_first == top_left[y, x]
    by_column = np.lexsort((comes_late, y, x))
    across = np.empty_like(by_column)  # the other end of each corner's vertical edge
    across[by_column] = by_column.reshape(-1, 2)[:, ::-1].ravel()
    corners = np.stack([x, y], axis=1)
    rings = [corners[ring] for ring in _cycles(across.tolist())]
    # A ring's first corner in row order is its top left one and its first edge goes right:
    # clockwise. The very first corner lies on the exterior.
    return [rings[0], *(ring[::-1] for ring in rings[1:])]


def _cycles(across: list[int]) -> list[list[int]]:
    """Follow horizontal (k, k ^ 1) and vertical (k, across[k]) edges in turn; closed cycles."""
    cycles, seen = [], [False] * len(across)
    for start in range(len(across)):
        if seen[start]:
            continue
        cycle, corner = [], start
        while not seen[corner]:
            other = corner ^ 1
            seen[corner] = seen[other] = True
            cycle += [corner, other]
            corner = across[other]
        cycles.append([*cycle, start])
    return cycles

"""From probability maps to a label image.

A decoder takes the maps of one image, float32 (C, H, W) in 0..1, and returns a label image, int32
(H, W): 0 = background, nuclei 1..N without gaps, none empty. The work is done in the boxes of
connected components: time and memory grow with the image, not with the number of nuclei.
Components of nuclei are 8-connected.
"""

from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
from detectron2.config import CfgNode, configurable
from skimage.segmentation import watershed

from nuclei_d2.data.targets import BACKGROUND, BOUNDARY, INTERIOR


def decode_two_class(
    maps: np.ndarray, *, threshold: float = 0.5, min_area: int = 0, hole_area: int = 0
) -> np.ndarray:
    """Connected components of the foreground: nuclei that touch become one.

    Args:
        maps: (2, H, W): background, nucleus.
        threshold: least probability of the foreground.
        min_area: nuclei with fewer pixels are dropped.
        hole_area: holes in a nucleus of up to so many pixels are filled.
    """
    return _clean(_components(maps[INTERIOR] > threshold), min_area, hole_area)


def decode_caicedo(maps: np.ndarray, *, min_area: int = 0, hole_area: int = 0) -> np.ndarray:
    """Components of the interior, grown by the boundary that was cut off them.

    Caicedo et al., Cytometry A 2019: likeliest class, small objects removed, holes filled,
    components, dilation by 3x3. Two nuclei keep their own pixels when they grow against each
    other, and a pixel that is likeliest background stays background.

    Args:
        maps: (3, H, W): background, interior, boundary (thick).
        min_area: interiors with fewer pixels are dropped.
        hole_area: holes in an interior of up to so many pixels are filled.
    """
    background, interior, boundary = maps
    inside = (interior > background) & (interior >= boundary)
    labels = _clean(_components(inside), min_area, hole_area)
    grown = cv2.dilate(labels.astype(np.float32), np.ones((3, 3), np.uint8)).astype(np.int32)
    outside = (background >= interior) & (background >= boundary)
    return np.where((labels > 0) | outside, labels, grown)


def decode_boundary(
    maps: np.ndarray,
    *,
    threshold: float = 0.5,
    seed_threshold: float = 0.5,
    min_area: int = 0,
    hole_area: int = 0,
) -> np.ndarray:
    """Watershed from the interiors over interior and boundary.

    Seeds are components of the interior; every pixel of the foreground goes to the seed that the
    flood of the distance to the nearest seed reaches it from. Foreground without a seed is left
    out.

    Args:
        maps: (3, H, W): background, interior, boundary (inner).
        threshold: least probability of interior and boundary together.
        seed_threshold: least probability of the interior in a seed.
        min_area: nuclei with fewer pixels are dropped.
        hole_area: holes in a nucleus of up to so many pixels are filled.
    """
    mask = 1 - maps[BACKGROUND] > threshold
    seeds = _components(mask & (maps[INTERIOR] > seed_threshold))
    elevation = cv2.distanceTransform(
        (seeds == 0).view(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE
    )
    # Diagonal steps would leak through the boundary where it is thin: they come last.
    return _clean(_flood(elevation, seeds, mask, (1, 2)), min_area, hole_area)


def decode_distance(
    maps: np.ndarray,
    *,
    threshold: float = 0.5,
    seed_threshold: float = 0.5,
    min_area: int = 0,
    hole_area: int = 0,
) -> np.ndarray:
    """Watershed on the negative depth, from its high ground.

    Args:
        maps: (3, H, W): background, nucleus, depth (distance to the outline over its maximum in
            the nucleus).
        threshold: least probability of the foreground.
        seed_threshold: least depth in a seed.
        min_area: nuclei with fewer pixels are dropped.
        hole_area: holes in a nucleus of up to so many pixels are filled.
    """
    _, foreground, depth = maps
    mask = foreground > threshold
    seeds = _components(mask & (depth > seed_threshold))
    return _clean(_flood(-depth, seeds, mask, (2,)), min_area, hole_area)


def decode_by_shape(
    maps: np.ndarray,
    *,
    threshold: float = 0.5,
    min_distance: int = 6,
    min_area: int = 0,
    hole_area: int = 0,
) -> np.ndarray:
    """Distance watershed: the foreground is cut where it is narrow.

    The classical method, with nothing learned: seeds are the pixels that lie deepest in the
    foreground within ``min_distance``, after slight smoothing; watershed on the negative depth.

    Args:
        maps: (2, H, W): background, nucleus.
        threshold: least probability of the foreground.
        min_distance: of two seeds, in pixels.
        min_area: components and nuclei with fewer pixels are dropped.
        hole_area: holes in a component of up to so many pixels are filled.
    """
    mask = decode_two_class(maps, threshold=threshold, min_area=min_area, hole_area=hole_area) > 0
    depth = cv2.distanceTransform(mask.view(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    # Without any background, depth is a huge constant.
    depth = cv2.GaussianBlur(np.minimum(depth, max(mask.shape)), (0, 0), 1.0)
    disk = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * min_distance + 1,) * 2)
    deepest = depth > cv2.dilate(depth, disk) - 1e-3  # up to rounding
    seeds = _components(mask & deepest)
    return _clean(_flood(-depth, seeds, mask, (2,)), min_area, 0)


def score_nuclei(labels: np.ndarray, interior: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Mean interior probability of each nucleus, float32 (N,), in 0..1.

    The mean goes over the nucleus' pixels ``inside``: its interior, without the boundary, where
    the interior is improbable by definition and which is a larger share of smaller nuclei. Over
    all its pixels, if none of them is inside.

    Args:
        labels: (H, W) integers, 1..N without gaps.
        interior: (H, W) probability, 0..1.
        inside: (H, W) bool.
    """
    count = int(labels.max(initial=0))
    sums, pixels = np.zeros((2, count + 1)), np.zeros((2, count + 1))
    for row, mask in enumerate((labels > 0, (labels > 0) & inside)):
        owner = labels[mask]
        sums[row] = np.bincount(owner, interior[mask], minlength=count + 1)
        pixels[row] = np.bincount(owner, minlength=count + 1)
    row = (pixels[1] > 0).astype(np.intp)[1:]
    index = np.arange(1, count + 1)
    return (sums[row, index] / pixels[row, index]).astype(np.float32)


class Decoder:
    """Probability maps of one image -> label image and scores, as the MODEL.UNET keys say.

    Attributes:
        settings: the decoder's keyword arguments; the lower-case keys of MODEL.UNET.DECODER that
            it has a use for.
    """

    @configurable
    def __init__(self, decode: Callable[..., np.ndarray], **settings: Any) -> None:
        """
        Args:
            decode: one of this module's decoders.
            settings: its keyword arguments.
        """
        self.decode = decode
        self.settings = settings

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        keys = cfg.MODEL.UNET
        method = f"{keys.TARGET}_{keys.BOUNDARY}" if keys.TARGET == "boundary" else keys.TARGET
        decode = _DECODERS[method]
        used = decode.__kwdefaults__
        return {
            "decode": decode,
            **{k.lower(): v for k, v in keys.DECODER.items() if k.lower() in used},
        }

    def __call__(self, maps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """
        Args:
            maps: float32 (C, H, W), 0..1, what the decoder asks for.

        Returns:
            Label image, int32 (H, W), and float32 (N,) scores, see :func:`score_nuclei`.
        """
        labels = self.decode(maps, **self.settings)
        inside = maps[INTERIOR] > maps[BACKGROUND]
        if self.decode in (decode_caicedo, decode_boundary):
            inside &= maps[INTERIOR] >= maps[BOUNDARY]
        return labels, score_nuclei(labels, maps[INTERIOR], inside)


_DECODERS = {
    "two_class": decode_two_class,
    "boundary_thick": decode_caicedo,
    "boundary_inner": decode_boundary,
    "distance": decode_distance,
}


def _components(mask: np.ndarray) -> np.ndarray:
    """8-connected components, int32 (H, W)."""
    return cv2.connectedComponents(mask.view(np.uint8), connectivity=8, ltype=cv2.CV_32S)[1]


def _flood(
    elevation: np.ndarray, seeds: np.ndarray, mask: np.ndarray, connectivities: tuple[int, ...]
) -> np.ndarray:
    """Seeded watershed in ``mask``; only components with several seeds are flooded.

    Args:
        elevation: (H, W) float.
        seeds: (H, W) int32, 8-connected components inside ``mask``.
        mask: (H, W) bool.
        connectivities: 1 floods to the 4 neighbours, 2 to all 8; another pass is made for pixels
            that the one before did not reach.

    Returns:
        int32 (H, W) of the seeds' labels, 0 in components without any.
    """
    count, components, stats, _ = cv2.connectedComponentsWithStats(
        mask.view(np.uint8), connectivity=8, ltype=cv2.CV_32S
    )
    seeded = seeds > 0
    component_of = np.zeros(int(seeds.max(initial=0)) + 1, np.int32)
    component_of[seeds[seeded]] = components[seeded]
    seed_of = np.zeros(count, np.int32)
    seed_of[component_of[1:]] = np.arange(1, len(component_of))
    labels = seed_of[components]
    for component in np.flatnonzero(np.bincount(component_of[1:], minlength=count) > 1):
        x, y, width, height = stats[component, :4]
        window = np.s_[y : y + height, x : x + width]
        inside = components[window] == component
        flooded = np.where(inside, seeds[window], 0)
        for connectivity in connectivities:
            if not flooded[inside].all():
                flooded = watershed(elevation[window], flooded, connectivity, mask=inside)
        labels[window][inside] = flooded[inside]
    return labels


def _clean(labels: np.ndarray, min_area: int, hole_area: int) -> np.ndarray:
    """Fill holes, drop small nuclei, number the rest 1..N."""
    if hole_area > 0:
        labels = _fill_holes(labels, hole_area)
    areas = np.bincount(labels.ravel())
    kept = areas >= max(min_area, 1)
    kept[0] = False
    return (np.cumsum(kept) * kept).astype(np.int32)[labels]


def _fill_holes(labels: np.ndarray, max_area: int) -> np.ndarray:
    """Fill 4-connected background of up to ``max_area`` pixels that one nucleus surrounds.

    A gap between several nuclei, or at the image border, is no hole.
    """
    _, gaps, stats, _ = cv2.connectedComponentsWithStats(
        (labels == 0).view(np.uint8), connectivity=4, ltype=cv2.CV_32S
    )
    height, width = labels.shape
    left, top, w, h, area = stats.T
    inside = (left > 0) & (top > 0) & (left + w < width) & (top + h < height)
    inside[0] = False  # OpenCV's row of all that is not gap
    small = (inside & (area <= max_area))[gaps]
    if not small.any():
        return labels
    # The highest and the lowest label around every pixel, then around every gap.
    values, square = labels.astype(np.float32), np.ones((3, 3), np.uint8)
    high, low = np.zeros(len(area), np.float32), np.full(len(area), np.inf, np.float32)
    np.maximum.at(high, gaps[small], cv2.dilate(values, square)[small])
    values[labels == 0] = np.inf
    np.minimum.at(low, gaps[small], cv2.erode(values, square)[small])
    fill = np.where(high == low, high, 0).astype(np.int32)
    return np.where(small, fill[gaps], labels)

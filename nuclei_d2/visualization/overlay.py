"""Pictures for eyes and papers: contours of nuclei, boundary maps, panels with titles.

Pictures are (H, W, 3) uint8 RGB. Every function returns a new one.
"""

from collections import Counter
from collections.abc import Iterator, Sequence

import cv2
import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from skimage.measure import find_contours, subdivide_polygon

from nuclei_d2.data.normalization import ContrastRange, contrast_range
from nuclei_d2.structures import BoxedMasks, LabelMasks
from nuclei_d2.structures.box_pairs import near_pairs
from nuclei_d2.structures.cropped_mask import CroppedMask, label_image_to_masks, split_masks

# After Okabe & Ito, "Color Universal Design" (2008): distinct for colour-blind readers too. Black
# is left out, orange (too close to vermilion on thin lines) as well, and the dark ones are lighter.
PALETTE = np.array(
    [
        (240, 228, 66),  # yellow
        (86, 180, 233),  # sky blue
        (235, 95, 25),  # vermilion
        (0, 200, 140),  # bluish green
        (235, 135, 200),  # reddish purple
        (85, 110, 255),  # blue
    ],
    np.uint8,
)
_MIN_SIDE = 1000  # pixels of a picture's longer side, if enlarging by an integer gets there
_NEIGHBOUR_DISTANCE = 6  # pixels between the boxes of two nuclei that need different colours
_SUBPIXEL_BITS = 4  # fractional bits of OpenCV's drawing coordinates


def stretch(image: np.ndarray, contrast: ContrastRange | None = None) -> np.ndarray:
    """Contrast-stretch a raw image for display, exactly as the network sees it.

    Args:
        image: (H, W, 1 or 3) float32 raw grey levels (grey or RGB).
        contrast: grey levels that become black and white; None: those of the image by the default
            settings of :func:`~nuclei_d2.data.normalization.contrast_range`.

    Returns:
        (H, W, 3) uint8.
    """
    contrast = contrast or contrast_range(image)
    stretched = np.rint(contrast.apply(image)).astype(np.uint8)
    return np.broadcast_to(stretched, (*image.shape[:2], 3)).copy()


def enlargement(height: int, width: int) -> int:
    """The integer factor that makes a small image large enough for crisp contours; 1 for large."""
    return max(1, -(-_MIN_SIDE // max(height, width, 1)))


def enlarge(picture: np.ndarray, factor: int) -> np.ndarray:
    """Enlarge a picture (H, W, 3) by an integer, bicubically, to (factor H, factor W, 3)."""
    if factor == 1 or picture.size == 0:
        return picture.copy()
    return cv2.resize(picture, None, fx=factor, fy=factor, interpolation=cv2.INTER_CUBIC)


def draw_contours(
    picture: np.ndarray,
    masks: torch.Tensor | np.ndarray | LabelMasks | BoxedMasks,
    *,
    line_width: float | None = None,
    factor: int | None = None,
) -> np.ndarray:
    """Enlarge ``picture`` and draw the outline of every nucleus in it, anti-aliased.

    A line runs inside its nucleus, along the edge of its pixels, so two nuclei that touch keep a
    line each. Those close to each other differ in colour, see :func:`neighbour_colors`.

    Args:
        picture: (H, W, 3) uint8.
        masks: bool (N, H, W), :class:`LabelMasks` or :class:`BoxedMasks`, or a label image (H, W)
            of integers with 0 as background. Nuclei may overlap: later ones are drawn over
            earlier ones.
        line_width: pixels of the enlarged picture, in steps of 1/2; None: by ``factor``.
        factor: enlargement; None: :func:`enlargement` of the picture's size.

    Returns:
        (factor H, factor W, 3) uint8.

    Raises:
        ValueError: masks of another size than the picture.
    """
    height, width = picture.shape[:2]
    crops = _to_crops(masks, (height, width))
    colors = neighbour_colors(np.array([_box(crop) for crop in crops]).reshape(-1, 4))
    factor = factor or enlargement(height, width)
    if line_width is None:
        line_width = 1.0 + 0.25 * (factor - 1)
    drawing = enlarge(picture, factor)
    for crop, color in zip(crops, colors, strict=True):
        if crop.mask.size:
            _blend(drawing, crop, color, factor, line_width)
    return drawing


def neighbour_colors(boxes: np.ndarray) -> np.ndarray:
    """Colours of :data:`PALETTE` in which nuclei close to each other differ.

    Greedy colouring in the order of the boxes: each takes the colour that is rarest among its
    neighbours, then rarest so far.

    Args:
        boxes: (N, 4) x1, y1, x2, y2 in pixels.

    Returns:
        (N, 3) uint8.
    """
    earlier: list[list[int]] = [[] for _ in range(len(boxes))]
    for i, j in near_pairs(boxes, _NEIGHBOUR_DISTANCE):
        earlier[max(i, j)].append(min(i, j))
    chosen, used, colors = [], [0] * len(PALETTE), range(len(PALETTE))
    for near in earlier:
        around = Counter(chosen[k] for k in near)
        chosen.append(min(colors, key=lambda c, around=around: (around[c], used[c], c)))
        used[chosen[-1]] += 1
    return PALETTE[np.array(chosen, np.intp)]


def draw_boundaries(boundaries: BoxedMasks | torch.Tensor | np.ndarray) -> np.ndarray:
    """A heat map of the predicted boundary: at each pixel the largest value of all nuclei.

    Args:
        boundaries: uint8, probability x 255: ``Instances.pred_boundaries``, or (N, H, W).

    Returns:
        (factor H, factor W, 3) uint8, enlarged by :func:`enlargement`; 0 and 255 are the ends of
        matplotlib's colour map "inferno".
    """
    height, width = boundaries.shape[1:]
    highest = np.zeros((height, width), np.uint8)
    for top, left, values in _windows(boundaries):
        window = highest[top : top + values.shape[0], left : left + values.shape[1]]
        np.maximum(window, values, out=window)
    colors = matplotlib.colormaps["inferno"](np.arange(256), bytes=True)[:, :3]
    # Values are enlarged before they are coloured: mixed colours would lie off the colour map.
    return colors[enlarge(highest, enlargement(height, width))]


def panel(pictures: Sequence[tuple[str, np.ndarray]]) -> np.ndarray:
    """Put pictures side by side on white, tops aligned, each below its title.

    Args:
        pictures: (title, (H, W, 3) uint8) each.
    """
    tallest = max(picture.shape[0] for _, picture in pictures)
    font = ImageFont.load_default(max(14, tallest // 36))
    gap, top = 12, round(1.7 * font.size)
    indent = gap // 2
    columns = [
        max(image.shape[1], indent + round(font.getlength(title))) + gap
        for title, image in pictures
    ]
    canvas = Image.new("RGB", (sum(columns) - gap, top + tallest), "white")
    pen, left = ImageDraw.Draw(canvas), 0
    for (title, picture), column in zip(pictures, columns, strict=True):
        pen.text((left + indent, top // 2), title, "black", font, anchor="lm")
        canvas.paste(Image.fromarray(picture), (left, top))
        left += column
    return np.array(canvas)


def _to_crops(
    masks: torch.Tensor | np.ndarray | LabelMasks | BoxedMasks, image_size: tuple[int, int]
) -> list[CroppedMask]:
    """Whatever the masks come as, one crop per nucleus: nothing after this touches full frames."""
    size = tuple(masks.shape[-2:])
    if size != image_size:
        raise ValueError(f"masks of size {size} for a picture of size {image_size}")
    if len(masks.shape) == 2:
        return [mask for _, mask in label_image_to_masks(np.asarray(masks))]
    return split_masks(masks)


def _box(crop: CroppedMask) -> tuple[int, int, int, int]:
    """x1, y1, x2, y2 in the image."""
    rows, columns = crop.window
    return columns.start, rows.start, columns.stop, rows.stop


def _windows(
    maps: BoxedMasks | torch.Tensor | np.ndarray,
) -> Iterator[tuple[int, int, np.ndarray]]:
    """Top, left and values of each map's window; of a (N, H, W) tensor it is the whole frame."""
    if isinstance(maps, BoxedMasks):
        maps = maps.to("cpu")
        return (maps.crop(k) for k in range(len(maps)))
    return ((0, 0, values) for values in np.asarray(torch.as_tensor(maps).cpu()))


def _blend(
    drawing: np.ndarray, crop: CroppedMask, color: np.ndarray, factor: int, line_width: float
) -> None:
    """Draw one nucleus into ``drawing``, in place."""
    outlines = _outlines(crop.mask, factor)
    inside = np.zeros([side * factor for side in crop.mask.shape], np.uint8)
    line = inside.copy()
    cv2.fillPoly(inside, outlines, 255, cv2.LINE_AA, _SUBPIXEL_BITS)
    # The inner half of a line of twice the width.
    thickness = max(1, round(2 * line_width))
    cv2.polylines(line, outlines, True, 255, thickness, cv2.LINE_AA, _SUBPIXEL_BITS)
    opacity = np.minimum(inside, line) / np.float32(255)
    left, top, right, bottom = (factor * edge for edge in _box(crop))
    region = drawing[top:bottom, left:right]
    region[:] = np.rint(region + opacity[:, :, None] * (color - region.astype(np.float32)))


def _outlines(mask: np.ndarray, factor: int) -> list[np.ndarray]:
    """Closed polygons of the mask's edge in fixed-point pixels of the enlarged crop."""
    outlines = []
    for outline in find_contours(np.pad(mask, 1).astype(np.float32), 0.5):
        # The stairs of pixels become smooth, a quartic B-spline. The line moves by less than half a
        # pixel, and no nucleus vanishes.
        for _ in range(2):
            outline = subdivide_polygon(outline, degree=4)
        # The padding's pixel 1 is the crop's pixel 0.
        points = (outline[:-1, ::-1] - 0.5) * factor - 0.5
        outlines.append(np.rint(points * (1 << _SUBPIXEL_BITS)).astype(np.int32))
    return outlines

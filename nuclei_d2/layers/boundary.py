"""From instance masks to their one-pixel inner boundaries."""

import torch
from torch import Tensor
from torch.nn import functional as F


def mask_to_boundary(masks: Tensor, zero_padding: bool = False) -> Tensor:
    """Mask pixels that have a background pixel among their 8 neighbours.

    This is where the 3x3 Laplacian (centre 8, neighbours -1) of a binary mask is positive: the
    boundary of Boundary-preserving Mask R-CNN (Cheng et al., ECCV 2020, section 3.3).

    Args:
        masks: (N, H, W), bool, or float that is foreground from 0.5 on.
        zero_padding: whether the surroundings of the H x W window are background. If not, the
            outermost pixels only serve as neighbours.

    Returns:
        bool, (N, H, W) with zero padding, (N, H - 2, W - 2) without.
    """
    masks = masks >= 0.5
    if zero_padding:
        masks = F.pad(masks, (1, 1, 1, 1))
    background = (~masks)[:, None].float()
    near_background = F.max_pool2d(background, kernel_size=3, stride=1)[:, 0] > 0
    return masks[:, 1:-1, 1:-1] & near_background


def crop_masks_and_boundaries(
    masks, boxes: Tensor, size: int, target: str = "exact"
) -> tuple[Tensor, Tensor]:
    """Training targets of the mask and the boundary branch.

    Args:
        masks: N instance masks of one image with
            ``crop_and_resize(boxes (N, 4), size) -> (N, size, size)``, as
            :class:`detectron2.structures.BitMasks` has it.
        boxes: (N, 4) float, XYXY in pixels; box i crops mask i.
        size: pixels along a side of the target.
        target: "exact" crops one target pixel more on each side, so that only real background
            makes a boundary. "paper" knows the crop alone and takes its surroundings for
            background: a nucleus that fills the box gets a frame of 4 * (size - 1) pixels.
            What lies outside the image is for ``masks`` to say; LabelMasks repeats its edge
            there, so that a nucleus cut by the image has no boundary along the cut.

    Returns:
        Masks and boundaries, bool, both (N, size, size).
    """
    if target == "paper":
        crops = masks.crop_and_resize(boxes, size)
        return crops, mask_to_boundary(crops, zero_padding=True)
    # Bins keep their size and place, so the inner pixels are those of the plain crop; only ties
    # at the threshold (boxes on whole pixels) may be rounded the other way.
    crops = masks.crop_and_resize(_enlarge(boxes, size), size + 2)
    return crops[:, 1:-1, 1:-1], mask_to_boundary(crops)


def _enlarge(boxes: Tensor, size: int) -> Tensor:
    """Boxes (N, 4) with 1/size of their own width and height more on each side."""
    margin = (boxes[:, 2:] - boxes[:, :2]) / size
    return torch.cat([boxes[:, :2] - margin, boxes[:, 2:] + margin], dim=1)

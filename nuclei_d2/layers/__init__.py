"""Operations on tensors that are not models of their own."""

from nuclei_d2.layers.boundary import crop_masks_and_boundaries, mask_to_boundary
from nuclei_d2.layers.roi_align import SmallROIAlign, SmallROIPooler
from nuclei_d2.layers.upsample import UpsamplePredictor

__all__ = [
    "SmallROIAlign",
    "SmallROIPooler",
    "UpsamplePredictor",
    "crop_masks_and_boundaries",
    "mask_to_boundary",
]

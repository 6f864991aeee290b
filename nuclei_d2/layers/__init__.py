"""Operations on tensors that are not models of their own."""

from nuclei_d2.layers.boundary import crop_masks_and_boundaries, mask_to_boundary

__all__ = ["crop_masks_and_boundaries", "mask_to_boundary"]

"""Heads that work on regions of interest."""

from nuclei_d2.modeling.roi_heads.boundary_mask_head import BoundaryMaskHead

__all__ = ["BoundaryMaskHead"]

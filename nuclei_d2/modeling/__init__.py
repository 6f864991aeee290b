"""Models; importing this package adds them to Detectron2's registries."""

from nuclei_d2.modeling.meta_arch import NucleiRCNN, build_model
from nuclei_d2.modeling.roi_heads import BoundaryMaskHead

__all__ = ["BoundaryMaskHead", "NucleiRCNN", "build_model"]

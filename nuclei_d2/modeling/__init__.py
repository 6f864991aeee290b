"""Models; importing this package adds them to Detectron2's registries."""

from nuclei_d2.modeling.backbone import UNetDecoder, UNetEncoder
from nuclei_d2.modeling.meta_arch import Classical, NucleiRCNN, UNet, build_model
from nuclei_d2.modeling.roi_heads import BoundaryMaskHead

__all__ = [
    "BoundaryMaskHead",
    "Classical",
    "NucleiRCNN",
    "UNet",
    "UNetDecoder",
    "UNetEncoder",
    "build_model",
]

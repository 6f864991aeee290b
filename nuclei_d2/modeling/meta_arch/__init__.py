"""Whole models, built by MODEL.META_ARCHITECTURE."""

import torch
from detectron2 import modeling
from detectron2.config import CfgNode

from nuclei_d2.modeling.meta_arch.classical import Classical
from nuclei_d2.modeling.meta_arch.rcnn import NucleiRCNN
from nuclei_d2.modeling.meta_arch.unet import UNet

__all__ = ["Classical", "NucleiRCNN", "UNet", "build_model"]


def build_model(cfg: CfgNode) -> torch.nn.Module:
    """Detectron2's ``build_model``, for training and inference alike, channels last in memory.

    Convolutions in bfloat16 are faster that way, on CPUs with such instructions and on GPUs.
    """
    return modeling.build_model(cfg).to(memory_format=torch.channels_last)

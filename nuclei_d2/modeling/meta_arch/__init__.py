"""Whole models, built by MODEL.META_ARCHITECTURE."""

import torch
from detectron2 import modeling
from detectron2.config import CfgNode

from nuclei_d2.modeling.meta_arch.classical import Classical
from nuclei_d2.modeling.meta_arch.rcnn import NucleiRCNN
from nuclei_d2.modeling.meta_arch.unet import UNet
from nuclei_d2.utils.errors import NucleiError

__all__ = ["Classical", "NucleiRCNN", "UNet", "build_model"]


def build_model(cfg: CfgNode) -> torch.nn.Module:
    """Detectron2's ``build_model``, for training and inference alike, channels last in memory.

    Convolutions in bfloat16 are faster that way, on CPUs with such instructions and on GPUs. There
    group norm gives its output channels first, so that each would be turned round twice: channels
    stay first, but in an encoder without it.

    Raises:
        NucleiError: the backbone does not make what the rest of the model takes.
    """
    try:
        model = modeling.build_model(cfg)
    except KeyError as error:
        if error.args[0] not in _taken_features(cfg):
            raise
        raise NucleiError(
            f"MODEL.BACKBONE.NAME {cfg.MODEL.BACKBONE.NAME} makes no features {error.args[0]!r}, "
            f"which MODEL.META_ARCHITECTURE {cfg.MODEL.META_ARCHITECTURE} is to take; begin with a "
            "config from configs/, or change the keys IN_FEATURES, too"
        ) from error
    except (AssertionError, ValueError) as error:  # how Detectron2 and PyTorch refuse a config
        reason = " ".join(str(error).split()) or "an assertion of Detectron2 failed"
        raise NucleiError(
            f"MODEL.META_ARCHITECTURE {cfg.MODEL.META_ARCHITECTURE} cannot be built with "
            f"MODEL.BACKBONE.NAME {cfg.MODEL.BACKBONE.NAME} and the keys that belong to them "
            f"({reason}); begin with a config from configs/"
        ) from error
    backbone = getattr(model, "backbone", model)  # the classical baseline has none
    for part in (model, getattr(backbone, "bottom_up", backbone)):
        if torch.device(cfg.MODEL.DEVICE).type == "cpu" or not _has_group_norm(part):
            part.to(memory_format=torch.channels_last)
    return model


def _has_group_norm(model: torch.nn.Module) -> bool:
    return any(isinstance(module, torch.nn.GroupNorm) for module in model.modules())


def _taken_features(cfg: CfgNode) -> set[str]:
    """Names of features that other parts take from the backbone."""
    parts = (cfg.MODEL.FPN, cfg.MODEL.RPN, cfg.MODEL.ROI_HEADS, cfg.MODEL.ROI_MASK_HEAD.BOUNDARY)
    return {name for part in parts for name in part.IN_FEATURES}

"""When bfloat16 is used in place of float32."""

import logging
from contextlib import AbstractContextManager, nullcontext

import torch
from detectron2.config import CfgNode

from nuclei_d2.doctor import bfloat16_support

_logger = logging.getLogger(__name__)


def has_bfloat16(device: torch.device, key: str) -> bool:
    """Whether bfloat16 is faster than float32 there: a CPU without its instructions emulates it.

    Args:
        key: the config key that asks for it, for the warning.
    """
    if device.type != "cpu" or bfloat16_support().startswith(("fast", "yes")):
        return True
    _logger.warning("this CPU only emulates bfloat16: %s is passed over, float32 is used", key)
    return False


def infers_in_bfloat16(cfg: CfgNode) -> bool:
    """Whether TEST.AMP.ENABLED asks for bfloat16, and MODEL.DEVICE is fast at it."""
    key = "TEST.AMP.ENABLED"
    return cfg.TEST.AMP.ENABLED and has_bfloat16(torch.device(cfg.MODEL.DEVICE), key)


def inference_precision(device: torch.device, bfloat16: bool) -> AbstractContextManager:
    """Autocast to bfloat16, or leave things as they are."""
    return torch.autocast(device.type, torch.bfloat16) if bfloat16 else nullcontext()

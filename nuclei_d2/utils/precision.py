"""When bfloat16 is used in place of float32."""

import logging
from contextlib import AbstractContextManager, nullcontext

import torch
from detectron2.config import CfgNode

from nuclei_d2.utils.hardware import bfloat16_support

_logger = logging.getLogger(__name__)
_AMPERE = (8, 0)  # compute capability of the first NVIDIA GPUs with bfloat16 (CUDA C++ Guide)


def has_bfloat16(device: torch.device, key: str) -> bool:
    """Whether bfloat16 is known to be faster than float32 there.

    Devices without its instructions emulate it; CPUs need AMX to gain from it.

    Args:
        device: one that is there.
        key: the config key that asks for it, for the warning.
    """
    fast = True
    if device.type == "cpu":
        fast = bfloat16_support().startswith("fast")
    elif device.type == "cuda" and torch.version.cuda:  # not AMD's
        fast = torch.cuda.get_device_capability(device) >= _AMPERE
    if not fast:
        name = {"cpu": "CPU", "cuda": "GPU"}[device.type]
        words = "bfloat16 is not known to be faster than float32 on this %s: %s is passed over"
        _logger.warning(words, name, key)
    return fast


def infers_in_bfloat16(cfg: CfgNode) -> bool:
    """Whether TEST.AMP.ENABLED asks for bfloat16, and MODEL.DEVICE is fast at it."""
    key = "TEST.AMP.ENABLED"
    return cfg.TEST.AMP.ENABLED and has_bfloat16(torch.device(cfg.MODEL.DEVICE), key)


def inference_precision(device: torch.device, bfloat16: bool) -> AbstractContextManager:
    """Autocast to bfloat16, or leave things as they are."""
    return torch.autocast(device.type, torch.bfloat16) if bfloat16 else nullcontext()

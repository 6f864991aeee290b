"""Whole models, built by MODEL.META_ARCHITECTURE."""

from nuclei_d2.modeling.meta_arch.rcnn import NucleiRCNN

__all__ = ["NucleiRCNN"]

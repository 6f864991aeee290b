"""Masks of nuclei: those that travel inside Detectron2's ``Instances``, and one at a time."""

from nuclei_d2.structures.boxed_masks import BoxedMasks
from nuclei_d2.structures.cropped_mask import CroppedMask
from nuclei_d2.structures.label_masks import LabelMasks

__all__ = ["BoxedMasks", "CroppedMask", "LabelMasks"]

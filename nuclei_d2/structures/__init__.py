"""Data structures that travel inside Detectron2's ``Instances``."""

from nuclei_d2.structures.boxed_masks import BoxedMasks
from nuclei_d2.structures.label_masks import LabelMasks

__all__ = ["BoxedMasks", "LabelMasks"]

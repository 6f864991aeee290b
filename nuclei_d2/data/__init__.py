"""From files to what the model sees: reading, normalising, augmenting, mapping."""

from nuclei_d2.data.dataset_mapper import NucleiDatasetMapper
from nuclei_d2.data.image_io import ImageNormalizer, normalize, read_image, read_label

__all__ = [
    "ImageNormalizer",
    "NucleiDatasetMapper",
    "normalize",
    "read_image",
    "read_label",
]

"""From files to what the model sees: reading, normalising, augmenting, mapping."""

from nuclei_d2.data.dataset_mapper import NucleiDatasetMapper
from nuclei_d2.data.image_io import read_image, read_label
from nuclei_d2.data.normalization import ImageNormalizer, normalize

__all__ = [
    "ImageNormalizer",
    "NucleiDatasetMapper",
    "normalize",
    "read_image",
    "read_label",
]

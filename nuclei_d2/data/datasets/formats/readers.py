"""How formats store objects: mask files, label images, colour-coded label images."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
from PIL import Image
from skimage.measure import label as connected_components

from nuclei_d2.data.datasets.coco import segmentation_to_rle
from nuclei_d2.data.datasets.prepare import NamedMask
from nuclei_d2.data.datasets.sources import SourceFile
from nuclei_d2.data.image_io import read_image, read_label
from nuclei_d2.structures.cropped_mask import crop_mask, label_image_to_masks
from nuclei_d2.utils.errors import NucleiError


def read_mask_files(height: int, width: int, files: Sequence[SourceFile]) -> list[NamedMask]:
    """One file per object: every pixel that is not black belongs to it."""
    named = []
    for file in files:
        mask = _decode_mask(file)
        check_size(file, mask, height, width)
        named.append(NamedMask(file.path.name, crop_mask(mask)))
    return named


def _decode_mask(file: SourceFile) -> np.ndarray:
    data = file.read_bytes()
    if not data:
        raise NucleiError(f"{file}: the file is empty; download it again")
    try:
        with Image.open(io.BytesIO(data)) as image:
            # Not image_io: a data set has tens of thousands, and these need no temporary file.
            pixels = np.asarray(image if image.mode in ("1", "L") else image.convert("RGB"))
    except MemoryError:
        raise
    except Exception as error:  # Pillow raises errors of every kind on broken files
        raise NucleiError(f"{file}: truncated or no readable mask ({error})") from error
    return pixels > 0 if pixels.ndim == 2 else pixels.any(axis=2)


def read_label_file(height: int, width: int, file: SourceFile) -> list[NamedMask]:
    """One label image: 0 is background, every other value one object."""
    labels = file.read(read_label)
    check_size(file, labels, height, width)
    return _name_labels(labels)


def read_coloured_file(height: int, width: int, file: SourceFile) -> list[NamedMask]:
    """One image whose red channel colours the objects so that touching ones differ.

    An object is an 8-connected component of one colour; black is background.
    """
    red = file.read(read_image)[:, :, 0]
    check_size(file, red, height, width)
    return _name_labels(connected_components(red.astype(np.int64), background=0, connectivity=2))


def read_coco_annotations(
    height: int, width: int, annotations: Sequence[dict[str, Any]], source: str
) -> list[NamedMask]:
    """COCO annotations, polygons or RLE; crowd regions are dropped."""
    named = []
    for annotation in annotations:
        name = f"annotation {annotation['id']}"
        segmentation = annotation.get("segmentation")
        rle = segmentation_to_rle(segmentation, (height, width), f"{source}: {name}")
        drop = "crowd" if annotation.get("iscrowd") else ""
        named.append(NamedMask(name, crop_mask(mask_util.decode(rle)), drop))
    return named


def _name_labels(labels: np.ndarray) -> list[NamedMask]:
    return [NamedMask(f"label {value}", mask) for value, mask in label_image_to_masks(labels)]


def check_size(file: SourceFile, array: np.ndarray, height: int, width: int) -> None:
    """Raise :class:`NucleiError` unless ``array`` is of the image's size."""
    if array.shape[:2] != (height, width):
        own = " x ".join(map(str, array.shape[:2]))
        raise NucleiError(f"{file} is {own} pixels, its image {height} x {width}; pair them anew")

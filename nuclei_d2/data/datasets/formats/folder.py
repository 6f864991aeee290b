"""Any folder of images with a folder of label images, as Cellpose and StarDist keep them."""

import os
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path, PurePath
from typing import TypeVar

from nuclei_d2.data.datasets.formats.readers import read_label_file
from nuclei_d2.data.datasets.prepare import Listing, Record
from nuclei_d2.data.datasets.sources import SourceFile, list_images
from nuclei_d2.utils.errors import NucleiError

F = TypeVar("F", PurePath, SourceFile)

LABEL_ENDINGS = ("_cp_masks", "_masks", "_labels")  # of Cellpose, others, tools/predict.py
_IMAGE_ENDINGS = ("_img",)


def list_folder(
    images: str | os.PathLike,
    labels: str | os.PathLike,
    split: Callable[[str], str],
    modality: str | None = None,
) -> Listing:
    """Pair images and label images by stem, without :data:`LABEL_ENDINGS` and ``_img``.

    Both may lie in one folder, where the label images are those with such an ending.
    Images without a label image are left out.

    Args:
        images: folder or zip.
        labels: folder or zip.
        split: image id -> split.
        modality: of all images; None judges each by its pixels.

    Raises:
        NucleiError: no pair at all, a label image without an image, or two of one stem.
    """
    same = Path(images).resolve() == Path(labels).resolve()
    image_files = [f for f in list_images(images) if not (same and _is_label(f))]
    image_of = _by_stem(image_files, image_key)
    label_of = labels_by_key(list_images(labels), same)
    for stem in sorted(label_of.keys() - image_of.keys()):
        raise NucleiError(f"{label_of[stem]} has no image {stem}.* or {stem}_img.* in {images}")
    if not label_of:
        raise NucleiError(f"{labels}: no label image; they end in _masks where images lie too")
    listing = Listing([])
    for stem, image in image_of.items():
        if stem not in label_of:
            listing.skipped[str(image)] = "no label image"
            continue
        read_masks = partial(read_label_file, file=label_of[stem])
        listing.records.append(Record(stem, split(stem), image, read_masks, modality))
    return listing


def image_key(image: F) -> str:
    """What an image and its label image have in common: the stem, without ``_img``."""
    return _remove_ending(image.stem, _IMAGE_ENDINGS)


def labels_by_key(files: Iterable[F], among_images: bool) -> dict[str, F]:
    """:func:`image_key` of the image -> its label image.

    Args:
        files: label images; their stems are those of the images, with or without ``_img``, and
            then one of :data:`LABEL_ENDINGS` or nothing.
        among_images: the files are images, too, so only those with such an ending count.

    Raises:
        NucleiError: two files stand for one image.
    """
    labels = [file for file in files if not among_images or _is_label(file)]
    return _by_stem(labels, _label_key)


def _label_key(file: PurePath | SourceFile) -> str:
    """Some label images are named after the image with its ending: ``a_img_cp_masks``."""
    return _remove_ending(_remove_ending(file.stem, LABEL_ENDINGS), _IMAGE_ENDINGS)


def _is_label(file: F) -> bool:
    return file.stem.endswith(LABEL_ENDINGS)


def _remove_ending(stem: str, endings: tuple[str, ...]) -> str:
    return stem.removesuffix(next((e for e in endings if stem.endswith(e)), ""))


def _by_stem(files: Iterable[F], key: Callable[[F], str]) -> dict[str, F]:
    found: dict[str, F] = {}
    for file in files:
        stem = key(file)
        if stem in found:
            raise NucleiError(f"{file} and {found[stem]} both stand for {stem}; keep one")
        found[stem] = file
    return found

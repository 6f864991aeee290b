"""Any folder of images with a folder of label images, as Cellpose and StarDist keep them."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

from nuclei_d2.data.datasets.formats.readers import read_label_file
from nuclei_d2.data.datasets.prepare import Listing, Record
from nuclei_d2.data.datasets.sources import SourceFile, list_images
from nuclei_d2.utils.errors import NucleiError

_LABEL_ENDINGS = ("_cp_masks", "_masks")
_IMAGE_ENDING = "_img"


def list_folder(
    images: str | os.PathLike,
    labels: str | os.PathLike,
    split: Callable[[str], str],
    modality: str | None = None,
) -> Listing:
    """Pair images and label images by stem, after removing ``_img``, ``_masks``, ``_cp_masks``.

    Both may lie in one folder, where the label images are those that end in ``_masks``.
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
    label_files = [f for f in list_images(labels) if not same or _is_label(f)]
    image_of = _by_stem(image_files, (_IMAGE_ENDING,))
    label_of = _by_stem(label_files, _LABEL_ENDINGS)
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


def _is_label(file: SourceFile) -> bool:
    return file.stem.endswith(_LABEL_ENDINGS)


def _by_stem(files: list[SourceFile], endings: tuple[str, ...]) -> dict[str, SourceFile]:
    found: dict[str, SourceFile] = {}
    for file in files:
        ending = next((e for e in endings if file.stem.endswith(e)), "")
        stem = file.stem.removesuffix(ending)
        if stem in found:
            raise NucleiError(f"{file} and {found[stem]} both stand for {stem}; keep one")
        found[stem] = file
    return found

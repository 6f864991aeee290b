"""BBBC039: U2OS nuclei, 16-bit TIFF of 520 x 696 pixels, colour-coded masks, official lists.

Source: Caicedo et al., Evaluation of Deep Learning Strategies for Nucleus Segmentation in
Fluorescence Images, Cytometry A 2019.
"""

import os
from functools import partial

from nuclei_d2.data.datasets.formats.readers import read_coloured_file
from nuclei_d2.data.datasets.prepare import Listing, Record
from nuclei_d2.data.datasets.sources import image_stem, list_files
from nuclei_d2.utils.errors import NucleiError

SPLIT_RULE = "official lists in metadata/"
_LISTS = {"training.txt": "train", "validation.txt": "val", "test.txt": "test"}


def list_bbbc039(source: str | os.PathLike) -> Listing:
    """List ``images/*.tif``, ``masks/*.png`` and ``metadata/{training,validation,test}.txt``.

    The lists name the mask files; the three folders may lie below a common one, or in a zip.
    Images that no list names are left out.

    Raises:
        NucleiError: a list, or an image or mask that a list names, is missing; a file is named
            twice.
    """
    folders = {"images": {}, "masks": {}, "metadata": {}}
    for file in list_files(source):
        kind = file.path.parent.name
        if kind in folders:
            key = file.path.name if kind == "metadata" else file.stem
            folders[kind][key] = file
    listing, listed = Listing([]), {}
    for list_name, split in _LISTS.items():
        if list_name not in folders["metadata"]:
            raise NucleiError(f"{source}: no metadata/{list_name}; unpack metadata.zip there too")
        lines = folders["metadata"][list_name].read_bytes().decode("utf-8", "replace").split()
        for line in lines:
            image_id = image_stem(line)
            if listed.setdefault(image_id, list_name) != list_name:
                raise NucleiError(f"{source}: {line} is in {listed[image_id]} and {list_name}")
            listing.records.append(_record(source, folders, image_id, split))
    for image_id, image in folders["images"].items():
        if image_id not in listed:
            listing.skipped[str(image)] = "in no official list"
    return listing


def _record(
    source: str | os.PathLike, folders: dict[str, dict], image_id: str, split: str
) -> Record:
    for kind in ("images", "masks"):
        if image_id not in folders[kind]:
            raise NucleiError(f"{source}: no {kind}/{image_id}.*, which metadata/ lists")
    read_masks = partial(read_coloured_file, file=folders["masks"][image_id])
    return Record(image_id, split, folders["images"][image_id], read_masks, "fluorescence")

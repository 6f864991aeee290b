"""NuInsSeg: H&E tiles of 31 human and mouse organs, 512 x 512 pixels, label TIFFs.

Source: Mahbod et al., NuInsSeg: A fully annotated dataset for nuclei instance segmentation in
H&E-stained histological images, Scientific Data 2024.
"""

import os
from functools import partial

from nuclei_d2.data.datasets.formats.readers import read_label_file
from nuclei_d2.data.datasets.prepare import Listing, Record
from nuclei_d2.data.datasets.sources import SourceFile, list_files
from nuclei_d2.data.datasets.splits import hash_split
from nuclei_d2.utils.errors import NucleiError

SPLIT_RULE = "fold = int(sha256(image id), 16) mod 10: 0 test, 1 val, else train"


def list_nuinsseg(source: str | os.PathLike) -> Listing:
    """List ``<organ>/tissue images/*.png`` and ``<organ>/label masks/*.tif``, paired by stem.

    There is no official split; images are split by hash.

    Raises:
        NucleiError: nothing of this layout, or an image without a label image or the reverse.
    """
    kinds: dict[str, dict[tuple[str, str], SourceFile]] = {"tissue images": {}, "label masks": {}}
    for file in list_files(source):
        kind = file.path.parent.name
        if kind in kinds and file.suffix in (".png", ".tif", ".tiff"):
            kinds[kind][str(file.path.parent.parent), file.stem] = file
    images, labels = kinds.values()
    if not images:
        raise NucleiError(f"{source}: no <organ>/tissue images/*.png; name the unpacked NuInsSeg")
    for organ, stem in sorted(images.keys() ^ labels.keys()):
        missing = "label masks" if (organ, stem) in images else "tissue images"
        raise NucleiError(f"{source}: no {organ}/{missing}/{stem}.*; unpack the data set again")
    records = []
    for key, image in images.items():
        read_masks = partial(read_label_file, file=labels[key])
        split = hash_split(image.stem)
        records.append(Record(image.stem, split, image, read_masks, "histology"))
    return Listing(records)

"""S-BSST265: 79 immunofluorescence images of tissue and cytospins with label TIFFs.

Source: Kromp et al., An annotated fluorescence image dataset for training nuclear segmentation
methods, Scientific Data 2020.
"""

import csv
import io
import os
from functools import partial

from nuclei_d2.data.datasets.formats.readers import read_label_file
from nuclei_d2.data.datasets.prepare import Listing, Record
from nuclei_d2.data.datasets.sources import SourceFile, image_stem, list_files
from nuclei_d2.data.datasets.splits import hash_split
from nuclei_d2.utils.errors import NucleiError

SPLIT_RULE = "official test set; val is the training images with int(sha256(id), 16) mod 10 = 1"
_TABLE = "image_description.csv"


def list_s_bsst265(source: str | os.PathLike) -> Listing:
    """List ``rawimages/*.tif``, ``groundtruth/*.tif`` and ``image_description.csv``.

    The table's column "Image_Name" gives the stem, "Train-/Testset split" the official split.
    There is no official validation set: a tenth of the training images, by hash, is taken.

    Raises:
        NucleiError: the table or a file that it names is missing, or a split is neither.
    """
    folders: dict[str, dict[str, SourceFile]] = {"rawimages": {}, "groundtruth": {}}
    table = None
    for file in list_files(source):
        if file.path.parent.name in folders:
            folders[file.path.parent.name][file.stem] = file
        elif file.path.name == _TABLE:
            table = file
    if table is None:
        raise NucleiError(f"{source}: no {_TABLE}; name the folder that the download holds")
    listing = Listing([])
    for image_id, official in _read_splits(table).items():
        for kind, files in folders.items():
            if image_id not in files:
                raise NucleiError(f"{source}: no {kind}/{image_id}.tif, which {_TABLE} lists")
        read_masks = partial(read_label_file, file=folders["groundtruth"][image_id])
        is_val = official == "train" and hash_split(image_id) == "val"
        image = folders["rawimages"][image_id]
        listing.records.append(
            Record(image_id, "val" if is_val else official, image, read_masks, "fluorescence")
        )
    for image_id in sorted(set(folders["rawimages"]) - {r.image_id for r in listing.records}):
        listing.skipped[str(folders["rawimages"][image_id])] = f"not in {_TABLE}"
    return listing


def _read_splits(table: SourceFile) -> dict[str, str]:
    """Image name -> "train" or "test"."""
    text = table.read_bytes().decode("utf-8-sig", "replace")
    delimiter = ";" if ";" in text.partition("\n")[0] else ","
    rows = csv.DictReader(io.StringIO(text), delimiter=delimiter)
    columns = {name.strip().lower(): name for name in rows.fieldnames or ()}
    name_column = next((c for k, c in columns.items() if k.replace(" ", "_") == "image_name"), None)
    split_column = next((c for k, c in columns.items() if "split" in k), None)
    if name_column is None or split_column is None:
        raise NucleiError(f"{table}: no columns Image_Name and Train-/Testset split")
    splits = {}
    for row in rows:
        name, split = (row[name_column] or "").strip(), (row[split_column] or "").strip().lower()
        if not name:
            continue
        if not split.startswith(("train", "test")):
            raise NucleiError(f"{table}: split of {name} is {split!r}, neither train nor test")
        splits[image_stem(name)] = "test" if split.startswith("test") else "train"
    return splits

"""Any COCO instance JSON with its images; all categories become "nucleus"."""

import os
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import PurePosixPath

from nuclei_d2.data.datasets.coco import read_coco_json
from nuclei_d2.data.datasets.formats.readers import read_coco_annotations
from nuclei_d2.data.datasets.prepare import Listing, Record
from nuclei_d2.data.datasets.sources import list_images
from nuclei_d2.utils.errors import NucleiError


def list_coco(
    json_file: str | os.PathLike,
    images: str | os.PathLike,
    split: Callable[[str], str],
    modality: str | None = None,
) -> Listing:
    """List the images of a COCO JSON; the image id is the "file_name" without its suffix.

    Args:
        json_file: COCO instance annotations.
        images: folder or zip that the "file_name"s are relative to.
        split: image id -> split.
        modality: of all images; None judges each by its pixels.

    Raises:
        NucleiError: as ``read_coco_json``, or an image is not in the folder.
    """
    content = read_coco_json(json_file)
    files = {file.name: file for file in list_images(images)}
    annotations = defaultdict(list)
    for annotation in content["annotations"]:
        annotations[annotation["image_id"]].append(annotation)
    listing = Listing([])
    for entry in content["images"]:
        path = PurePosixPath(entry["file_name"])
        if str(path) not in files:
            raise NucleiError(f"{json_file}: its image {path} is not in {images}")
        image_id = "_".join(path.with_suffix("").parts)
        read_masks = partial(
            read_coco_annotations, annotations=annotations[entry["id"]], source=str(json_file)
        )
        record = Record(image_id, split(image_id), files[str(path)], read_masks, modality)
        listing.records.append(record)
    return listing

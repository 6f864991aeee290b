"""All nuclei with their full, perhaps overlapping masks as a COCO data set of one image."""

import os

from nuclei_d2.data.datasets.coco import mask_to_annotation, write_coco_json
from nuclei_d2.inference.nuclei import ImageInfo, Nuclei


def write_coco(path: str | os.PathLike, nuclei: Nuclei, image: ImageInfo) -> None:
    """Write COCO instance JSON: annotation id k is label k, with its "score"."""
    height, width = nuclei.size
    annotations = [
        {**mask_to_annotation(boxed, nuclei.size), "score": score}
        for boxed, score in zip(nuclei.masks, nuclei.scores.tolist(), strict=True)
    ]
    entry = {
        "id": image.image_id,
        "file_name": image.file_name,
        "height": height,
        "width": width,
        "annotations": annotations,
    }
    write_coco_json(path, [entry], description="Nuclei found by nuclei_d2")

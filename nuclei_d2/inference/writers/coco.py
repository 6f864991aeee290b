"""All nuclei with their full, perhaps overlapping masks as a COCO data set of one image."""

import os

from nuclei_d2.data.datasets.coco import mask_to_annotation, write_coco_json
from nuclei_d2.inference.nuclei import ImageInfo, Nuclei, nuclei_quality


def write_coco(path: str | os.PathLike, nuclei: Nuclei, image: ImageInfo) -> None:
    """Write COCO instance JSON: annotation id k is label k, with its "score" and "quality"."""
    height, width = nuclei.size
    annotations = [
        {**mask_to_annotation(boxed, nuclei.size), "score": score, "quality": quality}
        for boxed, score, quality in zip(
            nuclei.masks, nuclei.scores.tolist(), nuclei_quality(nuclei).tolist(), strict=True
        )
    ]
    entry = {
        "id": image.image_id,
        "file_name": image.file_name,
        "height": height,
        "width": width,
        "annotations": annotations,
    }
    write_coco_json(path, [entry], description="Nuclei found by nuclei_d2")

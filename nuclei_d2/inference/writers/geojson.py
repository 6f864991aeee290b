"""Outlines as GeoJSON (RFC 7946) in the form that QuPath writes and imports."""

import json
import math
import os
from typing import Any

from nuclei_d2.data.datasets.coco import CATEGORIES
from nuclei_d2.inference.nuclei import ImageInfo, Nuclei
from nuclei_d2.inference.writers.measurements import area_columns
from nuclei_d2.inference.writers.outlines import mask_to_polygons
from nuclei_d2.structures.cropped_mask import CroppedMask
from nuclei_d2.utils.files import atomic_path

_CLASSIFICATION = {"name": CATEGORIES[0]["name"], "color": [86, 180, 233]}


def write_geojson(path: str | os.PathLike, nuclei: Nuclei, image: ImageInfo) -> None:
    """Write one Feature, a detection, per nucleus, in pixels; pixel (0, 0) spans 0..1.

    Outlines run along the edges of pixels, so their area is that of the mask. Features carry
    score, area and ``nuclei.measures``, but none that is not finite: QuPath takes no null.
    """
    columns = {"score": nuclei.scores, **area_columns(nuclei, image), **nuclei.measures}
    names, rows = list(columns), zip(*(column.tolist() for column in columns.values()), strict=True)
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.write('{"type": "FeatureCollection", "features": [')
        for label, (boxed, row) in enumerate(zip(nuclei.masks, rows, strict=True), start=1):
            feature = _feature(label, boxed, dict(zip(names, row, strict=True)))
            file.write(",\n" if label > 1 else "\n")
            file.write(json.dumps(feature, allow_nan=False))
        file.write("\n]}\n")


def _feature(label: int, boxed: CroppedMask, measurements: dict[str, float]) -> dict[str, Any]:
    return {
        "type": "Feature",
        "geometry": _geometry(boxed),
        "properties": {
            "objectType": "detection",
            "label": label,
            "name": str(label),
            "classification": _CLASSIFICATION,
            # QuPath reads numbers only: True becomes 1.
            "measurements": {
                name: value + 0 for name, value in measurements.items() if math.isfinite(value)
            },
        },
    }


def _geometry(boxed: CroppedMask) -> dict[str, Any]:
    polygons = [[ring.tolist() for ring in rings] for rings in mask_to_polygons(boxed)]
    if len(polygons) == 1:
        return {"type": "Polygon", "coordinates": polygons[0]}
    return {"type": "MultiPolygon", "coordinates": polygons}

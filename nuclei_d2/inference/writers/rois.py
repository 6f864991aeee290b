"""Outlines as a zip of ImageJ ROIs, as its ROI manager opens them."""

import os
import zipfile

import numpy as np
from roifile import ROI_TYPE, ImagejRoi

from nuclei_d2.inference.nuclei import ImageInfo, Nuclei
from nuclei_d2.inference.writers.outlines import Polygon, mask_to_polygons
from nuclei_d2.structures.cropped_mask import CroppedMask
from nuclei_d2.utils.files import atomic_path

_MOVE_TO, _LINE_TO, _CLOSE = 0.0, 1.0, 4.0  # java.awt.geom.PathIterator


def write_rois(path: str | os.PathLike, nuclei: Nuclei, image: ImageInfo) -> None:
    """Write one ROI per nucleus, named by its label, on no particular slice of a stack.

    A nucleus in one piece without holes is a traced polygon like the wand's; any other is a
    composite. Both run along the edges of pixels.
    """
    with atomic_path(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for label, boxed in enumerate(nuclei.masks, start=1):
            roi = _to_roi(boxed)
            roi.name = str(label)
            archive.writestr(f"{label}.roi", roi.tobytes(), zipfile.ZIP_DEFLATED)


def _to_roi(boxed: CroppedMask) -> ImagejRoi:
    polygons = mask_to_polygons(boxed)
    if len(polygons) == len(polygons[0]) == 1:
        roi = ImagejRoi.frompoints(polygons[0][0][:-1])
        roi.roitype = ROI_TYPE.TRACED
        return roi
    path = _to_path(polygons)
    (rows, columns) = boxed.window
    return ImagejRoi(
        roitype=ROI_TYPE.RECT,  # what ImageJ writes for a composite
        top=rows.start,
        left=columns.start,
        bottom=rows.stop,
        right=columns.stop,
        shape_roi_size=len(path),
        multi_coordinates=path,
    )


def _to_path(polygons: list[Polygon]) -> np.ndarray:
    """Segments of ImageJ's ``ShapeRoi``, each a type and its x and y: float32, flat."""
    segments = []
    for ring in (ring for rings in polygons for ring in rings):
        types = np.full(len(ring) - 1, _LINE_TO)
        types[0] = _MOVE_TO
        segments += [np.column_stack([types, ring[:-1]]).ravel(), [_CLOSE]]
    return np.concatenate(segments).astype(np.float32)

"""Outputs of a prediction, one writer per format. docs/outputs.md describes every one.

A writer is called as ``write(path, nuclei, image)`` with the ``Nuclei`` and the ``ImageInfo`` of
nuclei_d2.inference.nuclei, and writes one file atomically. Nucleus k has number k in all of them.
"""

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from nuclei_d2.inference.nuclei import ImageInfo, Nuclei
from nuclei_d2.inference.writers.coco import write_coco
from nuclei_d2.inference.writers.geojson import write_geojson
from nuclei_d2.inference.writers.labels import write_labels
from nuclei_d2.inference.writers.picture import write_picture
from nuclei_d2.inference.writers.rois import write_rois
from nuclei_d2.inference.writers.table import write_table
from nuclei_d2.utils.errors import NucleiError


class Writer(NamedTuple):
    """A format: how it is written, and what is appended to the image's name."""

    write: Callable[[str | os.PathLike, Nuclei, ImageInfo], None]
    suffix: str


FORMATS = {
    "labels": Writer(write_labels, "_labels.tif"),
    "coco": Writer(write_coco, ".coco.json"),
    "geojson": Writer(write_geojson, ".geojson"),
    "imagej": Writer(write_rois, "_rois.zip"),
    "csv": Writer(write_table, ".csv"),
    "overlay": Writer(write_picture, "_overlay.png"),
}


def get_writer(name: str) -> Writer:
    """The writer of a format.

    Raises:
        NucleiError: there is no such format; the message lists all.
    """
    if name not in FORMATS:
        raise NucleiError(f"no output format {name!r}; choose from {', '.join(FORMATS)}")
    return FORMATS[name]


def write_outputs(
    folder: str | os.PathLike,
    stem: str,
    nuclei: Nuclei,
    image: ImageInfo,
    formats: Iterable[str] = tuple(FORMATS),
) -> list[Path]:
    """Write the named formats of one image to ``folder/stem + suffix``; returns the paths.

    Raises:
        NucleiError: an unknown format, before anything is written; a file cannot be written.
    """
    paths = []
    for write, suffix in [get_writer(name) for name in formats]:
        paths.append(Path(folder) / f"{stem}{suffix}")
        write(paths[-1], nuclei, image)
    return paths

"""The label image: every pixel carries the number of its nucleus."""

import os
import zlib

import tifffile

from nuclei_d2.inference.nuclei import ImageInfo, Nuclei
from nuclei_d2.utils.files import atomic_path

_ROWS_PER_STRIP = 256
_CLASSIC_TIFF_BYTES = 1 << 32


def write_labels(path: str | os.PathLike, nuclei: Nuclei, image: ImageInfo) -> None:
    """Write a label TIFF (H, W), uint16 up to 65,535 nuclei and uint32 above; see
    :meth:`Nuclei.label_strips`.

    It has compressed strips, one in memory at a time: ImageJ opens no tiled TIFF. A known pixel
    size is stored as ImageJ does, in the resolution and the description.
    """
    height, width = nuclei.size
    is_big = height * width * nuclei.label_dtype.itemsize >= _CLASSIC_TIFF_BYTES
    calibration = {}
    if image.pixel_size:
        calibration["resolution"] = (1 / image.pixel_size,) * 2
        calibration["resolutionunit"] = "NONE"
        calibration["description"] = "ImageJ=1.11a\nimages=1\nunit=micron\n"
    with atomic_path(path) as temporary:
        tifffile.imwrite(
            temporary,
            (zlib.compress(strip) for strip in nuclei.label_strips(_ROWS_PER_STRIP)),
            shape=nuclei.size,
            dtype=nuclei.label_dtype,
            bigtiff=is_big,
            photometric="minisblack",
            rowsperstrip=_ROWS_PER_STRIP,
            compression="zlib",
            metadata=None,
            **calibration,
        )

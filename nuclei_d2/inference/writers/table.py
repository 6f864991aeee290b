"""One row of measurements per nucleus, as comma-separated values."""

import csv
import os

import numpy as np

from nuclei_d2.inference.nuclei import ImageInfo, Nuclei
from nuclei_d2.inference.writers.measurements import measure
from nuclei_d2.utils.files import atomic_path


def write_table(path: str | os.PathLike, nuclei: Nuclei, image: ImageInfo) -> None:
    """Write the columns of :func:`measure`, floats with 7 significant digits, NaN as nothing."""
    columns = measure(nuclei, image)
    rows = zip(*map(_to_text, columns.values()), strict=True)
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows)


def _to_text(column: np.ndarray) -> list:
    if column.dtype.kind != "f":
        return column.tolist()
    return ["" if np.isnan(value) else f"{value:.7g}" for value in column.tolist()]

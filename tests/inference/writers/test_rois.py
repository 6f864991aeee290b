import zipfile

import numpy as np
import pytest
import roifile
from matplotlib.path import Path as Outline

from nuclei_d2.inference.nuclei import Nuclei
from nuclei_d2.inference.writers.rois import write_rois
from nuclei_d2.structures.cropped_mask import CroppedMask


def fill(roi: roifile.ImagejRoi, size: tuple[int, int]) -> np.ndarray:
    """Pixels whose centre an odd number of the ROI's rings encloses, ImageJ's rule."""
    y, x = np.mgrid[: size[0], : size[1]] + 0.5
    centres = np.stack([x.ravel(), y.ravel()], axis=1)
    inside = np.zeros(len(centres), bool)
    for ring in roi.coordinates(multi=True):
        inside ^= Outline(ring).contains_points(centres)
    return inside.reshape(size)


@pytest.mark.parametrize("seed", [1, 5])
def test_read_back(tmp_path, draw_nuclei, seed):
    nuclei, masks, image = draw_nuclei(seed)
    write_rois(tmp_path / "a.zip", nuclei, image)
    rois = roifile.roiread(tmp_path / "a.zip")
    assert [roi.name for roi in rois] == [str(k) for k in range(1, len(nuclei) + 1)]
    for roi, mask in zip(rois, masks, strict=True):
        assert roi.position == 0
        rows, columns = np.nonzero(mask)
        assert (roi.top, roi.left) == (rows.min(), columns.min())
        np.testing.assert_array_equal(fill(roi, mask.shape), mask)


def test_polygons_and_composites(tmp_path, from_drawings, blank):
    nuclei = from_drawings(("XX XX", 2, 3), ("XXX X.X XXX", 2, 4), ("X. .X", 0, 0))
    write_rois(tmp_path / "a.zip", nuclei, blank)
    square, ring, pieces = roifile.roiread(tmp_path / "a.zip")
    assert square.roitype == roifile.ROI_TYPE.TRACED
    assert square.coordinates().tolist() == [[3, 2], [5, 2], [5, 4], [3, 4]]
    assert (ring.roitype, ring.composite) == (roifile.ROI_TYPE.RECT, True)
    assert (ring.top, ring.left, ring.bottom, ring.right) == (2, 4, 5, 7)
    hole = [[5, 3], [5, 4], [6, 4], [6, 3], [5, 3]]
    assert ring.coordinates(multi=True)[1].tolist() == hole
    assert len(pieces.coordinates(multi=True)) == 2


def test_far_from_the_origin(tmp_path, blank):
    """ImageJ's integers end at 60,535."""
    mask = np.ones((2, 3), bool)
    holed = np.pad(np.zeros((1, 1), bool), 1, constant_values=True)
    nuclei = Nuclei.from_masks(
        [CroppedMask(mask, 5, 70_000), CroppedMask(holed, 70_000, 70_001)], [2, 1], (80_000, 80_000)
    )
    write_rois(tmp_path / "a.zip", nuclei, blank)
    polygon, composite = roifile.roiread(tmp_path / "a.zip")
    expected = [[70_000, 5], [70_003, 5], [70_003, 7], [70_000, 7]]
    assert polygon.coordinates().tolist() == expected
    exterior, hole = composite.coordinates(multi=True)
    assert exterior.min(axis=0).tolist() == [70_001, 70_000]
    assert hole.max(axis=0).tolist() == [70_003, 70_002]


def test_no_nuclei(tmp_path, no_nuclei, blank):
    write_rois(tmp_path / "a.zip", no_nuclei, blank)
    assert zipfile.ZipFile(tmp_path / "a.zip").namelist() == []

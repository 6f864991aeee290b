import tracemalloc

import numpy as np
import pytest
import tifffile

from nuclei_d2.data.image_io import read_label
from nuclei_d2.inference.nuclei import ImageInfo, Nuclei
from nuclei_d2.inference.writers import labels
from nuclei_d2.inference.writers.labels import write_labels
from nuclei_d2.structures.cropped_mask import CroppedMask


@pytest.mark.parametrize("rows", [1, 7, 256])
def test_read_back(tmp_path, draw_nuclei, monkeypatch, rows):
    monkeypatch.setattr(labels, "_ROWS_PER_STRIP", rows)
    nuclei, masks, image = draw_nuclei(3)
    write_labels(tmp_path / "a.tif", nuclei, image)
    found = tifffile.imread(tmp_path / "a.tif")
    assert found.dtype == np.uint16
    # argmax finds the first, and so best, of the masks that cover a pixel.
    expected = np.where(masks.any(axis=0), masks.argmax(axis=0) + 1, 0)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(read_label(tmp_path / "a.tif"), expected)


def test_what_imagej_needs(tmp_path, draw_nuclei):
    nuclei, _, image = draw_nuclei(3)
    write_labels(tmp_path / "a.tif", nuclei, image)
    with tifffile.TiffFile(tmp_path / "a.tif") as tiff:
        page = tiff.pages.first
        assert not page.is_tiled
        assert not tiff.is_bigtiff
        assert page.compression == tifffile.COMPRESSION.ADOBE_DEFLATE
        assert page.photometric == tifffile.PHOTOMETRIC.MINISBLACK
        assert tiff.imagej_metadata["unit"] == "micron"
        assert page.resolution == (2.0, 2.0)  # pixels per unit, of 0.5 micrometres each
        assert page.resolutionunit == tifffile.RESUNIT.NONE


def test_unknown_pixel_size_and_no_nuclei(tmp_path, no_nuclei, blank):
    write_labels(tmp_path / "a.tif", no_nuclei, blank)
    with tifffile.TiffFile(tmp_path / "a.tif") as tiff:
        assert not tiff.asarray().any()
        assert tiff.asarray().shape == no_nuclei.size
        assert "ImageDescription" not in tiff.pages.first.tags
        assert tiff.pages.first.resolution == (1.0, 1.0)


def test_more_than_16_bits(tmp_path):
    pixel = np.ones((1, 1), bool)
    masks = [CroppedMask(pixel, *divmod(k, 300)) for k in range(70_000)]
    nuclei = Nuclei.from_masks(masks, np.zeros(70_000), (300, 300))
    image = ImageInfo.from_array(np.zeros((300, 300, 1)), "a.tif", pixel_size=0.5)
    write_labels(tmp_path / "a.tif", nuclei, image)
    found = tifffile.imread(tmp_path / "a.tif")
    assert found.dtype == np.uint32
    np.testing.assert_array_equal(found.ravel()[:70_000], np.arange(1, 70_001))


def test_memory_is_that_of_a_strip(tmp_path, blank):
    nuclei = Nuclei.from_masks([CroppedMask(np.ones((9, 9), bool), 3990, 5)], [1], (4000, 4000))
    tracemalloc.start()
    write_labels(tmp_path / "a.tif", nuclei, blank)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4000 * 4000 * 2 / 4
    assert (tifffile.imread(tmp_path / "a.tif") == 1).sum() == 81

import numpy as np
import pytest
from scipy import ndimage
from skimage.measure import regionprops_table

from nuclei_d2.inference.nuclei import ImageInfo
from nuclei_d2.inference.writers import measurements
from nuclei_d2.inference.writers.measurements import count_touching, measure


@pytest.fixture
def gradient():
    """Grey level of a pixel: its column; second channel: ten times its row."""
    rows, columns = np.mgrid[:20, :20]
    image = np.stack([columns, 10 * rows], axis=2).astype(np.float32)
    return ImageInfo.from_array(image, "a.tif", ("DAPI", "GFP"), pixel_size=0.25)


def test_a_rectangle_by_hand(from_drawings, gradient):
    nuclei = from_drawings(("XXXXXX " * 4, 2, 3), quality=np.array([0.5]))
    row = {name: column.tolist()[0] for name, column in measure(nuclei, gradient).items()}
    major, minor = 4 * np.sqrt(35 / 12), 4 * np.sqrt(15 / 12)  # variance (n^2 - 1) / 12
    diameter = np.sqrt(4 * 24 / np.pi)
    assert row == {
        "label": 1,
        "score": 0.9,
        "centroid_x_px": 6,
        "centroid_y_px": 4,
        "centroid_x_um": 1.5,
        "centroid_y_um": 1,
        "bbox_left_px": 3,
        "bbox_top_px": 2,
        "bbox_width_px": 6,
        "bbox_height_px": 4,
        "area_px": 24,
        "area_um2": 1.5,
        "equivalent_diameter_px": pytest.approx(diameter),
        "equivalent_diameter_um": pytest.approx(diameter / 4),
        "major_axis_px": pytest.approx(major),
        "major_axis_um": pytest.approx(major / 4),
        "minor_axis_px": pytest.approx(minor),
        "minor_axis_um": pytest.approx(minor / 4),
        "perimeter_px": 16,  # through the centres of the outermost pixels
        "perimeter_um": 4,
        "eccentricity": pytest.approx(np.sqrt(1 - 15 / 35)),
        "solidity": 1,
        "intensity_mean_DAPI": 5.5,
        "intensity_min_DAPI": 3,
        "intensity_max_DAPI": 8,
        "intensity_std_DAPI": pytest.approx(np.sqrt(35 / 12)),
        "intensity_mean_GFP": 35,
        "intensity_min_GFP": 20,
        "intensity_max_GFP": 50,
        "intensity_std_GFP": pytest.approx(10 * np.sqrt(15 / 12)),
        "touching_neighbours": 0,
        "touches_image_edge": False,
        "quality": 0.5,
    }


def test_one_pixel_and_a_hole(from_drawings, gradient):
    nuclei = from_drawings(("X", 7, 9), ("XXXX X..X X..X XXXX", 1, 1))
    columns = measure(nuclei, gradient)
    assert columns["centroid_x_px"].tolist() == [9.5, 3]
    assert columns["area_px"].tolist() == [1, 12]
    assert columns["solidity"].tolist() == [1, 0.75]
    assert columns["eccentricity"].tolist() == [0, 0]
    assert columns["perimeter_px"][0] == 0
    assert columns["intensity_std_DAPI"][0] == 0
    assert columns["intensity_mean_GFP"].tolist() == [70, 25]
    assert all(np.isfinite(column).all() for column in columns.values())


def test_same_as_scikit_image_on_the_whole_image(draw_nuclei):
    nuclei, masks, image = draw_nuclei(5)
    columns = measure(nuclei, image)
    pixels = image.read(slice(0, 40), slice(0, 56))
    names = {
        "centroid-0": ("centroid_y_px", 0.5),
        "centroid-1": ("centroid_x_px", 0.5),
        "axis_major_length": ("major_axis_px", 0),
        "solidity": ("solidity", 0),
        "intensity_mean-1": ("intensity_mean_GFP", 0),
        "intensity_std-0": ("intensity_std_DAPI", 0),
    }
    properties = {name.split("-")[0] for name in names}
    for k, mask in enumerate(masks):
        expected = regionprops_table(mask.astype(np.uint8), pixels, properties)
        for name, (column, shift) in names.items():
            assert columns[column][k] == pytest.approx(expected[name][0] + shift, rel=1e-5)


def test_pixel_size_unknown(from_drawings, blank):
    columns = measure(from_drawings(("X", 0, 0)), blank)
    assert not [name for name in columns if "_um" in name]


@pytest.mark.parametrize(
    ("top", "left", "touches"),
    [(0, 5, 1), (5, 0, 1), (19, 5, 1), (5, 18, 1), (18, 17, 0), (1, 1, 0)],
)
def test_image_edge(from_drawings, blank, top, left, touches):
    columns = measure(from_drawings(("XX", top, left)), blank)
    assert columns["touches_image_edge"].tolist() == [touches]


def test_neighbours_by_hand(from_drawings):
    nuclei = from_drawings(
        ("XX XX", 0, 0),  # 1: touches 2 at a corner, overlaps 3
        ("XX", 2, 2),
        ("XXX", 0, 1),
        ("X", 0, 5),  # 4: one pixel away from 3
        ("X..... X..... XXXXXX", 10, 0),  # 5: its box holds 6, its pixels are far from it
        ("X", 10, 5),
        ("X", 13, 6),  # 7: touches 5 at a corner
    )
    assert count_touching(nuclei).tolist() == [2, 1, 1, 0, 1, 0, 1]


@pytest.mark.parametrize("seed", range(8))
def test_neighbours_of_blobs(draw_nuclei, seed):
    nuclei, masks, _ = draw_nuclei(seed)
    grown = np.array([ndimage.binary_dilation(m, np.ones((3, 3))) for m in masks], bool)
    together = np.array([[(a & b).any() for b in masks] for a in grown], int).reshape(
        len(masks), -1
    )
    assert count_touching(nuclei).tolist() == (together.sum(axis=1) - 1).tolist()


@pytest.mark.parametrize("band", [1, 7, 100])
def test_bands(draw_nuclei, monkeypatch, band):
    nuclei, masks, image = draw_nuclei(5)
    monkeypatch.setattr(measurements, "_BAND", band)
    heights = []

    def read(rows, columns):
        heights.append(rows.stop - rows.start)
        return image.read(rows, columns)

    columns = measure(nuclei, ImageInfo("a.tif", read, image.channels))
    pixels = image.read(slice(0, 40), slice(0, 56))
    for channel, name in enumerate(image.channels):
        expected = [pixels[mask, channel].max() for mask in masks]
        assert columns[f"intensity_max_{name}"].tolist() == expected
    tallest = max(len(boxed.mask) for boxed in nuclei.masks)
    assert max(heights) <= tallest + band - 1
    assert len(heights) <= -(-40 // band)

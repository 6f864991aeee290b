from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from nuclei_d2.data.normalization import ContrastRange
from nuclei_d2.inference.nuclei import ImageInfo, Nuclei
from nuclei_d2.inference.writers import picture
from nuclei_d2.inference.writers.picture import write_picture, write_thumbnail
from nuclei_d2.structures.cropped_mask import CroppedMask
from nuclei_d2.visualization.overlay import draw_contours, stretch


def test_same_as_drawing_the_whole_image(tmp_path, monkeypatch):
    monkeypatch.setattr(picture, "_STRIP_ROWS", 16)
    rng = np.random.default_rng(0)
    image = rng.integers(0, 4000, (70, 50, 3)).astype(np.float32)
    masks = [CroppedMask(np.ones((9, 9), bool), top, 3 + top // 2) for top in (2, 8, 40, 60)]
    nuclei = Nuclei.from_masks(masks, [4, 3, 2, 1], (70, 50))
    write_picture(tmp_path / "a.png", nuclei, ImageInfo.from_array(image, "a"))
    stack = np.zeros((4, 70, 50), bool)
    for mask, boxed in zip(stack[::-1], nuclei.masks, strict=True):  # the best last: on top
        mask[boxed.window] = boxed.mask
    expected = draw_contours(stretch(image), stack)
    np.testing.assert_array_equal(np.array(Image.open(tmp_path / "a.png")), expected)


@pytest.mark.parametrize("factor", [1, 2])
def test_grey_levels_are_those_that_the_network_saw(tmp_path, monkeypatch, factor):
    monkeypatch.setattr(picture, "MAX_SIDE", 64 // factor)
    ramp = np.arange(64, dtype=np.float32).reshape(1, 64, 1).repeat(64, axis=0)
    contrast = ContrastRange(16.0, 32.0)
    image = replace(ImageInfo.from_array(ramp, "a"), contrast=contrast)
    write_picture(tmp_path / "a.png", Nuclei.from_masks([], [], (64, 64)), image)
    drawing = np.array(Image.open(tmp_path / "a.png"))
    seen = ramp.reshape(64, -1, factor).mean(axis=2, keepdims=True)[::factor]
    seen = np.rint(contrast.apply(seen)).astype(np.uint8).repeat(3, axis=2)
    np.testing.assert_array_equal(drawing, draw_contours(seen, np.zeros((0, *seen.shape[:2]))))


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_a_large_image_is_reduced(tmp_path, channels):
    """4,101 x 34 pixels by 2: a bright square nucleus keeps its place."""
    image = np.zeros((4101, 34, channels), np.float32)
    image[3000:3020, 10:24] = 1000
    nuclei = Nuclei.from_masks([CroppedMask(np.ones((20, 14), bool), 3000, 10)], [1], (4101, 34))
    read = []

    def read_window(rows, columns):
        read.append(rows.stop - rows.start)
        return image[rows, columns]

    write_picture(tmp_path / "a.png", nuclei, ImageInfo("a.tif", read_window, ("x",) * channels))
    drawing = np.array(Image.open(tmp_path / "a.png")).astype(int)
    assert drawing.shape == (2051, 17, 3)
    assert max(read) <= 256
    assert sum(read) == 4101
    assert (drawing[1503:1507, 8] == 255).all()  # inside
    outline = drawing[1500, 5:12]
    assert (outline.max(axis=1) - outline.min(axis=1)).min() > 50  # coloured
    drawing[1500:1510, 5:12] = 0
    assert not drawing.any()


def test_no_nuclei(tmp_path, no_nuclei, blank):
    write_picture(tmp_path / "a.png", no_nuclei, blank)
    drawing = np.array(Image.open(tmp_path / "a.png"))
    assert drawing.shape[2] == 3
    assert not drawing.any()


def test_nuclei_that_vanish_by_reducing_cost_nothing(tmp_path, monkeypatch):
    """1,100 px by 2: of five nuclei the one with a pixel at even coordinates stays."""
    image = ImageInfo.from_array(np.zeros((1100, 40, 1), np.float32), "a")
    masks = [
        CroppedMask(np.ones((1, 1), bool), *place) for place in ((2, 2), (2, 3), (3, 2), (5, 5))
    ]
    holes = CroppedMask(np.array([[1, 1], [1, 0], [1, 1]], bool), 7, 7)
    drawn = []

    def draw(drawing, masks):
        drawn.append(len(masks))
        return draw_contours(drawing, masks)

    monkeypatch.setattr(picture, "draw_contours", draw)
    nuclei = Nuclei.from_masks([*masks, holes], np.ones(5), (1100, 40))
    write_thumbnail(tmp_path / "a.webp", nuclei, image)
    assert drawn == [1]


@pytest.mark.parametrize(("size", "expected"), [((70, 50), (512, 366)), ((1500, 3000), (256, 512))])
def test_a_thumbnail_shows_the_outlines(tmp_path, size, expected):
    side = size[0] // 2
    nucleus = CroppedMask(np.ones((side, side), bool), size[0] // 4, 0)
    image = ImageInfo.from_array(np.zeros((*size, 1), np.float32), "a")
    write_thumbnail(tmp_path / "a.webp", Nuclei.from_masks([nucleus], [1], size), image)
    with Image.open(tmp_path / "a.webp") as file:
        assert file.format == "WEBP"
        drawing = np.array(file).astype(int)
    assert abs(np.subtract(drawing.shape[:2], expected)).max() <= 1
    brightness = drawing.max(axis=2)
    assert brightness[expected[0] // 2, 0] > 60  # its left edge
    assert brightness[expected[0] // 10].max() < 40  # above it

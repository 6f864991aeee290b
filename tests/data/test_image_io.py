from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image

from nuclei_d2.data.image_io import read_image, read_label
from nuclei_d2.utils.errors import NucleiError

RNG = np.random.default_rng(0)
GREY8 = RNG.integers(0, 256, (20, 30), np.uint8)
GREY16 = RNG.integers(0, 65536, (20, 30), np.uint16)
RGB8 = RNG.integers(0, 256, (20, 30, 3), np.uint8)
RGB16 = RNG.integers(0, 65536, (20, 30, 3), np.uint16)
RGBA8 = np.dstack([RGB8, GREY8])
RGBA16 = np.dstack([RGB16, GREY16])


def write(path: Path, array: np.ndarray, **options) -> Path:
    if path.suffix == ".tif":
        tifffile.imwrite(path, array, **options)
    elif array.dtype == np.uint16 and array.ndim == 3:
        order = [2, 1, 0, 3][: array.shape[2]]  # OpenCV writes BGR(A)
        assert cv2.imwrite(str(path), array[:, :, order])
    else:
        Image.fromarray(array).save(path, **options)
    return path


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("array", [GREY8, GREY16, RGB8, RGB16, RGBA8, RGBA16])
def test_reads_exact_values(tmp_path, suffix, array):
    options = {"photometric": "rgb"} if suffix == ".tif" and array.ndim == 3 else {}
    image = read_image(write(tmp_path / f"image{suffix}", array, **options))
    assert image.dtype == np.float32
    assert np.array_equal(image, np.atleast_3d(array)[:, :, :3])


def test_reads_bmp_exactly_and_jpeg_closely(tmp_path):
    assert np.array_equal(read_image(write(tmp_path / "a.bmp", GREY8))[:, :, 0], GREY8)
    smooth = np.dstack([np.tile(np.arange(0, 240, 8, dtype=np.uint8), (20, 1))] * 3)
    smooth[:, :, 2] = 40
    image = read_image(write(tmp_path / "a.jpg", smooth, quality=95))
    assert np.abs(image - smooth).max() < 12  # would be 200 with swapped channels


def test_the_content_decides_not_the_suffix(tmp_path):
    path = write(tmp_path / "a.tif", GREY16)
    renamed = path.rename(tmp_path / "a.png")
    assert np.array_equal(read_image(renamed)[:, :, 0], GREY16)


@pytest.mark.parametrize("compression", ["lzw", "zstd", "deflate", "packbits"])
def test_compressed_tiff(tmp_path, compression):
    path = write(tmp_path / "a.tif", GREY16, compression=compression)
    assert np.array_equal(read_image(path)[:, :, 0], GREY16)


def test_one_bit_image_is_black_and_white(tmp_path):
    expected = np.where(GREY8 > 99, 255, 0)[:, :, None]
    assert np.array_equal(read_image(write(tmp_path / "a.png", GREY8 > 99)), expected)
    path = write(tmp_path / "a.tif", GREY8 > 99, photometric="minisblack")
    assert np.array_equal(read_image(path), expected)


def test_palette_is_expanded_for_images_and_kept_for_labels(tmp_path):
    indices = GREY8 % 4
    picture = Image.fromarray(indices)
    picture.putpalette([0, 0, 0, 200, 10, 0, 0, 200, 10, 90, 0, 200])
    picture.save(tmp_path / "a.png")
    colours = np.array([[0, 0, 0], [200, 10, 0], [0, 200, 10], [90, 0, 200]])
    assert np.array_equal(read_image(tmp_path / "a.png"), colours[indices])
    assert np.array_equal(read_label(tmp_path / "a.png"), indices)


@pytest.mark.parametrize("pixels", [GREY8, GREY16], ids=["8 bit", "16 bit"])
def test_the_lut_of_imagej_only_colours_the_display(tmp_path, pixels):
    """As Fiji saves a channel after Split Channels."""
    levels = 2 ** (8 * pixels.itemsize)
    green = np.zeros((3, levels), np.uint16)
    green[1] = np.linspace(0, 65535, levels)
    path = tmp_path / "a.tif"
    tifffile.imwrite(
        path, pixels, photometric="palette", colormap=green, description="ImageJ=1.54f\n"
    )
    assert np.array_equal(read_image(path), pixels[:, :, None])
    tifffile.imwrite(path, pixels, photometric="palette", colormap=green)
    assert read_image(path).shape == (20, 30, 3)


def test_grey_with_alpha_is_grey(tmp_path):
    picture = Image.merge("LA", [Image.fromarray(GREY8), Image.fromarray(255 - GREY8)])
    picture.save(tmp_path / "a.png")
    assert np.array_equal(read_image(tmp_path / "a.png"), GREY8[:, :, None])


@pytest.mark.parametrize("alpha", ["assocalpha", "unassalpha"])
@pytest.mark.parametrize("planar", ["contig", "separate"])
@pytest.mark.parametrize("photometric", ["minisblack", "miniswhite"])
def test_transparency_of_a_grey_tiff_is_dropped(tmp_path, alpha, planar, photometric):
    pixels = np.dstack([GREY8, 255 - GREY8])
    pixels = np.moveaxis(pixels, 2, 0) if planar == "separate" else pixels
    options = {"photometric": photometric, "planarconfig": planar, "extrasamples": [alpha]}
    path = write(tmp_path / "a.tif", pixels, **options)
    expected = GREY8 if photometric == "minisblack" else 255 - GREY8
    assert np.array_equal(read_image(path), expected[:, :, None])
    assert np.array_equal(read_label(path), GREY8)


def test_transparency_of_a_planar_rgb_tiff_is_dropped(tmp_path):
    planes = np.ascontiguousarray(RGBA16.transpose(2, 0, 1))
    path = write(tmp_path / "a.tif", planes, photometric="rgb", planarconfig="separate")
    assert np.array_equal(read_image(path), RGB16)


def test_white_is_zero_tiff_is_inverted(tmp_path):
    path = write(tmp_path / "a.tif", GREY8, photometric="miniswhite")
    assert np.array_equal(read_image(path)[:, :, 0], 255 - GREY8)
    assert np.array_equal(read_label(path), GREY8)


@pytest.mark.parametrize(
    "options",
    [
        {"photometric": "rgb", "planarconfig": "separate"},
        {"photometric": "rgb", "planarconfig": "separate", "metadata": None},
        {"photometric": "minisblack", "metadata": {"axes": "CYX"}},
        {"imagej": True, "metadata": {"axes": "CYX"}},
    ],
)
def test_channels_first_tiff_is_colour(tmp_path, options):
    path = write(tmp_path / "a.tif", np.ascontiguousarray(RGB8.transpose(2, 0, 1)), **options)
    assert np.array_equal(read_image(path), RGB8)


def test_float_tiff(tmp_path):
    values = RNG.normal(size=(9, 7)).astype(np.float32)
    assert np.array_equal(read_image(write(tmp_path / "a.tif", values))[:, :, 0], values)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_float_tiff_without_a_number(tmp_path, bad):
    values = np.zeros((9, 7), np.float32)
    values[3, 3] = bad
    path = write(tmp_path / "a.tif", values)
    with pytest.raises(NucleiError, match=r"a\.tif: holds NaN or infinite"):
        read_image(path)


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((5, 20, 30), {}),
        ((20, 30, 2), {}),
        ((2, 20, 30), {"imagej": True, "metadata": {"axes": "CYX"}}),
        ((3, 20, 30), {"imagej": True, "metadata": {"axes": "ZYX"}}),
        ((3, 20, 30), {"imagej": True, "metadata": {"axes": "TYX"}}),
        ((2, 3, 20, 30), {"photometric": "minisblack"}),
        # Three pages, of which the file does not say what they are.
        ((3, 20, 30), {"photometric": "minisblack"}),
        ((3, 20, 30), {"photometric": "minisblack", "metadata": None}),
        ((20, 30, 3), {"photometric": "minisblack"}),
        # Four values of a pixel, of which the last one is no alpha.
        ((20, 30, 4), {"photometric": "minisblack", "planarconfig": "contig"}),
        ((20, 30, 4), {"photometric": "minisblack", "metadata": {"axes": "YXC"}}),
    ],
)
def test_stacks_are_refused(tmp_path, shape, options):
    path = write(tmp_path / "a.tif", np.zeros(shape, np.uint8), **options)
    with pytest.raises(NucleiError, match=r"a\.tif.*one plane or channel per file"):
        read_image(path)


def test_several_images_in_one_file_are_refused(tmp_path):
    path = write(tmp_path / "a.tif", GREY8)
    tifffile.imwrite(path, GREY8[:9], append=True)
    with pytest.raises(NucleiError, match=r"a\.tif: holds 2 images"):
        read_image(path)
    frames = [Image.fromarray(GREY8), Image.fromarray(255 - GREY8)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    with pytest.raises(NucleiError, match=r"a\.gif: holds 2 frames"):
        read_image(tmp_path / "a.gif")


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.jpg", "a.bmp"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("read", [read_image, read_label])
def test_truncated_files(tmp_path, name, share, read):
    path = write(tmp_path / name, GREY8)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(NucleiError, match=path.name) as caught:
        read(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_too_little_memory_is_no_damage_to_the_file(tmp_path, monkeypatch, name):
    def fail(*_arguments):
        raise MemoryError

    monkeypatch.setattr("nuclei_d2.data.image_io._read_pillow", fail)
    monkeypatch.setattr("nuclei_d2.data.image_io._read_tiff", fail)
    with pytest.raises(MemoryError):
        read_image(write(tmp_path / name, GREY8))


def test_truncated_16_bit_colour_png(tmp_path):
    path = write(tmp_path / "a.png", RGB16)
    path.write_bytes(path.read_bytes()[:1800])
    with pytest.raises(NucleiError, match=r"a\.png: truncated"):
        read_image(path)


def test_missing_empty_and_other_files(tmp_path):
    with pytest.raises(NucleiError, match=r"cannot read .*none\.png: No such file"):
        read_image(tmp_path / "none.png")
    with pytest.raises(NucleiError, match="cannot read"):
        read_image(tmp_path)
    (tmp_path / "empty.png").touch()
    with pytest.raises(NucleiError, match=r"empty\.png: the file is empty"):
        read_image(tmp_path / "empty.png")
    (tmp_path / "text.png").write_text("not an image" * 9)
    with pytest.raises(NucleiError, match=r"text\.png: not a PNG, TIFF, JPEG or BMP"):
        read_image(tmp_path / "text.png")


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.int32, np.float32])
def test_labels_of_any_type(tmp_path, dtype):
    values = (GREY8 % 100).astype(dtype)
    labels = read_label(write(tmp_path / "a.tif", values))
    assert labels.dtype == np.int32
    assert np.array_equal(labels, GREY8 % 100)


def test_labels_of_a_16_bit_png(tmp_path):
    assert np.array_equal(read_label(write(tmp_path / "a.png", GREY16)), GREY16)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.full((4, 5), 1.5, np.float32), "holds integers"),
        (np.full((4, 5), np.nan, np.float32), "holds integers"),
        (np.full((4, 5), -1, np.int16), "no negative values"),
        (np.full((4, 5), 2**31, np.uint32), "below 2\\^31"),
        (np.zeros((4, 5, 3), np.uint8), "in colour"),
    ],
)
def test_refused_labels(tmp_path, values, message):
    options = {"photometric": "rgb"} if values.ndim == 3 else {}
    with pytest.raises(NucleiError, match=rf"a\.tif: .*{message}"):
        read_label(write(tmp_path / "a.tif", values, **options))


def test_a_jpeg_holds_no_labels(tmp_path):
    Image.fromarray(np.eye(16, dtype=np.uint8)).save(tmp_path / "a.jpg")
    with pytest.raises(NucleiError, match=r"a\.jpg: JPEG changes the numbers of labels"):
        read_label(tmp_path / "a.jpg")


def test_colours_of_print_are_refused(tmp_path):
    Image.new("CMYK", (8, 8)).save(tmp_path / "a.tif")
    with pytest.raises(NucleiError, match=r"a\.tif: has CMYK colours; save it as RGB"):
        read_image(tmp_path / "a.tif")

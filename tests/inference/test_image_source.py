import json

import numpy as np
import pytest
import tifffile
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from nuclei_d2.data.image_io import read_image
from nuclei_d2.inference import image_source
from nuclei_d2.inference.image_source import open_image
from nuclei_d2.utils.errors import NucleiError

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 4096, (40, 50), np.uint16)
RGB = RNG.integers(0, 256, (40, 50, 3), np.uint8)
STACK = RNG.integers(0, 4096, (2, 3, 4, 40, 50), np.uint16)  # T, C, Z, Y, X
MICROMETRES = {"PhysicalSizeX": 0.325, "PhysicalSizeY": 0.325}
DAPI = {"Channel": {"Name": ["Actin", "DAPI", "GFP"]}}


@pytest.fixture
def windowed(monkeypatch):
    """Nothing is kept or decoded at once, as for images too large for memory."""
    monkeypatch.setattr("nuclei_d2.inference.image_source._KEPT", 0)
    monkeypatch.setattr("nuclei_d2.inference.stacks._SMALL", 0)


def write_ome(path, array, axes, **metadata):
    options = {"tile": (16, 16), "compression": "zlib"} if "S" not in axes else {}
    tifffile.imwrite(path, array, ome=True, metadata={"axes": axes, **metadata}, **options)
    return path


def write_zarr(path, array, axes, *, version=2, units="micrometer", scale=0.5, names=()):
    group = zarr.open_group(path, mode="w", zarr_format=version)
    for level in range(2):
        part = array[..., :: 2**level, :: 2**level]
        stored = group.create_array(
            str(level), shape=part.shape, chunks=(1,) * (part.ndim - 2) + (16, 16), dtype=part.dtype
        )
        stored[...] = part
    multiscale = {
        "axes": [{"name": a, "unit": units} if a in "yx" else {"name": a} for a in axes],
        "datasets": [
            {
                "path": str(level),
                "coordinateTransformations": [
                    {
                        "type": "scale",
                        "scale": [scale * 2**level if a in "yx" else 1.0 for a in axes],
                    }
                ],
            }
            for level in range(2)
        ],
    }
    content = {"multiscales": [multiscale], "omero": {"channels": [{"label": n} for n in names]}}
    group.attrs.update(content if version == 2 else {"ome": content})
    return path


def read(path, **options):
    with open_image(path, **options) as source:
        assert source.read_all().shape == (*source.size, len(source.channels))
        return source.read_all()


def refuse(path, *words, **options):
    with pytest.raises(NucleiError) as caught:
        read(path, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    for word in words:
        assert word in message
    return message


# ------------------------------------------------------------------- pictures


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "tif"])
@pytest.mark.parametrize("array", [GREY.astype(np.uint8), RGB])
def test_pictures_have_the_pixels_of_training(tmp_path, suffix, array):
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(array).save(path)
    with open_image(path) as source:
        assert np.array_equal(source.read_all(), read_image(path))
        assert source.size == (40, 50)
        assert source.dtype == np.uint8
        assert source.pixel_size is None
        expected = ("grey",) if array.ndim == 2 else ("red", "green", "blue")
        assert source.channels == expected


def test_descriptions_of_pictures(tmp_path):
    Image.fromarray(RGB).save(tmp_path / "a.png")
    tifffile.imwrite(tmp_path / "a.tif", GREY)
    with open_image(tmp_path / "a.png") as source:
        assert source.description == (
            "PNG YXS 40x50x3 uint8: colour (red, green, blue), pixel size unknown"
        )
    with open_image(tmp_path / "a.tif") as source:
        assert source.description == "TIFF YX 40x50 uint16: grey, pixel size unknown"


def test_a_colour_of_a_picture_can_be_chosen(tmp_path):
    Image.fromarray(RGB).save(tmp_path / "a.png")
    assert np.array_equal(read(tmp_path / "a.png", channel="Blue")[:, :, 0], RGB[:, :, 2])
    assert np.array_equal(read(tmp_path / "a.png", channel=1)[:, :, 0], RGB[:, :, 1])
    refuse(tmp_path / "a.png", "no --channel 'DAPI'", "0: red", channel="DAPI")
    Image.fromarray(RGB[:, :, 0]).save(tmp_path / "b.png")
    assert np.array_equal(read(tmp_path / "b.png", channel=0, z="0")[:, :, 0], RGB[:, :, 0])
    refuse(tmp_path / "b.png", "no --channel 1", channel=1)
    refuse(tmp_path / "b.png", "--z 3 is not there", z=3)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_rgb_tiff_is_colour_in_windows_too(tmp_path, windowed, dtype):
    array = RGB.astype(dtype)
    tifffile.imwrite(tmp_path / "a.tif", array, photometric="rgb", tile=(16, 16))
    planar = np.moveaxis(array, 2, 0)
    tifffile.imwrite(tmp_path / "b.tif", planar, photometric="rgb", planarconfig="separate")
    for name in ("a.tif", "b.tif"):
        with open_image(tmp_path / name) as source:
            window = source.read(slice(5, 23), slice(30, 41))
            assert np.array_equal(window, RGB[5:23, 30:41])
            assert source.channels == ("red", "green", "blue")


def test_white_is_zero(tmp_path, monkeypatch):
    tifffile.imwrite(tmp_path / "a.tif", RGB[:, :, 0], photometric="miniswhite")
    whole = read(tmp_path / "a.tif")
    assert np.array_equal(whole[:, :, 0], 255 - RGB[:, :, 0])
    monkeypatch.setattr("nuclei_d2.inference.stacks._SMALL", 0)
    assert np.array_equal(read(tmp_path / "a.tif"), whole)


LUT = np.zeros((3, 256), np.uint16)
LUT[1] = 257 * np.arange(256)


@pytest.mark.parametrize("small", [1 << 28, 0])
@pytest.mark.parametrize("options", [{"imagej": True}, {"ome": True}])
def test_the_lut_of_a_microscopy_file_only_colours_the_display(
    tmp_path, monkeypatch, small, options
):
    monkeypatch.setattr("nuclei_d2.inference.stacks._SMALL", small)
    grey = RGB[:, :, 0]
    tifffile.imwrite(tmp_path / "a.tif", grey, photometric="palette", colormap=LUT, **options)
    with open_image(tmp_path / "a.tif") as source:
        assert np.array_equal(source.read_all()[:, :, 0], grey)
        assert source.channels == ("grey",)


def test_a_palette_too_large_to_expand_is_refused(tmp_path, windowed):
    tifffile.imwrite(tmp_path / "a.tif", RGB[:, :, 0], photometric="palette", colormap=LUT)
    refuse(tmp_path / "a.tif", "palette", "save it in RGB or grey levels")


# --------------------------------------------------------------------- stacks


def test_ome_tiff_by_name_and_index(tmp_path):
    path = write_ome(tmp_path / "a.ome.tif", STACK, "TCZYX", **MICROMETRES, **DAPI)
    with open_image(path, channel="dapi", time=1) as source:
        assert np.array_equal(source.read_all()[:, :, 0], STACK[1, 1].max(axis=0))
        assert source.channels == ("DAPI",)
        assert source.dtype == np.uint16
        assert source.pixel_size == pytest.approx(0.325)
        assert source.description == (
            "OME-TIFF TCZYX 2x3x4x40x50 uint16: time 1 of 2, channel 1 'DAPI', "
            "max-projection of 4 z-planes, 0.325 um/px"
        )
    image = read(path, channel="2", time="0", z="3")
    assert np.array_equal(image[:, :, 0], STACK[0, 2, 3])


def test_what_is_ambiguous_is_refused(tmp_path):
    path = write_ome(tmp_path / "a.ome.tif", STACK, "TCZYX", **DAPI)
    refuse(path, "3 channels", "--channel", "0: Actin, 1: DAPI, 2: GFP", time=0)
    refuse(path, "2 points in time", "--time 0 to 1", channel=0)
    refuse(path, "no --channel 'Hoechst'", "1: DAPI", channel="Hoechst", time=0)
    refuse(path, "no --channel 3", channel=3, time=0)
    refuse(path, "--time 2 is not there", channel=0, time=2)
    refuse(path, "--z 4 is not there", "0 to 3", channel=0, time=0, z=4)
    refuse(path, "--z middle is not there", channel=0, time=0, z="middle")
    refuse(path, "no series 1", channel=0, time=0, series=1)


def test_channels_of_one_name_are_told_apart_by_number(tmp_path):
    names = {"Channel": {"Name": ["DAPI", "dapi"]}}
    path = write_ome(tmp_path / "a.ome.tif", STACK[0, :2, 0], "CYX", **names)
    refuse(path, "several channels are called 'DAPI'", channel="DAPI")
    assert np.array_equal(read(path, channel=1)[:, :, 0], STACK[0, 1, 0])


def test_a_number_is_an_index_and_never_a_guess(tmp_path):
    names = {"Channel": {"Name": ["1", "2", "3"]}}
    path = write_ome(tmp_path / "a.ome.tif", STACK[0, :, 0], "CYX", **names)
    assert np.array_equal(read(path, channel=1)[:, :, 0], STACK[0, 1, 0])
    refuse(path, "--channel 1 ", "number", "--channel 01", "0: 1, 1: 2, 2: 3", channel="1")
    assert np.array_equal(read(path, channel="01")[:, :, 0], STACK[0, 1, 0])
    assert np.array_equal(read(path, channel="0")[:, :, 0], STACK[0, 0, 0])
    assert np.array_equal(read(path, channel="3")[:, :, 0], STACK[0, 2, 0])
    names = {"Channel": {"Name": ["0", "1", "2"]}}
    path = write_ome(tmp_path / "b.ome.tif", STACK[0, :, 0], "CYX", **names)
    assert np.array_equal(read(path, channel="1")[:, :, 0], STACK[0, 1, 0])


def test_imagej_hyperstack(tmp_path):
    array = STACK[:1, :2].transpose(0, 2, 1, 3, 4)  # ImageJ's order: T, Z, C
    tifffile.imwrite(
        tmp_path / "a.tif",
        array,
        imagej=True,
        resolution=(2, 2),
        metadata={"axes": "TZCYX", "unit": "um"},
    )
    with open_image(tmp_path / "a.tif", channel=1, z=2) as source:
        assert np.array_equal(source.read_all()[:, :, 0], STACK[0, 1, 2])
        assert source.pixel_size == pytest.approx(0.5)
        assert source.description == (
            "ImageJ TIFF ZCYX 4x2x40x50 uint16: channel 1, z-plane 2 of 4, 0.5 um/px"
        )
    refuse(tmp_path / "a.tif", "2 channels")


def test_three_channels_are_no_colours_unless_asked(tmp_path):
    path = write_ome(tmp_path / "a.ome.tif", STACK[0, :, 0], "CYX")
    refuse(path, "rgb: all three as colours")
    assert np.array_equal(read(path, channel="rgb"), STACK[0, :, 0].transpose(1, 2, 0))
    names = {"Channel": {"Name": ["red", "green", "blue"]}}
    refuse(write_ome(tmp_path / "b.ome.tif", STACK[0, :, 0], "CYX", **names), "3 channels")


def test_samples_that_are_no_colours_are_channels(tmp_path, windowed):
    pixels = RNG.integers(0, 4096, (40, 50, 4), np.uint16)
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, pixels, photometric="minisblack", planarconfig="contig")
    refuse(path, "4 channels; choose a --channel")
    assert np.array_equal(read(path, channel=3)[:, :, 0], pixels[:, :, 3])


@pytest.mark.parametrize("small", [1 << 28, 0])
@pytest.mark.parametrize("planar", ["contig", "separate"])
@pytest.mark.parametrize("colours", [1, 3])
def test_transparency_is_dropped(tmp_path, monkeypatch, small, planar, colours):
    monkeypatch.setattr("nuclei_d2.inference.stacks._SMALL", small)
    pixels = np.dstack([RGB[:, :, :colours], 255 - RGB[:, :, 0]])
    pixels = np.moveaxis(pixels, 2, 0) if planar == "separate" else pixels
    options = {"photometric": "rgb" if colours == 3 else "minisblack", "planarconfig": planar}
    tifffile.imwrite(tmp_path / "a.tif", pixels, extrasamples=["unassalpha"], **options)
    with open_image(tmp_path / "a.tif") as source:
        assert np.array_equal(source.read_all(), RGB[:, :, :colours])
        assert source.channels == (("red", "green", "blue") if colours == 3 else ("grey",))


def test_an_axis_without_a_meaning_takes_it_from_the_option(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", STACK[0, 0], photometric="minisblack")
    refuse(tmp_path / "a.tif", "QYX", "4x40x50", "ambiguous", "--channel", "--z max")
    refuse(tmp_path / "a.tif", "ambiguous", channel=1, z=0)
    assert np.array_equal(read(tmp_path / "a.tif", z="max")[:, :, 0], STACK[0, 0].max(axis=0))
    assert np.array_equal(read(tmp_path / "a.tif", channel=3)[:, :, 0], STACK[0, 0, 3])
    assert np.array_equal(read(tmp_path / "a.tif", time=2)[:, :, 0], STACK[0, 0, 2])


def test_series_are_chosen_and_pyramid_levels_are_none(tmp_path):
    path = tmp_path / "a.ome.tif"
    with tifffile.TiffWriter(path, ome=True) as tiff:
        for name, array in (("first", GREY), ("second", GREY[:20])):
            tiff.write(array, subifds=1, metadata={"axes": "YX", "Name": name}, tile=(16, 16))
            tiff.write(array[::2, ::2], subfiletype=1, tile=(16, 16))
    refuse(path, "holds 2 images", "--series", "0: first YX 40x50", "1: second YX 20x50")
    with open_image(path, series=1) as source:
        assert np.array_equal(source.read_all()[:, :, 0], GREY[:20])
        assert "series 1 of 2" in source.description


# --------------------------------------------------------------------- windows


@pytest.mark.parametrize("layout", ["tiles", "strips", "mapped", "zarr2", "zarr3"])
def test_windows_of_large_images(tmp_path, windowed, layout):
    array = STACK[0]
    if layout.startswith("zarr"):
        path = write_zarr(tmp_path / "a.zarr", array, "czyx", version=int(layout[-1]))
    else:
        options = {
            "tiles": {"tile": (16, 16), "compression": "lzw"},
            "strips": {"rowsperstrip": 7, "compression": "zlib"},
            "mapped": {},
        }[layout]
        path = tmp_path / "a.ome.tif"
        tifffile.imwrite(path, array, ome=True, metadata={"axes": "CZYX"}, **options)
    expected = array[1].max(axis=0)
    with open_image(path, channel=1) as source:
        assert np.array_equal(
            source.read(slice(3, 37), slice(15, 33))[:, :, 0], expected[3:37, 15:33]
        )
        assert np.array_equal(
            source.read(slice(30, 99), slice(49, 51))[:, :, 0], expected[30:, 49:]
        )
        assert source.read(slice(7, 7), slice(9, 4)).shape == (0, 0, 1)
        assert np.array_equal(source.read_all()[:, :, 0], expected)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_windows_are_slices(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "windows.tif"
    if not path.exists():
        tifffile.imwrite(path, GREY, tile=(16, 16))
    bounds = st.one_of(st.none(), st.integers(-60, 60))
    rows, cols = (slice(data.draw(bounds), data.draw(bounds)) for _ in range(2))
    with open_image(path) as source:
        assert np.array_equal(source.read(rows, cols)[:, :, 0], GREY[rows, cols])


def test_a_large_image_is_never_read_whole(tmp_path, windowed, monkeypatch):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, np.zeros((1600, 1600), np.uint16), tile=(64, 64), compression="zlib")
    decoded = []
    fetch = image_source._fetch_plane
    monkeypatch.setattr(
        image_source,
        "_fetch_plane",
        lambda stack, where: decoded.append(fetch(stack, where)) or decoded[-1],
    )
    with open_image(path) as source:
        source.read(slice(100, 200), slice(300, 400))
    assert [pixels.shape for pixels in decoded] == [(100, 100)]


def test_a_small_stack_is_decoded_once(tmp_path, monkeypatch):
    path = write_ome(tmp_path / "a.ome.tif", STACK[0, 0], "ZYX")
    with open_image(path) as source:
        first = source.read(slice(0, 9), slice(0, 9))
        monkeypatch.setattr(image_source, "_fetch_plane", None)
        assert np.array_equal(source.read(slice(0, 9), slice(0, 9)), first)


def test_windows_have_no_step(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", GREY)
    with open_image(tmp_path / "a.tif") as source, pytest.raises(ValueError, match="step 1"):
        source.read(slice(0, 9, 2), slice(None))


# -------------------------------------------------------------------- OME-Zarr


@pytest.mark.parametrize("version", [2, 3])
def test_ome_zarr(tmp_path, version):
    path = write_zarr(
        tmp_path / "a.zarr",
        STACK[0],
        "czyx",
        version=version,
        units="nanometer",
        scale=500.0,
        names=("Actin", "DAPI", "GFP"),
    )
    with open_image(path, channel="DAPI", z=2) as source:
        assert np.array_equal(source.read_all()[:, :, 0], STACK[0, 1, 2])
        assert source.pixel_size == pytest.approx(0.5)
        assert source.description == (
            "OME-Zarr CZYX 3x4x40x50 uint16: channel 1 'DAPI', z-plane 2 of 4, 0.5 um/px"
        )
    refuse(path, "3 channels", "1: DAPI")


def test_scales_of_a_multiscale_and_its_level_multiply(tmp_path):
    path = write_zarr(tmp_path / "a.zarr", GREY, "yx", scale=0.5)
    attributes = json.loads((path / ".zattrs").read_text())
    attributes["multiscales"][0]["coordinateTransformations"] = [
        {"type": "scale", "scale": [0.2, 0.2]}
    ]
    (path / ".zattrs").write_text(json.dumps(attributes))
    with open_image(path) as source:
        assert source.pixel_size == pytest.approx(0.1)


def test_a_conversions_series(tmp_path):
    path = tmp_path / "a.zarr"
    zarr.open_group(path, mode="w", zarr_format=2).attrs["bioformats2raw.layout"] = 3
    for name, array in (("0", GREY), ("1", GREY[:9])):
        write_zarr(path / name, array, "yx")
    refuse(path, "holds 2 images", "--series")
    assert np.array_equal(read(path, series=1)[:, :, 0], GREY[:9])


def test_folders_that_are_no_image(tmp_path):
    refuse(tmp_path, "no OME-Zarr image")
    zarr.open_group(tmp_path / "a.zarr", mode="w")
    refuse(tmp_path / "a.zarr", "no multiscales metadata")
    zarr.open_group(tmp_path / "b.zarr", mode="w", zarr_format=2).attrs["plate"] = {}
    refuse(tmp_path / "b.zarr", "name one image in it")
    zarr.open_group(tmp_path / "p.zarr", mode="w", zarr_format=2).attrs["plate"] = {
        "wells": [{"path": "C/4"}]
    }
    refuse(tmp_path / "p.zarr", "name one image in it", f"{tmp_path}/p.zarr/C/4/0")
    well = zarr.open_group(tmp_path / "p.zarr/C/4", mode="w", zarr_format=2)
    well.attrs["well"] = {"images": [{"path": "2"}]}
    refuse(tmp_path / "p.zarr/C/4", "name one image in it", f"{tmp_path}/p.zarr/C/4/2")
    field = write_zarr(tmp_path / "p.zarr/C/4/2", GREY, "yx")
    assert np.array_equal(read(field)[:, :, 0], GREY)
    zarr.save(tmp_path / "c.zarr", GREY)
    assert np.array_equal(read(tmp_path / "c.zarr")[:, :, 0], GREY)
    refuse(write_zarr(tmp_path / "d.zarr", STACK[0], "yx"), "wrong axes: YX")
    refuse(write_zarr(tmp_path / "e.zarr", STACK[0, 0], "zzx"), "one Y and one X axis")


# ------------------------------------------------------------------ pixel size


@pytest.mark.parametrize(
    ("sizes", "expected", "words"),
    [
        ({"PhysicalSizeX": 325, "PhysicalSizeXUnit": "nm", "PhysicalSizeY": 0.327}, 0.326, "0.326"),
        ({"PhysicalSizeX": 0.3, "PhysicalSizeY": 0.5}, None, "0.5 x 0.3 um is not square"),
        ({"PhysicalSizeX": 0.3}, None, "pixel size unknown"),
        (
            {
                "PhysicalSizeX": 1,
                "PhysicalSizeXUnit": "pixel",
                "PhysicalSizeY": 1,
                "PhysicalSizeYUnit": "pixel",
            },
            None,
            "pixel size unknown",
        ),
    ],
)
def test_pixel_size_of_ome_tiff(tmp_path, sizes, expected, words):
    path = write_ome(tmp_path / "a.ome.tif", GREY, "YX", **sizes)
    with open_image(path) as source:
        assert source.pixel_size == (expected and pytest.approx(expected))
        assert words in source.description


def write_ome_xml(path, images):
    """GREY under OME-XML of one's own; {size of a pixel: what its image says of its planes}."""
    parts = [
        f'<Image ID="Image:{k}"><Pixels ID="Pixels:{k}" DimensionOrder="XYCZT" Type="uint16" '
        f'SizeX="50" SizeY="40" SizeZ="1" SizeC="1" SizeT="1" PhysicalSizeX="{size}" '
        f'PhysicalSizeY="{size}"><Channel ID="Channel:{k}" Name="of {size} um"/>{planes}'
        "</Pixels></Image>"
        for k, (size, planes) in enumerate(images.items())
    ]
    schema = 'xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"'
    description = f"<OME {schema}>{''.join(parts)}</OME>"
    tifffile.imwrite(path, GREY, description=description, metadata=None)
    return path


def test_metadata_are_those_of_the_image_whose_pixels_are_read(tmp_path):
    images = {9.5: "<MetadataOnly/>", 0.5: '<TiffData IFD="0" PlaneCount="1"/>'}
    with open_image(write_ome_xml(tmp_path / "a.ome.tif", images)) as source:
        assert np.array_equal(source.read_all()[:, :, 0], GREY)
        assert source.pixel_size == pytest.approx(0.5)
        assert source.channels == ("of 0.5 um",)
    images = {9.5: '<TiffData IFD="7" PlaneCount="1"/>', 0.5: '<TiffData IFD="0" PlaneCount="1"/>'}
    refuse(write_ome_xml(tmp_path / "b.ome.tif", images), "truncated or damaged")


def test_an_ome_tiff_whose_metadata_lie_elsewhere_is_a_picture(tmp_path):
    schema = 'xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"'
    description = f'<OME {schema}><BinaryOnly MetadataFile="a.companion.ome" UUID="u:1"/></OME>'
    tifffile.imwrite(tmp_path / "a.ome.tif", GREY, description=description, metadata=None)
    with open_image(tmp_path / "a.ome.tif") as source:
        assert np.array_equal(source.read_all()[:, :, 0], GREY)
        assert source.description == "OME-TIFF YX 40x50 uint16: grey, pixel size unknown"


@pytest.mark.parametrize(
    ("resolution", "unit", "expected"),
    [
        ((20000, 20000), "CENTIMETER", 0.5),
        ((25400, 25400), "INCH", 1.0),
        ((300, 300), "INCH", None),  # a print
        ((20000, 20000), "NONE", None),
    ],
)
def test_resolution_of_a_plain_tiff(tmp_path, resolution, unit, expected):
    tifffile.imwrite(tmp_path / "a.tif", GREY, resolution=resolution, resolutionunit=unit)
    with open_image(tmp_path / "a.tif") as source:
        assert source.pixel_size == (expected and pytest.approx(expected))


# ---------------------------------------------------------------- broken files


def test_vendors_files_are_to_be_converted(tmp_path):
    for suffix in (".czi", ".nd2", ".LIF"):
        path = tmp_path / f"a{suffix}"
        path.write_bytes(b"ZISRAWFILE")
        refuse(path, "OME-TIFF", "Bio-Formats")


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.ome.tif"])
def test_missing_empty_and_text(tmp_path, name):
    refuse(tmp_path / name, "No such file")
    (tmp_path / name).touch()
    refuse(tmp_path / name, "empty")
    (tmp_path / name).write_text("II*\0 not an image" * 9)
    refuse(tmp_path / name)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("layout", ["plane", "tiles", "mapped"])
def test_truncated_tiff(tmp_path, windowed, share, layout):
    path = tmp_path / "a.ome.tif"
    if layout == "tiles":
        write_ome(path, STACK[0, 0], "ZYX")
    else:
        array = GREY if layout == "plane" else STACK[0, 0]
        tifffile.imwrite(path, array, ome=True, metadata={"axes": "ZYX"[-array.ndim :]})
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    refuse(path)


def test_truncated_zarr(tmp_path):
    path = write_zarr(tmp_path / "a.zarr", GREY, "yx", version=3)
    chunk = path / "0" / "c" / "0" / "0"
    chunk.write_bytes(chunk.read_bytes()[:40])
    refuse(path, "truncated or damaged")
    (path / "zarr.json").write_text("{")
    refuse(path, "truncated or damaged")


@pytest.mark.parametrize("kept", [0, 1 << 28])
def test_nan_is_refused_where_it_is_read(tmp_path, monkeypatch, kept):
    monkeypatch.setattr("nuclei_d2.inference.image_source._KEPT", kept)
    values = GREY.astype(np.float32)
    values[30, 40] = np.nan
    tifffile.imwrite(tmp_path / "a.tif", values)
    with open_image(tmp_path / "a.tif") as source:
        assert source.read(slice(0, 30), slice(0, 50)).shape == (30, 50, 1)
        with pytest.raises(NucleiError, match=r"a\.tif: holds NaN"):
            source.read_all()


def test_pixels_that_are_no_grey_levels(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", GREY.astype(np.complex64))
    refuse(tmp_path / "a.tif", "complex64")


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32, np.float64])
def test_raw_values_are_kept(tmp_path, dtype):
    array = (GREY // 16).astype(dtype)
    path = write_ome(tmp_path / "a.ome.tif", array, "YX")
    image = read(path)
    assert image.dtype == np.float32
    assert np.array_equal(image[:, :, 0], GREY // 16)


def test_a_screens_resolution_from_imagej_is_no_pixel_size(tmp_path):
    options = {"imagej": True, "resolution": (72, 72), "metadata": {"unit": "inch"}}
    tifffile.imwrite(tmp_path / "a.tif", GREY, **options)
    with open_image(tmp_path / "a.tif") as source:
        assert source.pixel_size is None

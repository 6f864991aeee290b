import itertools

import numpy as np
import pytest
import tifffile

from nuclei_d2.data.image_io import read_image
from nuclei_d2.data.ome_tiff import open_tiff
from nuclei_d2.inference.image_source import open_image
from nuclei_d2.utils.errors import NucleiError

RNG = np.random.default_rng(0)
STACK = RNG.integers(0, 4096, (2, 3, 4, 20, 30), np.uint16)  # T, C, Z, Y, X
NAMES = ("Actin", "DAPI", "GFP")


def write_set(folder, planes_of, *, order="XYZCT", states_own=True, **options):
    """Files of one OME-TIFF of STACK, as bfconvert writes them: each describes all of them.

    Args:
        planes_of: file name -> the (t, c, z) of its pages.
        states_own: whether a file says which of the set it is.
    """
    blocks = [
        f'<TiffData IFD="{page}" FirstT="{t}" FirstC="{c}" FirstZ="{z}" PlaneCount="1">'
        f'<UUID FileName="{name}">urn:uuid:{name}</UUID></TiffData>'
        for name, planes in planes_of.items()
        for page, (t, c, z) in enumerate(planes)
    ]
    channels = "".join(f'<Channel ID="Channel:0:{k}" Name="{n}"/>' for k, n in enumerate(NAMES))
    folder.mkdir(exist_ok=True)
    for name, planes in planes_of.items():
        own = f'UUID="urn:uuid:{name}"' if states_own else ""
        description = (
            f'<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" {own}>'
            f'<Image ID="Image:0"><Pixels ID="Pixels:0" DimensionOrder="{order}" Type="uint16" '
            'SizeX="30" SizeY="20" SizeZ="4" SizeC="3" SizeT="2" '
            f'PhysicalSizeX="0.5" PhysicalSizeY="0.5">{channels}{"".join(blocks)}</Pixels></Image>'
            "</OME>"
        )
        pages = np.stack([STACK[plane] for plane in planes])
        options = {"photometric": "minisblack", "metadata": None, **options}
        tifffile.imwrite(folder / name, pages, description=description, **options)
    return folder


def grid(times=(0, 1), channels=(0, 1, 2), planes=(0, 1, 2, 3)):
    return list(itertools.product(times, channels, planes))


def read(path, **options):
    with open_image(path, **options) as source:
        return source.read_all()[:, :, 0], source.description


@pytest.fixture(params=[1 << 28, 0], ids=["small", "large"])
def sizes(request, monkeypatch):
    monkeypatch.setattr("nuclei_d2.inference.image_source._KEPT", request.param)
    monkeypatch.setattr("nuclei_d2.inference.stacks._SMALL", request.param)


@pytest.mark.parametrize("order", ["XYZCT", "XYCTZ", "XYTZC"])
@pytest.mark.parametrize("options", [{}, {"compression": "zlib", "tile": (16, 16)}])
def test_a_file_of_a_set_has_its_own_point_in_time(tmp_path, sizes, order, options):
    files = {f"w_T{t}.ome.tif": grid(times=[t]) for t in range(2)}
    write_set(tmp_path, files, order=order, **options)
    for time, name in enumerate(files):
        pixels, words = read(tmp_path / name, channel="gfp", z=1, time=0)
        assert np.array_equal(pixels, STACK[time, 2, 1])
        assert "CZYX" in words.replace("ZCYX", "CZYX")
        assert "channel 2 'GFP'" in words
        assert words.endswith("0.5 um/px")


def test_z_planes_in_files_of_their_own(tmp_path, sizes):
    files = {f"w_Z{z}.ome.tif": grid([1], [1], [z]) for z in range(4)}
    write_set(tmp_path, files)
    for plane, name in enumerate(files):
        pixels, words = read(tmp_path / name)
        assert np.array_equal(pixels, STACK[1, 1, plane])
        assert words == "OME-TIFF YX 20x30 uint16: channel 0 'DAPI', 0.5 um/px"
        assert np.array_equal(read_image(tmp_path / name)[:, :, 0], STACK[1, 1, plane])


def test_channels_in_files_of_their_own_are_no_colours(tmp_path):
    files = {f"w_C{c}.ome.tif": grid([0], [c], [0]) for c in range(3)}
    write_set(tmp_path, files)
    for channel, name in enumerate(files):
        assert np.array_equal(read_image(tmp_path / name), STACK[0, channel, 0][:, :, None])
        assert f"'{NAMES[channel]}'" in read(tmp_path / name)[1]


def test_the_other_files_are_not_needed(tmp_path, sizes):
    write_set(tmp_path, {f"w_T{t}.ome.tif": grid(times=[t]) for t in range(2)})
    (tmp_path / "w_T0.ome.tif").unlink()
    assert np.array_equal(read(tmp_path / "w_T1.ome.tif", channel=0, z=3)[0], STACK[1, 0, 3])


def test_a_file_of_a_set_is_known_by_its_identifier_or_its_name(tmp_path):
    files = {f"w_T{t}.ome.tif": grid(times=[t]) for t in range(2)}
    write_set(tmp_path / "a", files).joinpath("w_T1.ome.tif").rename(tmp_path / "b.tif")
    assert np.array_equal(read(tmp_path / "b.tif", channel=0, z=0)[0], STACK[1, 0, 0])
    write_set(tmp_path / "b", files, states_own=False)
    path = tmp_path / "b" / "w_T1.ome.tif"
    assert np.array_equal(read(path, channel=0, z=0)[0], STACK[1, 0, 0])
    path.rename(tmp_path / "c.tif")
    with pytest.raises(NucleiError, match=r"c\.tif: one of 2 files .* bfconvert"):
        open_image(tmp_path / "c.tif", channel=0, z=0)


def test_a_renamed_file_is_not_read_from_the_one_of_its_old_name(tmp_path):
    write_set(tmp_path, {"a.ome.tif": grid([0], [0], [2])}, states_own=False)
    (tmp_path / "a.ome.tif").rename(tmp_path / "b.ome.tif")
    write_set(tmp_path, {"a.ome.tif": grid([1], [1], [1])}, states_own=False)
    assert np.array_equal(read(tmp_path / "b.ome.tif")[0], STACK[0, 0, 2])


def test_a_part_that_is_no_whole_stack_is_refused(tmp_path):
    planes = grid()
    write_set(tmp_path, {"a.ome.tif": planes[:15], "a_1.ome.tif": planes[15:]})
    for name in ("a.ome.tif", "a_1.ome.tif"):
        with pytest.raises(NucleiError, match=rf"{name}: one of 2 files .* bfconvert") as caught:
            open_image(tmp_path / name, channel=0, time=0)
        assert "\n" not in str(caught.value)


def test_a_file_alone_is_opened_as_it_is(tmp_path):
    path = tmp_path / "a.ome.tif"
    tifffile.imwrite(path, STACK, ome=True, metadata={"axes": "TCZYX"})
    with open_tiff(path) as tiff:
        assert tiff.ome_metadata == tiff.pages.first.description
        assert np.array_equal(tiff.asarray(), STACK)


def test_a_set_without_ome_xml_is_refused(tmp_path, monkeypatch):
    """Such as NDTiff, of which tifffile reads all files from each."""
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, STACK[0, 0], photometric="minisblack")
    find = tifffile.TiffFile._series_generic

    def find_set(tiff):
        series = find(tiff)
        series[0].is_multifile = True
        return series

    monkeypatch.setattr(tifffile.TiffFile, "_series_shaped", find_set)
    with pytest.raises(NucleiError, match=r"a\.tif: one of .* bfconvert"):
        open_tiff(path)

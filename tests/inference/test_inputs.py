from pathlib import Path

import pytest

from nuclei_d2.inference.inputs import find_images, image_name, unique_stems
from nuclei_d2.utils.errors import NucleiError


@pytest.fixture
def folder(tmp_path):
    for name in ("b.TIF", "a.png", "notes.txt", ".hidden.png", "cells[1].png", "sub/c.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def test_folders_files_and_patterns(folder):
    def names(*words):
        return [path.name for path in find_images([str(folder / word) for word in words])]

    assert names("") == ["a.png", "b.TIF", "cells[1].png"]
    assert names("notes.txt") == ["notes.txt"]  # named by the user: taken at their word
    assert names("cells[1].png") == ["cells[1].png"]
    assert names("*.png") == ["a.png", "cells[1].png"]
    assert names("**/*.jpg") == ["c.jpg"]
    assert names("b.TIF", "", "sub/../a.png") == ["b.TIF", "a.png", "cells[1].png"]


@pytest.mark.parametrize("word", ["missing.png", "*.bmp", "empty"])
def test_a_word_that_stands_for_nothing_is_named(folder, word):
    (folder / "empty").mkdir()
    with pytest.raises(NucleiError) as error:
        find_images([str(folder / "a.png"), str(folder / word)])
    assert str(folder / word) in str(error.value)


@pytest.fixture
def zarrs(tmp_path):
    """A plate, a conversion of two images, an image not called *.zarr, and a broken one."""
    markers = ("plate.zarr", "plate.zarr/A", "plate.zarr/A/1", "plate.zarr/A/1/0")
    markers = (*markers, "plate.zarr/A/1/1", "two.zarr", "two.zarr/0", "two.zarr/1")
    for name in markers:
        (tmp_path / name).mkdir()
        (tmp_path / name / ".zgroup").touch()
    (tmp_path / "image").mkdir()
    (tmp_path / "image/zarr.json").touch()
    (tmp_path / "broken.zarr").mkdir()
    (tmp_path / "other").mkdir()
    return tmp_path


def test_a_folder_with_zarr_metadata_is_an_image(zarrs):
    found = find_images([str(zarrs)])
    assert [p.name for p in found] == ["broken.zarr", "image", "plate.zarr", "two.zarr"]
    field = zarrs / "plate.zarr/A/1/0"
    assert find_images([str(field)]) == [field]
    assert find_images([str(zarrs / "*.zarr/A/*/*")]) == [field, field.parent / "1"]
    assert find_images([str(zarrs / "image")]) == [zarrs / "image"]
    with pytest.raises(NucleiError, match="no images"):
        find_images([str(zarrs / "other")])


def test_an_image_in_a_zarr_is_called_after_the_whole(zarrs, monkeypatch):
    names = ("plate.zarr/A/1/0", "plate.zarr/A/1/1", "two.zarr/0", "two.zarr/1", "two.zarr")
    expected = ["plate_A_1_0", "plate_A_1_1", "two_0", "two_1", "two"]
    assert unique_stems([zarrs / name for name in names]) == expected
    assert [image_name(zarrs / name) for name in names] == list(names)
    monkeypatch.chdir(zarrs / "two.zarr")
    assert unique_stems([Path("0"), Path(), Path("../image")]) == ["two_0", "two", "image"]


def test_stems_never_collide():
    paths = [Path(p) for p in ("x/cell.png", "y/cell.tif", "Cell.png", "cell_2.png", "dna.png")]
    assert unique_stems(paths) == ["cell", "cell_2", "Cell_3", "cell_2_2", "dna"]

from pathlib import Path

import pytest

from nuclei_d2.inference.inputs import find_images, unique_stems
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


def test_stems_never_collide():
    paths = [Path(p) for p in ("x/cell.png", "y/cell.tif", "Cell.png", "cell_2.png", "dna.png")]
    assert unique_stems(paths) == ["cell", "cell_2", "Cell_3", "cell_2_2", "dna"]

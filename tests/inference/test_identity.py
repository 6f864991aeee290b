"""Files known again by their records: moved, linked, changed, and others of the same name."""

import os
import shutil

from nuclei_d2.inference.identity import file_version, has_changed, identity, is_of


def test_the_version_of_a_file_and_of_a_folder(tmp_path):
    (tmp_path / "a.zarr" / "0").mkdir(parents=True)
    chunk = tmp_path / "a.zarr" / "0" / "c"
    chunk.write_bytes(b"abc")
    os.utime(chunk, ns=(0, 4 * 10**18 + 1_999))  # later than the folders
    assert file_version(chunk) == {"file_bytes": 3, "file_mtime_ns": 4 * 10**18 + 1_000}
    before = file_version(tmp_path / "a.zarr")
    chunk.write_bytes(b"abcd")
    os.utime(chunk, ns=(0, 4 * 10**18))
    after = file_version(tmp_path / "a.zarr")
    assert after["file_bytes"] == before["file_bytes"] + 1
    assert (before["file_mtime_ns"], after["file_mtime_ns"]) == (4 * 10**18 + 1_000, 4 * 10**18)


def test_a_record_is_of_one_file_in_any_version(tmp_path):
    path, other = tmp_path / "a" / "images" / "1.tif", tmp_path / "b" / "images" / "1.tif"
    for file in (path, other):
        file.parent.mkdir(parents=True)
        file.write_bytes(b"abc")
    record = identity(path)
    assert record == {"file_path": str(path), **file_version(path)}
    assert is_of(record, path)
    assert not has_changed(record, path)
    assert not is_of(record, other)
    os.utime(path, (1, 1))
    assert is_of(record, path)
    assert has_changed(record, path)
    assert not has_changed({}, path)
    path.unlink()
    assert not has_changed(record, path)


def test_a_moved_file_is_known_by_three_names_and_its_version(tmp_path):
    path = tmp_path / "disk" / "exp" / "images" / "1.tif"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"abc")
    record = identity(path)
    shutil.move(tmp_path / "disk", tmp_path / "copy")
    moved = tmp_path / "copy" / "exp" / "images" / "1.tif"
    assert is_of(record, moved)
    assert not is_of(record, shutil.copy2(moved, tmp_path / "1.tif"))
    os.utime(moved, (1, 1))
    assert not is_of(record, moved)

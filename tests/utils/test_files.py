import io
import json
import os
import sys

import numpy as np
import pytest

from nuclei_d2.utils.errors import NucleiError, run_tool
from nuclei_d2.utils.files import atomic_path, check_writable, write_json


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_path(path) as temporary:  # noqa: PT012
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_disk_error_names_the_file(tmp_path):
    expected = pytest.raises(NucleiError, match=r"cannot write .*out\.bin: No space left")
    with expected, atomic_path(tmp_path / "out.bin"):
        raise OSError(28, "No space left on device")


def test_a_folder_that_is_a_file_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    expected = pytest.raises(NucleiError, match=r"cannot write .*out\.bin")
    with expected, atomic_path(tmp_path / "file" / "out.bin") as temporary:
        temporary.write_bytes(b"x")


def test_what_cannot_be_written_is_said_before(tmp_path):
    (tmp_path / "file").write_text("")
    check_writable(tmp_path / "new" / "folder" / "out.json")
    check_writable(tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    with pytest.raises(NucleiError, match=r"cannot write .*out\.json: .*file is no folder"):
        check_writable(tmp_path / "file" / "new" / "out.json")
    with pytest.raises(NucleiError, match=r"cannot write .*: it is a folder"):
        check_writable(tmp_path)


def test_a_folder_without_permission_is_said_before(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(NucleiError, match=r"cannot write .*out\.json: no permission in "):
        check_writable(tmp_path / "out.json")


def test_writers_of_one_file_do_not_meet(tmp_path):
    """Processes of several machines may have the same number."""
    path = tmp_path / "a.txt"
    with atomic_path(path) as first:
        first.write_text("half of")
        with atomic_path(path) as second:
            second.write_text("second")
        assert path.read_text() == "second"
        assert first.read_text() == "half of"
        first.write_text("first")
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("stem", ["a" * 251, "\u00e9" * 125])
def test_a_file_may_have_the_longest_name(tmp_path, stem):
    with atomic_path(tmp_path / f"{stem}.tif") as temporary:
        temporary.write_text("x")
        assert temporary.suffix == ".tif"
    assert [path.stem for path in tmp_path.iterdir()] == [stem]


def test_the_temporary_file_keeps_the_suffix(tmp_path):
    with atomic_path(tmp_path / "a" / "image.png") as temporary:
        assert temporary.suffix == ".png"
        temporary.write_bytes(b"x")
    assert (tmp_path / "a" / "image.png").read_bytes() == b"x"


def test_a_durable_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    path, synced = tmp_path / "a.txt", []

    def sync(number):
        synced.append((os.fstat(number).st_ino, os.fstat(number).st_size, path.exists()))

    monkeypatch.setattr("os.fsync", sync)
    with atomic_path(path, durable=True) as temporary:
        temporary.write_text("four")
    assert synced == [(path.stat().st_ino, 4, False)]


def test_json_takes_numpy_and_turns_what_json_has_no_word_for_into_null(tmp_path):
    value = {"a": np.float32(0.5), 1: (np.int64(2), float("nan")), "c": np.array([[1, 2]])}
    write_json(tmp_path / "x.json", value)
    expected = {"a": 0.5, "1": [2, None], "c": [[1, 2]]}
    assert json.loads((tmp_path / "x.json").read_text()) == expected


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (NucleiError("x.png: cut short"), 2, "error: x.png: cut short\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_tools_end_in_one_line_and_a_status(capsys, error, code, message):
    def main():
        raise error

    with pytest.raises(SystemExit) as ended:
        run_tool(main)
    assert ended.value.code == code
    assert capsys.readouterr().err == message


def test_a_name_that_is_no_utf8_can_be_printed(monkeypatch):
    streams = {name: io.TextIOWrapper(io.BytesIO(), "utf-8") for name in ("stdout", "stderr")}
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)

    def main():
        print(os.fsdecode(b"caf\xe9.tif"))
        raise NucleiError(os.fsdecode(b"caf\xe9.tif: cut short"))

    with pytest.raises(SystemExit):
        run_tool(main)
    printed = {}
    for name, stream in streams.items():
        stream.flush()
        printed[name] = stream.buffer.getvalue()
    expected = {"stdout": rb"caf\udce9.tif", "stderr": rb"error: caf\udce9.tif: cut short"}
    assert printed == {name: line + b"\n" for name, line in expected.items()}

"""Files of a data set as its authors deliver it: a folder, or a zip that is never unpacked."""

import os
import re
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import TypeVar

from nuclei_d2.utils.errors import NucleiError

T = TypeVar("T")

IMAGE_SUFFIXES = (".png", ".tif", ".tiff", ".jpg", ".jpeg", ".bmp")


@dataclass(frozen=True, order=True)
class SourceFile:
    """One file below ``root``, a folder or a zip; ``name`` is its path inside, with slashes."""

    root: str
    name: str

    def __str__(self) -> str:
        return f"{self.root}/{self.name}"

    @property
    def path(self) -> PurePosixPath:
        """Path inside ``root``."""
        return PurePosixPath(self.name)

    @property
    def stem(self) -> str:
        """File name without its suffix."""
        return self.path.stem

    @property
    def suffix(self) -> str:
        """Lower-case suffix with its dot."""
        return self.path.suffix.lower()

    def read_bytes(self) -> bytes:
        """The whole file.

        Raises:
            NucleiError: it cannot be read, or its checksum in the zip is wrong.
        """
        try:
            if Path(self.root).is_dir():
                return Path(self.root, self.name).read_bytes()
            version = Path(self.root).stat().st_mtime_ns
            return _open_zip(self.root, version, os.getpid()).read(self.name)
        except (OSError, RuntimeError, zipfile.BadZipFile, EOFError, ValueError) as error:
            reason = " ".join(str(getattr(error, "strerror", None) or error).split())
            raise NucleiError(f"cannot read {self}: {reason}") from error

    def read(self, reader: Callable[[Path], T]) -> T:
        """Call ``reader`` on a path that holds this file; its errors name this file."""
        if Path(self.root).is_dir():
            return reader(Path(self.root, self.name))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, f"member{self.suffix}")
            path.write_bytes(self.read_bytes())
            try:
                return reader(path)
            except NucleiError as error:
                raise NucleiError(str(error).replace(str(path), str(self))) from error


@lru_cache(maxsize=4)
def _open_zip(path: str, version: int, process_id: int) -> zipfile.ZipFile:
    # Keyed by process: forked workers would otherwise share one file position.
    return zipfile.ZipFile(path)


def list_files(root: str | os.PathLike) -> list[SourceFile]:
    """Every visible file below a folder or in a zip, sorted by name.

    Raises:
        NucleiError: there is no such folder or zip, the zip is broken, a member's name leads
            outside the zip, or a symbolic link leads outside the folder.
    """
    root = Path(root)
    if root.is_dir():
        names = _names_in_folder(root)
    elif root.is_file():
        names = _names_in_zip(root)
    else:
        raise NucleiError(f"no folder or zip {root}; name the downloaded or unpacked data")
    visible = [n for n in names if not any(p.startswith((".", "__MACOSX")) for p in n.split("/"))]
    return [SourceFile(str(root), name) for name in sorted(visible)]


def image_stem(name: str) -> str:
    """File name, as a list or table gives it, without folders and image suffix."""
    path = PurePosixPath(name)
    return path.stem if path.suffix.lower() in IMAGE_SUFFIXES else path.name


def list_images(root: str | os.PathLike) -> list[SourceFile]:
    """The image files of :func:`list_files`, by suffix.

    Raises:
        NucleiError: also when there is none.
    """
    images = [file for file in list_files(root) if file.suffix in IMAGE_SUFFIXES]
    if not images:
        raise NucleiError(f"{root} holds no image ({', '.join(IMAGE_SUFFIXES)})")
    return images


def _names_in_folder(root: Path) -> list[str]:
    names, real_root = [], root.resolve()
    for folder, subfolders, files in os.walk(root):
        for name in subfolders + files:
            path = Path(folder, name)
            if path.is_symlink() and not path.resolve().is_relative_to(real_root):
                raise NucleiError(f"{path} is a link that leads outside {root}; copy the file")
        names += [Path(folder, name).relative_to(root).as_posix() for name in files]
    return names


def _names_in_zip(path: Path) -> list[str]:
    try:
        with zipfile.ZipFile(path) as archive:
            names = [info.filename for info in archive.infolist() if not info.is_dir()]
    except (OSError, zipfile.BadZipFile) as error:
        raise NucleiError(f"{path}: no readable zip ({error}); download it again") from error
    for name in names:
        if name.startswith("/") or ".." in name.split("/") or re.search(r"^[A-Za-z]:|[\\\0]", name):
            raise NucleiError(f"{path}: member {name!r} has an unsafe name; do not trust this zip")
    return names


def check_image_id(image_id: str) -> str:
    """Return ``image_id`` if it can be a file's name, anywhere, in one folder.

    Raises:
        NucleiError: it is empty, hidden, too long, or holds a path separator, a drive letter
            or a control character.
    """
    if not re.fullmatch(r"[^\x00-\x1f/\\:*?\"<>|]{1,200}", image_id) or image_id.startswith("."):
        raise NucleiError(f"image id {image_id!r} cannot be a file name; rename the image")
    return image_id

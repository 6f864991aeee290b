"""Which images a command-line tool was asked to work on, and what it calls their results."""

import glob
import os
from collections.abc import Sequence
from pathlib import Path

from nuclei_d2.data.datasets.sources import IMAGE_SUFFIXES
from nuclei_d2.inference.stacks import has_zarr_metadata
from nuclei_d2.utils.errors import NucleiError


def find_images(words: Sequence[str]) -> list[Path]:
    """The image files that files, folders and quoted glob patterns stand for, without repeats.

    A folder stands for the visible images directly in it, judged by :data:`IMAGE_SUFFIXES`, a file
    for itself whatever its name, and a folder that is called ``*.zarr`` or has Zarr's metadata for
    one image. ``**`` in a pattern matches any depth.

    Raises:
        NucleiError: a word that stands for no file.
    """
    found: dict[Path, Path] = {}
    for word in words:
        for path in _expand(word):
            found.setdefault(path.resolve(), path)
    return list(found.values())


def _expand(word: str) -> list[Path]:
    path = Path(word)
    if path.is_dir() and not _is_zarr(path):
        paths = [p for p in sorted(path.iterdir()) if is_image_name(p) or _is_zarr(p)]
        if not paths:
            raise NucleiError(f"no images in {word} (looked for {', '.join(IMAGE_SUFFIXES)})")
        return paths
    if path.exists():  # before the pattern: a file may be called cells[1].png
        return [path]
    paths = map(Path, sorted(glob.glob(word, recursive=True)))  # noqa: PTH207
    paths = [p for p in paths if p.is_file() or _is_zarr(p)]
    if not paths:
        raise NucleiError(f"no file, folder or pattern of files: {word}")
    return paths


def is_image_name(path: Path) -> bool:
    """Whether a file in a folder counts as an image, judged by its name."""
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")


def _is_zarr(path: Path) -> bool:
    if path.name.startswith(".") or not path.is_dir():
        return False
    return path.suffix.lower() == ".zarr" or has_zarr_metadata(path)


def unique_stems(paths: Sequence[Path]) -> list[str]:
    """The files' stems, each numbered (``cells_2``) where an earlier one has taken it.

    An image inside a Zarr folder is called after the whole, too: ``plate_A_1_0``. Upper and lower
    case count as the same, as they do on some file systems.
    """
    stems, taken = [], set()
    for path in paths:
        first = stem = _stem(path)
        number = 1
        while stem.lower() in taken:
            number += 1
            stem = f"{first}_{number}"
        taken.add(stem.lower())
        stems.append(stem)
    return stems


def _stem(path: Path) -> str:
    first, *inside = _names(path)
    return "_".join([Path(first).stem, *inside])


def image_name(path: Path) -> str:
    """What results call an image: the file's name; in a Zarr folder ``plate.zarr/A/1/0``."""
    return "/".join(_names(path))


def _names(path: Path) -> tuple[str, ...]:
    """The file's name, or names from the outermost Zarr folder on."""
    if not path.is_dir():
        return (path.name,)
    path = Path(os.path.abspath(path))  # noqa: PTH100 - a link keeps its name
    whole = [parent for parent in path.parents if _is_zarr(parent)]
    return path.relative_to(whole[-1].parent).parts if whole else (path.name,)

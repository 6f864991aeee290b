"""Which image file a result is of, and whether the file has changed since."""

import os
from pathlib import Path
from typing import Any


def identity(path: str | os.PathLike) -> dict[str, Any]:
    """What a record keeps of its image file, to know it again however it is named.

    Returns:
        "file_path" (absolute, links resolved) and what :func:`file_version` returns.

    Raises:
        OSError: the file cannot be looked at.
    """
    return {"file_path": str(Path(path).resolve()), **file_version(path)}


def file_version(path: str | os.PathLike) -> dict[str, int]:
    """What tells an image file from a later one of the same name, without reading it.

    Returns:
        "file_bytes" and "file_mtime_ns", as docs/prediction.md explains them; of a folder (Zarr)
        the sum and the latest of all that is in it.

    Raises:
        OSError: it cannot be looked at.
    """
    stats = [part.stat() for part in (Path(path), *Path(path).rglob("*"))]
    # Network drives lose the last digits: whole microseconds are the same on all machines.
    modified = max(stat.st_mtime_ns for stat in stats) // 1000 * 1000
    return {"file_bytes": sum(stat.st_size for stat in stats), "file_mtime_ns": modified}


def is_of(record: dict[str, Any], path: str | os.PathLike) -> bool:
    """Whether a record is of this file, in whatever version, and not of another of its name.

    Args:
        record: has what :func:`identity` returned.
    """
    before, now = Path(record["file_path"]), Path(path).resolve()
    if before == now or _is_same_file(before, now):
        return True
    # Moved, or mounted elsewhere: experiments like to have the same last folder, exp1/images.
    is_alike = before.parts[-3:] == now.parts[-3:] and not has_changed(record, now)
    return is_alike and not os.path.exists(before)  # noqa: PTH110 - of others' folders raises


def _is_same_file(first: Path, second: Path) -> bool:
    """Whether two paths lead to one file, as two mounts do."""
    try:
        return first.samefile(second)
    except OSError:  # one is not there, or lies in another user's folder
        return False


def has_changed(record: dict[str, Any], path: str | os.PathLike) -> bool:
    """Whether a file is not in the version of its record; no, without a record or a file."""
    try:
        version = file_version(path)
    except OSError:
        return False
    return bool(record) and any(record[key] != value for key, value in version.items())

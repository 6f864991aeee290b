"""Atomic output: a reader sees the old file or the new one, never half of one."""

import json
import math
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from nuclei_d2.utils.errors import NucleiError

_LONGEST_NAME = 255  # bytes, on common file systems


@contextmanager
def atomic_path(path: str | os.PathLike, durable: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` that replaces it when the block succeeds.

    The temporary name keeps the suffix, since image writers choose the format by it. On any
    error the temporary file is removed and ``path`` stays as it was.

    Args:
        durable: the promise holds if the power fails, too; see :func:`flush`.

    Raises:
        NucleiError: the file cannot be written (disk full, no permission), named with the cause.
    """
    path = Path(path)
    if not path.name:
        raise NucleiError(f"cannot write {path}: it is a folder")
    temporary = path.with_name(_temporary_name(path))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        if durable:
            flush(temporary)
        temporary.replace(path)
    except OSError as error:
        raise NucleiError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):  # it may never have come to be
            temporary.unlink()


def _temporary_name(path: Path) -> str:
    """One that no other process has: not by its number, which other machines may have, too."""
    end = f".{secrets.token_hex(8)}.tmp{path.suffix}"
    stem = os.fsencode(path.stem)[: _LONGEST_NAME - 1 - len(os.fsencode(end))]
    return f".{stem.decode(errors='ignore')}{end}"


def flush(path: Path) -> None:
    """Wait until a file's content is on the disk: a power cut may leave a new name without it.

    That takes below 1 ms on an idle disk, but 0.1 s and more on a busy one: not for every file.

    Raises:
        OSError: the disk is full or broken.
    """
    with path.open("r+b") as file:
        os.fsync(file.fileno())


def check_writable(path: str | os.PathLike) -> None:
    """See, before hours of work, whether :func:`atomic_path` could write ``path``.

    Raises:
        NucleiError: it is a folder, or lies in what is none, or there is no permission.
    """
    path = Path(path)
    # A folder of another user's raises PermissionError in Path.exists().
    folder = next(parent for parent in path.absolute().parents if os.path.exists(parent))  # noqa: PTH110
    if path.is_dir():
        raise NucleiError(f"cannot write {path}: it is a folder")
    if not folder.is_dir():
        raise NucleiError(f"cannot write {path}: {folder} is no folder")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise NucleiError(f"cannot write {path}: no permission in {folder}")


def jsonable(value: Any) -> Any:
    """Turn numpy values into Python's, tuples into lists, NaN and infinity into None."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, dict):
        return {str(k): jsonable(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write_json(
    path: str | os.PathLike, value: Any, indent: int | None = 2, durable: bool = False
) -> None:
    """Write ``value`` as standard JSON (see :func:`jsonable`) by :func:`atomic_path`."""
    with atomic_path(path, durable) as temporary:
        temporary.write_text(json.dumps(jsonable(value), indent=indent, allow_nan=False) + "\n")

"""How a prediction was made, so that it can be made again."""

import hashlib
import os
import platform
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from nuclei_d2 import __version__
from nuclei_d2.doctor import MODULES
from nuclei_d2.utils.errors import NucleiError
from nuclei_d2.utils.hardware import cpu_name, usable_cores, usable_gpus


def manifest(
    model_file: str | os.PathLike | None,
    config: Any,
    settings: Mapping[str, Any],
    started: datetime,
) -> dict[str, Any]:
    """Describe a run that begins, for ``manifest.json``.

    Args:
        model_file: the weights; None: the model has none.
        config: as a dict or its YAML text.
        settings: the command's arguments.
        started: time zone aware.

    Returns:
        JSON-able: "model" ("file", "sha256"), "config", "settings", "versions" (installed
        packages by module), "host", "started" (ISO 8601, UTC), and "finished" and
        "seconds", which are None.

    Raises:
        NucleiError: the weights cannot be read.
    """
    return {
        "model": _model(model_file),
        "config": config,
        "settings": dict(settings),
        "versions": versions(),
        "host": host(),
        "started": started.astimezone(timezone.utc).isoformat(timespec="seconds"),
        "finished": None,
        "seconds": None,
    }


def _model(file: str | os.PathLike | None) -> dict[str, str | None]:
    if file is None:
        return {"file": None, "sha256": None}
    return {"file": str(file), "sha256": file_sha256(file)}


def file_sha256(path: str | os.PathLike) -> str:
    """SHA-256 of a file, hexadecimal.

    Raises:
        NucleiError: it cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with Path(path).open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    except OSError as error:
        raise NucleiError(f"cannot read {path}: {error.strerror or error}") from error
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Version of nuclei_d2, of Python and, by module, of the distributions that it needs."""
    distributions = metadata.packages_distributions()
    found = {
        module: metadata.version(distributions[module][0])
        for module in MODULES.split()
        if module in distributions
    }
    return {"nuclei_d2": __version__, "python": platform.python_version(), **found}


def host() -> dict[str, Any]:
    """Operating system, processor, cores that may be used, and CUDA devices."""
    return {
        "system": platform.platform(),
        "processor": cpu_name(),
        "cores": usable_cores(),
        "gpus": [torch.cuda.get_device_name(k) for k in range(usable_gpus())],
    }

"""Prediction: from image files to their nuclei.

The names below are imported when they are first used, so that importing a small module of this
package does not import torch.
"""

from importlib import import_module
from typing import Any

_MODULES = {
    "FolderPrediction": "folder",
    "Nuclei": "nuclei",
    "NucleiPipeline": "pipeline",
    "NucleiPredictor": "predictor",
    "Prediction": "pipeline",
    "PredictionOptions": "pipeline",
}
__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)

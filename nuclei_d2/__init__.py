"""Detectron2 extension that finds, separates and measures cell nuclei in microscopy images.

Importing the package registers its data sets, models and heads with Detectron2. Nothing is read
or downloaded.
"""

import warnings

__version__ = "0.1.0"

try:
    import nuclei_d2.data.datasets.builtin
    import nuclei_d2.modeling  # noqa: F401
except ModuleNotFoundError as error:
    # The doctor has to run where the installation is incomplete; everything else that is used
    # from here fails with the same ModuleNotFoundError.
    if error.name is None or error.name.startswith("nuclei_d2"):
        raise
    warnings.warn(
        f"{error.name} is not installed, nothing is registered: python -m nuclei_d2.doctor",
        stacklevel=2,
    )

"""Detectron2 extension that finds, separates and measures cell nuclei in microscopy images.

Importing the package registers its data sets, models and heads with Detectron2. Nothing is read
or downloaded.
"""

import sys

__version__ = "0.1.0"

# `python -m nuclei_d2.doctor` has to run where nothing else can be imported.
if "nuclei_d2.doctor" not in sys.orig_argv:
    import nuclei_d2.data.datasets
    import nuclei_d2.modeling  # noqa: F401

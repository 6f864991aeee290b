"""Detectron2 extension that finds, separates and measures cell nuclei in microscopy images.

Importing the package registers its data sets, models and heads with Detectron2. Nothing is read
or downloaded.
"""

import logging
import sys
import warnings

__version__ = "0.1.0"

# What PyTorch tells Detectron2's developers, not its users. fvcore compiles two losses when
# Detectron2 is imported, and our own exports are TorchScript; Detectron2's anchors call meshgrid,
# its layers is_fx_tracing.
warnings.filterwarnings("ignore", r"`torch\.jit\.\w+` is deprecated", FutureWarning)
warnings.filterwarnings("ignore", r"torch\.meshgrid: ", UserWarning)
logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)

# `python -m nuclei_d2.doctor` has to run where nothing else can be imported.
if "nuclei_d2.doctor" not in sys.orig_argv:
    import nuclei_d2.data.datasets
    import nuclei_d2.modeling  # noqa: F401

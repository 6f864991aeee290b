"""The formats that nuclei data sets come in.

Each ``list_*`` function returns a :class:`~nuclei_d2.data.datasets.prepare.Listing`: the images
with their ids and splits, and how to read their masks.
"""

from nuclei_d2.data.datasets.formats.bbbc039 import list_bbbc039
from nuclei_d2.data.datasets.formats.coco_json import list_coco
from nuclei_d2.data.datasets.formats.dsb2018 import list_dsb2018
from nuclei_d2.data.datasets.formats.folder import list_folder
from nuclei_d2.data.datasets.formats.nuinsseg import list_nuinsseg
from nuclei_d2.data.datasets.formats.s_bsst265 import list_s_bsst265

__all__ = [
    "list_bbbc039",
    "list_coco",
    "list_dsb2018",
    "list_folder",
    "list_nuinsseg",
    "list_s_bsst265",
]

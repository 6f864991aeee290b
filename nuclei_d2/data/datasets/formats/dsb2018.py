"""Data Science Bowl 2018 (BBBC038): ``<ImageId>/images/*.png`` and ``<ImageId>/masks/*.png``.

Source: Caicedo et al., Nucleus segmentation across imaging experiments: the 2018 Data Science
Bowl, Nature Methods 2019.
"""

import os
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from nuclei_d2.data.datasets.formats.readers import read_mask_files
from nuclei_d2.data.datasets.prepare import Listing, Record
from nuclei_d2.data.datasets.sources import IMAGE_SUFFIXES, SourceFile, list_files
from nuclei_d2.data.datasets.splits import hash_split
from nuclei_d2.utils.errors import NucleiError

SPLIT_RULE = "fold = int(sha256(image id), 16) mod 10: 0 test, 1 val, else train"
_STAGE1_TEST = "stage1_test"


def list_dsb2018(sources: Sequence[str | os.PathLike]) -> Listing:
    """List the official zips or folders, with or without a ``stage1_train/`` level above the ids.

    Images below ``stage1_test`` (the level, or the zip's name) form a split of that name, and
    are left out where they have no masks. A training image without masks has no nuclei.

    Raises:
        NucleiError: nothing of this layout, or no masks at all.
    """
    folders: dict[tuple[str, ...], dict[str, list[SourceFile]]] = {}
    for source in sources:
        for file in list_files(source):
            *above, kind, _ = ("", *file.path.parts) if len(file.path.parts) > 1 else ("", "", "")
            if kind in ("images", "masks") and file.suffix in IMAGE_SUFFIXES and above[-1]:
                parts = folders.setdefault((file.root, *above), defaultdict(list))
                parts[kind].append(file)
    if not any(parts["masks"] for parts in folders.values()):
        names = ", ".join(map(str, sources))
        raise NucleiError(f"{names}: no <ImageId>/masks/*.png; is this stage1_train?")
    listing = Listing([])
    for folder, parts in sorted(folders.items()):
        _add_record(listing, folder, parts)
    return listing


def _add_record(
    listing: Listing, folder: tuple[str, ...], parts: dict[str, list[SourceFile]]
) -> None:
    where = "/".join(part for part in folder if part)
    if len(parts["images"]) != 1:
        raise NucleiError(f"{where}/images holds {len(parts['images'])} images instead of one")
    image_id, image = folder[-1], parts["images"][0]
    is_stage1_test = any(_STAGE1_TEST in part for part in (Path(folder[0]).name, *folder[1:]))
    if is_stage1_test and not parts["masks"]:
        listing.skipped[str(image)] = "no masks"
        return
    split = _STAGE1_TEST if is_stage1_test else hash_split(image_id)
    read_masks = partial(read_mask_files, files=parts["masks"])
    listing.records.append(Record(image_id, split, image, read_masks))

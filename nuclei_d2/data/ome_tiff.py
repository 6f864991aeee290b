"""TIFFs opened as what lies in the file itself, where OME-XML describes many files."""

import math
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import tifffile

from nuclei_d2.utils.errors import NucleiError

_Planes = dict[tuple[int, ...], int]  # place along the axes of an image -> page of the file


def open_tiff(path: Path) -> tifffile.TiffFile:
    """Open a TIFF as the images in this file.

    Each file of an OME-TIFF that spans several describes all of them, and tifffile reads them all
    from any of them. Here the file has the planes that it holds: its sizes, its channels' names
    and the indices of its planes, from 0, are those of this part.

    Returns:
        an open file; the caller closes it.

    Raises:
        NucleiError: a file of a set whose own planes are unknown or make up no whole stack.
    """
    tiff = tifffile.TiffFile(path)
    try:
        own_xml = _own_xml(path, tiff) if tiff.is_ome else None
        if own_xml:
            tiff.close()
            # A Micro-Manager stack is a set by its file names, too.
            tiff = tifffile.TiffFile(path, omexml=own_xml, is_mmstack=False)
        for series in tiff.series:
            if series.is_multifile:  # by other metadata than OME-XML
                raise _part_of_set(path, len({page.parent for page in series if page}))
    except BaseException:
        tiff.close()
        raise
    return tiff


def _part_of_set(path: Path, count: int) -> NucleiError:
    return NucleiError(
        f"{path}: one of {count} files of an image, and no whole stack by itself; convert them "
        "into one OME-TIFF, with Fiji or Bio-Formats' bfconvert"
    )


def _own_xml(path: Path, tiff: tifffile.TiffFile) -> str | None:
    """OME-XML of the images in this file; None where that of the file describes no other."""
    try:
        root = ElementTree.fromstring(tiff.ome_metadata)
    except ElementTree.ParseError:
        return None  # tifffile complains, and reads the pages
    identifiers = root.iterfind(".//{*}TiffData/{*}UUID")
    names = {uuid.text: uuid.get("FileName", "") for uuid in identifiers}
    if set(names) <= {root.get("UUID")}:
        return None
    own = _own_identifier(root.get("UUID"), names, path.name)
    for image in root.findall("{*}Image"):
        pixels = image.find("{*}Pixels")
        planes = _planes_in_file(pixels, own, len(tiff.pages))
        if planes and not _keep(pixels, planes):
            raise _part_of_set(path, len(names))
        if not planes:
            root.remove(image)
    if root.find("{*}Image") is None:
        raise _part_of_set(path, len(names))
    return ElementTree.tostring(root, encoding="unicode")


def _own_identifier(stated: str | None, names: dict[str, str], name: str) -> str | None:
    """Which of a set (identifier -> file name) a file is, by what it states or by its name."""
    if stated in names:
        return stated
    if len(names) == 1:  # renamed
        return next(iter(names))
    return next((own for own, other in names.items() if other.lower() == name.lower()), None)


def _axes(pixels: ElementTree.Element) -> dict[str, int]:
    """Number of planes along Z, C and T, in the order in which they are counted."""
    channel = pixels.find("{*}Channel")
    samples = 1 if channel is None else int(channel.get("SamplesPerPixel", 1))
    sizes = {axis: int(pixels.get(f"Size{axis}")) for axis in pixels.get("DimensionOrder")[2:]}
    return {**sizes, "C": sizes["C"] // samples}


def _planes_in_file(pixels: ElementTree.Element, own: str | None, page_count: int) -> _Planes:
    sizes, planes = _axes(pixels), {}
    for block in pixels.findall("{*}TiffData"):
        uuid = block.find("{*}UUID")
        if uuid is not None and uuid.text != own:
            continue
        page = int(block.get("IFD", 0))
        count = block.get("NumPlanes", 1 if "IFD" in block.attrib else page_count)
        first = [int(block.get(f"First{axis}", 0)) for axis in sizes]
        first = np.ravel_multi_index(first, tuple(sizes.values()), order="F")
        for number in range(int(block.get("PlaneCount", count))):
            place = np.unravel_index(first + number, tuple(sizes.values()), order="F")
            planes[tuple(map(int, place))] = page + number
    return planes


def _keep(pixels: ElementTree.Element, planes: _Planes) -> bool:
    """Reduce an image to some of its planes; whether they fill a stack."""
    sizes = _axes(pixels)
    kept = {axis: sorted({place[k] for place in planes}) for k, axis in enumerate(sizes)}
    ranks = {axis: {place: k for k, place in enumerate(kept[axis])} for axis in kept}
    samples = int(pixels.get("SizeC")) // sizes["C"]
    for axis, places in kept.items():
        pixels.set(f"Size{axis}", str(len(places) * (samples if axis == "C" else 1)))
    for number, channel in enumerate(pixels.findall("{*}Channel")):
        if number not in ranks["C"]:
            pixels.remove(channel)
    blocks = pixels.findall("{*}TiffData")
    for block in blocks:
        pixels.remove(block)
    for place, page in planes.items():
        block = ElementTree.SubElement(pixels, blocks[0].tag, IFD=str(page), PlaneCount="1")
        for axis, k in zip(ranks, place, strict=True):
            block.set(f"First{axis}", str(ranks[axis][k]))
    return len(planes) == math.prod(map(len, kept.values()))

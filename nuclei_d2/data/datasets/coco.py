"""COCO JSON: masks as RLE, annotations, writing and loading."""

import json
import math
import os
from collections.abc import Container, Hashable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
from detectron2.data import MetadataCatalog
from detectron2.data.datasets import load_coco_json

from nuclei_d2.structures.cropped_mask import CroppedMask
from nuclei_d2.utils.errors import NucleiError
from nuclei_d2.utils.files import write_json

CATEGORIES = [{"id": 1, "name": "nucleus"}]


def mask_to_rle(boxed: CroppedMask, size: tuple[int, int]) -> dict[str, Any]:
    """COCO's compressed RLE of a mask in an image of ``size`` (H, W).

    Runs go down the columns, so only the box is looked at: the cost is that of the box, not
    of the image.

    Returns:
        ``{"size": [H, W], "counts": str}``.
    """
    height, width = size
    rows, columns = boxed.mask.shape
    # The box' columns in a line, background at both ends of each: runs start and end in turn.
    padded = np.zeros((columns, rows + 2), bool)
    padded[:, 1:-1] = boxed.mask.T
    line = padded.ravel()
    column, row = np.divmod(np.flatnonzero(line[1:] != line[:-1]), rows + 2)
    bounds = (boxed.left + column) * height + boxed.top + row
    if rows == height:  # a run that reaches the bottom goes on at the top: drop the seam
        seam = np.flatnonzero(bounds[1:-1:2] == bounds[2::2])
        bounds = np.delete(bounds, np.concatenate([2 * seam + 1, 2 * seam + 2]))
    counts = np.diff(np.concatenate([[0], bounds, [height * width]])).tolist()
    if counts[-1] == 0:  # COCO's own encoder writes no empty run at the end
        counts.pop()
    rle = mask_util.frPyObjects({"size": [height, width], "counts": counts}, height, width)
    return {"size": [height, width], "counts": rle["counts"].decode("ascii")}


def decode_counts(counts: str | bytes) -> np.ndarray:
    """Run lengths, background first, of a compressed RLE.

    pycocotools' maskApi.c, rleFrString: each character carries 5 bits, low ones first, and
    whether more follow; from the fourth number on, they are differences to the one two before.
    """
    text = counts.encode() if isinstance(counts, str) else counts
    digits = np.frombuffer(text, np.uint8).astype(np.int64) - 48
    if not digits.size:
        return digits
    last = np.flatnonzero(digits & 0x20 == 0)
    first = np.concatenate([[0], last[:-1] + 1])
    length = last - first + 1
    shift = 5 * (np.arange(last[-1] + 1) - np.repeat(first, length))
    values = np.add.reduceat((digits[: last[-1] + 1] & 0x1F) << shift, first)
    values -= np.where(digits[last] & 0x10, np.int64(1) << (5 * length), 0)
    values[1::2] = np.cumsum(values[1::2])
    values[2::2] = np.cumsum(values[2::2])
    return values


def mask_to_annotation(boxed: CroppedMask, size: tuple[int, int]) -> dict[str, Any]:
    """COCO annotation of a nonempty mask in an image of ``size`` (H, W), without the ids."""
    height, width = boxed.mask.shape
    return {
        "category_id": CATEGORIES[0]["id"],
        "bbox": [boxed.left, boxed.top, width, height],
        "area": boxed.area,
        "iscrowd": 0,
        "segmentation": mask_to_rle(boxed, size),
    }


def write_coco_json(
    path: str | os.PathLike, images: Sequence[dict[str, Any]], description: str = ""
) -> None:
    """Write COCO JSON atomically.

    Args:
        path: the file to write.
        images: COCO image entries, each with an extra key "annotations": COCO annotations
            without ids, which are numbered from 1 here.
        description: goes to the JSON's "info".
    """
    entries, annotations = [], []
    for image in images:
        entries.append({key: value for key, value in image.items() if key != "annotations"})
        for annotation in image["annotations"]:
            ids = {"id": len(annotations) + 1, "image_id": image["id"]}
            annotations.append({**ids, **annotation})
    content = {
        "info": {"description": description},
        "licenses": [],
        "categories": CATEGORIES,
        "images": entries,
        "annotations": annotations,
    }
    write_json(path, content, indent=None)


def load_nuclei_json(
    json_file: str | os.PathLike, image_root: str | os.PathLike, name: str | None = None
) -> list[dict[str, Any]]:
    """Load COCO JSON as Detectron2 dataset dicts with one class, "nucleus".

    Whatever the file's categories, all map to class 0. Polygons become RLE, as
    ``INPUT.MASK_FORMAT`` is "bitmask". Prepared sets add "label_file_name" (absolute),
    "modality" and "overlaps".

    Args:
        json_file: COCO instance annotations.
        image_root: folder that the JSON's "file_name"s are relative to.
        name: a registered name: its metadata gets ``thing_classes`` and, for a file with one
            category, ``thing_dataset_id_to_contiguous_id``.

    Raises:
        NucleiError: the file is missing, broken or no COCO instance annotation, lists no
            image, ids occur twice or are unknown, or an annotation has no usable segmentation.
    """
    content = read_coco_json(json_file)
    if not content["images"]:
        raise NucleiError(f"{json_file} lists no image; leave this data set out of the config")
    extras = {image["id"]: image for image in content["images"]}
    root = Path(image_root).absolute()
    try:
        dataset_dicts = load_coco_json(str(json_file), str(root), extra_annotation_keys=["id"])
    except (AssertionError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise NucleiError(f"{json_file}: no COCO instance JSON ({error})") from error
    segmentations = {a["id"]: a.get("segmentation") for a in content["annotations"]}
    for record in dataset_dicts:
        extra = extras[record["image_id"]]
        if "label_file_name" in extra:
            record["label_file_name"] = str(root / extra["label_file_name"])
        record.update({key: extra[key] for key in ("modality", "overlaps") if key in extra})
        for annotation in record["annotations"]:
            # As in the file: Detectron2 has left out polygons.
            segmentation = segmentations.pop(annotation.pop("id"))
            _use_rle(annotation, segmentation, record, json_file)
    _check_none_left(list(segmentations), json_file)
    if name is not None:
        _set_classes(name, content["categories"])
    return dataset_dicts


def _check_none_left(ids: Sequence[Hashable], json_file) -> None:
    """Raise for annotations that Detectron2 has dropped, which it does by their polygons."""
    if ids:
        count = f" ({len(ids)} in all)" if len(ids) > 3 else ""
        raise NucleiError(
            f"{json_file}: no polygon of three points or more in annotation "
            f"{', '.join(map(str, ids[:3]))}{count}; remove it, or prepare the file with "
            "datasets/prepare_coco.py, which drops and lists it"
        )


def _use_rle(
    annotation: dict[str, Any], segmentation: Any, record: dict[str, Any], json_file
) -> None:
    size = [record["height"], record["width"]]
    source = f"{json_file}: image {record['file_name']}"
    annotation["category_id"] = 0
    annotation["segmentation"] = segmentation_to_rle(segmentation, size, source)
    if "bbox" not in annotation:
        annotation["bbox"] = mask_util.toBbox(annotation["segmentation"]).tolist()
    if not is_box(annotation["bbox"]):
        raise NucleiError(
            f"{source}: an annotation has bbox {annotation['bbox']!r}; give x, y, width, height"
        )


def segmentation_to_rle(segmentation: Any, size: Sequence[int], source: str) -> dict[str, Any]:
    """Polygons or RLE of an image of ``size`` (H, W) -> compressed RLE.

    Polygons of less than three points have no area; nothing but these is an empty mask.

    Raises:
        NucleiError: naming ``source``, when there is no segmentation or it does not fit.
    """
    if not segmentation:
        raise NucleiError(f"{source}: an annotation has no segmentation; a box alone is no mask")
    try:
        if isinstance(segmentation, list):
            return _polygons_to_rle(segmentation, size)
        if list(segmentation["size"]) != list(size):
            raise ValueError(f"RLE of size {segmentation['size']} in an image of size {list(size)}")
        _check_runs(segmentation["counts"], size)
        if isinstance(segmentation["counts"], list):
            return mask_util.frPyObjects(segmentation, *size)
    except Exception as error:  # pycocotools raises errors of every kind
        raise NucleiError(f"{source}: broken segmentation ({error})") from error
    return segmentation


def annotations_as_rle(record: dict[str, Any]) -> list[dict[str, Any]]:
    """A Detectron2 dataset dict's annotations, none if it has none, with segmentations as RLE.

    Raises:
        NucleiError: naming the image, when one has no segmentation or it does not fit.
    """
    size = (record["height"], record["width"])
    return [
        {**a, "segmentation": segmentation_to_rle(a.get("segmentation"), size, record["file_name"])}
        for a in record.get("annotations", [])
    ]


def _polygons_to_rle(polygons: list[Any], size: Sequence[int]) -> dict[str, Any]:
    for polygon in polygons:
        if not isinstance(polygon, (list, tuple, np.ndarray)):
            raise ValueError("a polygon is a list of x, y, x, y and so on")
        if len(polygon) % 2:
            raise ValueError(f"a polygon of {len(polygon)} numbers, which are no pairs of x and y")
    # pycocotools would take four numbers for a box.
    areas = [polygon for polygon in polygons if len(polygon) >= 6]
    if not areas:
        runs = {"size": list(size), "counts": [size[0] * size[1]]}
        return mask_util.frPyObjects(runs, *size)
    return mask_util.merge(mask_util.frPyObjects(areas, *size))


def _check_runs(counts: Any, size: Sequence[int]) -> None:
    """Raise ValueError unless these are run lengths, compressed or not, that fill the image."""
    runs = np.array(counts) if isinstance(counts, list) else decode_counts(counts)
    if runs.dtype.kind != "i" or runs.min(initial=0) < 0:
        raise ValueError("run lengths that are negative or no whole numbers")
    if runs.sum() != size[0] * size[1]:
        raise ValueError(f"runs of {runs.sum()} pixels in an image of {size[0] * size[1]}")


def _set_classes(name: str, categories: Sequence[dict[str, Any]]) -> None:
    metadata = MetadataCatalog.get(name)
    metadata.thing_classes = [CATEGORIES[0]["name"]]
    if len(categories) == 1:
        metadata.thing_dataset_id_to_contiguous_id = {categories[0]["id"]: 0}


def read_coco_json(json_file: str | os.PathLike) -> dict[str, Any]:
    """Parse and check a COCO instance file.

    Raises:
        NucleiError: as :func:`load_nuclei_json`.
    """
    try:
        content = json.loads(Path(json_file).read_bytes())
    except OSError as error:
        raise NucleiError(f"cannot read {json_file}: {error.strerror or error}") from error
    except ValueError as error:
        raise NucleiError(f"{json_file}: broken JSON ({error}); write it again") from error
    required = {
        "images": ("id", "file_name", "height", "width"),
        "annotations": ("id", "image_id", "category_id"),
        "categories": ("id", "name"),
    }
    for part, keys in required.items():
        _check_part(content, part, keys, json_file)
    _check_images(content["images"], json_file)
    images = {image["id"] for image in content["images"]}
    categories = [category["id"] for category in content["categories"]]
    for annotation in content["annotations"]:
        if not is_one_of(annotation["image_id"], images):
            raise NucleiError(
                f"{json_file}: annotation {annotation['id']} belongs to image "
                f"{annotation['image_id']}, which the file does not list"
            )
        if not is_one_of(annotation["category_id"], categories):
            raise NucleiError(
                f"{json_file}: annotation {annotation['id']} has category_id "
                f"{annotation['category_id']!r}; the file has {', '.join(map(str, categories))}"
            )
    return content


def _check_images(images: Sequence[dict[str, Any]], json_file) -> None:
    for index, image in enumerate(images):
        name = image["file_name"]
        if not isinstance(name, str) or not PurePosixPath(name).name:
            raise NucleiError(f"{json_file}: images[{index}] has file_name {name!r}; name a file")
        for side in ("height", "width"):
            if not isinstance(image[side], int) or image[side] < 1:
                raise NucleiError(
                    f"{json_file}: images[{index}] has {side} {image[side]!r}; give pixels"
                )


def is_one_of(value: Any, ids: Container) -> bool:
    """Whether a value of JSON, which may be a list or an object, is among ``ids``."""
    return isinstance(value, Hashable) and value in ids


def is_box(value: Any) -> bool:
    """Whether a value of JSON is a box: a list of x, y, width and height."""
    return (
        isinstance(value, list)
        and len(value) == 4
        and all(isinstance(v, (int, float)) and math.isfinite(v) for v in value)
    )


def _check_part(content: Any, part: str, keys: Sequence[str], json_file) -> None:
    entries = content.get(part) if isinstance(content, dict) else None
    if not isinstance(entries, list):
        raise NucleiError(f"{json_file}: no list of {part}; it is not COCO instance JSON")
    seen = set()
    for index, entry in enumerate(entries):
        missing = [key for key in keys if not isinstance(entry, dict) or key not in entry]
        if missing:
            raise NucleiError(f"{json_file}: {part}[{index}] lacks {', '.join(missing)}")
        if not isinstance(entry["id"], Hashable):
            raise NucleiError(
                f"{json_file}: {part}[{index}] has id {entry['id']}; give a number or a name"
            )
        if entry["id"] in seen:
            raise NucleiError(f"{json_file}: id {entry['id']} occurs twice among its {part}")
        seen.add(entry["id"])

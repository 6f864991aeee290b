"""Ground truth and predictions of any program: label images, COCO JSON, DSB 2018 folders."""

import io
import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import pycocotools.mask as mask_util
from PIL import Image

from nuclei_d2.data.datasets.coco import (
    is_box,
    is_one_of,
    load_nuclei_json,
    read_coco_json,
    segmentation_to_rle,
)
from nuclei_d2.data.datasets.formats.folder import LABEL_ENDINGS
from nuclei_d2.data.datasets.formats.readers import read_mask_files
from nuclei_d2.data.datasets.sources import IMAGE_SUFFIXES, SourceFile, list_files
from nuclei_d2.data.image_io import read_label
from nuclei_d2.evaluation.instances import (
    LabelLayers,
    layers_from_label_image,
    layers_from_masks,
    rle_to_mask,
)
from nuclei_d2.evaluation.nuclei_evaluation import record_to_layers
from nuclei_d2.structures.cropped_mask import CroppedMask
from nuclei_d2.utils.errors import NucleiError

# JPEG is left out: it is lossy, and labels do not survive it.
_LABEL_SUFFIXES = (".png", ".tif", ".tiff", ".bmp")


class ScoredMasks(NamedTuple):
    """Predictions of one image that may overlap, with their scores."""

    masks: list[CroppedMask]
    scores: np.ndarray  # (M,)
    size: tuple[int, int]  # (H, W)
    results: list[dict[str, Any]]  # COCO results of one category, without image_id


@dataclass(frozen=True)
class ImageSource:
    """One image's nuclei, read when asked for."""

    where: str  # the file that an error should name
    read: Callable[[], LabelLayers | ScoredMasks]


@dataclass(frozen=True)
class GroundTruth:
    """Every image's nuclei, by the image's name."""

    path: str
    images: dict[str, ImageSource]
    records: dict[str, dict[str, Any]]  # dataset dicts by name, where the source is COCO JSON
    categories: tuple[int, ...] = ()  # category ids, likewise


@dataclass(frozen=True)
class Predictions:
    """What one program found, by the image's name."""

    path: str
    images: dict[str, ImageSource]
    has_scores: bool = False


def open_ground_truth(path: str | os.PathLike) -> GroundTruth:
    """Open a label image, a folder of them, a DSB 2018 folder, or COCO instance JSON.

    Raises:
        NucleiError: it is none of them, or its JSON is broken.
    """
    path = Path(path)
    if path.is_file() and _is_label_image(path):
        return GroundTruth(str(path), _label_images([path]), {})
    if path.is_file():
        if isinstance(_load_json(path), list):
            raise NucleiError(f"{path}: COCO results are predictions; ground truth lists images")
        return _open_coco(path)
    return GroundTruth(str(path), _open_folder(path), {})


def open_predictions(path: str | os.PathLike, truth: GroundTruth) -> Predictions:
    """Open predictions, and match them with the images of ``truth`` by name.

    Besides what ground truth may be, COCO results: a JSON list of image_id, category_id,
    segmentation and score. Their image_id is that of the COCO ground truth, or else the image's
    name. An image without results has no predictions; a label image must be there. One label image
    belongs to one image of ground truth, whatever their names.

    Raises:
        NucleiError: also for images that only one of the two has, or unknown ids.
    """
    path = Path(path)
    if path.is_file() and _is_label_image(path):
        images = _label_images([path])
        if len(truth.images) == 1:
            images = dict(zip(truth.images, images.values(), strict=True))
    elif path.is_file():
        content = _load_json(path)
        if isinstance(content, list):
            return _open_results(path, content, truth)
        images = _open_coco(path).images
    else:
        images = _open_folder(path)
    _check_names(path, images, truth)
    return Predictions(str(path), images)


def _load_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise NucleiError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise NucleiError(
            f"{path}: broken JSON ({error}); give a JSON file, a folder, or a label image "
            f"({', '.join(_LABEL_SUFFIXES)})"
        ) from error


def _check_names(path: Path, images: Iterable[str], truth: GroundTruth) -> None:
    for here, there, names in (
        (path, truth.path, truth.images.keys() - set(images)),
        (truth.path, path, set(images) - truth.images.keys()),
    ):
        if names:
            first = ", ".join(sorted(names)[:3])
            raise NucleiError(
                f"{here} lacks {len(names)} of the images in {there}: {first}"
                f"{' ..' if len(names) > 3 else ''}; files are matched by name without suffix"
            )


# ----------------------------------------------------------------- label images, folders


def _is_label_image(path: Path) -> bool:
    return path.suffix.lower() in _LABEL_SUFFIXES and not path.is_dir()


def _open_folder(path: Path) -> dict[str, ImageSource]:
    if not path.is_dir():
        raise NucleiError(f"no file or folder {path}")
    files = [file for file in sorted(path.iterdir()) if not file.name.startswith(".")]
    images = _label_images([file for file in files if _is_label_image(file)])
    if not images:
        images = _mask_folders(path)
    if not images:
        raise NucleiError(
            f"{path}: neither label images ({', '.join(_LABEL_SUFFIXES)}) nor <image>/masks/*.png"
        )
    return images


def _label_images(files: Sequence[Path]) -> dict[str, ImageSource]:
    # Cellpose puts its masks beside the images, tools/predict.py other results beside its labels.
    files = [file for file in files if file.stem.endswith(LABEL_ENDINGS)] or files
    images: dict[str, ImageSource] = {}
    for file in files:
        ending = next((e for e in LABEL_ENDINGS if file.stem.endswith(e)), "")
        name = file.stem.removesuffix(ending)
        if name in images:
            raise NucleiError(f"{file} and {images[name].where} are both called {name}; keep one")
        images[name] = ImageSource(str(file), partial(_read_label_layers, file))
    return images


def _read_label_layers(file: Path) -> LabelLayers:
    return layers_from_label_image(read_label(file))


def _mask_folders(folder: Path) -> dict[str, ImageSource]:
    """``<image>/masks/*`` with one file per nucleus; ``<image>/images/*`` gives the size."""
    parts: dict[PurePosixPath, dict[str, list[SourceFile]]] = {}
    for file in list_files(folder):
        place = file.path.parent
        if place.name in ("masks", "images") and file.suffix in IMAGE_SUFFIXES:
            parts.setdefault(place.parent, defaultdict(list))[place.name].append(file)
    images: dict[str, ImageSource] = {}
    for place, files in parts.items():
        if place.name in images:
            raise NucleiError(f"{folder / place} and {images[place.name].where}: same name")
        if not (folder / place / "masks").is_dir():
            raise NucleiError(
                f"{folder / place} has no folder masks; copy it, or make an empty one if the image "
                "has no nuclei"
            )
        read = partial(_read_mask_layers, files["masks"], files["images"])
        images[place.name] = ImageSource(str(folder / place), read)
    return images


def _read_mask_layers(masks: list[SourceFile], images: list[SourceFile]) -> LabelLayers:
    size = _image_size((images or masks)[0])
    named = read_mask_files(*size, masks)
    return layers_from_masks([n.mask for n in named if n.mask.mask.size], size)


def _image_size(file: SourceFile) -> tuple[int, int]:
    try:
        with Image.open(io.BytesIO(file.read_bytes())) as image:
            return image.height, image.width
    except OSError as error:  # Pillow's UnidentifiedImageError is one
        raise NucleiError(f"{file}: no readable image; copy it again") from error


# --------------------------------------------------------------------------- COCO JSON


def _open_coco(path: Path) -> GroundTruth:
    content = read_coco_json(path)
    names = _image_names(path, content["images"])
    records = load_nuclei_json(path, path.parent)
    by_name = {names[record["image_id"]]: record for record in records}
    images = {
        name: ImageSource(f"{path}: image {name}", partial(record_to_layers, record))
        for name, record in by_name.items()
    }
    return GroundTruth(
        str(path), images, by_name, tuple(category["id"] for category in content["categories"])
    )


def _image_names(file: Path, entries: list[dict]) -> dict[Any, str]:
    """Image id -> stem of its file; with the folders where stems repeat."""
    paths = {entry["id"]: PurePosixPath(entry["file_name"]).with_suffix("") for entry in entries}
    stems = {key: path.name for key, path in paths.items()}
    if len(set(stems.values())) == len(stems):
        return stems
    owners: dict[str, Any] = {}
    for key, path in paths.items():
        other = owners.setdefault(str(path), key)
        if other != key:
            raise NucleiError(f"{file}: images {other} and {key} are both called {path}; keep one")
    return {key: name for name, key in owners.items()}


def _open_results(path: Path, results: list[Any], truth: GroundTruth) -> Predictions:
    names = {record["image_id"]: name for name, record in truth.records.items()}
    names = names or {name: name for name in truth.images}
    grouped: dict[str, list[tuple[int, dict]]] = defaultdict(list)
    for index, result in enumerate(results):
        grouped[_check_result(path, index, result, names, truth)].append((index, result))
    images = {
        name: ImageSource(
            f"{path}: image {name}",
            partial(_read_results, path, grouped[name], partial(_size_of, truth, name)),
        )
        for name in truth.images
    }
    return Predictions(str(path), images, has_scores=True)


def _check_result(path: Path, index: int, result: Any, names: dict, truth: GroundTruth) -> str:
    """The result's image name."""
    keys = ("image_id", "category_id", "segmentation", "score")
    missing = [key for key in keys if not isinstance(result, dict) or key not in result]
    if missing:
        raise NucleiError(f"{path}: result {index} lacks {', '.join(missing)}")
    if not isinstance(result["score"], (int, float)) or not np.isfinite(result["score"]):
        raise NucleiError(f"{path}: result {index} has score {result['score']!r}, not a number")
    if not is_one_of(result["image_id"], names):
        raise NucleiError(
            f"{path}: result {index} is of image {result['image_id']!r}, which {truth.path} "
            "does not have"
        )
    if truth.categories and result["category_id"] not in truth.categories:
        raise NucleiError(
            f"{path}: result {index} has category_id {result['category_id']!r}; {truth.path} has "
            f"{', '.join(map(str, truth.categories))}"
        )
    if result.get("bbox") and not is_box(result["bbox"]):
        raise NucleiError(
            f"{path}: result {index} has bbox {result['bbox']!r}; give x, y, width, height"
        )
    return names[result["image_id"]]


def _size_of(truth: GroundTruth, name: str) -> tuple[int, int]:
    if name in truth.records:
        return truth.records[name]["height"], truth.records[name]["width"]
    return truth.images[name].read().size


def _read_results(
    path: Path, results: list[tuple[int, dict]], read_size: Callable[[], tuple[int, int]]
) -> ScoredMasks:
    size = read_size()
    found = []
    for index, result in results:
        rle = segmentation_to_rle(result["segmentation"], size, f"{path}: result {index}")
        box = result.get("bbox") or mask_util.toBbox(rle).tolist()
        found.append(
            {"category_id": 1, "bbox": box, "segmentation": rle, "score": float(result["score"])}
        )
    masks = [rle_to_mask(result["segmentation"]) for result in found]
    return ScoredMasks(masks, np.array([result["score"] for result in found]), size, found)

"""Data sets that a study makes for itself: steps of crowding, and parts of a prepared set.

They are written below ``$DETECTRON2_DATASETS`` like every prepared set, and found by their names.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image
from tqdm import tqdm

from nuclei_d2.data.datasets.builtin import check_available, register_from_config
from nuclei_d2.data.datasets.coco import mask_to_annotation, read_coco_json, write_coco_json
from nuclei_d2.data.datasets.prepare import datasets_root
from nuclei_d2.data.datasets.splits import SPLITS
from nuclei_d2.data.datasets.statistics import equivalent_diameter
from nuclei_d2.data.datasets.synthetic import SyntheticConfig, generate, layered_masks
from nuclei_d2.data.image_io import read_image
from nuclei_d2.structures.cropped_mask import crop_mask, masks_to_label_image
from nuclei_d2.utils.errors import NucleiError
from nuclei_d2.utils.files import atomic_path

_CROWDING = "synthetic_crowding"
_KEYS = ({"crowding", "images"}, {"subsets_of", "by", "edge", "names"})


def annotation_file(name: str, cfg: CfgNode) -> Path:
    """COCO JSON of a registered set, or of one in ``DATASETS.CUSTOM``.

    Raises:
        NucleiError: there is no such set, or it is not prepared.
    """
    cfg = cfg.clone()
    cfg.DATASETS.TEST = (name,)
    register_from_config(cfg)
    if name.startswith("synthetic_"):
        DatasetCatalog.get(name)  # draws it on first use
    check_available([name])
    return Path(MetadataCatalog.get(name).json_file)


def prepare_datasets(entries: Sequence[dict[str, Any]]) -> None:
    """Write what ``prepare`` of a study file lists, unless it is there.

    An entry is ``{crowding: [0, 0.5, 1], images: 20}``: the sets ``synthetic_crowding_000``,
    ``_050``, ``_100``, with so many images each; or ``{subsets_of: my_set, by: diameter, edge: 18,
    names: [small, large]}``: ``my_set_small_train``, .. have the images whose median nucleus is
    smaller than the edge (diameter, of the circle of the same area, pixels), or whose grey levels
    span less (contrast: 99.8th minus 1st percentile), and ``my_set_large_train``, .. the others.

    Raises:
        NucleiError: an entry is neither; the set is not prepared.
    """
    for entry in entries:
        if not isinstance(entry, dict) or set(entry) not in _KEYS:
            keys = " or ".join(", ".join(sorted(keys)) for keys in _KEYS)
            raise NucleiError(f"prepare: an entry has the keys {keys}; got {entry}")
        if "crowding" in entry:
            for level in entry["crowding"]:
                _write_crowding(float(level), int(entry["images"]))
        else:
            _write_subsets(entry["subsets_of"], entry["by"], entry["edge"], entry["names"])


# ------------------------------------------------------------------------------- crowding


def _write_crowding(level: float, images: int) -> None:
    """Synthetic images in which this share of the nuclei is placed against another one."""
    name = f"{_CROWDING}_{round(100 * level):03}"
    config = SyntheticConfig(crowding=level, empty=0.0, count=(25, 45))
    description = f"{images} images, {config}"
    root = datasets_root() / _CROWDING
    path = root / "annotations" / f"{name}.json"
    if path.is_file() and read_coco_json(path)["info"]["description"] == description:
        return
    entries = [
        _write_field(root, f"{name}_{k:03}", k, config)
        for k in tqdm(range(images), name, leave=False)
    ]
    write_coco_json(path, entries, description)


def _write_field(root: Path, image_id: str, seed: int, config: SyntheticConfig) -> dict[str, Any]:
    image, labels = generate(np.random.default_rng((1, seed)), config)
    masks = [crop_mask(mask) for mask in layered_masks(labels)]
    names = {"file_name": f"images/{image_id}.png", "label_file_name": f"labels/{image_id}.png"}
    arrays = image, masks_to_label_image(masks, image.shape)
    for name, array in zip(names.values(), arrays, strict=True):
        with atomic_path(root / name) as path:
            Image.fromarray(array).save(path)
    return {
        **{"id": seed + 1, "height": image.shape[0], "width": image.shape[1]},
        **names,
        "annotations": [mask_to_annotation(mask, image.shape) for mask in masks],
    }


# -------------------------------------------------------------------------------- subsets


def _write_subsets(source: str, by: str, edge: float, names: Sequence[str]) -> None:
    if by not in ("diameter", "contrast") or len(names) != 2:
        raise NucleiError(f"prepare: subsets_of {source}: by diameter or contrast, two names")
    paths = [
        path
        for split in SPLITS
        for path in datasets_root().glob(f"*/annotations/{source}_{split}.json")
    ]
    if not paths:
        raise NucleiError(f"prepare: no {source}_train below {datasets_root()}; prepare it first")
    for path in paths:
        split = path.stem.rpartition("_")[2]
        targets = [path.with_name(f"{source}_{name}_{split}.json") for name in names]
        told = [f"images of {path.stem} with {by} {sign} {edge}" for sign in ("below", "from")]
        if not all(_is_current(*pair, path) for pair in zip(targets, told, strict=True)):
            for target, part, words in zip(targets, _split(path, by, edge), told, strict=True):
                write_coco_json(target, part, words)


def _is_current(path: Path, description: str, source: Path) -> bool:
    if not path.is_file() or path.stat().st_mtime < source.stat().st_mtime:
        return False
    return read_coco_json(path)["info"]["description"] == description


def _split(path: Path, by: str, edge: float) -> tuple[list, list]:
    """The images below the edge, and the others, with their annotations."""
    content = read_coco_json(path)
    annotations: dict[Any, list[dict]] = {image["id"]: [] for image in content["images"]}
    for annotation in content["annotations"]:
        annotations[annotation["image_id"]].append(annotation)
    parts: tuple[list, list] = [], []
    for image in tqdm(content["images"], f"{path.stem} by {by}", unit="image", leave=False):
        own = annotations[image["id"]]
        if by == "diameter":
            value = np.median(equivalent_diameter([a["area"] for a in own])) if own else np.nan
        else:
            value = np.subtract(
                *np.percentile(read_image(path.parents[1] / image["file_name"]), (99.8, 1))
            )
        if np.isfinite(value):
            parts[int(value >= edge)].append({**image, "annotations": own})
    return parts

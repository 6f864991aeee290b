"""Registers every known data set by name. Nothing is read before ``DatasetCatalog.get(name)``."""

import os
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from nuclei_d2.data.datasets.coco import CATEGORIES, load_nuclei_json
from nuclei_d2.data.datasets.prepare import MODALITIES, SPLITS, datasets_root
from nuclei_d2.utils.errors import NucleiError

# Folder below $DETECTRON2_DATASETS -> parts of its names behind the folder's.
_PREPARED = {
    "dsb2018": [*SPLITS, *(f"{m}_{s}" for m in MODALITIES for s in SPLITS), "stage1_test"],
    "bbbc039": SPLITS,
    "s_bsst265": SPLITS,
    "nuinsseg": SPLITS,
}


def register_builtin() -> None:
    """Register the prepared and the synthetic sets; names that exist already stay as they are."""
    for dataset, parts in _PREPARED.items():
        for part in parts:
            name = f"{dataset}_{part}"
            _register(name, _json_file(dataset, name), partial(_load_prepared, dataset, name))
    for split in SPLITS:
        name = f"synthetic_{split}"
        _register(name, _json_file("synthetic", name), partial(_load_synthetic, name, split))


def register_from_config(cfg: CfgNode) -> None:
    """Register ``DATASETS.CUSTOM``, and prepared sets named in ``DATASETS.TRAIN/VAL/TEST``.

    A name that is not known is looked up as ``$DETECTRON2_DATASETS/*/annotations/<name>.json``.

    Raises:
        NucleiError: a custom name is taken, a name is not known and not prepared, or occurs in
            two folders.
    """
    for name, json_file, image_root in cfg.DATASETS.CUSTOM:
        _register_custom(name, Path(json_file).expanduser(), Path(image_root).expanduser())
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.VAL, *cfg.DATASETS.TEST):
        if name not in DatasetCatalog:
            json_file = _find_prepared(name)
            _register_custom(name, json_file, json_file.parent.parent)


def check_available(names: Iterable[str]) -> None:
    """Raise :class:`NucleiError` for the first set whose annotations are not on disk.

    Training looks at its test set last: this finds out before it starts.
    """
    for name in names:
        json_file = Path(getattr(MetadataCatalog.get(name), "json_file", "."))
        if not name.startswith("synthetic_") and not json_file.exists():
            raise NucleiError(_missing(name, json_file))


def _register(name: str, json_file: Path, load) -> None:
    if name not in DatasetCatalog:
        DatasetCatalog.register(name, load)
        _set_metadata(name, json_file, json_file.parent.parent)


def _register_custom(name: str, json_file: Path, image_root: Path) -> None:
    json_file, image_root = json_file.absolute(), image_root.absolute()
    if name in DatasetCatalog:
        metadata = MetadataCatalog.get(name)
        known = getattr(metadata, "json_file", None), getattr(metadata, "image_root", None)
        if known != (str(json_file), str(image_root)):
            raise NucleiError(f"DATASETS.CUSTOM: the name {name} is taken; choose another one")
        return
    DatasetCatalog.register(name, partial(_load, name, json_file, image_root))
    _set_metadata(name, json_file, image_root)


def _set_metadata(name: str, json_file: Path, image_root: Path) -> None:
    MetadataCatalog.get(name).set(
        json_file=str(json_file),
        image_root=str(image_root),
        evaluator_type="nuclei",
        thing_classes=[category["name"] for category in CATEGORIES],
    )


def _json_file(dataset: str, name: str) -> Path:
    return datasets_root() / dataset / "annotations" / f"{name}.json"


def _load_prepared(dataset: str, name: str) -> list[dict[str, Any]]:
    json_file = _follow_root(dataset, name)
    if not json_file.exists():
        raise NucleiError(_missing(name, json_file))
    return _load(name, json_file, json_file.parent.parent)


def _load_synthetic(name: str, split: str) -> list[dict[str, Any]]:
    # Imported here: most runs need no generator.
    from nuclei_d2.data.datasets.synthetic import load_synthetic

    _follow_root("synthetic", name)
    return load_synthetic(split)


def _follow_root(dataset: str, name: str) -> Path:
    """The annotation file below today's root, put into the metadata if the root has moved."""
    json_file = _json_file(dataset, name)
    if MetadataCatalog.get(name).json_file != str(json_file):
        MetadataCatalog.pop(name)
        _set_metadata(name, json_file, json_file.parent.parent)
    return json_file


def _load(name: str, json_file: Path, image_root: Path) -> list[dict[str, Any]]:
    if not image_root.is_dir():
        raise NucleiError(f"{name}: no image folder {image_root}")
    return load_nuclei_json(json_file, image_root, name)


def _missing(name: str, json_file: Path) -> str:
    dataset = json_file.parent.parent.name
    if dataset not in _PREPARED:
        return f"{name}: no {json_file}; mend DATASETS.CUSTOM"
    return (
        f"{name}: no {json_file}; run `python datasets/prepare_{dataset}.py SOURCE` "
        "or set DETECTRON2_DATASETS"
    )


def _find_prepared(name: str) -> Path:
    root = datasets_root()
    folders = sorted(root.iterdir()) if root.is_dir() else []
    found = [folder / "annotations" / f"{name}.json" for folder in folders]
    found = [path for path in found if path.is_file() and os.sep not in name]
    if len(found) > 1:
        raise NucleiError(f"{name} is in {found[0]} and {found[1]}; name one of them anew")
    if not found:
        ours = [n for n in DatasetCatalog.list() if _is_ours(n)]
        raise NucleiError(
            f"no data set {name}: not in DATASETS.CUSTOM, nor prepared below {root} "
            f"(DETECTRON2_DATASETS); known: {', '.join(sorted(ours))}"
        )
    return found[0]


def _is_ours(name: str) -> bool:
    return getattr(MetadataCatalog.get(name), "evaluator_type", "") == "nuclei"

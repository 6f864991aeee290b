"""Registers every known data set by name. Nothing is read before ``DatasetCatalog.get(name)``."""

import difflib
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from nuclei_d2.data.datasets.coco import CATEGORIES, load_nuclei_json
from nuclei_d2.data.datasets.prepare import MODALITIES, datasets_root
from nuclei_d2.data.datasets.splits import SPLITS
from nuclei_d2.utils.errors import NucleiError

# Folder below $DETECTRON2_DATASETS -> what its registered names add to the folder's name.
_ENDINGS = {
    "dsb2018": (*SPLITS, *(f"{m}_{s}" for m in MODALITIES for s in SPLITS), "stage1_test"),
    "bbbc039": SPLITS,
    "s_bsst265": SPLITS,
    "nuinsseg": SPLITS,
    "synthetic": SPLITS,
}
_FOLDERS = {f"{folder}_{end}": folder for folder, ends in _ENDINGS.items() for end in ends}


def register_builtin() -> None:
    """Register the known sets; names that are registered already stay as they are."""
    for name, folder in _FOLDERS.items():
        if name in DatasetCatalog:
            continue
        if folder == "synthetic":
            DatasetCatalog.register(name, partial(_load_synthetic, name))
        else:
            DatasetCatalog.register(name, partial(_load_prepared, name))
        _point_to_root(name)


def register_from_config(cfg: CfgNode) -> None:
    """Register ``DATASETS.CUSTOM``, and prepared sets named in ``DATASETS.TRAIN/VAL/TEST``.

    A name that is not known is looked up as ``$DETECTRON2_DATASETS/*/annotations/<name>.json``.

    Raises:
        NucleiError: a custom name is taken; a name is neither known nor prepared, or prepared
            in two folders.
    """
    for name, json_file, image_root in cfg.DATASETS.CUSTOM:
        _register_custom(name, Path(json_file).expanduser(), Path(image_root).expanduser())
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.VAL, *cfg.DATASETS.TEST):
        if name in _FOLDERS:
            _point_to_root(name)
        elif name not in DatasetCatalog:
            json_file = _find_prepared(name)
            _register_custom(name, json_file, json_file.parent.parent)


def check_own_name(dataset: str) -> str:
    """Return ``dataset`` if it can be the name of somebody's own data set.

    Raises:
        NucleiError: with a split behind it, it would be the registered name of a known set.
    """
    if any(f"{dataset.lower()}_{split}" in _FOLDERS for split in SPLITS):
        raise NucleiError(f"--name {dataset} is a known data set; choose another name")
    return dataset


def check_available(names: Iterable[str]) -> None:
    """Find out before a long run, not at its end, whether its data are there.

    Raises:
        NucleiError: for the first registered set whose annotations are not on disk. Synthetic
            sets are generated on demand, so they are always there.
    """
    for name in names:
        if _FOLDERS.get(name) == "synthetic":
            continue
        json_file = getattr(MetadataCatalog.get(name), "json_file", None)
        if json_file is not None and not Path(json_file).is_file():
            raise NucleiError(_missing(name, json_file))


def _register_custom(name: str, json_file: Path, image_root: Path) -> None:
    places = {"json_file": str(json_file.absolute()), "image_root": str(image_root.absolute())}
    if name in DatasetCatalog:
        known = MetadataCatalog.get(name).as_dict()
        if any(known.get(key) != place for key, place in places.items()):
            raise NucleiError(f"DATASETS.CUSTOM: the name {name} is taken; choose another one")
        return
    DatasetCatalog.register(name, partial(_load_custom, name, **places))
    _set_metadata(name, **places)


def _set_metadata(name: str, **places: str) -> None:
    classes = [category["name"] for category in CATEGORIES]
    MetadataCatalog.get(name).set(evaluator_type="nuclei", thing_classes=classes, **places)


def _point_to_root(name: str) -> tuple[str, str]:
    """Let a known set's metadata point below today's ``$DETECTRON2_DATASETS``.

    Returns:
        The annotation file and the image root.
    """
    root = datasets_root() / _FOLDERS[name]
    json_file = str(root / "annotations" / f"{name}.json")
    if MetadataCatalog.get(name).get("json_file") != json_file:
        # Metadata cannot be changed, only replaced.
        MetadataCatalog.pop(name)
        _set_metadata(name, json_file=json_file, image_root=str(root))
        ids = {category["id"]: index for index, category in enumerate(CATEGORIES)}
        MetadataCatalog.get(name).thing_dataset_id_to_contiguous_id = ids
    return json_file, str(root)


def _load_prepared(name: str) -> list[dict[str, Any]]:
    json_file, image_root = _point_to_root(name)
    if not Path(json_file).is_file():
        raise NucleiError(_missing(name, json_file))
    return load_nuclei_json(json_file, image_root, name)


def _load_synthetic(name: str) -> list[dict[str, Any]]:
    # Imported here: most runs need no generator.
    from nuclei_d2.data.datasets.synthetic import load_synthetic

    _point_to_root(name)
    return load_synthetic(name.removeprefix("synthetic_"))


def _load_custom(name: str, json_file: str, image_root: str) -> list[dict[str, Any]]:
    if not Path(image_root).is_dir():
        raise NucleiError(f"{name}: no image folder {image_root}; mend DATASETS.CUSTOM")
    return load_nuclei_json(json_file, image_root, name)


def _missing(name: str, json_file: str) -> str:
    if name not in _FOLDERS:
        return f"{name}: no {json_file}; mend DATASETS.CUSTOM or prepare the set again"
    if any(Path(json_file).parent.glob("*.json")):
        return (
            f"{name}: no {json_file}; none of the images prepared there belongs to it: leave it "
            f"out, or run `python datasets/prepare_{_FOLDERS[name]}.py SOURCE` with all images"
        )
    script = f"datasets/prepare_{_FOLDERS[name]}.py"
    return f"{name}: no {json_file}; run `python {script} SOURCE` or set DETECTRON2_DATASETS"


def _find_prepared(name: str) -> Path:
    root = datasets_root()
    folders: Iterable[Path] = sorted(root.iterdir()) if root.is_dir() else ()
    candidates = (folder / "annotations" / f"{name}.json" for folder in folders)
    found = [path for path in candidates if path.is_file() and path.stem == name]
    if len(found) > 1:
        raise NucleiError(f"data set {name} is in {found[0]} and in {found[1]}; remove one")
    if not found:
        raise NucleiError(_unknown(name, root))
    return found[0]


def _unknown(name: str, root: Path) -> str:
    known = sorted(n for n in DatasetCatalog.list() if _is_ours(n))
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {close[0]}?" if close else "."
    return (
        f"no data set {name}: neither in DATASETS.CUSTOM nor prepared below {root} "
        f"(DETECTRON2_DATASETS){hint} Known: {', '.join(known)}"
    )


def _is_ours(name: str) -> bool:
    return MetadataCatalog.get(name).get("evaluator_type") == "nuclei"

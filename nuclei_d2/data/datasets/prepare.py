"""The core that every format shares: images and masks -> images, label images and COCO JSON.

A format (see ``nuclei_d2.data.datasets.formats``) lists :class:`Record`; :func:`prepare` reads
them in parallel processes, accounts for every mask and writes the data set.
"""

import argparse
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
from PIL import Image
from scipy import ndimage
from tqdm import tqdm

from nuclei_d2.data.datasets.accounting import (
    DUPLICATE,
    EMPTY,
    FRAGMENTS,
    HIDDEN,
    OVERLAPPING,
    PreparedImage,
    account,
    accounting_table,
    merge_runs,
)
from nuclei_d2.data.datasets.coco import mask_to_annotation, read_coco_json, write_coco_json
from nuclei_d2.data.datasets.sources import check_image_id
from nuclei_d2.data.datasets.splits import SPLITS
from nuclei_d2.data.image_io import read_image
from nuclei_d2.structures.cropped_mask import CroppedMask, masks_to_label_image
from nuclei_d2.utils.errors import NucleiError
from nuclei_d2.utils.files import atomic_path, write_json
from nuclei_d2.utils.hardware import usable_cores

T = TypeVar("T")

MODALITIES = ("fluorescence", "histology", "brightfield")

_FULL_SCALES = (1, 255, 1023, 4095, 16383, 65535)
_EIGHT_CONNECTED = np.ones((3, 3), int)


class ImageSource(Protocol):
    """What :func:`prepare` needs of an image: ``sources.SourceFile`` is one."""

    @property
    def suffix(self) -> str:
        """Lower-case file suffix with its dot."""

    def read_bytes(self) -> bytes:
        """The encoded file, copied as it is."""

    def read(self, reader: Callable[[Path], T]) -> T:
        """Call ``reader`` on a path that holds the file."""


class NamedMask(NamedTuple):
    """One annotated object: where it comes from, its mask, and why it is dropped, if it is."""

    name: str
    mask: CroppedMask
    drop: str = ""


@dataclass(frozen=True)
class Record:
    """One image of a format and how to read its objects. Must be picklable.

    ``read_masks(height, width)`` returns the objects in a fixed order, or raises NucleiError.
    ``modality`` None means: judge by the pixels.
    """

    image_id: str
    split: str
    image: ImageSource
    read_masks: Callable[[int, int], list[NamedMask]]
    modality: str | None = None


@dataclass(frozen=True)
class Listing:
    """What a format found: the images, and files it leaves out with the reason for each."""

    records: list[Record]
    skipped: dict[str, str] = field(default_factory=dict)


def datasets_root() -> Path:
    """``$DETECTRON2_DATASETS``, or ``datasets`` in the working folder, as in Detectron2."""
    return Path(os.environ.get("DETECTRON2_DATASETS") or "datasets").expanduser().absolute()


def guess_modality(image: np.ndarray) -> str:
    """Judge a raw (H, W, C) float32 image by its background, i.e. its median brightness.

    Below 0.4 of full scale: "fluorescence". Else "histology" if it is coloured, "brightfield"
    if it is grey. Full scale is 1, 255 or that of a camera with 10, 12, 14 or 16 bits, the
    least that holds the largest pixel. But a grey image of more than 8 bits without anything
    darker than 0.8 of its background shows no absorbing nuclei; it may be an empty field,
    whose largest pixel tells nothing of the camera: then full scale is that of 16 bits.
    """
    largest = float(image.max(initial=0))
    full_scale = next((scale for scale in _FULL_SCALES if largest <= scale), largest)
    colour = (image.max(axis=2) - image.min(axis=2)).mean()
    coloured = colour > 0.01 * full_scale
    grey = image.mean(axis=2)
    darkest, background = np.percentile(grey, (1, 50))
    if largest > 255 and not coloured and darkest > 0.8 * background:
        full_scale = max(full_scale, _FULL_SCALES[-1])
    if background < 0.4 * full_scale:
        return "fluorescence"
    return "histology" if coloured else "brightfield"


def prepare(
    listing: Listing,
    dataset: str,
    *,
    root: Path | None = None,
    split_rule: str = "",
    modality: str = "all",
    by_modality: bool = False,
    workers: int | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Write ``<root>/<dataset>/{images,labels,annotations}`` and ``preparation.json``.

    Every file is written atomically and depends on the source alone: a second run gives the
    same bytes, an interrupted one can be run again. The annotation files of the splits that
    ``listing`` fills are replaced; those of other splits stay.

    Args:
        listing: what a format found.
        dataset: folder name and first part of the registered names ``<dataset>_<split>``.
        root: default :func:`datasets_root`.
        split_rule: how the split came about, for the accounting.
        modality: prepare only images of this one (names then carry it), or "all".
        by_modality: also write ``<dataset>_<modality>_<split>``.
        workers: processes; default one per usable core. 1 works in this process.
        progress: show a progress bar.

    Returns:
        The accounting; preparation.json lists it among its "runs".

    Raises:
        NucleiError: an unreadable image or mask, sizes that differ, an id that occurs twice,
            stands in another split that stays, or cannot be a file name, no image at all.
    """
    folder = (root or datasets_root()) / check_image_id(dataset)
    records = _check_records(listing.records, dataset)
    prefix = f"{dataset}_{modality}" if by_modality and modality != "all" else dataset
    _check_other_splits(records, folder, prefix)
    work = partial(_prepare_image, folder=folder, modality=modality)
    results = _run_parallel(work, records, workers or usable_cores(), dataset, progress)
    images = []
    for number, result in enumerate(results, start=1):
        if result is not None:
            result.entry["id"] = number
            images.append(result)
    if not images:
        raise NucleiError(f"{dataset}: no {modality} image among the {len(records)}")
    groups = _group(images, dataset, modality, by_modality)
    for name, group in groups.items():
        path = folder / "annotations" / f"{name}.json"
        write_coco_json(path, [image.entry for image in group], description=name)
    report = account(images, listing.skipped)
    settings = {"dataset": dataset, "split_rule": split_rule, "modality": modality}
    report = {**settings, "annotations": sorted(groups), **report}
    write_json(folder / "preparation.json", {"runs": merge_runs(folder, report)})
    return report


def _check_records(records: Sequence[Record], dataset: str) -> list[Record]:
    if not records:
        raise NucleiError(f"{dataset}: found no annotated image; look at the expected layout")
    seen: dict[str, Record] = {}
    for record in records:
        check_image_id(record.image_id)
        other = seen.setdefault(record.image_id.lower(), record)
        if other is not record:
            raise NucleiError(
                f"{record.image} and {other.image} have the same id {record.image_id}; rename one"
            )
    return sorted(records, key=lambda record: record.image_id)


def _check_other_splits(records: Sequence[Record], folder: Path, prefix: str) -> None:
    """No image may be in two splits: look into the annotation files that this run leaves as is.

    It replaces ``<prefix>_<split>`` for every split of the records.
    A file's split is its name's last word; other files than those of splits are not looked at.
    """
    split_of = {r.image_id.lower(): r.split.rpartition("_")[2] for r in records}
    replaced = {f"{prefix}_{record.split}" for record in records}
    for path in sorted((folder / "annotations").glob("*.json")):
        split = path.stem.rpartition("_")[2]
        if split not in SPLITS or path.stem in replaced:
            continue
        for image in read_coco_json(path)["images"]:
            image_id = Path(image["file_name"]).stem
            if split_of.get(image_id.lower(), split) != split:
                raise NucleiError(
                    f"image {image_id} would be in {split_of[image_id.lower()]} and stands in "
                    f"{path} too; choose another name for the data set, or remove that file"
                )


def _run_parallel(
    work: Callable[[Record], T], records: list[Record], workers: int, title: str, progress: bool
) -> list[T]:
    workers = min(workers, len(records))
    pool = nullcontext()
    if workers > 1:
        pool = ProcessPoolExecutor(workers, initializer=_start_worker)
    try:
        with pool:
            results = pool.map(work, records) if workers > 1 else map(work, records)
            bar = tqdm(results, title, len(records), unit="image", disable=not progress)
            return list(bar)
    except BrokenProcessPool as error:
        raise NucleiError("a worker was killed (memory?); try again with --workers 1") from error


def _start_worker() -> None:
    # Ctrl-C is for the parent, which then stops its workers; if it is killed, they go too.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _prepare_image(record: Record, folder: Path, modality: str) -> PreparedImage | None:
    image = record.image.read(read_image)
    kind = record.modality or guess_modality(image)
    if modality not in ("all", kind):
        return None
    size = image.shape[:2]
    named = record.read_masks(*size)
    try:
        labels, kept, dropped = select_masks(named, size)
    except NucleiError as error:
        raise NucleiError(f"{record.image}: {error}") from error
    overlapping, noted = _note([named[k] for k in kept], size)
    entry = {
        "file_name": f"images/{record.image_id}{record.image.suffix}",
        "height": size[0],
        "width": size[1],
        "label_file_name": f"labels/{record.image_id}.png",
        "modality": kind,
        "overlaps": overlapping,
        "annotations": [mask_to_annotation(named[k].mask, size) for k in kept],
    }
    with atomic_path(folder / entry["file_name"]) as path:
        path.write_bytes(record.image.read_bytes())
    with atomic_path(folder / entry["label_file_name"]) as path:
        Image.fromarray(labels).save(path)
    return PreparedImage(entry, record.image_id, record.split, len(named), dropped, noted)


def select_masks(
    named: Sequence[NamedMask], size: tuple[int, int]
) -> tuple[np.ndarray, list[int], list[dict[str, str]]]:
    """Drop what is empty, a duplicate or wholly hidden, and paint the rest.

    Returns:
        labels: (H, W) uint16; label i + 1 is mask ``kept[i]``
            (see :func:`~nuclei_d2.structures.cropped_mask.masks_to_label_image`).
        kept: indices into ``named``.
        dropped: for each other one ``{"mask": its name, "reason": ...}``, and for a duplicate
            ``"of"``: the name of the earlier one.
    """
    drops: dict[int, dict[str, str]] = {}
    first: dict[tuple, int] = {}
    for k, (_, boxed, reason) in enumerate(named):
        if reason or boxed.mask.size == 0:
            drops[k] = {"reason": reason or EMPTY}
            continue
        pixels = (boxed.top, boxed.left, boxed.mask.shape, boxed.mask.tobytes())
        earlier = first.setdefault(pixels, k)
        if earlier != k:
            drops[k] = {"reason": DUPLICATE, "of": named[earlier].name}
    candidates = [k for k in range(len(named)) if k not in drops]
    painted = masks_to_label_image([named[k].mask for k in candidates], size)
    visible = np.bincount(painted.ravel(), minlength=len(candidates) + 1)[1:] > 0
    drops |= {
        k: {"reason": HIDDEN} for k, seen in zip(candidates, visible, strict=True) if not seen
    }
    renumber = np.concatenate([[0], np.cumsum(visible) * visible]).astype(np.uint16)
    kept = [k for k in candidates if k not in drops]
    dropped = [{"mask": named[k].name, **drops[k]} for k in sorted(drops)]
    return renumber[painted], kept, dropped


def _note(named: Sequence[NamedMask], size: tuple[int, int]) -> tuple[bool, list[dict[str, str]]]:
    """Whether any of these masks overlap, and the remarks on single ones."""
    cover = np.zeros(size, np.uint16)
    for _, boxed, _ in named:
        cover[boxed.window] += boxed.mask
    overlapping, noted = bool((cover > 1).any()), []
    for name, boxed, _ in named:
        if ndimage.label(boxed.mask, _EIGHT_CONNECTED)[1] > 1:
            noted.append({"mask": name, "reason": FRAGMENTS})
        if overlapping and (cover[boxed.window][boxed.mask] > 1).any():
            noted.append({"mask": name, "reason": OVERLAPPING})
    return overlapping, noted


def _group(
    images: Iterable[PreparedImage], dataset: str, modality: str, by_modality: bool
) -> dict[str, list[PreparedImage]]:
    """Registered name -> its images, where there are any."""
    images = list(images)
    kinds = sorted({image.entry["modality"] for image in images}) if by_modality else []
    prefixes = {f"{dataset}_{kind}": kind for kind in kinds}
    if modality == "all" or not by_modality:
        prefixes[dataset] = "all"
    groups = {}
    for prefix, kind in prefixes.items():
        for split in {image.split for image in images}:
            groups[f"{prefix}_{split}"] = [
                image
                for image in images
                if image.split == split and kind in ("all", image.entry["modality"])
            ]
    return {name: group for name, group in groups.items() if group}


def argument_parser(description: str) -> argparse.ArgumentParser:
    """Parser with the options that every prepare script has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--root", type=Path, help="output root; default $DETECTRON2_DATASETS, else ./datasets"
    )
    parser.add_argument("--workers", type=int, help="processes; default one per usable core")
    return parser


def add_split_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the formats that bring no split of their own."""
    parser.add_argument("--name", required=True, help="registered as NAME_train, NAME_val, ...")
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--split", default="0.8/0.1/0.1", help="shares of train/val/test, drawn by hash of the id"
    )
    group.add_argument("--all-to", choices=SPLITS, help="put every image into one split")
    parser.add_argument("--modality", choices=MODALITIES, help="default: judged for each image")


def run(listing: Listing, dataset: str, args: argparse.Namespace, **options) -> None:
    """:func:`prepare` with the parsed options, then print the accounting."""
    if args.workers is not None and args.workers < 1:
        raise NucleiError(f"--workers is {args.workers}; it counts processes, from 1")
    report = prepare(listing, dataset, root=args.root, workers=args.workers, **options)
    print(accounting_table(report))
    print(f"written to {(args.root or datasets_root()) / dataset}")

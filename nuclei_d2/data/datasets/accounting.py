"""What became of every image and mask of a data set: ``preparation.json``, and a table."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tabulate import tabulate

from nuclei_d2.data.datasets.splits import SPLITS

# Reasons to drop a mask, and to note one that is kept.
EMPTY, DUPLICATE, HIDDEN = "empty", "duplicate", "wholly hidden"
FRAGMENTS, OVERLAPPING = "disconnected fragments", "overlapping"


@dataclass
class PreparedImage:
    """What a worker sends back: the COCO entry with annotations, and the accounting."""

    entry: dict[str, Any]
    image_id: str
    split: str
    found: int
    dropped: list[dict[str, str]]
    noted: list[dict[str, str]]


def account(images: Sequence[PreparedImage], skipped: dict[str, str]) -> dict[str, Any]:
    splits: dict[str, dict[str, Any]] = {}
    for image in images:
        nuclei = len(image.entry["annotations"])
        row = splits.setdefault(image.split, {"images": 0, "nuclei": 0, "modalities": {}})
        kind = row["modalities"].setdefault(image.entry["modality"], {"images": 0, "nuclei": 0})
        for counts in (row, kind):
            counts["images"] += 1
            counts["nuclei"] += nuclei
    dropped = [{"image_id": i.image_id, **entry} for i in images for entry in i.dropped]
    noted = [{"image_id": i.image_id, **entry} for i in images for entry in i.noted]
    counts = [len(image.entry["annotations"]) for image in images]
    return {
        "images": len(images),
        "images_without_nuclei": counts.count(0),
        "images_with_overlaps": sum(image.entry["overlaps"] for image in images),
        "most_nuclei_in_an_image": max(counts),
        "splits": {name: splits[name] for name in sorted(splits)},
        "masks_found": sum(image.found for image in images),
        "masks_kept": sum(counts),
        "masks_dropped": dict(Counter(entry["reason"] for entry in dropped)),
        "masks_noted": dict(Counter(entry["reason"] for entry in noted)),
        "dropped": dropped,
        "noted": noted,
        "skipped": [{"file": name, "reason": skipped[name]} for name in sorted(skipped)],
    }


def merge_runs(folder: Path, report: dict[str, Any]) -> list[dict[str, Any]]:
    """The accounting of every run of which an annotation file stands, with those that do."""
    try:
        earlier = json.loads((folder / "preparation.json").read_text())["runs"]
    except (OSError, ValueError, KeyError, TypeError):
        earlier = []
    standing = {path.stem for path in (folder / "annotations").glob("*.json")}
    standing -= set(report["annotations"])
    runs = [report]
    for run in earlier:
        names = [name for name in run["annotations"] if name in standing]
        if names:
            runs.append({**run, "annotations": names})
    return sorted(runs, key=lambda run: run["annotations"])


def accounting_table(report: dict[str, Any]) -> str:
    """:func:`prepare`'s accounting as text for people."""
    rows = []
    for split, counts in report["splits"].items():
        rows.append([split, "all", counts["images"], counts["nuclei"]])
        for kind, part in sorted(counts["modalities"].items()):
            rows.append(["", kind, part["images"], part["nuclei"]])
    splits = tabulate(rows, ["split", "modality", "images", "nuclei"])
    rows = [["found", report["masks_found"]], ["= kept", report["masks_kept"]]]
    rows += [[f"+ dropped: {why}", count] for why, count in report["masks_dropped"].items()]
    rows += [[f"kept, noted: {why}", count] for why, count in report["masks_noted"].items()]
    masks = tabulate(rows, ["masks", "count"])
    lines = [splits, "", masks, ""]
    if report["skipped"]:
        lines.append(f"{len(report['skipped'])} files left out, listed in preparation.json")
    if report["masks_kept"] == report["masks_noted"].get(FRAGMENTS) == report["images"]:
        lines.append(
            "every image has one nucleus, in pieces: are the labels binary masks? Number the "
            "nuclei first (skimage.measure.label), and prepare again"
        )
    empty = [split for split in SPLITS if split not in report["splits"]]
    if empty:
        lines.append(f"no image in {', '.join(empty)}: leave it out of the config, e.g. VAL: []")
    lines.append(f"most nuclei in an image: {report['most_nuclei_in_an_image']}")
    return "\n".join(lines)

"""``report.html``: all images of a folder, those first that deserve a look."""

import base64
import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nuclei_d2.utils.files import atomic_path
from nuclei_d2.visualization.report.templates import render_template

TABLE = "report/images.csv"
FIRST = 10  # images to look at first
PICTURE_BYTES = 6_000_000  # of the thumbnails on the page; a third more in its encoding
LISTED = 2_000  # images without a picture that the page lists
_REASONS = 300  # characters of a remark on the page
# File names need not be UTF-8; what is none becomes \udce9 or the like.
_ENCODING = {"encoding": "utf-8", "errors": "backslashreplace"}


def concern(content: Mapping[str, Any]) -> float:
    """How much an image deserves a look: the one number that orders the page, 0 to 3.

    Args:
        content: its record, or why there is none.

    Returns:
        1 - quality, and 1 where no nucleus was found; 1 more with warnings; 3 for a failure.
    """
    if "reason" in content:
        return 3.0
    return 1 - (content.get("quality") or 0) + bool(content["warnings"])


def write_overview(
    folder: Path, images: Mapping[str, Mapping[str, Any]], manifest: Mapping[str, Any]
) -> None:
    """Write ``report.html`` and, with a row for every image, :data:`TABLE`.

    Args:
        folder: of the results.
        images: records and failures by name.
        manifest: of the run; names the model and the time.

    Raises:
        NucleiError: a file cannot be written.
    """
    order = sorted(images, key=lambda name: (-concern(images[name]), name))
    _write_table(folder / TABLE, order, images)
    first, others = order[:FIRST], order[FIRST:]
    pictures, left = {}, PICTURE_BYTES
    for name in order:
        path = folder / str(images[name].get("thumbnail"))
        if not path.is_file():
            continue
        left -= path.stat().st_size
        if left < 0:
            break
        data = base64.b64encode(path.read_bytes()).decode()
        pictures[name] = f"data:image/webp;base64,{data}"
    listed = [name for name in others if name not in pictures]
    entries = {n: _entry(n, images[n], pictures.get(n, "")) for n in (*first, *pictures)}
    records = [content for content in images.values() if "reason" not in content]
    page = render_template(
        "batch.html",
        counts={
            "images": len(images),
            "done": len(records),
            "failed": len(images) - len(records),
            "warned": sum(bool(record["warnings"]) for record in records),
            "nuclei": sum(record["nuclei"] for record in records),
        },
        model=Path(
            manifest["model"]["file"] or manifest["config"]["MODEL"]["META_ARCHITECTURE"]
        ).name,
        started=manifest["started"],
        first=[entries[name] for name in first],
        pictured=[entries[name] for name in others if name in pictures],
        listed=[_entry(name, images[name], "") for name in listed[:LISTED]],
        left_out=max(len(listed) - LISTED, 0),
        table=TABLE,
    )
    with atomic_path(folder / "report.html") as temporary:
        temporary.write_text(page, **_ENCODING)


def _entry(name: str, content: Mapping[str, Any], picture: str) -> dict[str, Any]:
    quality = content.get("quality")
    return {
        "name": name,
        "picture": picture,
        "failed": "reason" in content,
        "nuclei": content.get("nuclei", 0),
        "quality": "" if quality is None else f"{quality:.2f}",
        "reasons": [reason[:_REASONS] for reason in _reasons(content)],
    }


def _reasons(content: Mapping[str, Any]) -> list[str]:
    """Why the image is where it is, in words."""
    if "reason" in content:
        return [f"failed: {content['reason']}"]
    if content["warnings"]:
        return list(content["warnings"])
    if not content["nuclei"]:
        return ["no nuclei found"]
    return [f"quality {content['quality']:.2f}, no warnings"] if "quality" in content else []


def _write_table(path: Path, order: Sequence[str], images: Mapping[str, Mapping[str, Any]]) -> None:
    with atomic_path(path) as temporary, temporary.open("w", newline="", **_ENCODING) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["image", "file", "concern", "nuclei", "quality", "remarks"])
        for name in order:
            content = images[name]
            quality = content.get("quality")
            remarks = "; ".join(_reasons(content))
            shown = "" if quality is None else f"{quality:.4f}"
            row = [name, content["file"], f"{concern(content):.4f}", content.get("nuclei", "")]
            writer.writerow([*row, shown, remarks])

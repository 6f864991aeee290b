"""Predict many images into one output folder: resumable, and shared by any number of processes."""

import hashlib
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from detectron2.config import CfgNode
from detectron2.utils.file_io import PathManager

from nuclei_d2.data.normalization import ContrastRange
from nuclei_d2.inference.identity import has_changed, identity, is_of
from nuclei_d2.inference.inputs import image_name, unique_stems
from nuclei_d2.inference.manifest import manifest
from nuclei_d2.inference.nuclei import ImageInfo
from nuclei_d2.inference.overview import TABLE, write_overview
from nuclei_d2.inference.pipeline import NucleiPipeline, PredictionOptions
from nuclei_d2.inference.work import SharedWork
from nuclei_d2.inference.writers import get_writer, write_outputs
from nuclei_d2.inference.writers.picture import write_thumbnail
from nuclei_d2.utils.errors import NucleiError
from nuclei_d2.utils.files import flush, jsonable, write_json

# Where these differ, the results are the same. Of MODEL.WEIGHTS the content is compared.
_FREE_KEYS = ("config.MODEL.DEVICE", "config.MODEL.WEIGHTS", "config.OUTPUT_DIR", "model.file")
_PARTS = ("model", "config", "settings")  # of the manifest, that have to agree
_THUMBNAILS = "report"
_FOLDERS = ("records", "failures", "claims", "work", _THUMBNAILS)
# What clear removes besides the results: files by pattern, and then the folders if they are empty.
_FILES = (
    *("records/*.json", "failures/*.json", "claims/*.[0-9]*"),
    *("work/*/**/*tile_*.npz", "work/*/*/*scale*.json", "work/*/outputs/*"),
    *("summary.json", "report.html", TABLE),
)
_EMPTIED = ("work/*/*", "work/*", *_FOLDERS)
_PATIENCE = 0.1  # seconds between two looks at an image that another process has


class Outcome(NamedTuple):
    """What became of one image: ``content`` is its record, or says why there is none."""

    path: Path
    failed: bool
    content: dict[str, Any]


class FolderPrediction:
    """All images of one call, and the folder that their results go to.

    ``<name>_labels.tif`` and the other formats of an image lie directly in the folder;
    ``records/<name>.json`` is written last, so that an image with a record is complete. Several
    processes with the same images may work on one folder, see
    :class:`~nuclei_d2.inference.work.SharedWork`.
    """

    def __init__(
        self,
        cfg: CfgNode,
        options: PredictionOptions,
        images: Sequence[Path],
        output: Path,
        formats: Sequence[str],
    ) -> None:
        """Nothing is read or written yet.

        Raises:
            NucleiError: an unknown format; the images lie in the output folder.
        """
        self.cfg = cfg
        self.options = options
        self.output = output
        self.formats = tuple(dict.fromkeys(formats))  # each once
        self.images = dict(zip(unique_stems(images), images, strict=True))
        for name in self.formats:
            get_writer(name)
        if output.exists() and not output.is_dir():
            raise NucleiError(f"--output {output} is a file; name a folder")
        if any(path.parent.resolve() == output.resolve() for path in images):
            raise NucleiError(f"--output {output} is where the images lie; name another folder")

    @cached_property
    def pipeline(self) -> NucleiPipeline:
        """Loaded when it is first needed."""
        return NucleiPipeline(self.cfg, self.options)

    def prepare(self) -> list[Path]:
        """Make the folder, and check that what is there belongs to the same call.

        Returns:
            Images that have changed since their results were made. Their results are removed, so
            that they are done again; of several processes one returns the image.

        Raises:
            NucleiError: the folder was made with other settings, or not by this class; a record in
                it is of another image of the same name; the model cannot be loaded; nothing can be
                written.
        """
        before = self._read_manifest()
        if before:
            self._compare(before, jsonable(self._describe()))
        else:
            _ = self.pipeline  # a model that cannot be loaded leaves no folder
            write_json(self._manifest, self._describe(), durable=True)
        self.work = SharedWork(self.output)
        changed = []
        for name in sorted(self.work.finished() & set(self.images)):
            path, record = self.images[name], self._read_record(name)
            if record and not is_of(record, path):
                raise NucleiError(
                    f"{self.work.record_path(name)} is of {record['file_path']}, not of "
                    f"{path.resolve()}; name another --output"
                )
            if has_changed(record, path):
                changed.append(name)
        return [self.images[name] for name in changed if self._set_back(name)]

    def _read_record(self, name: str) -> dict[str, Any]:
        """Of an image; empty without one: another process may have set it back just now."""
        return _read_json(self.work.record_path(name), {})

    def _set_back(self, name: str) -> bool:
        """Remove the results of an image that has changed; False if another process did.

        Only the owner of the image's claim may: results that are being made stay.
        """
        while has_changed(self._read_record(name), self.images[name]):
            with self.work.claim(name) as ours:
                record = self._read_record(name)
                if ours and has_changed(record, self.images[name]):
                    self._remove(self.work.record_path(name), record)
                    return True
            time.sleep(_PATIENCE)
        return False

    def _remove(self, path: Path, record: dict[str, Any]) -> None:
        """An image's results; the record first, since an image with a record is complete."""
        path.unlink(missing_ok=True)
        for name in (*record["outputs"], f"{_THUMBNAILS}/{path.stem}.webp"):
            (self.output / name).unlink(missing_ok=True)

    def clear(self) -> None:
        """Remove what earlier calls with this output folder have written.

        Raises:
            NucleiError: the folder has files, but was not made by this class; the model cannot be
                loaded; a record cannot be read. Nothing is removed then.
        """
        if not self._read_manifest():
            if self.output.exists() and any(self.output.iterdir()):
                raise NucleiError(
                    f"{self.output} has no manifest.json, so its files are not of predict.py; name "
                    "another --output, or leave out --overwrite"
                )
            return
        _ = self.pipeline
        described = self._describe()
        files = (self.output / "records").glob("[!.]*.json")
        for file, record in [(file, _read_json(file)) for file in files]:
            self._remove(file, record)
        for path in (path for pattern in _FILES for path in self.output.glob(pattern)):
            if path.is_file():
                path.unlink(missing_ok=True)
        for folder in (folder for pattern in _EMPTIED for folder in self.output.glob(pattern)):
            with suppress(OSError):  # with files of others
                folder.rmdir()
        # Without it the folder is that of others.
        write_json(self._manifest, described, durable=True)

    @property
    def _manifest(self) -> Path:
        return self.output / "manifest.json"

    def _read_manifest(self) -> dict[str, Any] | None:
        """That of an earlier call; None without one."""
        # Looked at first: other processes write the manifest before they make these.
        taken = [path for name in _FOLDERS if (path := self.output / name).exists()]
        if self._manifest.exists():
            content = _read_json(self._manifest)
            if not (isinstance(content, dict) and content.keys() >= set(_PARTS)):
                raise NucleiError(f"{self._manifest} is not of predict.py; name another --output")
            return content
        if taken:
            raise NucleiError(f"{taken[0]} is not of predict.py; name another --output")
        return None

    def count_finished(self) -> int:
        """Images that are done or have failed, by whichever process."""
        return len(self.work.finished() & set(self.images))

    def run(self, first: int = 0) -> Iterator[Outcome]:
        """Do what is missing, together with other processes; returns when all is done.

        Args:
            first: index of the image to begin with.

        Yields:
            The images that this process did, and those that failed.

        Raises:
            NucleiError: the model cannot be loaded, or nothing can be written.
        """
        for name in self.work.todo(list(self.images), first):
            yield self._predict(name)
        self._sweep()

    def _sweep(self) -> None:
        """Remove what lost processes have left behind of images that are done."""
        folder = self.output / "work"
        with suppress(OSError):  # another process may do the same
            for path in folder.iterdir():
                with self.work.claim(path.name) as ours:  # else one may just begin it again
                    if ours and self.work.record_path(path.name).exists():
                        shutil.rmtree(path, ignore_errors=True)
            folder.rmdir()

    def _predict(self, name: str) -> Outcome:
        path = self.images[name]
        pipeline = self.pipeline
        start = time.perf_counter()
        try:
            record = self._write(pipeline, name)
        except Exception as error:  # whatever is wrong with one image, the others go on
            content = {"file": str(path), "reason": _reason(path, error)}
            self.work.fail(name, content)
            return Outcome(path, True, content)
        record["seconds"] = round(time.perf_counter() - start, 3)
        self.work.record(name, record)
        shutil.rmtree(self.output / "work" / name, ignore_errors=True)
        return Outcome(path, False, record)

    def _write(self, pipeline: NucleiPipeline, name: str) -> dict[str, Any]:
        """Predict and write one image, whose claim this process holds; returns its record."""
        folder = self.output / "work" / name
        source_file = identity(self.images[name])  # before it is read: it may change meanwhile
        with pipeline.open(self.images[name]) as source:
            # Tiles of another file or version lie in another folder, and are never found.
            digest = hashlib.sha256(json.dumps(source_file).encode()).hexdigest()
            nuclei, record = pipeline.find(source, folder / digest[:16])
            low, high = (record["contrast"][end] for end in ("low", "high"))
            info = ImageInfo(
                image_name(source.path),
                source.read,
                source.channels,
                pipeline.pixel_size_of(source),
                contrast=ContrastRange(low, high - low),
            )
            # Written aside: an interrupted writer leaves nothing among the results.
            written = write_outputs(folder / "outputs", name, nuclei, info, self.formats)
            thumbnail = folder / "outputs" / f"{name}.webp"
            write_thumbnail(thumbnail, nuclei, info)
        for path in (*written, thumbnail):  # a record promises that they are whole
            flush(path)
        for path in written:
            path.replace(self.output / path.name)
        (self.output / _THUMBNAILS).mkdir(exist_ok=True)
        thumbnail.replace(self.output / _THUMBNAILS / thumbnail.name)
        return {
            **record,
            **source_file,
            "outputs": [path.name for path in written],
            "thumbnail": f"{_THUMBNAILS}/{thumbnail.name}",
        }

    def summarize(self) -> dict[str, Any]:
        """Read what became of all images, write it to ``summary.json`` and, for people, to
        ``report.html``, and date the manifest.

        Returns:
            "images", "done", "failed", "nuclei" (counts), "failures" (list of "file" and
            "reason") and "warnings" (list of "file" and "warnings").
        """
        contents = {}
        for name in self.images:
            paths = (self.work.record_path(name), self.work.failure_path(name))
            content = next(filter(None, (_read_json(path, {}) for path in paths)), None)
            if content:
                contents[name] = content
        records = [content for content in contents.values() if "reason" not in content]
        failures = [content for content in contents.values() if "reason" in content]
        summary = {
            "images": len(self.images),
            "done": len(records),
            "failed": len(failures),
            "nuclei": sum(record["nuclei"] for record in records),
            "failures": failures,
            "warnings": [
                {key: record[key] for key in ("file", "warnings")}
                for record in records
                if record["warnings"]
            ],
        }
        write_json(self.output / "summary.json", summary)
        finished = datetime.now(timezone.utc)
        described = _read_json(self._manifest)
        write_overview(self.output, contents, described)
        seconds = (finished - datetime.fromisoformat(described["started"])).total_seconds()
        described |= {"finished": finished.isoformat(timespec="seconds"), "seconds": seconds}
        write_json(self._manifest, described, durable=True)
        return summary

    def _describe(self) -> dict[str, Any]:
        """The manifest: everything that the results depend on."""
        weights = self.cfg.MODEL.WEIGHTS
        local = PathManager.get_local_path(weights) if weights else None
        settings = {**asdict(self.options), "formats": self.formats}
        return manifest(
            local, yaml.safe_load(self.cfg.dump()), settings, datetime.now(timezone.utc)
        )

    def _compare(self, before: dict[str, Any], now: dict[str, Any]) -> None:
        old, new = (_flatten({part: content[part] for part in _PARTS}) for content in (before, now))
        for key in sorted(old.keys() | new.keys()):
            if old.get(key) != new.get(key) and key not in _FREE_KEYS:
                raise NucleiError(
                    f"{self.output} was begun with {key} = {old.get(key)!r}, now it is "
                    f"{new.get(key)!r}; name another --output, or add --overwrite to do all again"
                )


def _read_json(path: Path, missing: dict[str, Any] | None = None) -> dict[str, Any]:
    """The content of a file, or ``missing``, if that is given and there is no file."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        if missing is not None and isinstance(error, FileNotFoundError):
            return missing
        raise NucleiError(f"cannot read {path} ({error}); remove it") from error


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _reason(path: Path, error: Exception) -> str:
    """One line that names what to do, if anybody knows."""
    if isinstance(error, NucleiError):
        return str(error)
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return f"{path}: out of memory; use a smaller --tile, or save the image as a tiled TIFF"
    text = " ".join(str(error).split())
    return f"{path}: {type(error).__name__}: {text}"

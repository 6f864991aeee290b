import io
import json
import multiprocessing
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image
from pycocotools.coco import COCO

from nuclei_d2.data.datasets.accounting import accounting_table
from nuclei_d2.data.datasets.formats import list_dsb2018
from nuclei_d2.data.datasets.prepare import (
    Listing,
    NamedMask,
    Record,
    guess_modality,
    prepare,
    select_masks,
)
from nuclei_d2.data.datasets.sources import SourceFile
from nuclei_d2.data.image_io import read_label
from nuclei_d2.structures.cropped_mask import crop_mask
from nuclei_d2.utils.errors import NucleiError


@dataclass(frozen=True)
class Masks:
    """Picklable reader of masks given as strings of rows: "." is background."""

    pictures: tuple[str, ...]

    def __call__(self, height, width):
        return [NamedMask(f"m{k}", crop_mask(draw(p))) for k, p in enumerate(self.pictures)]


def draw(picture):
    return np.array([[c != "." for c in row] for row in picture.split()])


def record(folder, image_id, pictures=("xx.. ....",), split="train", **fields):
    folder.mkdir(exist_ok=True)
    Image.fromarray(np.arange(8, dtype=np.uint8).reshape(2, 4)).save(folder / f"{image_id}.png")
    source = SourceFile(str(folder), f"{image_id}.png")
    return Record(image_id, split, source, Masks(tuple(pictures)), **fields)


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def load(folder, name):
    return COCO(str(folder / "annotations" / f"{name}.json"))


@pytest.mark.parametrize(
    ("pixels", "expected"),
    [
        (np.array([10, 10, 10, 250]), "fluorescence"),
        (np.array([300, 310, 320, 4000]), "fluorescence"),
        (np.array([0.01, 0.02, 0.02, 0.9]), "fluorescence"),
        (np.array([230, 225, 228, 60]), "brightfield"),
        (np.array([3000, 3100, 3050, 500]), "brightfield"),
        (np.array([3, 3, 4, 4]), "fluorescence"),  # an empty field, far from full scale
    ],
)
def test_modality_of_grey_images(pixels, expected):
    image = pixels.reshape(2, 2, 1).astype(np.float32)
    assert guess_modality(image) == expected
    assert guess_modality(np.repeat(image, 3, axis=2)) == expected


@pytest.mark.parametrize("level", [300, 800, 2000, 9000])
def test_an_empty_16_bit_field_is_dark(level):
    noise = np.random.default_rng(0).normal(0, level**0.5, (64, 64, 1))
    field = np.rint(level + noise).astype(np.float32)
    assert guess_modality(field) == "fluorescence"
    field[:8, :8] *= 1.2  # a faint nucleus
    assert guess_modality(field) == "fluorescence"


@pytest.mark.parametrize("level", [800, 3000, 12000, 50000])
def test_dark_objects_on_a_bright_field_of_any_bit_depth(level):
    field = np.full((64, 64, 1), level, np.float32)
    field[:8, :8] *= 0.6
    assert guess_modality(field) == "brightfield"
    assert guess_modality(field * np.float32((1, 0.8, 0.9))) == "histology"


def test_modality_of_coloured_images():
    stained = np.full((4, 4, 3), (220, 160, 200), np.float32)
    assert guess_modality(stained) == "histology"
    blue = np.zeros((4, 4, 3), np.float32)
    blue[0, 0, 2] = 200
    assert guess_modality(blue) == "fluorescence"


def test_every_dropped_mask_has_its_reason():
    pictures = [
        "xxx. xx..",  # 0: large; keeps what 1 and 4 leave
        "xx.. ....",  # 1
        ".... ....",  # 2: empty
        "xx.. ....",  # 3: duplicate of 1
        ".... x...",  # 4
        ".xx. ....",  # 5: as large as 1, later: keeps one pixel
        "xx.. x...",  # 6: covered by 1 and 4
    ]
    labels, kept, dropped = select_masks(Masks(tuple(pictures))(2, 4), (2, 4))
    assert kept == [0, 1, 4, 5]
    assert labels.tolist() == [[2, 2, 4, 0], [3, 1, 0, 0]]
    assert dropped == [
        {"mask": "m2", "reason": "empty"},
        {"mask": "m3", "reason": "duplicate", "of": "m1"},
        {"mask": "m6", "reason": "wholly hidden"},
    ]


def test_labels_follow_the_annotations_and_the_accounting_adds_up(tmp_path):
    records = [
        record(tmp_path / "in", "b", ["xx.. xx..", ".... ....", ".x.. ....", "...x x..."]),
        record(tmp_path / "in", "a", [], split="val", modality="histology"),
        record(tmp_path / "in", "c", ["xx.. ...."], split="val"),
    ]
    report = prepare(Listing(records, {"x.png": "no masks"}), "set", root=tmp_path, progress=False)
    folder = tmp_path / "set"
    api = load(folder, "set_train")
    (image,) = api.dataset["images"]
    assert image == {
        "id": 2,
        "file_name": "images/b.png",
        "height": 2,
        "width": 4,
        "label_file_name": "labels/b.png",
        "modality": "fluorescence",
        "overlaps": True,
    }
    masks = [api.annToMask(a) for a in api.dataset["annotations"]]
    assert [m.tolist() for m in masks] == [
        [[1, 1, 0, 0], [1, 1, 0, 0]],
        [[0, 1, 0, 0], [0, 0, 0, 0]],
        [[0, 0, 0, 1], [1, 0, 0, 0]],
    ]
    labels = Image.open(folder / "labels/b.png")
    assert labels.mode == "I;16"
    assert np.array(labels).tolist() == [[1, 2, 0, 3], [3, 1, 0, 0]]
    assert (folder / "images/b.png").read_bytes() == (tmp_path / "in/b.png").read_bytes()
    assert [i["modality"] for i in load(folder, "set_val").dataset["images"]] == [
        "histology",
        "fluorescence",
    ]
    assert json.loads((folder / "preparation.json").read_text()) == {"runs": [report]}
    assert report["masks_found"] == 5
    assert report["masks_kept"] == 4
    assert report["masks_dropped"] == {"empty": 1}
    assert report["masks_noted"] == {"overlapping": 3, "disconnected fragments": 1}
    assert report["dropped"] == [{"image_id": "b", "mask": "m1", "reason": "empty"}]
    assert report["skipped"] == [{"file": "x.png", "reason": "no masks"}]
    assert report["images_without_nuclei"] == 1
    assert report["splits"]["val"] == {
        "images": 2,
        "nuclei": 1,
        "modalities": {
            "histology": {"images": 1, "nuclei": 0},
            "fluorescence": {"images": 1, "nuclei": 1},
        },
    }
    table = accounting_table(report)
    assert "+ dropped: empty" in table
    assert "no image in test" in table


def test_binary_masks_are_suspected(tmp_path):
    whole, pieces = ["xx.. xx.."], ["x..x ...."]
    for name, pictures, suspected in (("a", pieces, True), ("b", whole, False)):
        records = [record(tmp_path / name, f"i{k}", pictures) for k in range(2)]
        report = prepare(Listing(records), name, root=tmp_path, workers=1, progress=False)
        assert ("are the labels binary masks?" in accounting_table(report)) == suspected


def test_second_run_and_other_worker_counts_give_the_same_bytes(tmp_path):
    records = [record(tmp_path / "in", f"i{k}", ["x... ....", ".x.. ...."]) for k in range(6)]
    for root, workers in (("one", 1), ("two", 2)):
        prepare(Listing(records), "set", root=tmp_path / root, workers=workers, progress=False)
    once = contents(tmp_path / "one")
    assert len(once) == 6 + 6 + 2
    assert contents(tmp_path / "two") == once
    prepare(Listing(records[::-1]), "set", root=tmp_path / "one", workers=1, progress=False)
    assert contents(tmp_path / "one") == once


def test_modalities_have_names_of_their_own(tmp_path):
    records = [
        record(tmp_path / "in", "a", modality="fluorescence"),
        record(tmp_path / "in", "b", modality="histology", split="test"),
    ]
    prepare(Listing(records), "set", root=tmp_path, by_modality=True, progress=False)
    folder = tmp_path / "set"
    sizes = {p.stem: len(load(folder, p.stem).imgs) for p in (folder / "annotations").iterdir()}
    assert sizes == {
        "set_train": 1,
        "set_test": 1,
        "set_fluorescence_train": 1,
        "set_histology_test": 1,
    }


def test_one_modality_prepares_nothing_else(tmp_path):
    records = [record(tmp_path / "in", k, modality=m) for k, m in (("a", "x"), ("b", "y"))]
    options = {"root": tmp_path, "by_modality": True, "progress": False}
    prepare(Listing(records), "set", modality="y", **options)
    assert set(contents(tmp_path / "set")) == {
        Path("images/b.png"),
        Path("labels/b.png"),
        Path("annotations/set_y_train.json"),
        Path("preparation.json"),
    }
    with pytest.raises(NucleiError, match="no z image among the 2"):
        prepare(Listing(records), "set", modality="z", **options)


def test_parts_under_one_name_stand_side_by_side(tmp_path):
    options = {"root": tmp_path, "progress": False}
    parts = {
        split: Listing([record(tmp_path / "in", image_id, split=split)])
        for image_id, split in (("a", "train"), ("b", "test"))
    }
    unrelated = tmp_path / "set/annotations/subset.json"
    unrelated.parent.mkdir(parents=True)
    unrelated.write_text("mine")
    for split, part in parts.items():
        prepare(part, "set", split_rule=f"all to {split}", **options)
    once = contents(tmp_path / "set")
    assert {path.name for path in once} == {
        *("a.png", "b.png", "set_train.json", "set_test.json"),
        *("subset.json", "preparation.json"),
    }
    runs = json.loads(once[Path("preparation.json")])["runs"]
    assert [run["annotations"] for run in runs] == [["set_test"], ["set_train"]]
    assert [run["split_rule"] for run in runs] == ["all to test", "all to train"]
    prepare(parts["train"], "set", split_rule="all to train", **options)  # again
    assert contents(tmp_path / "set") == once


def test_a_replaced_split_leaves_the_accounting(tmp_path):
    options = {"root": tmp_path, "progress": False}
    records = [record(tmp_path / "in", k, split=s) for k, s in (("a", "train"), ("b", "val"))]
    prepare(Listing(records), "set", **options)
    prepare(Listing([record(tmp_path / "in", "c")]), "set", **options)
    runs = json.loads((tmp_path / "set/preparation.json").read_text())["runs"]
    assert [run["annotations"] for run in runs] == [["set_train"], ["set_val"]]
    assert [run["images"] for run in runs] == [1, 2]
    prepare(Listing([replace(r, split="val") for r in records[1:]]), "set", **options)
    runs = json.loads((tmp_path / "set/preparation.json").read_text())["runs"]
    assert [run["images"] for run in runs] == [1, 1]


@pytest.mark.parametrize("image_id", ["a", "A"])
def test_no_image_gets_into_two_splits(tmp_path, image_id):
    options = {"root": tmp_path, "split_rule": "same", "progress": False}
    prepare(Listing([record(tmp_path / "in", "a"), record(tmp_path / "in", "b")]), "set", **options)
    before = contents(tmp_path / "set")
    moved = Listing([record(tmp_path / "other", image_id, ["...x ...x"], split="val")])
    with pytest.raises(NucleiError, match=r"image a .*set_train\.json.*another name") as caught:
        prepare(moved, "set", **options)
    assert "\n" not in str(caught.value)
    assert contents(tmp_path / "set") == before
    (tmp_path / "set/annotations/set_train.json").unlink()
    prepare(moved, "set", **options)
    runs = json.loads((tmp_path / "set/preparation.json").read_text())["runs"]
    assert [run["annotations"] for run in runs] == [["set_val"]]


def test_another_split_of_all_images_replaces_the_first(tmp_path):
    options = {"root": tmp_path, "progress": False}
    splits = {"a": "train", "b": "val"}
    for _ in range(2):
        records = [record(tmp_path / "in", k, split=split) for k, split in splits.items()]
        prepare(Listing(records), "set", **options)
        for name, split in splits.items():
            (image,) = load(tmp_path / "set", f"set_{split}").dataset["images"]
            assert image["file_name"] == f"images/{name}.png"
        splits = {"a": "val", "b": "train"}


@pytest.mark.parametrize("image_id", ["", ".hidden", "..", "a/b", "a\\b", "C:x", "a\nb", "x" * 201])
def test_ids_that_are_no_file_names(tmp_path, image_id):
    bad = replace(record(tmp_path / "in", "a"), image_id=image_id)
    with pytest.raises(NucleiError, match="cannot be a file name"):
        prepare(Listing([bad]), "set", root=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_ids_that_differ_by_case_only(tmp_path):
    records = [record(tmp_path / "in", "a"), record(tmp_path / "in2", "A")]
    with pytest.raises(NucleiError, match=r"in2/A\.png and .*in/a\.png have the same id"):
        prepare(Listing(records), "set", root=tmp_path)


def test_nothing_to_prepare(tmp_path):
    with pytest.raises(NucleiError, match="no annotated image"):
        prepare(Listing([]), "set", root=tmp_path)


@pytest.mark.parametrize("workers", [1, 2])
def test_broken_image_stops_the_run_and_a_repaired_one_can_be_run_again(tmp_path, workers):
    records = [record(tmp_path / "in", f"i{k}") for k in range(4)]
    good = (tmp_path / "in/i2.png").read_bytes()
    (tmp_path / "in/i2.png").write_bytes(good[:50])
    options = {"root": tmp_path / "out", "workers": workers, "progress": False}
    with pytest.raises(NucleiError, match=r"in/i2\.png") as caught:
        prepare(Listing(records), "set", **options)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out/set/annotations").exists()
    (tmp_path / "in/i2.png").write_bytes(good)
    assert prepare(Listing(records), "set", **options)["images"] == 4


@dataclass(frozen=True)
class Dies:
    def __call__(self, height, width):
        os._exit(1)


def test_killed_worker_is_one_line(tmp_path):
    records = [record(tmp_path / "in", f"i{k}") for k in range(3)]
    records[1] = replace(records[1], read_masks=Dies())
    with pytest.raises(NucleiError, match="a worker was killed"):
        prepare(Listing(records), "set", root=tmp_path, workers=2, progress=False)


@dataclass(frozen=True)
class Slow:
    """Writes its process id and waits."""

    folder: str

    def __call__(self, height, width):
        Path(self.folder, str(os.getpid())).touch()
        time.sleep(60)


def test_workers_go_when_the_run_is_killed(tmp_path):
    pids = tmp_path / "pids"
    pids.mkdir()
    records = [
        replace(record(tmp_path / "in", f"i{k}"), read_masks=Slow(str(pids))) for k in range(2)
    ]
    options = {"root": tmp_path, "workers": 2, "progress": False}
    run = multiprocessing.get_context("fork").Process(
        target=prepare, args=(Listing(records), "set"), kwargs=options
    )
    run.start()
    wait_for(lambda: len(list(pids.iterdir())) == 2)
    run.kill()
    run.join()
    wait_for(lambda: not any(is_running(int(path.name)) for path in pids.iterdir()))


def wait_for(condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def is_running(pid):
    # A zombie, which nobody may be there to reap, has ended.
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_output_that_cannot_be_written(tmp_path):
    (tmp_path / "set/images/a.png").mkdir(parents=True)
    with pytest.raises(NucleiError, match=r"cannot write .*set/images/a\.png"):
        prepare(Listing([record(tmp_path / "in", "a")]), "set", root=tmp_path, progress=False)


@pytest.mark.skipif("NUCLEI_DSB2018" not in os.environ, reason="needs NUCLEI_DSB2018=<zip>")
def test_real_dsb2018_pixel_for_pixel(tmp_path):
    """664 images, 28,986 masks; every RLE is its mask file, every label the visible part."""
    listing = list_dsb2018([os.environ["NUCLEI_DSB2018"]])
    report = prepare(listing, "dsb2018", root=tmp_path, by_modality=True, progress=False)
    assert report["images"] == 664
    assert report["masks_found"] == 28986
    assert report["masks_found"] == report["masks_kept"] + len(report["dropped"])
    kinds = [split["modalities"]["fluorescence"]["images"] for split in report["splits"].values()]
    assert sum(kinds) == 541
    dropped = {(entry["image_id"], entry["mask"]) for entry in report["dropped"]}
    records = {record.image_id: record for record in listing.records}
    folder, compared = tmp_path / "dsb2018", 0
    for split in ("train", "val", "test"):
        api = load(folder, f"dsb2018_{split}")
        for image in api.dataset["images"]:
            image_id = Path(image["file_name"]).stem
            files = records[image_id].read_masks.keywords["files"]
            files = [f for f in files if (image_id, f.path.name) not in dropped]
            annotations = api.imgToAnns[image["id"]]
            labels = read_label(folder / image["label_file_name"])
            union = np.zeros(labels.shape, bool)
            for k, (file, annotation) in enumerate(zip(files, annotations, strict=True), start=1):
                mask = np.asarray(Image.open(io.BytesIO(file.read_bytes()))) > 0
                assert (api.annToMask(annotation) == mask).all()
                seen = labels == k
                assert seen.any()
                assert (mask[seen]).all()
                assert image["overlaps"] or (seen == mask).all()
                union |= mask
                compared += 1
            assert ((labels > 0) == union).all()
    assert compared == report["masks_kept"]

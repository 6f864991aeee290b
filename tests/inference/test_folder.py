import json
import os
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image
from tiny import CONFIGS, draw_nuclei

from nuclei_d2.config import load_config
from nuclei_d2.inference import FolderPrediction, NucleiPipeline, PredictionOptions
from nuclei_d2.inference.work import SharedWork
from nuclei_d2.inference.writers import FORMATS
from nuclei_d2.utils.errors import NucleiError


@pytest.fixture
def images(tmp_path):
    """Four good images, two of them with one stem, and a broken one."""
    folder = tmp_path / "in"
    folder.mkdir()
    for k, name in enumerate(["a.png", "a.tif", "b.png", "c.png"]):
        pixels, _ = draw_nuclei(np.random.default_rng(k), (64, 80), 6)
        Image.fromarray(pixels).save(folder / name)
    (folder / "broken.png").write_bytes(b"no image")
    return sorted(folder.iterdir())


def prediction(images, tmp_path, formats=("labels", "csv"), opts=(), **options):
    cfg = load_config(str(CONFIGS / "classical.yaml"), ["MODEL.DEVICE", "cpu", *opts])
    return FolderPrediction(cfg, PredictionOptions(**options), images, tmp_path / "out", formats)


def run(folder):
    folder.prepare()
    return list(folder.run())


def test_every_image_gets_its_results_and_the_broken_one_a_reason(images, tmp_path):
    folder = prediction(images, tmp_path)
    outcomes = run(folder)
    assert [outcome.path.name for outcome in outcomes if outcome.failed] == ["broken.png"]
    out = tmp_path / "out"
    names = {"a", "a_2", "b", "c"}
    assert {p.name for p in out.glob("*_labels.tif")} == {f"{n}_labels.tif" for n in names}
    assert {p.name for p in out.glob("*.csv")} == {f"{n}.csv" for n in names}
    assert {p.stem for p in (out / "records").iterdir()} == names
    for name in names:
        record = json.loads((out / "records" / f"{name}.json").read_text())
        labels = tifffile.imread(out / f"{name}_labels.tif")
        assert record["nuclei"] == labels.max() > 0
        assert record["outputs"] == [f"{name}_labels.tif", f"{name}.csv"]
        assert len((out / f"{name}.csv").read_text().splitlines()) == record["nuclei"] + 1
    summary = folder.summarize()
    assert (summary["images"], summary["done"], summary["failed"]) == (5, 4, 1)
    (failure,) = summary["failures"]
    assert "not a PNG" in failure["reason"]
    assert summary == json.loads((out / "summary.json").read_text())
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["settings"]["formats"] == ["labels", "csv"]
    assert manifest["model"] == {"file": None, "sha256": None}
    assert manifest["finished"] >= manifest["started"]
    assert list((out / "claims").iterdir()) == []
    assert not (out / "work" / "a").exists()
    assert not [p for p in out.rglob("*") if "tmp" in p.name]


def test_a_second_call_does_what_is_missing(images, tmp_path):
    run(prediction(images, tmp_path))
    (tmp_path / "out" / "records" / "b.json").unlink()
    Image.fromarray(np.zeros((20, 20), np.uint8)).save(tmp_path / "in" / "broken.png")
    outcomes = run(prediction(images, tmp_path))
    assert [outcome.path.name for outcome in outcomes] == ["b.png", "broken.png"]
    assert not any(outcome.failed for outcome in outcomes)
    assert prediction(images, tmp_path).output.joinpath("failures").exists()
    assert list((tmp_path / "out" / "failures").iterdir()) == []
    assert run(prediction(images, tmp_path)) == []


def test_a_changed_image_is_done_again(images, tmp_path):
    run(prediction(images, tmp_path))
    b, c = tmp_path / "in" / "b.png", tmp_path / "in" / "c.png"
    Image.fromarray(np.zeros((20, 20), np.uint8)).save(b)
    c.write_bytes(c.read_bytes()[:100] + b"no image" + c.read_bytes()[108:])  # of the same size
    folder = prediction(images, tmp_path)
    assert folder.prepare() == [b, c]
    results = ("a.csv", "b.csv", "b_labels.tif", "records/b.json", "report/b.webp")
    assert [(folder.output / name).exists() for name in results] == [True, *[False] * 4]
    failed = {outcome.path.name: outcome.failed for outcome in folder.run()}
    assert failed == {"b.png": False, "broken.png": True, "c.png": True}
    assert tifffile.imread(folder.output / "b_labels.tif").shape == (20, 20)
    record = json.loads((folder.output / "records" / "b.json").read_text())
    assert record["file_bytes"] == b.stat().st_size
    assert record["file_mtime_ns"] // 1000 == b.stat().st_mtime_ns // 1000
    assert prediction(images, tmp_path).prepare() == []


def test_a_changed_image_that_another_process_does_again_is_left_to_it(images, tmp_path):
    run(prediction(images[:1], tmp_path))
    other = SharedWork(tmp_path / "out")
    record = json.loads(other.record_path("a").read_text())
    os.utime(images[0], (1, 1))
    answers = []
    with other.claim("a"):
        folder = prediction(images[:1], tmp_path)
        thread = threading.Thread(target=lambda: answers.append(folder.prepare()))
        thread.start()
        thread.join(0.5)
        assert thread.is_alive()
        other.record("a", {**record, "file_mtime_ns": 10**9})
    thread.join(60)
    assert answers == [[]]
    assert other.is_finished("a")
    assert (tmp_path / "out" / "a_labels.tif").exists()


@pytest.mark.parametrize(("other", "looked_at"), [("", 1), ("version", 2), ("file", 2)])
def test_tiles_of_another_image_are_not_used(images, tmp_path, monkeypatch, other, looked_at):
    find = NucleiPipeline._find_in_tile
    tiles = []

    def stop_at_second(pipeline, image, grid, tile, inputs):
        tiles.append(tile)
        if len(tiles) == 2:
            raise KeyboardInterrupt
        return find(pipeline, image, grid, tile, inputs)

    monkeypatch.setattr(NucleiPipeline, "_find_in_tile", stop_at_second)
    with pytest.raises(KeyboardInterrupt):
        run(prediction(images[:1], tmp_path, tile=64, overlap=0))
    image = images[0]
    if other == "version":
        os.utime(image, (1, 1))
    if other == "file":
        image = tmp_path / image.name
        shutil.copy2(images[0], image)
    run(prediction([image], tmp_path, tile=64, overlap=0))
    assert len(tiles) == 2 + looked_at
    assert not (tmp_path / "out" / "work" / "a").exists()


def test_a_writer_that_is_interrupted_leaves_nothing_among_the_results(
    images, tmp_path, monkeypatch
):
    from nuclei_d2.inference import folder as module

    def write_half(folder, stem, nuclei, image, formats):
        (folder / f"{stem}_labels.tif").parent.mkdir(parents=True, exist_ok=True)
        (folder / f"{stem}_labels.tif").write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_outputs", write_half)
        with pytest.raises(KeyboardInterrupt):
            run(prediction(images, tmp_path))
    out = tmp_path / "out"
    assert {p.name for p in out.iterdir() if p.is_file()} == {"manifest.json"}
    assert list((out / "claims").iterdir()) == []
    assert len(run(prediction(images, tmp_path))) == 5
    assert tifffile.imread(out / "a_labels.tif").shape == (64, 80)
    assert not (out / "work" / "a").exists()


def test_results_are_on_the_disk_before_the_record_is(images, tmp_path, monkeypatch):
    synced = []

    def sync(number):
        synced.append((os.fstat(number).st_ino, (tmp_path / "out/records/a.json").exists()))

    monkeypatch.setattr("os.fsync", sync)
    run(prediction(images[:1], tmp_path))
    names = "manifest.json", "a_labels.tif", "a.csv", "report/a.webp", "records/a.json"
    assert synced == [((tmp_path / "out" / name).stat().st_ino, False) for name in names]


def test_a_name_that_is_no_utf8_stops_nothing(images, tmp_path):
    image = tmp_path / os.fsdecode(b"caf\xe9.png")
    try:
        shutil.copy(images[0], image)
    except OSError:
        pytest.skip("this file system has no such names")
    folder = prediction([image], tmp_path, formats=FORMATS)
    (outcome,) = run(folder)
    assert not outcome.failed, outcome.content
    assert folder.summarize()["done"] == 1
    assert len(list(folder.output.glob("caf*"))) == len(FORMATS)
    assert (folder.output / "report.html").exists()
    assert run(prediction([image], tmp_path, formats=FORMATS)) == []


def test_the_picture_has_the_contrast_of_the_network(images, tmp_path):
    opts = ("INPUT.NOISE_FLOOR", "0.0", "INPUT.MIN_LEVELS", "1e9")  # everything is black
    run(prediction(images[:1], tmp_path, formats=("overlay",), opts=opts))
    for name in ("a_overlay.png", "report/a.webp"):
        with Image.open(tmp_path / "out" / name) as file:
            assert np.array(file).max() <= 2


def test_whatever_goes_wrong_with_one_image_the_others_go_on(images, tmp_path, monkeypatch):
    folder = prediction(images[:3], tmp_path)
    folder.prepare()
    find = type(folder.pipeline).find

    def fail(pipeline, source, tiles):
        if source.path.name == "a.png":
            raise MemoryError
        if source.path.name == "a.tif":
            raise RuntimeError("first line\nsecond line")
        return find(pipeline, source, tiles)

    monkeypatch.setattr(type(folder.pipeline), "find", fail)
    reasons = {o.path.name: o.content.get("reason") for o in folder.run()}
    assert "smaller --tile" in reasons["a.png"]
    assert reasons["a.tif"].endswith("a.tif: RuntimeError: first line second line")
    assert reasons["b.png"] is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tta": True}, r"settings\.tta = False, now it is True"),
        ({"formats": ("labels",)}, r"settings\.formats"),
        ({"opts": ("MODEL.CLASSICAL.SIGMA", "2")}, r"config\.MODEL\.CLASSICAL\.SIGMA = 1.0"),
    ],
)
def test_other_settings_are_refused(images, tmp_path, changes, message):
    run(prediction(images[:1], tmp_path))
    with pytest.raises(NucleiError, match=message) as error:
        prediction(images, tmp_path, **changes).prepare()
    assert "--overwrite" in str(error.value)
    prediction(images, tmp_path, opts=("OUTPUT_DIR", "elsewhere")).prepare()


def test_overwrite_removes_what_was_written_and_nothing_else(images, tmp_path):
    run(prediction(images, tmp_path))
    names = ("notes.txt", "report/notes.txt", "work/mine/tiles/notes.txt", "work/notes.txt")
    notes = [tmp_path / "out" / name for name in names]
    for path in notes:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    tiles = tmp_path / "out" / "work" / "a" / "0123"
    tiles.mkdir(parents=True)
    for half in (tmp_path / "out/records/.a.1.tmp.json", tiles / ".scale.1.tmp.json"):
        half.write_text("{")  # of a killed process
    (tiles / "scale.json").write_text("{}")
    folder = prediction(images[:1], tmp_path, formats=("labels",), tta=True)
    folder.clear()
    left = sorted(p for p in (tmp_path / "out").rglob("*") if p.is_file())
    assert left == [tmp_path / "out" / "manifest.json", *notes]
    assert len(run(folder)) == 1


def test_a_folder_of_others_is_left_alone(images, tmp_path):
    folder = prediction(images, tmp_path)
    folder.output.mkdir()
    (folder.output / "notes.txt").write_text("mine")
    with pytest.raises(NucleiError, match=r"has no manifest.json.*another --output"):
        folder.clear()
    mine = folder.output / "work" / "a" / "notes.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    for refuse in (folder.clear, folder.prepare):  # without --overwrite work/a would go, too
        with pytest.raises(NucleiError, match=r"out/work is not of predict.py.*another --output"):
            refuse()
    (folder.output / "manifest.json").write_text('{"name": "my web page"}')
    for refuse in (folder.clear, folder.prepare):
        with pytest.raises(NucleiError, match=r"manifest.json is not of predict.py"):
            refuse()
    assert mine.read_text() == "mine"


def test_there_may_be_nothing_to_overwrite(images, tmp_path):
    folder = prediction(images[:1], tmp_path)
    folder.clear()
    folder.output.mkdir()
    folder.clear()
    assert len(run(folder)) == 1


@pytest.mark.parametrize("time", [1, 2])
def test_another_image_of_the_same_name_is_no_repetition(images, tmp_path, time, monkeypatch):
    first, second = (tmp_path / name / "images" / "a.png" for name in ("exp1", "exp2"))
    for path in (first, second):
        path.parent.mkdir(parents=True)
        path.write_bytes(images[0].read_bytes())
        os.utime(path, (1, 1))
    monkeypatch.chdir(first.parent)
    run(prediction([Path("a.png")], tmp_path))
    os.utime(second, (time, time))
    with pytest.raises(NucleiError, match=rf"is of {first}, not of {second}; name another --out"):
        prediction([second], tmp_path).prepare()
    first.unlink()  # too little is alike for a folder that was moved
    with pytest.raises(NucleiError, match="name another --output"):
        prediction([second], tmp_path).prepare()
    assert len(list(tmp_path.glob("out/*_labels.tif"))) == 1


def test_an_image_is_the_same_however_it_is_named(images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path / "in")
    run(prediction([Path("a.png")], tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("in")
    for name in ("in/a.png", "in/../in/a.png", "link/a.png", images[0]):
        assert run(prediction([Path(name)], tmp_path)) == []
    os.utime(images[0], (1, 1))
    assert prediction([Path("link/a.png")], tmp_path).prepare() == [Path("link/a.png")]


def test_a_folder_that_was_moved_is_known_by_its_versions_and_names(images, tmp_path):
    image = tmp_path / "disk" / "exp" / "in" / "a.png"
    image.parent.mkdir(parents=True)
    image.write_bytes(images[0].read_bytes())
    run(prediction([image], tmp_path))
    shutil.copytree(tmp_path / "disk", tmp_path / "copy")
    moved = tmp_path / "copy" / "exp" / "in" / "a.png"
    with pytest.raises(NucleiError, match="name another --output"):  # both are there
        prediction([moved], tmp_path).prepare()
    image.unlink()
    assert run(prediction([moved], tmp_path)) == []
    os.utime(moved, (1, 1))
    with pytest.raises(NucleiError, match="name another --output"):
        prediction([moved], tmp_path).prepare()


def test_a_file_is_the_same_behind_another_path(images, tmp_path):
    run(prediction(images[:1], tmp_path))
    elsewhere = tmp_path / "mounted" / "there" / "a.png"
    elsewhere.parent.mkdir(parents=True)
    elsewhere.hardlink_to(images[0])
    assert run(prediction([elsewhere], tmp_path)) == []


def test_a_format_that_is_given_twice_is_written_once(images, tmp_path):
    (outcome,) = run(prediction(images[:1], tmp_path, formats=("csv", "labels", "csv")))
    assert not outcome.failed
    assert outcome.content["outputs"] == ["a.csv", "a_labels.tif"]


def test_a_folder_that_cannot_be_the_output(images, tmp_path):
    with pytest.raises(NucleiError, match="where the images lie"):
        FolderPrediction(None, None, images, tmp_path / "in", ["labels"])
    with pytest.raises(NucleiError, match="is a file"):
        FolderPrediction(None, None, images, images[0], ["labels"])
    with pytest.raises(NucleiError, match="no output format 'label'"):
        FolderPrediction(None, None, images, tmp_path / "out", ["label"])


def test_a_model_that_cannot_be_loaded_leaves_no_folder(images, tmp_path):
    cfg = load_config(str(CONFIGS / "unet.yaml"), ["MODEL.DEVICE", "cpu"])
    with pytest.raises(NucleiError, match="WEIGHTS"):
        FolderPrediction(cfg, PredictionOptions(), images, tmp_path / "out", ["labels"]).prepare()
    assert not (tmp_path / "out").exists()


def test_the_pixel_size_that_is_given_goes_to_the_table(images, tmp_path):
    opts = ("INPUT.PIXEL_SIZE", "0.5")
    run(prediction(images[:1], tmp_path, opts=opts, pixel_size=0.5))
    header = (tmp_path / "out" / "a.csv").read_text().splitlines()[0]
    assert "area_um2" in header.split(",")

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

REPOSITORY = Path(__file__).parents[2]
SCRIPTS = sorted((REPOSITORY / "datasets").glob("prepare_*.py"))

GREY = np.array([[0, 90, 0], [7, 0, 0]], np.uint8)
LABELS = np.array([[4, 4, 0], [0, 0, 9]], np.uint16)


def run_script(name, *arguments, root):
    """As a user runs it."""
    return subprocess.run(
        [sys.executable, str(REPOSITORY / "datasets" / name), *map(str, arguments)],
        env={
            **os.environ,
            "PYTHONPATH": str(REPOSITORY),
            "DETECTRON2_DATASETS": str(root),
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def call_script(monkeypatch, name, *arguments):
    """In this process, since importing the package takes seconds."""
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    runpy.run_path(str(REPOSITORY / "datasets" / name), run_name="__main__")


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".tif":
        tifffile.imwrite(path, array)
    else:
        Image.fromarray(array).save(path)


def dsb2018(folder):
    for image_id in ("i0", "i2", "i15"):  # folds 6, 0, 1
        save(folder / image_id / "images/x.png", GREY)
        save(folder / image_id / "masks/a.png", np.uint8(255 * (LABELS == 4)))
        save(folder / image_id / "masks/b.png", np.uint8(255 * (LABELS == 9)))
    return [folder]


def bbbc039(folder):
    (folder / "metadata").mkdir(parents=True)
    for name, split in (("a", "training"), ("b", "validation"), ("c", "test")):
        save(folder / f"images/{name}.tif", GREY)
        save(folder / f"masks/{name}.png", np.dstack([np.uint8(LABELS), GREY, GREY]))
        (folder / f"metadata/{split}.txt").write_text(f"{name}.png\n")
    return [folder]


def s_bsst265(folder):
    rows = ["Image_Name;Train-/Testset split"]
    for name, split in (("i0", "train"), ("i15", "train"), ("t", "test")):
        save(folder / f"rawimages/{name}.tif", GREY)
        save(folder / f"groundtruth/{name}.tif", LABELS)
        rows.append(f"{name};{split}")
    (folder / "image_description.csv").write_text("\n".join(rows))
    return [folder]


def nuinsseg(folder):
    for name in ("i0", "i2", "i15"):
        save(folder / f"human lung/tissue images/{name}.png", np.dstack([GREY] * 3))
        save(folder / f"human lung/label masks/{name}.tif", LABELS)
    return [folder]


def folder(folder):
    for name in ("i0", "i2", "i15"):
        save(folder / f"images/{name}.tif", GREY)
        save(folder / f"labels/{name}.tif", LABELS)
    return [folder / "images", folder / "labels", "--name", "folder"]


def coco(folder):
    images, annotations = [], []
    for name in ("i0", "i2", "i15"):
        save(folder / f"images/{name}.png", GREY)
        number = len(images) + 1
        images.append({"id": number, "file_name": f"{name}.png", "height": 2, "width": 3})
        for polygon in ([0, 0, 2, 0, 2, 1, 0, 1], [2, 1, 3, 1, 3, 2, 2, 2]):
            entry = {"id": len(annotations) + 1, "image_id": number, "category_id": 5}
            annotations.append(entry | {"segmentation": [polygon]})
    categories = [{"id": 5, "name": "cell"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "a.json").write_text(json.dumps(content))
    return [folder / "a.json", folder / "images", "--name", "coco"]


MAKERS = {
    f"prepare_{maker.__name__}.py": maker
    for maker in (dsb2018, bbbc039, s_bsst265, nuinsseg, folder, coco)
}


def test_every_script_is_tested():
    assert [path.name for path in SCRIPTS] == sorted(MAKERS)


@pytest.mark.parametrize("name", MAKERS)
def test_script_writes_every_split(tmp_path, monkeypatch, capsys, name):
    arguments = MAKERS[name](tmp_path / "in")
    call_script(monkeypatch, name, *arguments, "--root", tmp_path / "out", "--workers", 1)
    dataset = name.removeprefix("prepare_").removesuffix(".py")
    annotations = tmp_path / "out" / dataset / "annotations"
    for split in ("train", "val", "test"):
        content = json.loads((annotations / f"{dataset}_{split}.json").read_text())
        assert len(content["images"]) == 1
        assert [a["area"] for a in content["annotations"]] == [2, 1]
        assert content["categories"] == [{"id": 1, "name": "nucleus"}]
    printed = capsys.readouterr().out
    assert "found" in printed
    assert str(tmp_path / "out" / dataset) in printed


def test_dsb2018_as_a_user_runs_it(tmp_path):
    (source,) = dsb2018(tmp_path / "in")
    done = run_script("prepare_dsb2018.py", source, "--modality", "fluorescence", root=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "3/3" in done.stderr  # the progress bar
    names = {path.stem for path in (tmp_path / "dsb2018/annotations").iterdir()}
    assert names == {f"dsb2018_fluorescence_{split}" for split in ("train", "val", "test")}


def test_a_mistake_is_one_line_and_a_failure(tmp_path):
    (source,) = dsb2018(tmp_path / "in")
    path = source / "i0/masks/b.png"
    path.write_bytes(path.read_bytes()[:30])
    done = run_script("prepare_dsb2018.py", source, root=tmp_path)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert str(path) in line
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing", "missing", "--name", "x"], "no folder or zip missing"),
        (["images", "labels", "--name", "../x"], "'../x' cannot be a file name"),
        (["images", "labels", "--name", "x", "--split", "1/1/1"], "--split is '1/1/1'"),
        (["images", "labels", "--name", "dsb2018"], "dsb2018 is a known data set; choose another"),
        (["images", "labels", "--name", "DSB2018"], "DSB2018 is a known data set"),
        (["images", "labels", "--name", "dsb2018_histology"], "is a known data set"),
        (["images", "labels", "--name", "synthetic"], "is a known data set"),
        (["images", "labels", "--name", "x", "--workers", "0"], "--workers is 0"),
    ],
)
def test_mistakes_in_the_arguments(tmp_path, monkeypatch, capsys, arguments, message):
    folder(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DETECTRON2_DATASETS", raising=False)
    with pytest.raises(SystemExit) as caught:
        call_script(monkeypatch, "prepare_folder.py", *arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_all_to_one_split(tmp_path, monkeypatch, capsys):
    arguments = [*folder(tmp_path / "in"), "--all-to", "test", "--modality", "histology"]
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    call_script(monkeypatch, "prepare_folder.py", *arguments)
    (path,) = (tmp_path / "folder/annotations").iterdir()
    assert path.name == "folder_test.json"
    images = json.loads(path.read_text())["images"]
    assert [image["modality"] for image in images] == ["histology"] * 3
    assert "no image in train, val" in capsys.readouterr().out

import hashlib
import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image
from pycocotools.coco import COCO

from nuclei_d2.data.datasets.formats import (
    list_bbbc039,
    list_coco,
    list_dsb2018,
    list_folder,
    list_nuinsseg,
    list_s_bsst265,
)
from nuclei_d2.data.datasets.prepare import prepare
from nuclei_d2.data.datasets.sources import image_stem, list_files
from nuclei_d2.data.datasets.splits import hash_split
from nuclei_d2.utils.errors import NucleiError


def png(array):
    buffer = io.BytesIO()
    Image.fromarray(np.asarray(array)).save(buffer, "png")
    return buffer.getvalue()


def tiff(array):
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, np.asarray(array))
    return buffer.getvalue()


def save(root, files):
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def save_zip(path, files):
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def run(listing, tmp_path, name="set", **options):
    prepare(listing, name, root=tmp_path / "out", workers=1, progress=False, **options)
    return tmp_path / "out" / name


def masks_of(folder, name):
    api = COCO(str(folder / "annotations" / f"{name}.json"))
    return {
        Path(image["file_name"]).name: [
            api.annToMask(a).tolist() for a in api.imgToAnns[image["id"]]
        ]
        for image in api.dataset["images"]
    }


def splits(listing):
    return {record.image_id: record.split for record in listing.records}


def train(image_id):
    return "train"


GREY = np.array([[0, 90, 0], [7, 0, 0]], np.uint8)
RGBA = np.dstack([GREY, GREY, GREY, np.full_like(GREY, 255)])
LEFT = np.array([[255, 0, 0], [255, 0, 0]], np.uint8)
RIGHT = np.array([[0, 0, 255], [0, 0, 0]], np.uint8)
LABELS = np.array([[4, 4, 0], [0, 0, 9]], np.uint16)
LABEL_MASKS = [[[1, 1, 0], [0, 0, 0]], [[0, 0, 0], [0, 0, 1]]]


def dsb_image(image_id, above="", masks=(LEFT, RIGHT)):
    files = {f"{above}{image_id}/images/{image_id}.png": png(RGBA)}
    return files | {f"{above}{image_id}/masks/m{k}.png": png(mask) for k, mask in enumerate(masks)}


@pytest.mark.parametrize("above", ["", "stage1_train/", "data/stage1_train/"])
@pytest.mark.parametrize("kind", ["zip", "folder"])
def test_dsb2018(tmp_path, above, kind):
    files = dsb_image("i0", above) | dsb_image("i2", above, [])
    files |= {f"{above}.DS_Store": b"x", "__MACOSX/i0/images/i0.png": b"x", "table.csv": b"x"}
    if kind == "zip":
        source = save_zip(tmp_path / "stage1_train.zip", files)
    else:
        source = save(tmp_path / "stage1_train", files)
    listing = list_dsb2018([source])
    folds = {i: int(hashlib.sha256(i.encode()).hexdigest(), 16) % 10 for i in ("i0", "i2")}
    assert folds == {"i0": 6, "i2": 0}
    assert splits(listing) == {"i0": "train", "i2": "test"}
    folder = run(listing, tmp_path, by_modality=True)
    expected = {"i0.png": [(LEFT > 0).tolist(), (RIGHT > 0).tolist()]}
    assert masks_of(folder, "set_train") == expected
    assert masks_of(folder, "set_fluorescence_train") == expected
    assert masks_of(folder, "set_test") == {"i2.png": []}
    assert (folder / "images/i0.png").read_bytes() == png(RGBA)


def test_dsb2018_stage1_test_only_where_masks_exist(tmp_path):
    files = dsb_image("i0", "stage1_test/") | dsb_image("i1", "stage1_test/", [])
    listing = list_dsb2018(
        [
            save(tmp_path / "unpacked", files),
            save_zip(tmp_path / "stage1_train.zip", dsb_image("t0")),
            save_zip(tmp_path / "stage1_test.zip", dsb_image("i2")),
        ]
    )
    assert splits(listing) == {"i0": "stage1_test", "i2": "stage1_test", "t0": hash_split("t0")}
    ((skipped, reason),) = listing.skipped.items()
    assert skipped.endswith("unpacked/stage1_test/i1/images/i1.png")
    assert reason == "no masks"


def test_dsb2018_masks_may_be_1_bit_or_colour(tmp_path):
    colour = np.dstack([0 * LEFT, LEFT, 0 * LEFT, np.full_like(LEFT, 255)])
    source = save(tmp_path / "in", dsb_image("i0", masks=[LEFT > 0, colour]))
    listing = list_dsb2018([source])
    report = prepare(listing, "set", root=tmp_path, progress=False)
    assert report["masks_dropped"] == {"duplicate": 1}


def test_dsb2018_broken_masks(tmp_path):
    for data, message in (
        (b"", "the file is empty"),
        (png(LEFT)[:40], "truncated or no readable mask"),
        (b"no image", "truncated or no readable mask"),
        (png(LEFT[:1]), "is 1 x 3 pixels, its image 2 x 3"),
    ):
        files = dsb_image("i0") | {"i0/masks/bad.png": data}
        for source in (save(tmp_path / "in", files), save_zip(tmp_path / "in.zip", files)):
            with pytest.raises(NucleiError, match=rf"i0/masks/bad\.png.*{message}") as caught:
                run(list_dsb2018([source]), tmp_path)
            assert "\n" not in str(caught.value)


def test_dsb2018_broken_images_are_named_in_a_zip_too(tmp_path):
    for data in (b"", png(RGBA)[:50]):
        files = dsb_image("i0") | {"i0/images/i0.png": data}
        for source in (save(tmp_path / "in", files), save_zip(tmp_path / "in.zip", files)):
            with pytest.raises(NucleiError) as caught:
                run(list_dsb2018([source]), tmp_path)
            assert f"{source}/i0/images/i0.png" in str(caught.value)
            assert "\n" not in str(caught.value)


def test_dsb2018_other_layouts(tmp_path):
    with pytest.raises(NucleiError, match=r"no <ImageId>/masks"):
        list_dsb2018([save(tmp_path / "a", {"x.png": b"x", "images/y.png": b"y"})])
    with pytest.raises(NucleiError, match=r"no <ImageId>/masks"):
        list_dsb2018([save(tmp_path / "b", dsb_image("i0", masks=[]))])
    two = dsb_image("i0") | {"i0/images/other.png": b"x"}
    with pytest.raises(NucleiError, match="i0/images holds 2 images"):
        list_dsb2018([save(tmp_path / "c", two)])


@pytest.mark.parametrize("name", ["../x.png", "/x.png", "a/../../x.png", "C:/x.png", "a\\x.png"])
def test_zip_with_a_name_that_leads_outside(tmp_path, name):
    source = save_zip(tmp_path / "bad.zip", dsb_image("i0") | {name: b"x"})
    with pytest.raises(NucleiError, match=r"bad\.zip: member .* unsafe"):
        list_dsb2018([source])


def test_links_that_lead_outside(tmp_path):
    source = save(tmp_path / "in", dsb_image("i0"))
    save(tmp_path / "outside", {"masks/secret.png": png(LEFT)})
    link = source / "i0/masks/link.png"
    link.symlink_to(source / "i0/masks/m0.png")
    assert len(list_files(source)) == 4
    link.unlink()
    link.symlink_to(tmp_path / "outside/masks/secret.png")
    with pytest.raises(NucleiError, match=r"link\.png is a link that leads outside"):
        list_files(source)
    link.unlink()
    (source / "i1").symlink_to(tmp_path / "outside")
    with pytest.raises(NucleiError, match="i1 is a link that leads outside"):
        list_files(source)


def test_sources_that_are_none(tmp_path):
    (tmp_path / "text.zip").write_text("no zip")
    with pytest.raises(NucleiError, match=r"text\.zip: no readable zip"):
        list_files(tmp_path / "text.zip")
    with pytest.raises(NucleiError, match="no folder or zip"):
        list_files(tmp_path / "missing")


def test_zip_with_a_wrong_checksum(tmp_path):
    path = save_zip(tmp_path / "in.zip", dsb_image("i0"))
    data = bytearray(path.read_bytes())
    start = data.index(png(RIGHT))
    data[start + 40] ^= 1
    path.write_bytes(data)
    with pytest.raises(NucleiError, match=r"in\.zip/i0/masks/m1\.png: Bad CRC-32"):
        run(list_dsb2018([path]), tmp_path)


def bbbc039(**lists):
    image = np.array([[200, 4000, 250], [230, 220, 210]], np.uint16)
    # Two nuclei of colour 1 (one touches the other colour), one of colour 2.
    red = np.array([[1, 2, 0, 1], [1, 2, 0, 1], [0, 0, 0, 0]], np.uint8)
    mask = np.dstack([red, 0 * red, 0 * red, np.full_like(red, 255)])
    image = np.pad(image, ((0, 1), (0, 1)), mode="edge")
    files = {}
    for name in ("a_s1_w1", "b", "c", "d"):
        files[f"images/{name}.tif"] = tiff(image)
        files[f"masks/{name}.png"] = png(mask)
    lists = {"training": "a_s1_w1.png\n", "validation": "b.png\r\n", "test": "c.png"} | lists
    for name, text in lists.items():
        if text is not None:
            files[f"metadata/{name}.txt"] = text.encode()
    return files


@pytest.mark.parametrize("above", ["", "BBBC039/"])
def test_bbbc039(tmp_path, above):
    source = save(tmp_path / "in", {above + name: data for name, data in bbbc039().items()})
    listing = list_bbbc039(source)
    assert splits(listing) == {"a_s1_w1": "train", "b": "val", "c": "test"}
    assert {r.modality for r in listing.records} == {"fluorescence"}
    assert list(listing.skipped.values()) == ["in no official list"]
    masks = masks_of(run(listing, tmp_path), "set_train")["a_s1_w1.tif"]
    assert masks == [
        [[1, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]],
        [[0, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]],
        [[0, 0, 0, 1], [0, 0, 0, 1], [0, 0, 0, 0]],
    ]
    assert (tmp_path / "out/set/images/b.tif").read_bytes() == bbbc039()["images/b.tif"]


def test_bbbc039_incomplete(tmp_path):
    for number, (lists, message) in enumerate(
        (
            ({"test": None}, r"no metadata/test\.txt"),
            ({"test": "x.png"}, r"no images/x\.\*"),
            ({"test": "b.png"}, r"b\.png is in validation\.txt and test\.txt"),
        )
    ):
        source = save(tmp_path / str(number), bbbc039(**lists))
        with pytest.raises(NucleiError, match=message):
            list_bbbc039(source)
    files = bbbc039()
    del files["masks/c.png"]
    with pytest.raises(NucleiError, match=r"no masks/c\.\*"):
        list_bbbc039(save(tmp_path / "no mask", files))


BSST_HEAD = "Image_Name;Diagnosis;Preparation;Train-/Testset split;Testset class\n"


def s_bsst265(table, names):
    files = {
        "image_description.csv": table.encode("utf-8-sig"),
        "visualized_groundtruth/x.png": b"",
    }
    for name in names:
        files[f"rawimages/{name}.tif"] = tiff(GREY.astype(np.uint16) * 100)
        files[f"groundtruth/{name}.tif"] = tiff(LABELS)
    return files


@pytest.mark.parametrize("delimiter", [";", ","])
def test_s_bsst265(tmp_path, delimiter):
    names = [f"Neuroblastoma_{k}" for k in range(60)]
    rows = [f"{name};NB;cytospin;{('train', 'test')[k % 2]};" for k, name in enumerate(names)]
    table = (BSST_HEAD + "\n".join(rows)).replace(";", delimiter)
    source = save_zip(tmp_path / "dataset.zip", s_bsst265(table, [*names, "unlisted"]))
    listing = list_s_bsst265(source)
    by_hash = [n for n in names[::2] if int(hashlib.sha256(n.encode()).hexdigest(), 16) % 10 == 1]
    assert by_hash == ["Neuroblastoma_48"]
    expected = {n: "test" if k % 2 else "train" for k, n in enumerate(names)}
    assert splits(listing) == expected | dict.fromkeys(by_hash, "val")
    assert list(listing.skipped) == [f"{source}/rawimages/unlisted.tif"]
    folder = run(listing, tmp_path)
    assert masks_of(folder, "set_test")["Neuroblastoma_1.tif"] == LABEL_MASKS


def test_s_bsst265_broken(tmp_path):
    for number, (table, message) in enumerate(
        (
            (BSST_HEAD + "a;;;train;\nb;;;test;", r"no rawimages/b\.tif"),
            (BSST_HEAD + "a;;;both;", "split of a is 'both'"),
            ("name;group\na;train", "no columns Image_Name"),
        )
    ):
        source = save(tmp_path / str(number), s_bsst265(table, ["a"]))
        with pytest.raises(NucleiError, match=message):
            list_s_bsst265(source)
    with pytest.raises(NucleiError, match=r"no image_description\.csv"):
        list_s_bsst265(save(tmp_path / "none", {"rawimages/a.tif": b""}))


def nuinsseg():
    rgb = np.full((2, 3, 3), (220, 150, 200), np.uint8)
    return {
        "human liver/tissue images/human_liver_01.png": png(rgb),
        "human liver/label masks/human_liver_01.tif": tiff(LABELS),
        "human liver/mask binary/human_liver_01.png": png(LEFT),
        "mouse lung/tissue images/mouse_lung_07.png": png(rgb),
        "mouse lung/label masks/mouse_lung_07.tif": tiff(LABELS.astype(np.float32)),
    }


def test_nuinsseg(tmp_path):
    listing = list_nuinsseg(save(tmp_path / "in", nuinsseg()))
    assert splits(listing) == {n: hash_split(n) for n in ("human_liver_01", "mouse_lung_07")}
    folder = run(listing, tmp_path)
    for name in ("human_liver_01", "mouse_lung_07"):
        assert masks_of(folder, f"set_{hash_split(name)}")[f"{name}.png"] == LABEL_MASKS
    assert {r.modality for r in listing.records} == {"histology"}


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        ("mouse lung/label masks/mouse_lung_07.tif", r"no mouse lung/label masks/mouse_lung_07"),
        ("mouse lung/tissue images/mouse_lung_07.png", r"no mouse lung/tissue images/mouse_"),
    ],
)
def test_nuinsseg_incomplete(tmp_path, gone, message):
    files = nuinsseg()
    del files[gone]
    with pytest.raises(NucleiError, match=message):
        list_nuinsseg(save(tmp_path / "in", files))
    with pytest.raises(NucleiError, match="no <organ>/tissue images"):
        list_nuinsseg(save(tmp_path / "empty", {"x.txt": b""}))


def test_folder_of_stardist(tmp_path):
    images = save(tmp_path / "images", {"a.tif": tiff(GREY), "b.png": png(GREY), "c.tif": b"x"})
    labels = save(tmp_path / "masks", {"a.tif": tiff(LABELS), "b.tif": tiff(0 * LABELS)})
    listing = list_folder(images, labels, {"a": "train", "b": "val"}.get)
    assert list(listing.skipped) == [f"{images}/c.tif"]
    folder = run(listing, tmp_path)
    assert masks_of(folder, "set_train") == {"a.tif": LABEL_MASKS}
    assert masks_of(folder, "set_val") == {"b.png": []}


def test_folder_of_cellpose(tmp_path):
    names = ["a_img.png", "a_masks.png", "b.tif", "b_cp_masks.png", "b_seg.npy"]
    both = save(tmp_path / "both", dict.fromkeys(names, png(LABELS)))
    listing = list_folder(both, both, train, "brightfield")
    assert {r.image_id: r.image.name for r in listing.records} == {"a": "a_img.png", "b": "b.tif"}
    assert {r.modality for r in listing.records} == {"brightfield"}
    assert masks_of(run(listing, tmp_path), "set_train")["a.png"] == LABEL_MASKS


def test_label_images_of_a_prediction(tmp_path):
    both = save(tmp_path / "both", {"a.png": png(GREY), "a_labels.png": png(LABELS)})
    (record,) = list_folder(both, both, train).records
    assert (record.image_id, record.image.name) == ("a", "a.png")


def test_label_images_named_after_the_whole_name_of_the_image(tmp_path):
    names = ["a_img.png", "a_img_cp_masks.png", "b_img.png", "b_img_masks.png"]
    both = save(tmp_path / "both", dict.fromkeys(names, png(LABELS)))
    listing = list_folder(both, both, train)
    assert {r.image_id: r.image.name for r in listing.records} == {
        "a": "a_img.png",
        "b": "b_img.png",
    }
    images = save(tmp_path / "images", {"a_img.png": png(GREY)})
    labels = save(tmp_path / "labels", {"a_img.png": png(LABELS)})
    assert [r.image_id for r in list_folder(images, labels, train).records] == ["a"]


def test_folder_errors(tmp_path):
    images = save(tmp_path / "images", {"a.png": png(GREY)})
    for number, (files, message) in enumerate(
        (
            ({"a.png": png(LABELS), "z_masks.png": b"x"}, r"z_masks\.png has no image z\.\*"),
            ({"a.png": b"x", "a_masks.tif": b"x"}, r"a_masks\.tif and .*a\.png both stand for a"),
            ({"notes.txt": b"x"}, "holds no image"),
        )
    ):
        labels = save(tmp_path / str(number), files)
        with pytest.raises(NucleiError, match=message):
            list_folder(images, labels, train)
    with pytest.raises(NucleiError, match="they end in _masks"):
        list_folder(images, images, train)
    with pytest.raises(NucleiError, match="no folder or zip"):
        list_folder(tmp_path / "missing", images, train)


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (LABELS + np.float32(0.5), "integers"),
        (-LABELS.astype(np.int32), "negative"),
        (np.dstack([LABELS] * 3), "one channel"),
        (LABELS[:, :2], r"is 2 x 2 pixels, its image 2 x 3"),
    ],
)
def test_label_images_that_are_none(tmp_path, label, message):
    images = save(tmp_path / "images", {"a.png": png(GREY)})
    labels = save(tmp_path / "labels", {"a.tif": tiff(label)})
    with pytest.raises(NucleiError, match=rf"labels/a\.tif.*{message}"):
        run(list_folder(images, labels, train), tmp_path)


def coco_json(path, **fields):
    polygon = {"image_id": 7, "category_id": 2, "segmentation": [[0, 0, 2, 0, 2, 1, 0, 1]]}
    rle = {"image_id": 7, "category_id": 1, "segmentation": {"size": [2, 3], "counts": [5, 1]}}
    crowd = rle | {"iscrowd": 1}
    annotations = [dict(a, id=k) for k, a in enumerate((polygon, rle, crowd), start=1)]
    content = {
        "images": [{"id": 7, "file_name": "well/a.png", "height": 2, "width": 3}],
        "annotations": annotations,
        "categories": [{"id": 1, "name": "x"}, {"id": 2, "name": "y"}],
    }
    path.write_text(json.dumps(content | fields))
    return path


def test_coco(tmp_path):
    images = save(tmp_path / "images", {"well/a.png": png(GREY), "well/b.png": b"not listed"})
    listing = list_coco(coco_json(tmp_path / "a.json"), images, train)
    report = prepare(listing, "set", root=tmp_path / "out", progress=False)
    assert masks_of(tmp_path / "out/set", "set_train") == {"well_a.png": LABEL_MASKS}
    assert report["dropped"] == [{"image_id": "well_a", "mask": "annotation 3", "reason": "crowd"}]


@pytest.mark.parametrize("polygon", [[0, 0], [0, 0, 2, 1]])
def test_coco_polygons_without_area_are_dropped_and_listed(tmp_path, polygon):
    images = save(tmp_path / "images", {"well/a.png": png(GREY)})
    square = {"image_id": 7, "category_id": 1, "segmentation": [[0, 0, 2, 0, 2, 1, 0, 1]]}
    annotations = [square | {"id": 1}, square | {"id": 2, "segmentation": [polygon]}]
    listing = list_coco(coco_json(tmp_path / "a.json", annotations=annotations), images, train)
    report = prepare(listing, "set", root=tmp_path / "out", progress=False)
    assert (report["masks_found"], report["masks_kept"]) == (2, 1)
    assert report["dropped"] == [{"image_id": "well_a", "mask": "annotation 2", "reason": "empty"}]


@pytest.mark.parametrize("name", ["c.png", "../secret.png", "/etc/passwd"])
def test_coco_image_that_is_not_in_the_folder(tmp_path, name):
    images = save(tmp_path / "images", {"a.png": png(GREY)})
    save(tmp_path, {"secret.png": png(GREY)})
    image = {"id": 7, "file_name": name, "height": 2, "width": 3}
    with pytest.raises(NucleiError, match=r"a\.json: its image .* is not in .*images"):
        list_coco(coco_json(tmp_path / "a.json", images=[image]), images, train)


def test_coco_of_another_size(tmp_path):
    images = save(tmp_path / "images", {"well/a.png": png(GREY.T.copy())})
    with pytest.raises(NucleiError, match=r"a\.json: annotation 2: broken segmentation"):
        run(list_coco(coco_json(tmp_path / "a.json"), images, train), tmp_path)


def test_image_stem_removes_image_suffixes_only():
    assert [image_stem(n) for n in ("a/b.PNG", "dose 1.5", "x.y.tif")] == ["b", "dose 1.5", "x.y"]

import json

import numpy as np
import pycocotools.mask as mask_util
import pytest
from detectron2.data import MetadataCatalog
from detectron2.structures import BoxMode
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pycocotools.coco import COCO

from nuclei_d2.data.datasets.coco import (
    annotations_as_rle,
    load_nuclei_json,
    mask_to_annotation,
    mask_to_rle,
    segmentation_to_rle,
    write_coco_json,
)
from nuclei_d2.structures.cropped_mask import crop_mask
from nuclei_d2.utils.errors import NucleiError

masks = hnp.arrays(bool, st.tuples(st.integers(1, 9), st.integers(1, 9)))


@given(masks)
def test_rle_from_the_box_is_pycocotools_rle_of_the_frame(mask):
    expected = mask_util.encode(np.asfortranarray(mask, np.uint8))
    rle = mask_to_rle(crop_mask(mask), mask.shape)
    assert rle == {"size": list(mask.shape), "counts": expected["counts"].decode()}
    assert json.loads(json.dumps(rle)) == rle


def test_runs_that_touch_over_the_column_end_are_one_run():
    mask = np.zeros((3, 3), bool)
    mask[1:, 0] = mask[:2, 1] = True
    rle = mask_to_rle(crop_mask(mask), (3, 3))
    assert rle["counts"] == mask_util.frPyObjects({"size": [3, 3], "counts": [1, 4, 4]}, 3, 3)[
        "counts"
    ].decode("ascii")


def test_annotation_by_hand():
    mask = np.zeros((6, 8), np.uint8)
    mask[2:4, 3:7] = 255
    mask[3, 6] = 0
    annotation = mask_to_annotation(crop_mask(mask), (6, 8))
    assert annotation["bbox"] == [3, 2, 4, 2]
    assert annotation["area"] == 7
    assert annotation["iscrowd"] == 0
    assert annotation["category_id"] == 1
    np.testing.assert_array_equal(mask_util.decode(annotation["segmentation"]), mask > 0)


def square(image_id=1, **fields):
    """Annotation of the pixels of rows 1..3, columns 2..3 of a 6 x 5 image, as a polygon."""
    polygon = [[2, 1, 4, 1, 4, 4, 2, 4]]
    return {"id": 1, "image_id": image_id, "category_id": 9, "iscrowd": 0, "area": 6} | {
        "bbox": [2, 1, 2, 3],
        "segmentation": polygon,
        **fields,
    }


def coco(annotations, **fields):
    image = {"id": 1, "file_name": "images/a.png", "height": 6, "width": 5}
    categories = [{"id": 4, "name": "tumour"}, {"id": 9, "name": "stroma"}]
    return {"images": [image], "annotations": annotations, "categories": categories, **fields}


def save(path, content):
    path.write_text(json.dumps(content))
    return path


def plain(*runs):
    return {"size": [6, 5], "counts": list(runs)}


def compressed(*runs):
    return plain() | {"counts": mask_util.frPyObjects(plain(*runs), 6, 5)["counts"].decode()}


PLAIN = plain(13, 3, 3, 3, 8)
COMPRESSED = compressed(13, 3, 3, 3, 8)


@pytest.mark.parametrize(
    "segmentation",
    [
        [[2, 1, 4, 1, 4, 4, 2, 4]],
        [[2, 1, 4, 1, 4, 2, 2, 2], [2, 2, 4, 2, 4, 4, 2, 4]],
        [[0, 0, 3, 3], [2, 1, 4, 1, 4, 4, 2, 4], []],
        PLAIN,
        COMPRESSED,
    ],
    ids=["polygon", "two polygons", "polygon and a line", "plain RLE", "compressed RLE"],
)
def test_foreign_coco_becomes_one_class_with_rle(tmp_path, segmentation):
    path = save(tmp_path / "a.json", coco([square(segmentation=segmentation)]))
    (record,) = load_nuclei_json(path, tmp_path)
    (annotation,) = record["annotations"]
    expected = np.zeros((6, 5), np.uint8)
    expected[1:4, 2:4] = 1
    np.testing.assert_array_equal(mask_util.decode(annotation["segmentation"]), expected)
    assert annotation["category_id"] == 0
    assert annotation["bbox_mode"] == BoxMode.XYWH_ABS
    assert annotation["bbox"] == [2, 1, 2, 3]
    assert record["file_name"] == str(tmp_path / "images/a.png")
    assert "label_file_name" not in record


@pytest.mark.parametrize("polygon", [[], [2, 1], [2, 1, 4, 1]])
def test_polygons_without_area_are_an_empty_mask(polygon):
    rle = segmentation_to_rle([polygon, polygon], (6, 5), "a.json")
    assert mask_util.decode(rle).tolist() == np.zeros((6, 5)).tolist()


def test_annotations_of_any_kind_as_rle():
    image = {"file_name": "x.png", "height": 6, "width": 5}
    kinds = [COMPRESSED, PLAIN, square()["segmentation"]]
    record = {**image, "annotations": [{"id": k, "segmentation": s} for k, s in enumerate(kinds)]}
    found = annotations_as_rle(record)
    assert [a["id"] for a in found] == [0, 1, 2]
    pixels = np.zeros((6, 5), np.uint8)
    pixels[1:4, 2:4] = 1
    for annotation in found:
        np.testing.assert_array_equal(mask_util.decode(annotation["segmentation"]), pixels)
    assert record["annotations"][2]["segmentation"] is kinds[2]  # the catalog's own
    assert annotations_as_rle(image) == []


def test_annotations_without_area_are_named_not_dropped(tmp_path):
    lines = [square(id=k, segmentation=[[2, 1, 4, 1]]) for k in range(10, 15)]
    path = save(tmp_path / "a.json", coco([square(), *lines]))
    with pytest.raises(NucleiError, match=r"a\.json: .* 10, 11, 12 \(5 in all\)") as caught:
        load_nuclei_json(path, tmp_path)
    assert "datasets/prepare_coco.py" in str(caught.value)
    path = save(tmp_path / "a.json", coco([square(), lines[0]]))
    with pytest.raises(NucleiError, match=r"a\.json: .* annotation 10;"):
        load_nuclei_json(path, tmp_path)


def test_missing_box_is_made_from_the_mask(tmp_path):
    annotation = square()
    del annotation["bbox"]
    (record,) = load_nuclei_json(save(tmp_path / "a.json", coco([annotation])), tmp_path)
    assert record["annotations"][0]["bbox"] == [2, 1, 2, 3]


def test_written_json_is_valid_coco_and_loads_with_our_fields(tmp_path):
    mask = np.zeros((6, 5), bool)
    mask[2:4, 1:3] = True
    image = {
        "file_name": "images/a.png",
        "label_file_name": "labels/a.png",
        "height": 6,
        "width": 5,
        "modality": "fluorescence",
        "overlaps": False,
    }
    annotation = mask_to_annotation(crop_mask(mask), (6, 5))
    path = tmp_path / "annotations" / "set.json"
    write_coco_json(
        path,
        [
            {"id": 3, **image, "annotations": [annotation, annotation]},
            {"id": 8, **image, "annotations": []},
            {"id": 9, **image, "annotations": [annotation]},
        ],
    )
    api = COCO(str(path))
    assert sorted(api.anns) == [1, 2, 3]
    assert [api.anns[k]["image_id"] for k in (1, 2, 3)] == [3, 3, 9]
    np.testing.assert_array_equal(api.annToMask(api.anns[3]), mask)
    records = load_nuclei_json(path, tmp_path, "test_coco_written")
    assert [len(r["annotations"]) for r in records] == [2, 0, 1]
    assert records[0]["label_file_name"] == str(tmp_path / "labels/a.png")
    assert records[0]["modality"] == "fluorescence"
    assert records[0]["overlaps"] is False
    metadata = MetadataCatalog.get("test_coco_written")
    assert metadata.thing_classes == ["nucleus"]
    assert metadata.thing_dataset_id_to_contiguous_id == {1: 0}


two_images = [{"id": 1, "file_name": n, "height": 6, "width": 5} for n in "ab"]


def one_image(**fields):
    return [{"id": 1, "file_name": "a.png", "height": 6, "width": 5, **fields}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "no list of images"),
        ({"images": []}, "no list of annotations"),
        (coco([{"id": 1}]), r"annotations\[0\] lacks image_id, category_id"),
        (coco([], images=[{"id": 1, "file_name": "a"}]), r"images\[0\] lacks height, width"),
        (coco([], images=two_images), "id 1 occurs twice among its images"),
        (coco([square(), square()]), "id 1 occurs twice among its annotations"),
        (coco([square(image_id=5)]), "annotation 1 belongs to image 5"),
        (coco([square(image_id=[1])]), r"annotation 1 belongs to image \[1\]"),
        (coco([square(category_id=5)]), "annotation 1 has category_id 5; .* has 4, 9"),
        (coco([square(category_id=[9])]), r"annotation 1 has category_id \[9\]"),
        (coco([square(id={})]), r"annotations\[0\] has id {}"),
        (coco([], images=one_image(id=[1])), r"images\[0\] has id \[1\]"),
        (coco([], images=one_image(file_name="")), r"images\[0\] has file_name ''"),
        (coco([], images=one_image(file_name=5)), r"images\[0\] has file_name 5"),
        (coco([], images=one_image(height="6")), r"images\[0\] has height '6'"),
        (coco([], images=one_image(width=0)), r"images\[0\] has width 0"),
        (coco([square(segmentation=[])]), r"images/a\.png: .* no segmentation"),
        (coco([square(segmentation=[[2, 1, 4, 1, 4, 4], [2, 1, 4, 1, 4, 4, 2]])]), "of 7 numbers"),
        (coco([square(segmentation=[PLAIN, [2, 1, 4, 1, 4, 4]])]), "broken segmentation"),
        (coco([square(segmentation={"size": [5, 6], "counts": [30]})]), "broken segmentation"),
        (coco([square(segmentation=PLAIN | {"counts": None})]), "broken segmentation"),
        (coco([square(segmentation=PLAIN | {"counts": "5"})]), "runs .* 5 pixels .* 30"),
        (coco([square(segmentation=plain(13, 5000, 3))]), "runs .* 5016 pixels .* 30"),
        (coco([square(segmentation=plain(13, 3))]), "runs .* 16 pixels .* 30"),
        (coco([square(segmentation=plain(13, -3, 20))]), "no COCO instance JSON"),
        (coco([square(segmentation=plain(13, 3.5, 13.5))]), "broken segmentation"),
        (coco([square(segmentation=compressed(13, 5000, 3))]), "runs .* 5016 pixels .* 30"),
        (coco([square(segmentation=compressed(13, 3))]), "runs .* 16 pixels .* 30"),
        (coco([square(bbox=[])]), "no COCO instance JSON"),
        (coco([square(bbox=[1, 2])]), r"images/a\.png: .* bbox \[1, 2\]"),
        (coco([square(bbox="wide")]), "bbox 'wide'"),
        (coco([square(bbox=[1, 2, 3, float("nan")])]), r"bbox \[1, 2, 3, nan\]"),
    ],
)
def test_broken_content_is_one_line_that_names_the_file(tmp_path, content, message):
    path = save(tmp_path / "broken.json", content)
    with pytest.raises(NucleiError, match=message) as caught:
        load_nuclei_json(path, tmp_path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_image_at_all(tmp_path):
    path = save(tmp_path / "none.json", coco([], images=[]))
    with pytest.raises(NucleiError, match=r"none\.json lists no image") as caught:
        load_nuclei_json(path, tmp_path)
    assert "\n" not in str(caught.value)


def test_missing_and_truncated_json(tmp_path):
    with pytest.raises(NucleiError, match=r"nothing\.json"):
        load_nuclei_json(tmp_path / "nothing.json", tmp_path)
    (tmp_path / "half.json").write_text('{"images": [')
    with pytest.raises(NucleiError, match=r"half\.json: broken JSON"):
        load_nuclei_json(tmp_path / "half.json", tmp_path)

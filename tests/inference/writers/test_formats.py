"""All formats together: they agree nucleus by nucleus, and fail cleanly."""

import json

import numpy as np
import pandas as pd
import pytest
import roifile
import shapely
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO

from nuclei_d2.inference.nuclei import Nuclei
from nuclei_d2.inference.writers import FORMATS, get_writer, write_outputs
from nuclei_d2.structures.cropped_mask import CroppedMask
from nuclei_d2.utils.errors import NucleiError

SIDECARS = ["labels", "coco", "geojson", "imagej", "csv"]


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=25, deadline=None)
def test_they_agree_nucleus_by_nucleus(tmp_path_factory, draw_nuclei, seed):
    nuclei, _, image = draw_nuclei(seed)
    paths = write_outputs(tmp_path_factory.mktemp("out"), "a", nuclei, image, SIDECARS)
    labels, coco, geojson, rois, table = (
        tifffile.imread(paths[0]),
        COCO(str(paths[1])),
        json.loads(paths[2].read_text()),
        roifile.roiread(paths[3]) if len(nuclei) else [],
        pd.read_csv(paths[4]).set_index("label"),
    )
    numbers = list(range(1, len(nuclei) + 1))
    assert list(coco.anns) == numbers
    assert [feature["properties"]["label"] for feature in geojson["features"]] == numbers
    assert [int(roi.name) for roi in rois] == numbers
    assert list(table.index) == numbers
    masks = {k: coco.annToMask(annotation).astype(bool) for k, annotation in coco.anns.items()}
    y, x = np.mgrid[: labels.shape[0], : labels.shape[1]] + 0.5
    expected = np.zeros_like(labels)
    for k in reversed(numbers):
        expected[masks[k]] = k
        feature, row = geojson["features"][k - 1], table.loc[k]
        shape = shapely.geometry.shape(feature["geometry"])
        np.testing.assert_array_equal(shapely.contains_xy(shape, x, y), masks[k])
        measured = feature["properties"]["measurements"]
        assert coco.anns[k]["score"] == measured["score"] == row["score"] == row["quality"]
        assert coco.anns[k]["area"] == measured["area_px"] == row["area_px"] == shape.area
        assert shape.centroid.x == pytest.approx(row["centroid_x_px"], rel=1e-6)
        assert shape.centroid.y == pytest.approx(row["centroid_y_px"], rel=1e-6)
        box = row[["bbox_left_px", "bbox_top_px", "bbox_width_px", "bbox_height_px"]]
        assert coco.anns[k]["bbox"] == box.tolist()
        rings = [shapely.Polygon(ring) for ring in rois[k - 1].coordinates(multi=True)]
        filled = sum(shapely.contains_xy(ring, x, y).astype(int) for ring in rings) % 2
        np.testing.assert_array_equal(filled, masks[k])
    np.testing.assert_array_equal(labels, expected)


def test_every_format_gets_its_own_file(tmp_path, draw_nuclei):
    nuclei, _, image = draw_nuclei(3)
    paths = write_outputs(tmp_path / "new folder", "a.b", nuclei, image)
    assert sorted(path.name for path in paths) == [
        "a.b.coco.json",
        "a.b.csv",
        "a.b.geojson",
        "a.b_labels.tif",
        "a.b_overlay.png",
        "a.b_rois.zip",
    ]
    assert sorted((tmp_path / "new folder").iterdir()) == sorted(paths)


def test_an_unknown_format(tmp_path, no_nuclei, blank):
    message = "no output format 'tiff'; choose from labels, coco, geojson, imagej, csv, overlay"
    with pytest.raises(NucleiError, match=message):
        get_writer("tiff")
    with pytest.raises(NucleiError, match=message):
        write_outputs(tmp_path, "a", no_nuclei, blank, ["csv", "tiff"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", list(FORMATS))
def test_a_failure_leaves_the_old_file(tmp_path, blank, name):
    good, broken = CroppedMask(np.ones((2, 2), bool), 0, 0), CroppedMask(None, 3, 3)
    nuclei = Nuclei([good, broken], np.array([0.9, 0.8]), (40, 56))
    path = tmp_path / "a.file"
    path.write_text("old")
    with pytest.raises((AttributeError, TypeError)):
        get_writer(name).write(path, nuclei, blank)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_text() == "old"

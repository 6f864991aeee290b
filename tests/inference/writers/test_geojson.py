import json

import geojson
import numpy as np
import shapely

from nuclei_d2.inference.writers.geojson import write_geojson


def read(path):
    content = geojson.loads(path.read_text())
    assert content.is_valid
    return content


def test_read_back(tmp_path, draw_nuclei):
    nuclei, masks, image = draw_nuclei(5)
    assert len(nuclei) > 2
    write_geojson(tmp_path / "a.geojson", nuclei, image)
    content = read(tmp_path / "a.geojson")
    assert content["type"] == "FeatureCollection"
    for k, feature in enumerate(content["features"]):
        properties = feature["properties"]
        assert properties["objectType"] == "detection"
        assert properties["label"] == k + 1
        assert properties["name"] == str(k + 1)
        assert properties["classification"]["name"] == "nucleus"
        area = int(masks[k].sum())
        assert properties["measurements"] == {
            "score": nuclei.scores[k],
            "area_px": area,
            "area_um2": area / 4,
            "quality": nuclei.scores[k],
        }
        shape = shapely.geometry.shape(feature["geometry"])
        assert shape.is_valid
        assert shape.area == area


def test_parts_and_holes(tmp_path, from_drawings, blank):
    nuclei = from_drawings(("XXX X.X XXX", 2, 4), ("X.X", 0, 0), ("X", 19, 19))
    write_geojson(tmp_path / "a.geojson", nuclei, blank)
    ring, pieces, pixel = (f["geometry"] for f in read(tmp_path / "a.geojson")["features"])
    assert ring["type"] == "Polygon"
    assert len(ring["coordinates"]) == 2
    assert ring["coordinates"][0] == [[4, 2], [7, 2], [7, 5], [4, 5], [4, 2]]
    assert pieces["type"] == "MultiPolygon"
    assert len(pieces["coordinates"]) == 2
    assert pixel["coordinates"] == [[[19, 19], [20, 19], [20, 20], [19, 20], [19, 19]]]


def test_qupath_takes_numbers_only(tmp_path, from_drawings, blank):
    measures = {
        "quality": np.array([np.nan, 0.5]),
        "is_sure": np.array([True, False]),
        "votes": np.array([3, 4], np.uint8),
    }
    nuclei = from_drawings(("X", 2, 4), ("X", 0, 0), **measures)
    write_geojson(tmp_path / "a.geojson", nuclei, blank)
    content = json.loads((tmp_path / "a.geojson").read_text())
    first, second = (feature["properties"]["measurements"] for feature in content["features"])
    assert first == {"score": 0.9, "area_px": 1, "is_sure": 1, "votes": 3}
    assert second == {"score": 0.1, "area_px": 1, "quality": 0.5, "is_sure": 0, "votes": 4}
    values = [*first.values(), *second.values()]
    assert {type(value) for value in values} == {int, float}


def test_no_nuclei(tmp_path, no_nuclei, blank):
    write_geojson(tmp_path / "a.geojson", no_nuclei, blank)
    assert read(tmp_path / "a.geojson")["features"] == []

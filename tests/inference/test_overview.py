import csv
import json
import os

import numpy as np
import pytest
from browser import BACKGROUND, NEEDS_CHROMIUM, PHONE, look_at
from PIL import Image

from nuclei_d2.inference import overview
from nuclei_d2.inference.overview import concern, write_overview

MANIFEST = {"model": {"file": "/x/model.pth"}, "config": {}, "started": "2020-01-01T00:00:00+00:00"}


def record(quality, warnings=(), nuclei=4, **more):
    return {
        "file": "f",
        "quality": quality,
        "warnings": list(warnings),
        "nuclei": nuclei,
        **more,
    }


def test_failures_come_first_then_warnings_then_low_quality(tmp_path):
    images = {
        "good": record(0.9),
        "poor": record(0.6),
        "empty": record(None, nuclei=0),
        "warned": record(0.95, ["blurred: refocus"]),
        "<script>": {"file": "f", "reason": "f: not a <PNG>"},
    }
    assert concern(images["good"]) == 1 - 0.9
    assert concern(images["warned"]) == 1 - 0.95 + 1
    assert concern(images["<script>"]) == 3
    write_overview(tmp_path, images, MANIFEST)
    with (tmp_path / overview.TABLE).open(newline="") as file:
        rows = list(csv.DictReader(file))
    order = ["<script>", "warned", "empty", "poor", "good"]
    assert [row["image"] for row in rows] == order
    assert rows[2]["remarks"] == "no nuclei found"
    page = (tmp_path / "report.html").read_text()
    places = [page.index(f"<strong>{n}</strong>") for n in ("warned", "empty", "poor", "good")]
    assert places == sorted(places)
    assert "<script" not in page
    assert "default-src 'none'" in page
    assert "12 nuclei in 4 images" in page


def test_a_name_that_is_no_utf8_is_escaped(tmp_path):
    name = os.fsdecode(b"caf\xe9")
    failure = {"file": f"{name}.tif", "reason": f"{name}.tif: cut short"}
    write_overview(tmp_path, {name: record(0.9), f"{name}_2": failure}, MANIFEST)
    for file in ("report.html", overview.TABLE):
        text = (tmp_path / file).read_text(encoding="utf-8")
        assert r"caf\udce9_2" in text
        assert r"caf\udce9.tif: cut short" in text


def test_one_is_singular(tmp_path):
    write_overview(tmp_path, {"a": record(0.9, nuclei=1)}, MANIFEST)
    page = (tmp_path / "report.html").read_text()
    assert "1 nucleus in 1 image<" in page
    assert "1 image to look at first" in page
    assert "1 nucleus, quality" in page
    assert "before you trust" not in page  # there is no warning


def test_the_page_stays_small_and_the_table_has_all(tmp_path, monkeypatch):
    monkeypatch.setattr(overview, "LISTED", 30)
    noise = np.random.default_rng(0).integers(0, 255, (60, 60, 3), np.uint8)
    (tmp_path / "thumbnails").mkdir()
    images = {}
    for k in range(60):
        Image.fromarray(noise).save(tmp_path / "thumbnails" / f"{k}.webp")
        images[f"{k}"] = record(k / 60, thumbnail=f"thumbnails/{k}.webp")
    size = (tmp_path / "thumbnails" / "0.webp").stat().st_size
    monkeypatch.setattr(overview, "PICTURE_BYTES", 15 * size)
    write_overview(tmp_path, images, MANIFEST)
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/webp") == 15
    assert page.count('<th scope="row">') == 30
    assert "15 more images are not on this page" in page
    assert len((tmp_path / overview.TABLE).read_text().splitlines()) == 61
    write_overview(tmp_path, json.loads(json.dumps(images)), MANIFEST)
    assert (tmp_path / "report.html").read_text() == page


@NEEDS_CHROMIUM
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_renders_on_a_phone(tmp_path, scheme):
    (tmp_path / "report").mkdir()
    images = {"broken": {"file": "f", "reason": "a_file_name_without_spaces" * 5}}
    for k in range(12):
        Image.new("RGB", (40 + k, 30)).save(tmp_path / "report" / f"{k}.webp")
        name = f"a_long_name_of_an_image_without_any_space_in_it_{k}" * 2
        images[name] = record(0.5 + k / 100, ["blurred: refocus"], thumbnail=f"report/{k}.webp")
    write_overview(tmp_path, images, MANIFEST)
    page = (tmp_path / "report.html").read_text()
    seen = look_at(page, tmp_path, scheme)
    assert sorted(seen["images"]) == list(range(40, 52))
    assert seen["width"] == PHONE
    assert seen["background"] == BACKGROUND[scheme]

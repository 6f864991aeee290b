import cv2
import numpy as np
import pytest
from PIL import Image
from tiny import draw_nuclei

from nuclei_d2.config import load_config
from nuclei_d2.data.datasets.coco import mask_to_annotation
from nuclei_d2.data.image_measures import (
    count_pixels,
    image_measures,
    judge,
    measure_warnings,
    training_ranges,
)
from nuclei_d2.structures.cropped_mask import label_image_to_masks


def colours(grey):
    return np.repeat(np.asarray(grey, np.float32)[:, :, None], 3, axis=2)


def measures(grey, diameter=None):
    return image_measures(count_pixels(colours(grey)), diameter)


def test_levels_are_counted():
    grey = np.zeros((10, 10))
    grey[:4], grey[4] = 51, 255
    found = measures(grey, 12.5)
    assert found["saturated"] == 0.1
    assert found["background"] == 0
    assert found["diameter"] == 12.5
    assert measures(np.full((4, 4), 51))["background"] == pytest.approx(0.2)


def test_focus_of_a_single_edge():
    """Of 16 x 8 squares of 2 px every row has one step in 15; of 4 x 2 of 8 px, one in 3."""
    grey = np.zeros((16, 32))
    grey[:, 16:] = 100
    assert measures(grey)["focus"] == pytest.approx((1 / 15) / (1 / 3))
    assert measures(grey / 10)["focus"] == pytest.approx(0.2)  # whatever the contrast


def test_what_is_done_to_an_image_shows_in_its_measure():
    grey = draw_nuclei(np.random.default_rng(0), (256, 256), 40)[0].astype(np.float32)
    grey = cv2.GaussianBlur(grey, (0, 0), 1)
    before = measures(grey)
    noise = np.random.default_rng(1).normal(0, 10, grey.shape)
    assert measures(cv2.GaussianBlur(grey, (0, 0), 4))["focus"] < 0.6 * before["focus"]
    assert measures(np.clip(grey + 100 + noise, 0, 255))["noise"] == pytest.approx(
        10 / 255, rel=0.1
    )
    assert measures(255 - grey)["background"] > 0.8 > 0.2 > before["background"]
    assert measures(np.minimum(3 * grey, 255))["saturated"] > 0.05 > before["saturated"]


def test_parts_add_up():
    grey = np.random.default_rng(0).integers(0, 256, (64, 64))
    whole, parts = (
        sum(map(count_pixels, p)) for p in ([colours(grey)], np.split(colours(grey), 2))
    )
    np.testing.assert_array_equal(whole[:256], parts[:256])
    np.testing.assert_allclose(whole[256:], parts[256:], rtol=0.2)


@pytest.mark.parametrize("size", [(1, 1), (3, 40), (30, 30)])
def test_without_contrast_or_room_there_is_no_focus(size):
    found = measures(np.zeros(size))
    assert found["focus"] is None
    assert (found["noise"], found["saturated"], found["background"]) == (0, 0, 0)


def test_what_is_outside_gets_one_warning_with_the_remedy():
    ranges = load_config().INPUT.TRAINING_RANGES
    values = {"focus": 0.05, "noise": 0.01, "background": None}
    assert {e["inside"] for e in judge(values, ranges).values()} == {None}
    ranges.FOCUS, ranges.NOISE, ranges.BACKGROUND = [0.1, 1.0], [0.0, 0.02], [0.0, 0.3]
    judged = judge(values, ranges)
    assert judged["focus"] == {"value": 0.05, "range": [0.1, 1.0], "inside": False}
    assert [judged[name]["inside"] for name in ("noise", "background")] == [True, None]
    (warning,) = measure_warnings(judged)
    assert warning.startswith("blurred: focus 0.05, training 0.1 to 1; refocus")


def test_the_ranges_of_training_images(tmp_path):
    records = []
    for k in range(5):
        image, labels = draw_nuclei(np.random.default_rng(k), (64, 80), 6 if k else 0)
        Image.fromarray(image).save(tmp_path / f"{k}.png")
        masks = [mask for _, mask in label_image_to_masks(labels)]
        annotations = [mask_to_annotation(mask, image.shape) for mask in masks]
        record = {"file_name": str(tmp_path / f"{k}.png"), "height": 64, "width": 80}
        records.append({**record, "annotations": annotations})
    cfg = load_config("", ["INPUT.SCALE", "2"])
    ranges = training_ranges(records, cfg)
    assert set(ranges) == set(cfg.INPUT.TRAINING_RANGES)
    assert ranges["FOCUS"][1] == 1
    assert ranges["NOISE"][0] == ranges["SATURATED"][0] == ranges["BACKGROUND"][0] == 0
    low, high = ranges["DIAMETER"]
    assert 2 * 8 < low < high < 2 * 20
    assert training_ranges([], cfg)["FOCUS"] == []
    cfg.INPUT.TRAINING_RANGES.update(ranges)
    focus = ranges["FOCUS"]
    reloaded = load_config("", ["INPUT.TRAINING_RANGES.FOCUS", str(focus)])
    assert focus == reloaded.INPUT.TRAINING_RANGES.FOCUS

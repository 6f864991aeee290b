import math

import numpy as np
import pytest
from detectron2.structures import BoxMode
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from nuclei_d2.config import load_config
from nuclei_d2.data.datasets.coco import mask_to_annotation
from nuclei_d2.data.datasets.statistics import (
    ASPECT_RATIOS,
    STRIDES,
    best_anchor_iou,
    find_touching,
    fit_anchors,
    measure_image,
    measure_record,
    median_diameter,
    propose,
    propose_scale,
    summarize,
)
from nuclei_d2.data.normalization import ImageNormalizer
from nuclei_d2.structures.cropped_mask import crop_mask, masks_to_label_image
from nuclei_d2.utils.errors import NucleiError

NORMALIZER = ImageNormalizer(load_config())


def draw(shape, **squares):
    """Label image with one square per keyword: ``_1=(top, left, side)``."""
    labels = np.zeros(shape, np.int32)
    for name, (top, left, side) in squares.items():
        labels[top : top + side, left : left + side] = int(name[1:])
    return labels


def measure(labels, image=None, **kwargs):
    ids = range(1, labels.max(initial=0) + 1)
    areas = np.array([(labels == k).sum() for k in ids])
    places = [np.argwhere(labels == k) for k in ids]
    boxes = np.array([[*p.min(0)[::-1], *(p.max(0)[::-1] + 1)] for p in places])
    if image is None:
        image = np.zeros((*labels.shape, 1), np.float32)
    return measure_image(image, labels, areas, boxes, **{"normalizer": NORMALIZER, **kwargs})


@pytest.mark.parametrize(
    ("second", "expected"),
    [
        ((2, 6, 4), True),  # shares an edge
        ((6, 6, 4), True),  # shares a corner
        ((6, 0, 2), True),  # shares the other diagonal's corner
        ((2, 7, 4), False),  # one pixel between
        ((7, 7, 4), False),
    ],
)
def test_two_squares_touch(second, expected):
    labels = draw((16, 16), _1=(2, 2, 4), _2=second)
    assert find_touching(labels).tolist() == [expected, expected]


def test_touching_is_told_for_each_label_and_background_is_no_neighbour():
    labels = draw((20, 20), _1=(0, 0, 5), _2=(0, 5, 5), _3=(12, 12, 4))
    assert find_touching(labels).tolist() == [True, True, False]
    assert find_touching(np.zeros((4, 4), np.int32)).tolist() == []


def test_wholly_hidden_last_nucleus_does_not_touch():
    labels = draw((8, 8), _1=(0, 0, 4))
    image = np.zeros((8, 8, 1), np.float32)
    boxes = [[0, 0, 4, 4], [1, 1, 2, 2]]
    measured = measure_image(image, labels, [16, 1], boxes, NORMALIZER)
    assert measured.touching.tolist() == [False, False]


def test_intensity_of_a_two_level_image():
    labels = draw((10, 10), _1=(0, 0, 5))
    image = np.where(labels > 0, 300.0, 100.0).astype(np.float32)[:, :, None]
    measured = measure(labels, image, modality="fluorescence")
    assert (measured.low, measured.high) == (100, 300)
    assert (measured.background, measured.foreground) == (0, 255)
    assert measured.modality == "fluorescence"


def test_intensity_follows_the_normaliser():
    labels = draw((10, 10), _1=(0, 0, 5))
    image = np.arange(100, dtype=np.float32).reshape(10, 10, 1)
    normalizer = ImageNormalizer(percentiles=(0, 50), noise_floor=0, min_levels=0)
    measured = measure(labels, image, normalizer=normalizer)
    assert (measured.low, measured.high) == (0, 49.5)
    assert measured.foreground == pytest.approx(22 * 255 / 49.5)  # median of 0..4, 10..14, ..44
    assert measured.background == 255


@pytest.fixture
def record(tmp_path):
    """Two squares of 6 px that share 2 x 6 pixels, and one of 4 px apart, in 20 x 30 pixels."""
    masks = np.zeros((3, 20, 30), bool)
    masks[0, 2:8, 2:8] = masks[1, 2:8, 6:12] = masks[2, 14:18, 20:24] = True
    boxed = [crop_mask(mask) for mask in masks]
    Image.fromarray(masks.any(0) * np.uint8(100)).save(tmp_path / "image.png")
    Image.fromarray(masks_to_label_image(boxed, (20, 30))).save(tmp_path / "label.png")
    annotations = [mask_to_annotation(mask, (20, 30)) for mask in boxed]
    for annotation in annotations:
        annotation["bbox_mode"] = BoxMode.XYWH_ABS
    return {
        "file_name": str(tmp_path / "image.png"),
        "label_file_name": str(tmp_path / "label.png"),
        "height": 20,
        "width": 30,
        "modality": "fluorescence",
        "annotations": annotations,
    }


def test_record_counts_whole_masks_where_they_overlap(record):
    measured = measure_record(record, NORMALIZER)
    assert measured.areas.tolist() == [36, 36, 16]
    assert measured.boxes.tolist() == [[2, 2, 8, 8], [6, 2, 12, 8], [20, 14, 24, 18]]
    assert measured.touching.tolist() == [True, True, False]
    assert (measured.foreground, measured.background) == (255, 0)
    assert measured.modality == "fluorescence"


def test_record_without_label_image_is_painted_and_crowds_are_left_out(record):
    with_labels = measure_record(record, NORMALIZER)
    del record["label_file_name"], record["modality"]
    measured = measure_record(record, NORMALIZER)
    assert measured.modality == "unknown"
    assert measured.touching.tolist() == with_labels.touching.tolist()
    assert measured.foreground == with_labels.foreground
    record["annotations"][1]["iscrowd"] = 1
    measured = measure_record(record, NORMALIZER)
    assert measured.areas.tolist() == [36, 16]
    assert measured.touching.tolist() == [False, False]


def test_record_of_more_masks_than_a_byte_counts(record):
    # pycocotools 2.0.11 cannot measure more than 255 masks at once.
    del record["label_file_name"]
    record["annotations"] = record["annotations"][2:] * 300
    assert measure_record(record, NORMALIZER).areas.tolist() == [16] * 300


def test_record_of_an_empty_image(record):
    record["annotations"] = []
    del record["label_file_name"]
    measured = measure_record(record, NORMALIZER)
    assert len(measured.areas) == 0
    assert measured.boxes.shape == (0, 4)


@pytest.mark.parametrize("key", ["file_name", "label_file_name"])
def test_record_with_another_size_than_its_file_names_the_file(record, key):
    Image.fromarray(np.zeros((20, 20), np.uint8)).save(record[key])
    with pytest.raises(NucleiError, match=r"(image|label)\.png is \(20, 20\) pixels"):
        measure_record(record, NORMALIZER)


def test_median_diameter_is_of_the_circle_of_the_same_area():
    squares = [crop_mask(np.ones((side, side), bool)) for side in (2, 4, 30)]
    annotations = [mask_to_annotation(square, (30, 30)) for square in squares]
    image = {"file_name": "x.png", "height": 30, "width": 30}
    records = [{**image, "annotations": part} for part in (annotations[:1], annotations[1:])]
    assert median_diameter(records) == pytest.approx(4 * 2 / math.sqrt(math.pi))
    crowd = {**annotations[0], "iscrowd": 1}
    assert median_diameter([{**image, "annotations": [crowd, annotations[1]]}]) == median_diameter(
        records
    )
    assert median_diameter([{**image, "annotations": []}, image]) == 0
    polygon = {"segmentation": [[3, 3, 7, 3, 7, 7, 3, 7]]}
    assert median_diameter([{**image, "annotations": [polygon]}]) == median_diameter(records)


def test_summary_by_hand():
    first = measure(draw((20, 30), _1=(0, 0, 4), _2=(0, 4, 4), _3=(10, 10, 8)), modality="a")
    second = measure(draw((20, 30), _1=(5, 5, 6)), modality="b")
    empty = measure(np.zeros((40, 40), np.int32), modality="a")
    summary = summarize([first, second, empty])
    assert (summary.images, summary.nuclei) == (3, 4)
    assert (summary.count_median, summary.count_max) == (1, 3)
    assert summary.empty_share == pytest.approx(1 / 3)
    assert summary.touching_share == 0.5
    assert summary.sizes == {"20 x 30": 2, "40 x 40": 1}
    assert summary.modalities == {"a": 2, "b": 1}
    # Squares of 4, 4, 6 and 8 pixels: the median lies half-way between 4 and 6.
    assert summary.box_side_percentiles[50] == 5
    assert summary.box_side_percentiles[75] == pytest.approx(6.5)
    circle = 2 / math.sqrt(math.pi)  # diameter of the one that is as large as a square of 1 px
    assert summary.diameter_percentiles == pytest.approx(
        {k: circle * side for k, side in summary.box_side_percentiles.items()}
    )
    assert summary.background_percentiles[50] == 0


def test_summary_without_nuclei_has_no_diameter():
    summary = summarize([measure(np.zeros((8, 8), np.int32))])
    assert summary.empty_share == 1
    assert math.isnan(summary.touching_share)
    assert math.isnan(summary.diameter_percentiles[50])
    assert math.isnan(summary.foreground_percentiles[50])


@pytest.mark.parametrize(
    ("diameter", "scale"), [(27, 1.0), (20.3, 1.5), (13.5, 2.0), (2, 4.0), (108, 0.25), (54, 0.5)]
)
def test_scale(diameter, scale):
    assert propose_scale(diameter) == scale


def test_anchor_on_the_grid_point_matches_perfectly():
    # 32 x 32 around (64, 64), a point of every stride.
    boxes = np.array([[48.0, 48, 80, 80]])
    frames = np.array([[128.0, 128]])
    assert best_anchor_iou(boxes, frames, [[32], [64], [64], [64], [64]]) == pytest.approx([1.0])
    # Twice the side: a quarter of the area.
    assert best_anchor_iou(boxes, frames, [[64]] * 5) == pytest.approx([0.25])


def test_anchor_iou_falls_with_the_distance_to_the_grid():
    # Centre (66, 64): 2 px beside the points of stride 4 and more; 30 of 32 columns overlap.
    boxes = np.array([[50.0, 48, 82, 80]])
    frames = np.array([[128.0, 128]])
    expected = 30 / (32 + 32 - 30)
    assert best_anchor_iou(boxes, frames, [[32]] * 5) == pytest.approx([expected])


def test_anchor_grid_ends_with_the_image():
    # Centre (62, 62) in a 64 px image: stride 64 has the point 0 alone, stride 4 has 60.
    boxes = np.array([[60.0, 60, 64, 64]])
    frames = np.array([[64.0, 64]])
    fine = best_anchor_iou(boxes, frames, [[4], [], [], [], []])
    assert fine == pytest.approx([4 / 28])
    assert best_anchor_iou(boxes, frames, [[], [], [], [], [4]]) == pytest.approx([0.0])


@settings(max_examples=25, deadline=None)
@given(st.floats(0, 90), st.floats(0, 90), st.floats(2, 60), st.floats(2, 60), st.floats(4, 40))
def test_best_anchor_iou_equals_detectron2s(x, y, width, height, size):
    import torch
    from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
    from detectron2.structures import Boxes, pairwise_iou

    frame = 128
    sizes = [[size * 2**level] for level in range(5)]
    generator = DefaultAnchorGenerator(
        sizes=sizes, aspect_ratios=[list(ASPECT_RATIOS)], strides=list(STRIDES), offset=0.0
    )
    features = [torch.zeros(1, 1, frame // stride, frame // stride) for stride in STRIDES]
    anchors = Boxes.cat(generator(features))
    box = np.array([[x, y, x + width, y + height]])
    exact = pairwise_iou(Boxes(torch.tensor(box, dtype=torch.float32)), anchors).max().item()
    frames = np.array([[frame, frame]])
    assert best_anchor_iou(box, frames, sizes)[0] == pytest.approx(exact, abs=1e-4)


def test_anchors_double_from_level_to_level_and_meet_the_boxes():
    rng = np.random.default_rng(0)
    sides = 2 ** rng.uniform(4, 7, 400)
    centres = rng.uniform(128, 384, (400, 2))
    boxes = np.hstack([centres - sides[:, None] / 2, centres + sides[:, None] / 2])
    frames = np.full((400, 2), 512.0)
    anchors = fit_anchors(boxes, frames)
    first = anchors[0][0]
    assert anchors == tuple((first * 2**k, round(first * 2 ** (k + 0.5))) for k in range(5))
    assert np.mean(best_anchor_iou(boxes, frames, anchors) >= 0.5) > 0.98


@pytest.mark.parametrize("side", [16, 24])
def test_anchors_of_one_size_of_box(side):
    # Centres on points of the p2 grid: there an anchor of this very size is perfect.
    centres = np.random.default_rng(0).integers(8, 56, (50, 2)) * 4.0
    boxes = np.hstack([centres - side / 2, centres + side / 2])
    anchors = fit_anchors(boxes, np.full((50, 2), 256.0))
    assert side in anchors[0]


def test_proposal_by_hand():
    # 35 squares of 12 px in one image, none in the other.
    labels = np.zeros((160, 160), np.int32)
    for k in range(35):
        top, left = 20 * (k // 7), 20 * (k % 7)
        labels[top : top + 12, left : left + 12] = k + 1
    proposal = propose([measure(labels), measure(np.zeros((50, 50), np.int32))])
    assert proposal.scale == 2.0
    assert proposal.detections == 100  # 1.5 x 35 = 52.5
    assert proposal.crop == 256  # nine diameters of 27 px are 243
    assert proposal.recall_50 == 1.0
    assert 0 <= proposal.recall_70 <= proposal.recall_50
    config = proposal.to_config()
    assert config["TEST"]["DETECTIONS_PER_IMAGE"] == 100
    assert config["MODEL"]["RPN"]["POST_NMS_TOPK_TEST"] == 1000
    assert propose([measure(labels)], scale=1.0).crop == 128


def test_topk_grows_with_the_cap():
    labels = np.arange(1, 901, dtype=np.int32).reshape(30, 30).repeat(4, 0).repeat(4, 1)
    proposal = propose([measure(labels)])
    assert proposal.detections == 1350
    rpn = proposal.to_config()["MODEL"]["RPN"]
    assert rpn["POST_NMS_TOPK_TEST"] == rpn["PRE_NMS_TOPK_TEST"] == 2700
    assert set(rpn) == {"POST_NMS_TOPK_TEST", "PRE_NMS_TOPK_TEST"}


def test_nothing_to_propose_without_nuclei():
    with pytest.raises(ValueError, match="no nuclei"):
        propose([measure(np.zeros((8, 8), np.int32))])

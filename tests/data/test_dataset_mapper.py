import copy

import numpy as np
import pytest
import tifffile
import torch
from detectron2.config import CfgNode
from detectron2.data import build_detection_train_loader
from detectron2.structures import BitMasks, BoxMode
from PIL import Image
from pycocotools import mask as mask_util

from nuclei_d2.config import load_config
from nuclei_d2.data.dataset_mapper import (
    NucleiDatasetMapper,
    labels_to_instances,
    paint_annotations,
)
from nuclei_d2.data.targets import distance_target
from nuclei_d2.utils.errors import NucleiError

# Raised inside pycocotools.mask.decode with NumPy 2.

PLAIN = [
    *("INPUT.SCALE_JITTER", "(1.0, 1.0)", "INPUT.RANDOM_FLIP", "none"),
    *("INPUT.RANDOM_ROTATE90", "False", "INPUT.CROP.ENABLED", "False"),
    *("INPUT.GAMMA", "(1.0, 1.0)", "INPUT.CONTRAST", "(1.0, 1.0)"),
    *("INPUT.BRIGHTNESS", "(1.0, 1.0)", "INPUT.NOISE", "(0.0, 0.0)"),
    *("INPUT.PERCENTILES", "(0.0, 100.0)", "INPUT.NOISE_FLOOR", "0.0"),
]


@pytest.fixture(autouse=True)
def _seed():
    np.random.seed(0)


def config(*opts: str) -> CfgNode:
    return load_config(opts=[*PLAIN, *opts])


def square_labels() -> np.ndarray:
    """Six nuclei of 3 x 4 up to 8 x 9 pixels in 60 x 80; the last one touches the border."""
    labels = np.zeros((60, 80), np.int32)
    for k, (y, x) in enumerate([(2, 3), (10, 40), (30, 5), (30, 11), (45, 60), (52, 71)]):
        labels[y : y + 3 + k, x : x + 4 + k] = k + 1
    return labels


def annotate(masks: np.ndarray) -> list[dict]:
    """COCO annotations, as the data sets have them, of bool (N, H, W)."""
    annotations = []
    for mask in masks:
        rle = mask_util.encode(np.asfortranarray(mask, np.uint8))
        rle["counts"] = rle["counts"].decode()
        box = {"bbox": mask_util.toBbox(rle).tolist(), "bbox_mode": BoxMode.XYWH_ABS}
        annotations.append({"category_id": 0, "iscrowd": 0, "segmentation": rle, **box})
    return annotations


def split(labels: np.ndarray) -> np.ndarray:
    return labels == np.arange(1, labels.max() + 1)[:, None, None]


@pytest.fixture
def dataset_dict(tmp_path):
    """The image shows 20 x label, so that it can be compared with what the masks say."""
    labels = square_labels()
    Image.fromarray((labels * 20).astype(np.uint8)).save(tmp_path / "image.png")
    Image.fromarray(labels.astype(np.uint16)).save(tmp_path / "label.png")
    return {
        "file_name": str(tmp_path / "image.png"),
        "label_file_name": str(tmp_path / "label.png"),
        "height": 60,
        "width": 80,
        "image_id": 7,
        "annotations": annotate(split(labels)),
    }


def masks_of(output: dict) -> torch.Tensor:
    return output["instances"].gt_masks.tensor


def test_training_output(dataset_dict):
    before = copy.deepcopy(dataset_dict)
    output = NucleiDatasetMapper(config(), True)(dataset_dict)
    assert dataset_dict == before
    assert "annotations" not in output
    assert output["image_id"] == 7
    assert (output["height"], output["width"]) == (60, 80)
    labels = square_labels()
    expected = np.repeat((labels * (255 / 6))[None], 3, axis=0)
    assert output["image"].dtype == torch.float32
    assert np.allclose(output["image"], expected, atol=1e-3)
    instances = output["instances"]
    assert instances.image_size == (60, 80)
    assert np.array_equal(masks_of(output), split(labels))
    assert instances.gt_classes.tolist() == [0] * 6
    assert instances.gt_classes.dtype == torch.int64
    assert instances.gt_boxes.tensor[:2].tolist() == [[3, 2, 7, 5], [40, 10, 45, 14]]
    assert instances.gt_boxes.tensor.dtype == torch.float32


def test_image_and_masks_stay_together_through_every_augmentation(dataset_dict):
    crop = ["INPUT.CROP.ENABLED", "True", "INPUT.CROP.SIZE", "[32, 40]"]
    turn = ["INPUT.RANDOM_FLIP", "both", "INPUT.RANDOM_ROTATE90", "True"]
    mapper = NucleiDatasetMapper(config(*crop, *turn, "INPUT.MIN_INSTANCE_AREA", "1"), True)
    shapes = set()
    for _ in range(30):
        output = mapper(dataset_dict)
        instances, masks = output["instances"], masks_of(output)
        shapes.add(instances.image_size)
        assert output["image"].shape[1:] == instances.image_size == masks.shape[1:]
        shown = (masks * instances.gt_masks.ids[:, None, None]).sum(dim=0) * (255 / 6)
        assert torch.allclose(output["image"][0], shown, atol=1e-3)
        assert torch.equal(instances.gt_boxes.tensor, BitMasks(masks).get_bounding_boxes().tensor)
    assert shapes == {(32, 40), (40, 32)}


def test_annotations_give_the_same_as_the_label_image(dataset_dict):
    from_label = NucleiDatasetMapper(config(), True)(dataset_dict)
    del dataset_dict["label_file_name"]
    from_rle = NucleiDatasetMapper(config(), True)(dataset_dict)
    assert torch.equal(masks_of(from_label), masks_of(from_rle))
    assert torch.equal(
        from_label["instances"].gt_boxes.tensor, from_rle["instances"].gt_boxes.tensor
    )


def test_overlapping_nuclei_come_whole_from_their_annotations(dataset_dict):
    masks = np.zeros((3, 60, 80), bool)
    masks[0, 5:20, 5:20] = True
    masks[1, 15:30, 15:30] = True
    masks[2, 40:50, 40:50] = True
    dataset_dict.update(annotations=annotate(masks), overlaps=True)
    output = NucleiDatasetMapper(config(), True)(dataset_dict)
    assert output["instances"].gt_masks.labels.shape == (2, 60, 80)
    order = output["instances"].gt_masks.ids - 1
    assert np.array_equal(masks_of(output), masks[order])
    assert output["instances"].gt_masks.area().sum() == masks.sum()


def test_layers_are_as_few_as_greedy_search_finds():
    masks = np.zeros((4, 20, 20), bool)
    masks[0, 0:8, 0:8] = True
    masks[1, 4:12, 4:12] = True  # overlaps 0
    masks[2, 10:18, 10:18] = True  # overlaps 1, not 0
    masks[3, 6:11, 6:11] = True  # overlaps 0, 1 and 2
    layers = paint_annotations(annotate(masks), (20, 20), "image.png")
    assert layers.shape == (20, 20, 3)
    for k, layer in enumerate([0, 1, 0, 2]):
        assert np.array_equal(layers[:, :, layer] == k + 1, masks[k])


def test_boxes_may_overlap_without_another_layer():
    masks = np.zeros((2, 20, 20), bool)
    masks[0] = np.tri(20, dtype=bool)
    masks[1] = ~masks[0]
    assert paint_annotations(annotate(masks), (20, 20), "image.png").shape == (20, 20, 1)


def test_polygons_and_uncompressed_masks():
    mask = np.zeros((20, 30), bool)
    mask[5:10, 10:20] = True
    polygon = [[10, 5, 20, 5, 20, 10, 10, 10]]
    starts = np.flatnonzero(np.diff(mask.T.ravel().astype(int), prepend=0, append=0))
    counts = np.diff(starts, prepend=0, append=mask.size).tolist()
    for segmentation in (polygon, {"size": [20, 30], "counts": counts}):
        layers = paint_annotations([{"segmentation": segmentation}], (20, 30), "image.png")
        assert np.array_equal(layers[:, :, 0], mask)


def test_crowds_and_empty_masks_are_left_out():
    masks = np.zeros((3, 20, 20), bool)
    masks[0, :9, :9] = True
    masks[2, 12:, 12:] = True
    annotations = annotate(masks)
    annotations[0]["iscrowd"] = 1
    layers = paint_annotations(annotations, (20, 20), "image.png")
    assert np.unique(layers).tolist() == [0, 3]


def test_image_without_nuclei(dataset_dict, tmp_path):
    Image.fromarray(np.zeros((60, 80), np.uint16)).save(tmp_path / "label.png")
    dataset_dict["annotations"] = []
    crop = ["INPUT.CROP.ENABLED", "True", "INPUT.CROP.SIZE", "[32, 32]"]
    for label_file in (dataset_dict["label_file_name"], None):
        dataset_dict["label_file_name"] = label_file
        instances = NucleiDatasetMapper(config(*crop), True)(dataset_dict)["instances"]
        assert len(instances) == 0
        assert instances.image_size == (32, 32)
        assert instances.gt_boxes.tensor.shape == (0, 4)
        assert instances.gt_masks.crop_and_resize(torch.zeros(0, 4), 28).shape == (0, 28, 28)


def test_small_instances_are_dropped():
    labels = square_labels()  # areas 12, 20, 30, 42, 56, 72
    instances = labels_to_instances(labels, min_area=30)
    assert instances.gt_masks.ids.tolist() == [3, 4, 5, 6]
    assert instances.gt_masks.area().tolist() == [30, 42, 56, 72]
    assert instances.gt_boxes.area().tolist() == [30, 42, 56, 72]


def test_min_instance_area_key(dataset_dict):
    mapper = NucleiDatasetMapper(config("INPUT.MIN_INSTANCE_AREA", "21"), True)
    assert mapper(dataset_dict)["instances"].gt_masks.ids.tolist() == [3, 4, 5, 6]


def test_evaluation_output(dataset_dict):
    dataset_dict["label_file_name"] = "is not read"
    output = NucleiDatasetMapper(config("INPUT.SCALE", "2.0"), False)(dataset_dict)
    assert output["image"].shape == (3, 120, 160)
    assert (output["height"], output["width"]) == (60, 80)
    assert "instances" not in output
    assert "annotations" not in output


def test_size_is_declared_where_the_dict_has_none(dataset_dict):
    output = NucleiDatasetMapper(config("INPUT.SCALE", "0.5"), False)(
        {"file_name": dataset_dict["file_name"]}
    )
    assert (output["height"], output["width"]) == (60, 80)
    assert output["image"].shape == (3, 30, 40)


def test_crop_is_normalised_with_the_whole_image(tmp_path):
    image = np.zeros((64, 64), np.uint16)
    image[:, 40:] = 1000
    image[0, 0] = 4000
    tifffile.imwrite(tmp_path / "a.tif", image)
    crop = ["INPUT.CROP.ENABLED", "True", "INPUT.CROP.SIZE", "[8, 8]"]
    mapper = NucleiDatasetMapper(config(*crop), True)
    seen = set()
    for _ in range(60):
        output = mapper({"file_name": str(tmp_path / "a.tif"), "annotations": []})
        seen |= set(output["image"].unique().round(decimals=2).tolist())
    assert seen <= {0, 63.75, 255}
    assert {0, 63.75} <= seen


def test_label_image_of_another_size(dataset_dict, tmp_path):
    Image.fromarray(np.zeros((60, 81), np.uint16)).save(tmp_path / "label.png")
    with pytest.raises(NucleiError, match=r"label\.png is 60 x 81.*image\.png is 60 x 80"):
        NucleiDatasetMapper(config(), True)(dataset_dict)


def test_label_image_with_another_number_of_nuclei(dataset_dict):
    del dataset_dict["annotations"][-1]
    with pytest.raises(NucleiError, match=r"label\.png: labels reach 6 .* list 5 nuclei"):
        NucleiDatasetMapper(config(), True)(dataset_dict)


def test_annotations_of_another_size(dataset_dict):
    dataset_dict["height"] = 61
    with pytest.raises(NucleiError, match=r"image\.png: image is 60 x 80.*say 61 x 80"):
        NucleiDatasetMapper(config(), False)(dataset_dict)


def test_mask_of_another_size(dataset_dict):
    del dataset_dict["label_file_name"]
    dataset_dict["annotations"] = annotate(np.ones((1, 80, 60), bool))
    with pytest.raises(NucleiError, match=r"image\.png: .*size \[80, 60\] .* size \[60, 80\]"):
        NucleiDatasetMapper(config(), True)(dataset_dict)


def test_annotation_without_mask():
    with pytest.raises(NucleiError, match=r"image\.png: an annotation has no segmentation"):
        paint_annotations([{"bbox": [0, 0, 4, 4]}], (20, 20), "image.png")


@pytest.mark.parametrize("num_workers", [0, 1])
def test_through_detectron2s_data_loader(dataset_dict, num_workers):
    """Also after OpenCV's threads ran in the parent process, which a forked worker lacks."""
    mapper = NucleiDatasetMapper(config("INPUT.SCALE", "1.5"), True)
    mapper(dataset_dict)
    loader = build_detection_train_loader(
        [dataset_dict] * 3, mapper=mapper, total_batch_size=2, num_workers=num_workers
    )
    batch = next(iter(loader))
    assert len(batch) == 2
    for output in batch:
        assert output["image"].shape == (3, 90, 120)
        masks = output["instances"].gt_masks
        assert torch.equal(masks.get_bounding_boxes().tensor, output["instances"].gt_boxes.tensor)
        assert len(masks) == 6


UNET = ("MODEL.META_ARCHITECTURE", "UNet", "MODEL.UNET.TARGET", "distance")


def test_semantic_targets_are_those_of_the_augmented_labels(dataset_dict):
    cfg = load_config(opts=[*UNET, "INPUT.CROP.SIZE", "[32, 40]"])
    for _ in range(3):
        output = NucleiDatasetMapper(cfg, True)(dataset_dict)
        labels = output["instances"].gt_masks.labels[0].numpy()
        assert output["sem_seg"].dtype == torch.uint8
        assert output["sem_seg"].shape == output["image"].shape[1:]
        assert (output["sem_seg"].numpy() == (labels > 0)).all()
        assert (output["distance"].numpy() == distance_target(labels)).all()


def test_semantic_targets_of_overlapping_nuclei(dataset_dict):
    masks = split(square_labels())
    masks[0, 12:17, 42:46] = True  # inside nucleus 2
    dataset_dict |= {"annotations": annotate(masks), "overlaps": True}
    output = NucleiDatasetMapper(config(*UNET), True)(dataset_dict)
    assert (output["sem_seg"].numpy() == masks.any(axis=0)).all()


@pytest.mark.parametrize("architecture", ["NucleiRCNN", "Classical"])
def test_no_semantic_targets_for_other_models(dataset_dict, architecture):
    cfg = config("MODEL.META_ARCHITECTURE", architecture)
    assert not {"sem_seg", "distance"} & set(NucleiDatasetMapper(cfg, True)(dataset_dict))
    assert "sem_seg" not in NucleiDatasetMapper(config(*UNET), False)(dataset_dict)

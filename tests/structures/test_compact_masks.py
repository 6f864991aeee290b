"""Masks without bitmaps, where Detectron2 expects its BitMasks or a tensor."""

import logging

import numpy as np
import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.video_visualizer import VideoVisualizer
from detectron2.utils.visualizer import ColorMode, Visualizer

from nuclei_d2.structures import BoxedMasks, LabelMasks


def boxed_masks() -> BoxedMasks:
    """Two nuclei that overlap, and one without a pixel, in 30 x 40 pixels."""
    values = torch.ones(12 * 10 + 9 * 11, dtype=torch.bool)
    values[:7] = False
    windows = torch.tensor([[3, 4, 15, 14], [10, 8, 19, 19], [0, 0, 0, 0]])
    return BoxedMasks(values, windows, (30, 40))


def label_masks() -> LabelMasks:
    """The same."""
    labels = torch.zeros(2, 30, 40, dtype=torch.int32)
    labels[0, 4:14, 3:15] = 5
    labels[0, 4, 3:10] = 0
    labels[1, 8:19, 10:19] = 2
    return LabelMasks(labels, torch.tensor([5, 2, 3]), torch.tensor([0, 1, 1]))


@pytest.fixture(params=[boxed_masks, label_masks])
def masks(request) -> BoxedMasks | LabelMasks:
    return request.param()


def instances_of(masks: BitMasks | torch.Tensor) -> Instances:
    bitmasks = masks if isinstance(masks, BitMasks) else BitMasks(masks)
    return Instances(
        (30, 40),
        pred_boxes=bitmasks.get_bounding_boxes(),
        scores=torch.tensor([0.9, 0.8, 0.7]),
        pred_classes=torch.zeros(3, dtype=torch.int64),
        pred_masks=masks,
    )


def test_is_a_bitmasks_with_a_tensor(masks):
    assert isinstance(masks, BitMasks)
    assert torch.equal(boxed_masks().tensor, label_masks().tensor)
    assert masks.tensor.dtype == torch.bool
    assert masks.tensor.sum(dim=(1, 2)).tolist() == masks.area().tolist() == [113, 99, 0]
    assert masks.nonempty().tolist() == [True, True, False]
    assert masks.shape == (3, 30, 40)
    assert torch.equal(masks.any(dim=0), masks.tensor.any(dim=0))
    assert masks.cpu().numpy().shape == (3, 30, 40)
    assert np.asarray(masks).sum() == 212
    assert repr(masks) == f"{type(masks).__name__}(num_instances=3, image_size=(30, 40))"
    box = Boxes(torch.tensor([[3.0, 4, 15, 14]])).tensor
    crop = masks[0].crop_and_resize(box, 10)
    assert torch.equal(crop, BitMasks(masks.tensor[:1]).crop_and_resize(box, 10))


def test_detectron2_evaluates_them(masks):
    dense = instances_of(masks.tensor)
    assert instances_to_coco_json(instances_of(masks), 1) == instances_to_coco_json(dense, 1)


def draw(masks, mode: ColorMode) -> np.ndarray:
    np.random.seed(0)  # colours
    metadata = MetadataCatalog.get("compact_masks_test")
    metadata.thing_colors = [(200, 30, 30)]
    image = np.full((30, 40, 3), 90, np.uint8)
    visualizer = Visualizer(image, metadata, instance_mode=mode)
    return visualizer.draw_instance_predictions(instances_of(masks)).get_image()


@pytest.mark.parametrize("mode", list(ColorMode))
def test_detectron2_draws_them(masks, mode):
    logging.getLogger("matplotlib").setLevel(logging.WARNING)
    picture = draw(masks, mode)
    assert (picture != 90).any()
    np.testing.assert_array_equal(picture, draw(masks.tensor, mode))


def test_detectron2_draws_them_as_ground_truth_and_in_videos(masks):
    image = np.full((30, 40, 3), 90, np.uint8)
    metadata = MetadataCatalog.get("compact_masks_test")
    pictures = []
    for form in (masks, masks.tensor):
        np.random.seed(0)
        visualizer = Visualizer(image, metadata)
        pictures.append(visualizer.overlay_instances(masks=form).get_image())
    np.testing.assert_array_equal(*pictures)
    video = VideoVisualizer(metadata, ColorMode.IMAGE_BW)
    assert (video.draw_instance_predictions(image, instances_of(masks)).get_image() != 90).any()

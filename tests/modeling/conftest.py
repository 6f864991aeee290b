import pytest
import torch
from detectron2.structures import Instances

from nuclei_d2.config import load_config
from nuclei_d2.structures.label_masks import LabelMasks

TINY_MODEL = """
MODEL:
  DEVICE: cpu
  BACKBONE: {NAME: build_resnet_fpn_backbone, FREEZE_AT: 0}
  RESNETS:
    DEPTH: 18
    RES2_OUT_CHANNELS: 64
    NORM: BN
    OUT_FEATURES: [res2, res3, res4, res5]
  FPN: {IN_FEATURES: [res2, res3, res4, res5], OUT_CHANNELS: 32}
  ANCHOR_GENERATOR: {SIZES: [[8], [16], [32], [64], [128]]}
  RPN: {IN_FEATURES: [p2, p3, p4, p5, p6], POST_NMS_TOPK_TRAIN: 100, POST_NMS_TOPK_TEST: 20}
  ROI_HEADS:
    NAME: StandardROIHeads
    IN_FEATURES: [p2, p3, p4, p5]
    BATCH_SIZE_PER_IMAGE: 32
    SCORE_THRESH_TEST: 0.0
  ROI_BOX_HEAD:
    NAME: FastRCNNConvFCHead
    NUM_FC: 1
    FC_DIM: 32
    POOLER_RESOLUTION: 7
    CLS_AGNOSTIC_BBOX_REG: true
    TRAIN_ON_PRED_BOXES: true
  ROI_MASK_HEAD:
    NAME: BoundaryMaskHead
    POOLER_TYPE: ""
    NUM_CONV: 4
    CONV_DIM: 16
"""


@pytest.fixture
def tiny_config(tmp_path):
    """Function of KEY, VALUE, ... -> config of a small Mask Boundary R-CNN."""

    def build(*opts):
        file = tmp_path / "tiny.yaml"
        file.write_text(TINY_MODEL)
        return load_config(str(file), opts)

    return build


def grid_of_nuclei(num, side, pitch, image_size):
    """Instances: ``num`` squares of ``side`` pixels, one every ``pitch`` pixels."""
    labels = torch.zeros(1, image_size, image_size, dtype=torch.int32)
    for k in range(num):
        row, column = divmod(k, image_size // pitch)
        y, x = row * pitch + 2, column * pitch + 2
        labels[0, y : y + side, x : x + side] = k + 1
    masks = LabelMasks(labels, torch.arange(1, num + 1))
    return Instances(
        (image_size, image_size),
        gt_boxes=masks.get_bounding_boxes(),
        gt_classes=torch.zeros(num, dtype=torch.int64),
        gt_masks=masks,
    )


@pytest.fixture
def training_input():
    """Function of the number of nuclei -> one dict as the mapper gives it to the model."""

    def build(num_nuclei, side=14, pitch=20, image_size=96):
        return {
            "image": torch.rand(3, image_size, image_size) * 255,
            "height": 2 * image_size,
            "width": image_size,
            "instances": grid_of_nuclei(num_nuclei, side, pitch, image_size),
        }

    return build

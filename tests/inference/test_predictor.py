import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from PIL import Image

from nuclei_d2.config import load_config
from nuclei_d2.data.dataset_mapper import NucleiDatasetMapper
from nuclei_d2.data.image_io import read_image
from nuclei_d2.inference.predictor import NucleiPredictor
from nuclei_d2.utils.errors import NucleiError

_OPTIONS = """
MODEL.DEVICE cpu
MODEL.BACKBONE.NAME build_resnet_fpn_backbone
MODEL.RESNETS.DEPTH 18
MODEL.RESNETS.RES2_OUT_CHANNELS 64
MODEL.RESNETS.OUT_FEATURES ['res2','res3','res4','res5']
MODEL.FPN.IN_FEATURES ['res2','res3','res4','res5']
MODEL.FPN.OUT_CHANNELS 32
MODEL.ANCHOR_GENERATOR.SIZES [[8],[16],[32],[64],[128]]
MODEL.RPN.IN_FEATURES ['p2','p3','p4','p5','p6']
MODEL.RPN.POST_NMS_TOPK_TEST 20
MODEL.ROI_HEADS.NAME StandardROIHeads
MODEL.ROI_HEADS.IN_FEATURES ['p2','p3','p4','p5']
MODEL.ROI_HEADS.SCORE_THRESH_TEST 0.0
MODEL.ROI_BOX_HEAD.NAME FastRCNNConvFCHead
MODEL.ROI_BOX_HEAD.NUM_FC 1
MODEL.ROI_BOX_HEAD.FC_DIM 32
MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION 7
MODEL.ROI_MASK_HEAD.NAME BoundaryMaskHead
MODEL.ROI_MASK_HEAD.POOLER_TYPE ''
MODEL.ROI_MASK_HEAD.NUM_CONV 1
MODEL.ROI_MASK_HEAD.CONV_DIM 16
MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION 14
"""
TINY = _OPTIONS.split()


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "model.pth"
    torch.save({"model": build_model(load_config("", TINY)).state_dict()}, path)
    return path


def predictor_with(weights, *opts):
    return NucleiPredictor(load_config("", [*TINY, "MODEL.WEIGHTS", str(weights), *opts]))


@pytest.fixture
def image_file(tmp_path):
    pixels = np.random.default_rng(0).integers(200, 5000, (40, 60), np.uint16)
    Image.fromarray(pixels).save(tmp_path / "cells.tif")
    return tmp_path / "cells.tif"


def test_instances_come_at_the_size_of_the_file(weights, image_file):
    predictor = predictor_with(weights, "INPUT.SCALE", "2.0")
    instances = predictor(image_file)
    assert instances.image_size == (40, 60)
    assert len(instances) > 0
    assert instances.pred_masks.shape == (len(instances), 40, 60)
    assert instances.pred_masks.dtype == torch.bool
    assert instances.pred_boundaries.shape == (len(instances), 40, 60)
    assert instances.pred_boundaries.dtype == torch.uint8
    again = predictor(read_image(image_file))
    assert torch.equal(instances.scores, again.scores)
    boundaries = instances.pred_boundaries.tensor
    assert torch.equal(boundaries, again.pred_boundaries.tensor)


@pytest.mark.parametrize("opts", [(), ("INPUT.SCALE", "1.5", "INPUT.FORMAT", "BGR")])
def test_the_network_sees_what_it_sees_in_evaluation(weights, image_file, opts):
    predictor = predictor_with(weights, *opts)
    seen = []

    def model(inputs):
        seen.extend(inputs)
        return [{"instances": Instances((40, 60), pred_boxes=Boxes(torch.zeros(0, 4)))}]

    predictor.model = model
    predictor(image_file)
    mapper = NucleiDatasetMapper(load_config("", [*TINY, *opts]), False)
    expected = mapper({"file_name": str(image_file), "height": 40, "width": 60})
    assert torch.equal(seen[0]["image"], expected["image"])
    assert (seen[0]["height"], seen[0]["width"]) == (40, 60)


def test_the_callers_config_is_not_changed_and_may_be_frozen(weights):
    cfg = load_config("", [*TINY, "MODEL.WEIGHTS", str(weights)])
    cfg.freeze()
    before = cfg.dump()
    assert not NucleiPredictor(cfg).model.training
    assert cfg.dump() == before


def test_a_broken_image_is_named(weights, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG")
    with pytest.raises(NucleiError, match=r"broken\.png"):
        predictor_with(weights)(tmp_path / "broken.png")


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (("MODEL.WEIGHTS", ""), "MODEL.WEIGHTS is empty"),
        (("MODEL.WEIGHTS", "nowhere.pth"), r"nowhere\.pth"),
        (("MODEL.FPN.OUT_CHANNELS", "16"), "does not fit this config"),
    ],
)
def test_wrong_weights_are_refused(weights, opts, message):
    with pytest.raises(NucleiError, match=message):
        predictor_with(weights, *opts)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(weights):
    with pytest.raises(NucleiError, match=r"MODEL\.DEVICE.*cpu"):
        predictor_with(weights, "MODEL.DEVICE", "cuda")

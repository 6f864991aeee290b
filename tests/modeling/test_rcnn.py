import pytest
import torch
from detectron2.modeling import build_model
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from nuclei_d2.layers import SmallROIAlign
from nuclei_d2.modeling.meta_arch.rcnn import NucleiRCNN, postprocess

ROI_HEADS = {
    "standard": [],
    "cascade": ["MODEL.ROI_HEADS.NAME", "CascadeROIHeads"],
}
MASK_HEADS = {
    "boundary": [],
    "baseline": [
        *("MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead"),
        *("MODEL.ROI_MASK_HEAD.POOLER_TYPE", "ROIAlignV2"),
    ],
}


@pytest.fixture
def build(tiny_config):
    def build(*opts):
        torch.manual_seed(0)
        return build_model(tiny_config(*opts))

    return build


def train_step(model, inputs):
    with EventStorage():
        losses = model(inputs)
    sum(losses.values()).backward()
    return losses


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("mask_head", MASK_HEADS)
@pytest.mark.parametrize("roi_heads", ROI_HEADS)
def test_train_and_predict(build, training_input, roi_heads, mask_head, autocast):
    model = build(*ROI_HEADS[roi_heads], *MASK_HEADS[mask_head])
    assert type(model) is NucleiRCNN
    inputs = [training_input(9), training_input(0)]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        losses = train_step(model, inputs)
        assert ("loss_boundary_dice" in losses) == (mask_head == "boundary")
        assert all(v.dtype == torch.float32 and v.isfinite() for v in losses.values())
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        with torch.no_grad():
            outputs = model.eval()(inputs)
    for output in outputs:
        found = output["instances"]
        assert found.image_size == (192, 96)
        assert len(found) > 0
        assert found.pred_masks.shape == (len(found), 192, 96)
        assert found.pred_masks.dtype == torch.bool
        assert found.has("pred_boundaries") == (mask_head == "boundary")
        if mask_head == "boundary":
            assert found.pred_boundaries.shape == (len(found), 192, 96)
            assert found.pred_boundaries.dtype == torch.uint8


@pytest.mark.parametrize("mask_head", MASK_HEADS)
@pytest.mark.parametrize("roi_heads", ROI_HEADS)
def test_inference_in_bfloat16(build, training_input, monkeypatch, roi_heads, mask_head):
    monkeypatch.setattr("nuclei_d2.utils.precision.bfloat16_support", lambda: "fast")
    inputs, opts = [training_input(9)], [*ROI_HEADS[roi_heads], *MASK_HEADS[mask_head]]
    seen = []
    for enabled in ("False", "True"):
        model = build(*opts, "TEST.AMP.ENABLED", enabled).eval()
        features = []
        model.backbone.fpn_output2.register_forward_hook(
            lambda module, args, output, features=features: features.append(output.dtype)
        )
        with torch.no_grad():
            found = model.inference(inputs, do_postprocess=False)[0]
        assert features == [torch.bfloat16 if enabled == "True" else torch.float32]
        dtypes = {x.dtype for x in found.get_fields().values() if torch.is_tensor(x)}
        assert dtypes == {torch.float32, torch.int64}
        assert found.pred_boxes.tensor.dtype == torch.float32
        seen.append(found.scores.max())
    torch.testing.assert_close(*seen, atol=0.02, rtol=0)


@pytest.mark.parametrize("roi_heads", ROI_HEADS)
def test_features_are_pooled_as_detectron2_does(build, training_input, roi_heads):
    """NucleiRCNN pools and lays out memory in its own way; GeneralizedRCNN does not."""
    inputs, opts = [training_input(9)], [*ROI_HEADS[roi_heads], *MASK_HEADS["baseline"]]
    ours = build(*opts).eval()
    stock = build(*opts, "MODEL.META_ARCHITECTURE", "GeneralizedRCNN").eval()
    stock.load_state_dict(ours.state_dict())
    pooled = []
    for model in (ours, stock):
        with torch.no_grad():
            images = ours.preprocess_image(inputs)
            features = model.backbone(images.tensor)
            features = [features[name] for name in ("p2", "p3", "p4", "p5")]
            boxes = [Boxes(torch.tensor([[3.0, 4, 30, 40], [1, 2, 90, 80], [5, 5, 5, 9]]))]
            heads = model.roi_heads
            pooled.append([pool(features, boxes) for pool in (heads.box_pooler, heads.mask_pooler)])
    for first, second in zip(*pooled, strict=True):
        assert torch.allclose(first, second, atol=1e-5)
    assert {type(pool) for pool in ours.roi_heads.box_pooler.level_poolers} == {SmallROIAlign}


def test_batch_without_nuclei(build, training_input):
    model = build()
    losses = train_step(model, [training_input(0)])
    assert losses["loss_mask"] == losses["loss_boundary"] == losses["loss_boundary_dice"] == 0
    assert all(p.grad is not None for p in model.roi_heads.mask_head.parameters())


def test_image_without_detections(build, training_input):
    model = build("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 1.0).eval()
    with torch.no_grad():
        found = model([training_input(0)])[0]["instances"]
    assert len(found) == 0
    assert found.pred_masks.shape == found.pred_boundaries.shape == (0, 192, 96)


def test_a_thousand_nuclei(build, training_input):
    model = build("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 128)
    crowd = training_input(1000, side=6, pitch=8, image_size=256)
    losses = train_step(model, [crowd])
    assert all(v.isfinite() for v in losses.values())
    with torch.no_grad():
        assert len(model.eval()([crowd])[0]["instances"]) > 0


def test_raw_results_on_request(build, training_input):
    model = build().eval()
    with torch.no_grad():
        raw = model.inference([training_input(4)], do_postprocess=False)[0]
        again = model.inference([training_input(4)], [raw])[0]["instances"]
    assert raw.image_size == (96, 96)
    assert raw.pred_boundaries.shape == (len(raw), 1, 28, 28)
    assert again.pred_boundaries.shape[1:] == (192, 96)


def test_features_are_float32_inside_autocast(build):
    model = build()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = model.backbone(torch.rand(1, 3, 64, 64))
    assert {f.dtype for f in features.values()} == {torch.float32}


def constant_maps(values):
    return torch.tensor(values)[:, None, None, None].expand(-1, 1, 28, 28).clone()


def test_boundaries_are_pasted_into_their_own_boxes():
    # The second box is empty and dropped; the image is enlarged twice.
    results = Instances(
        (20, 30),
        pred_boxes=Boxes(torch.tensor([[1.0, 2, 5, 8], [9, 9, 9, 12], [10, 4, 20, 14]])),
        scores=torch.tensor([0.9, 0.8, 0.7]),
        pred_masks=constant_maps([0.9, 0.9, 0.2]),
        pred_boundaries=constant_maps([0.25, 0.5, 0.75]),
    )
    results = postprocess(results, 40, 60)
    assert results.scores.tolist() == pytest.approx([0.9, 0.7])
    expected = torch.zeros(2, 40, 60, dtype=torch.uint8)
    expected[0, 4:16, 2:10] = 63  # of 63.75
    expected[1, 8:28, 20:40] = 191  # of 191.25
    assert torch.equal(results.pred_boundaries.tensor, expected)
    assert torch.equal(next(iter(results.pred_masks)), expected[0] > 0)
    assert results.pred_masks.nonempty().tolist() == [True, False]


def test_empty_results_keep_the_shape():
    results = Instances(
        (20, 30),
        pred_boxes=Boxes(torch.zeros(0, 4)),
        pred_masks=torch.zeros(0, 1, 28, 28),
        pred_boundaries=torch.zeros(0, 1, 28, 28),
    )
    results = postprocess(results, 40, 60)
    assert results.pred_boundaries.shape == results.pred_masks.shape == (0, 40, 60)
    assert results.pred_boundaries.dtype == torch.uint8


@pytest.mark.parametrize("mask_head", MASK_HEADS)
def test_same_predictions_as_detectron2(build, training_input, mask_head):
    model, inputs = build(*MASK_HEADS[mask_head]).eval(), [training_input(9)]
    with torch.no_grad():
        found = model(inputs)[0]["instances"]
        raw = model.inference(inputs, do_postprocess=False)[0]
    expected = detector_postprocess(raw, 192, 96)
    assert torch.equal(found.pred_masks.tensor, expected.pred_masks)
    assert torch.equal(found.pred_boxes.tensor, expected.pred_boxes.tensor)
    assert torch.equal(found.scores, expected.scores)


@pytest.mark.parametrize("level", [10.0, 230.0])
def test_padding_looks_like_the_background(tiny_config, level):
    model = build_model(tiny_config())
    image = torch.full((3, 40, 60), level)
    image[:, 10:20, 10:20] = 255 - level
    batch = model.preprocess_image([{"image": image}, {"image": torch.full((3, 64, 32), 100.0)}])
    assert batch.tensor.shape == (2, 3, 64, 64)
    raw = batch.tensor * model.pixel_std + model.pixel_mean
    assert torch.allclose(raw[0, :, :40, :60], image, atol=1e-3)
    assert torch.allclose(raw[0, :, 40:], torch.tensor(level), atol=1e-3)
    assert torch.allclose(raw[0, :, :, 60:], torch.tensor(level), atol=1e-3)
    assert torch.allclose(raw[1], torch.tensor(100.0), atol=1e-3)

import math

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads import build_mask_head
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from torch.nn import functional as F

from nuclei_d2.modeling import BoundaryMaskHead
from nuclei_d2.modeling.roi_heads import boundary_mask_head
from nuclei_d2.utils.errors import NucleiError

CHANNELS, DIM = 32, 16
LEVELS = {"p2": 4, "p3": 8, "p4": 16, "p5": 32}
SHAPES = {name: ShapeSpec(channels=CHANNELS, stride=stride) for name, stride in LEVELS.items()}
LOSSES = ["loss_mask", "loss_boundary", "loss_boundary_dice"]


@pytest.fixture
def build_head(tiny_config):
    def build(*opts):
        torch.manual_seed(0)
        return build_mask_head(
            tiny_config(*(f"MODEL.{o}" if i % 2 == 0 else o for i, o in enumerate(opts))), SHAPES
        )

    return build


def feature_maps(num_images=1):
    torch.manual_seed(1)
    return {name: torch.rand(num_images, CHANNELS, 64 // s, 64 // s) for name, s in LEVELS.items()}


def proposals(num=3, gt_class=0):
    """RoIs on a 20 x 20 nucleus: around it, inside it, over its left half."""
    mask = torch.zeros(1, 64, 64, dtype=torch.bool)
    mask[:, 20:40, 20:40] = True
    boxes = torch.tensor([[16.0, 16, 44, 44], [25, 25, 35, 35], [20, 20, 30, 40]])
    return Instances(
        (64, 64),
        proposal_boxes=Boxes(boxes[:num]),
        gt_classes=torch.full((num,), gt_class),
        gt_masks=BitMasks(mask.expand(num, 64, 64)),
    )


def detections(num, pred_class=0):
    return Instances(
        (64, 64),
        pred_boxes=proposals(num).proposal_boxes,
        pred_classes=torch.full((num,), pred_class),
    )


def num_parameters(module):
    return sum(p.numel() for p in module.parameters())


def test_shapes_at_every_stage(build_head):
    head = build_head()
    shapes = {}
    for name, module in head.named_modules():
        module.register_forward_hook(lambda _m, _i, out, n=name: shapes.update({n: out}))
    head(feature_maps(), [proposals(3)])
    shapes = {n: tuple(out.shape) for n, out in shapes.items() if torch.is_tensor(out)}
    assert shapes["mask_pooler"] == (3, CHANNELS, 14, 14)
    assert shapes["boundary_pooler"] == (3, CHANNELS, 28, 28)
    for stage in (
        *("mask_convs", "boundary_downsample", "mask_to_boundary", "boundary_convs"),
        *("boundary_to_mask", "mask_fusion"),
    ):
        assert shapes[stage] == (3, DIM, 14, 14), stage
    assert shapes["mask_predictor"] == shapes["boundary_predictor"] == (3, 1, 28, 28)


def test_parameters(build_head):
    head = build_head()

    def conv(in_channels, kernel):
        return in_channels * DIM * kernel**2 + DIM

    branch_out = conv(DIM, 2) + DIM + 1
    expected = (
        (conv(CHANNELS, 3) + 3 * conv(DIM, 3))  # F_m
        + (conv(CHANNELS, 3) + conv(DIM, 1) + 2 * conv(DIM, 3))  # F_b
        + (conv(DIM, 1) + conv(DIM, 3))  # F_m'
        + 2 * branch_out
    )
    assert num_parameters(head) == expected
    control = build_head(
        *("ROI_MASK_HEAD.BOUNDARY.BCE_WEIGHT", 0.0, "ROI_MASK_HEAD.BOUNDARY.DICE_WEIGHT", 0.0)
    )
    assert num_parameters(control) == expected


def test_initial_weights(build_head):
    head = build_head("ROI_MASK_HEAD.CONV_DIM", 128)
    for predictor in (head.mask_predictor.predictor, head.boundary_predictor.predictor):
        assert predictor.weight.std().item() == pytest.approx(0.001, rel=0.25)
        assert predictor.bias.tolist() == [0]
    # MSRA fill: variance 2 / (output channels x kernel size).
    for conv, kernel in ((head.mask_fusion, 3), (head.mask_to_boundary, 1)):
        std = math.sqrt(2 / (128 * kernel**2))
        assert conv.weight.std().item() == pytest.approx(std, rel=0.05)
        assert conv.bias.abs().max() == 0


def test_layers_are_wired_as_published(build_head):
    head = build_head().double()
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    w = dict(head.named_parameters())
    mask, boundary = torch.rand(2, CHANNELS, 14, 14), torch.rand(2, CHANNELS, 28, 28)
    mask, boundary = mask.double(), boundary.double()

    def conv(x, name, **kwargs):
        return F.relu(F.conv2d(x, w[f"{name}.weight"], w[f"{name}.bias"], **kwargs))

    def predict(x, name):
        x = F.conv_transpose2d(x, w[f"{name}.deconv.weight"], w[f"{name}.deconv.bias"], stride=2)
        return F.conv2d(F.relu(x), w[f"{name}.predictor.weight"], w[f"{name}.predictor.bias"])

    f_m = mask
    for k in range(4):
        f_m = conv(f_m, f"mask_convs.{k}", padding=1)
    f_b = conv(boundary, "boundary_downsample", stride=2, padding=1) + conv(f_m, "mask_to_boundary")
    for k in range(2):
        f_b = conv(f_b, f"boundary_convs.{k}", padding=1)
    f_m2 = conv(conv(f_b, "boundary_to_mask") + f_m, "mask_fusion", padding=1)

    mask_logits, boundary_logits = head.layers(mask, boundary)
    assert torch.allclose(mask_logits.double(), predict(f_m2, "mask_predictor"), atol=1e-5)
    assert torch.allclose(boundary_logits.double(), predict(f_b, "boundary_predictor"), atol=1e-5)


@pytest.mark.parametrize(("target", "boundary_pixels"), [("exact", [76, 0]), ("paper", [76, 108])])
def test_losses_of_undecided_logits(build_head, target, boundary_pixels):
    # All logits 0. RoI 1: the 20 x 20 nucleus has 4 * 19 boundary pixels; RoI 2 lies inside it.
    head = build_head("ROI_MASK_HEAD.BOUNDARY.TARGET", target)
    for predictor in (head.mask_predictor.predictor, head.boundary_predictor.predictor):
        torch.nn.init.zeros_(predictor.weight)
    losses = head(feature_maps(), [proposals(2)])
    assert list(losses) == LOSSES
    half = 28 * 28 / 2
    dice = [1 - (n + 1) / (half + n + 1) for n in boundary_pixels]
    expected = [math.log(2), math.log(2), sum(dice) / 2]
    assert [losses[k].item() for k in LOSSES] == pytest.approx(expected, rel=1e-5)


def test_losses_are_weighted(build_head):
    plain = build_head()(feature_maps(), [proposals()])
    weighted = build_head(
        *("ROI_MASK_HEAD.BOUNDARY.MASK_WEIGHT", 2.0),
        *("ROI_MASK_HEAD.BOUNDARY.BCE_WEIGHT", 3.0),
        *("ROI_MASK_HEAD.BOUNDARY.DICE_WEIGHT", 0.5),
    )(feature_maps(), [proposals()])
    for name, weight in zip(LOSSES, (2, 3, 0.5), strict=True):
        assert weighted[name].item() == pytest.approx(weight * plain[name].item())


def test_losses_look_at_the_ground_truth_class(build_head):
    head = build_head("ROI_HEADS.NUM_CLASSES", 3)
    sum(head(feature_maps(), [proposals(gt_class=2)]).values()).backward()
    for predictor in (head.mask_predictor.predictor, head.boundary_predictor.predictor):
        assert predictor.bias.grad[:2].tolist() == [0, 0]
        assert predictor.bias.grad[2] != 0
    agnostic = build_head("ROI_HEADS.NUM_CLASSES", 3, "ROI_MASK_HEAD.CLS_AGNOSTIC_MASK", True)
    assert agnostic.mask_predictor.predictor.out_channels == 1
    agnostic(feature_maps(), [proposals(gt_class=2)])


def has_gradient(module):
    return all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())


def test_mask_loss_reaches_the_boundary_branch(build_head):
    head = build_head()
    head(feature_maps(), [proposals()])["loss_mask"].backward()
    for name in ("boundary_to_mask", "boundary_convs", "boundary_downsample", "mask_to_boundary"):
        assert has_gradient(getattr(head, name)), name
    assert all(p.grad is None for p in head.boundary_predictor.parameters())


@pytest.mark.parametrize("loss", ["loss_boundary", "loss_boundary_dice"])
def test_boundary_losses_reach_the_mask_branch(build_head, loss):
    head = build_head()
    head(feature_maps(), [proposals()])[loss].backward()
    for name in ("mask_to_boundary", "mask_convs", "boundary_downsample", "boundary_convs"):
        assert has_gradient(getattr(head, name)), name
    for name in ("boundary_to_mask", "mask_fusion", "mask_predictor"):
        assert all(p.grad is None for p in getattr(head, name).parameters()), name


def test_control_trains_on_the_mask_alone(build_head):
    opts = ["ROI_MASK_HEAD.BOUNDARY.BCE_WEIGHT", 0.0, "ROI_MASK_HEAD.BOUNDARY.DICE_WEIGHT", 0.0]
    control = build_head(*opts)
    losses = control(feature_maps(), [proposals()])
    assert losses["loss_boundary"].item() == losses["loss_boundary_dice"].item() == 0
    assert losses["loss_mask"].item() > 0
    sum(losses.values()).backward()
    # Zero gradients, not missing ones: distributed training waits for all of them.
    assert all(p.grad is not None for p in control.parameters())
    assert all(p.grad.abs().sum() == 0 for p in control.boundary_predictor.parameters())
    assert has_gradient(control.boundary_convs)


@pytest.mark.parametrize("norm", ["", "GN"])
def test_no_foreground_gives_zero_losses_with_gradients(build_head, norm):
    head = build_head("ROI_MASK_HEAD.NORM", norm, "ROI_MASK_HEAD.CONV_DIM", 32)
    nothing = Instances(
        (64, 64), proposal_boxes=Boxes(torch.zeros(0, 4)), gt_classes=torch.zeros(0).long()
    )
    losses = head(feature_maps(2), [nothing, nothing])
    assert [losses[k].item() for k in LOSSES] == [0, 0, 0]
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() == 0 for p in head.parameters())


def test_images_without_nuclei_are_skipped(build_head):
    head = build_head()
    nothing = Instances(
        (64, 64), proposal_boxes=Boxes(torch.zeros(0, 4)), gt_classes=torch.zeros(0).long()
    )
    alone = head({k: v[1:] for k, v in feature_maps(2).items()}, [proposals()])
    beside = head(feature_maps(2), [nothing, proposals()])
    for name in LOSSES:
        assert beside[name].item() == pytest.approx(alone[name].item())


def test_mask_accuracy_is_logged(build_head):
    # Bias 1 calls everything foreground: 400 of 784 pixels are, then all 784.
    head = build_head()
    torch.nn.init.ones_(head.mask_predictor.predictor.bias)
    torch.nn.init.zeros_(head.mask_predictor.predictor.weight)
    with EventStorage() as storage:
        head(feature_maps(), [proposals(2)])
    latest = {name: value for name, (value, _) in storage.latest().items()}
    assert latest["mask_rcnn/accuracy"] == pytest.approx((400 + 784) / (2 * 784))
    assert latest["mask_rcnn/false_positive"] == 1
    assert latest["mask_rcnn/false_negative"] == 0


def test_bfloat16_autocast(build_head):
    head = build_head()
    expected = head(feature_maps(), [proposals()])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = head(feature_maps(), [proposals()])
        predicted = head.eval()(feature_maps(), [detections(3)])[0]
    for name in LOSSES:
        assert losses[name].dtype == torch.float32
        assert losses[name].item() == pytest.approx(expected[name].item(), rel=0.02)
    assert predicted.pred_masks.dtype == predicted.pred_boundaries.dtype == torch.float32


def test_inference_attaches_masks_and_boundaries(build_head):
    head = build_head("ROI_HEADS.NUM_CLASSES", 2).eval()
    for predictor, bias in (
        (head.mask_predictor.predictor, [0.0, 2.0]),
        (head.boundary_predictor.predictor, [0.0, -3.0]),
    ):
        torch.nn.init.zeros_(predictor.weight)
        predictor.bias.data.copy_(torch.tensor(bias))
    results = head(feature_maps(2), [detections(2, pred_class=1), detections(0)])
    assert [len(r) for r in results] == [2, 0]
    for result in results:
        assert result.pred_masks.shape == result.pred_boundaries.shape == (len(result), 1, 28, 28)
    sigmoid = [1 / (1 + math.exp(-2)), 1 / (1 + math.exp(3))]
    assert results[0].pred_masks.unique().tolist() == pytest.approx(sigmoid[:1])
    assert results[0].pred_boundaries.unique().tolist() == pytest.approx(sigmoid[1:])


def test_inference_in_batches(build_head, monkeypatch):
    head = build_head().eval()
    features, found = feature_maps(2), [detections(3), detections(2)]
    expected = head(features, found)
    maps = [torch.cat([x.pred_masks, x.pred_boundaries]) for x in expected]
    monkeypatch.setattr(boundary_mask_head, "INFERENCE_ROIS", 2)
    for batched, reference in zip(head(features, found), maps, strict=True):
        batched = torch.cat([batched.pred_masks, batched.pred_boundaries])
        assert torch.allclose(batched, reference, atol=1e-6)


def test_control_attaches_no_boundaries(build_head):
    opts = ["ROI_MASK_HEAD.BOUNDARY.BCE_WEIGHT", 0.0, "ROI_MASK_HEAD.BOUNDARY.DICE_WEIGHT", 0.0]
    result = build_head(*opts).eval()(feature_maps(), [detections(2)])[0]
    assert result.has("pred_masks")
    assert not result.has("pred_boundaries")
    result = build_head(*opts[:2]).eval()(feature_maps(), [detections(2)])[0]
    assert result.has("pred_boundaries")


@pytest.mark.parametrize(
    ("key", "value", "remedy"),
    [
        ("POOLER_TYPE", "ROIAlignV2", "POOLER_TYPE to ''"),
        ("BOUNDARY.POOLER_RESOLUTION", 14, "must be twice"),
        ("BOUNDARY.IN_FEATURES", ["p6"], r"\['p6'\] must be among"),
    ],
)
def test_impossible_config_is_one_clear_line(build_head, key, value, remedy):
    with pytest.raises(NucleiError, match=remedy) as error:
        build_head(f"ROI_MASK_HEAD.{key}", value)
    assert "\n" not in str(error.value)


def test_registered():
    from detectron2.modeling import ROI_MASK_HEAD_REGISTRY

    assert ROI_MASK_HEAD_REGISTRY.get("BoundaryMaskHead") is BoundaryMaskHead

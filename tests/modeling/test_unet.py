import numpy as np
import pytest
import torch
from detectron2.structures import Instances
from detectron2.utils.events import EventStorage
from tiny import CONFIGS

from nuclei_d2.config import load_config
from nuclei_d2.data.targets import build_target
from nuclei_d2.modeling import UNetDecoder, UNetEncoder, build_model
from nuclei_d2.structures import LabelMasks
from nuclei_d2.utils.errors import NucleiError

TINY = (
    *("MODEL.META_ARCHITECTURE", "UNet", "MODEL.DEVICE", "cpu"),
    *("MODEL.BACKBONE.NAME", "build_unet_encoder", "MODEL.UNET.WIDTH", "4"),
    *("MODEL.UNET.DEPTH", "3", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0"),
)
RESNET = (
    *("MODEL.BACKBONE.NAME", "build_resnet_backbone", "MODEL.BACKBONE.FREEZE_AT", "0"),
    *("MODEL.RESNETS.DEPTH", "18", "MODEL.RESNETS.RES2_OUT_CHANNELS", "64"),
    *("MODEL.RESNETS.NORM", "BN"),
    *("MODEL.RESNETS.OUT_FEATURES", "['stem', 'res2', 'res3', 'res4', 'res5']"),
)
TARGETS = {
    "two_class": ("MODEL.UNET.TARGET", "two_class"),
    "inner": ("MODEL.UNET.TARGET", "boundary"),
    "thick": ("MODEL.UNET.TARGET", "boundary", "MODEL.UNET.BOUNDARY", "thick"),
    "distance": ("MODEL.UNET.TARGET", "distance"),
}
CLASSES = {"two_class": 2, "inner": 3, "thick": 3, "distance": 2}
by_target = pytest.mark.parametrize("target", TARGETS)


def config(*opts):
    return load_config("", [*TINY, *opts])


def build(*opts):
    torch.manual_seed(0)
    return build_model(config(*opts))


def two_squares(height=40, width=52):
    """Two touching squares, brighter than the ground."""
    labels = np.zeros((height, width), np.int32)
    labels[6:26, 5:20], labels[6:26, 20:37] = 1, 2
    image = torch.from_numpy(np.where(labels > 0, 200.0, 20.0)).float()
    return image.expand(3, -1, -1).clone(), labels


def training_input(cfg, image, labels):
    return {"image": image, **build_target(cfg)(labels)}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("encoder", [(), RESNET], ids=["plain", "resnet"])
@by_target
def test_train_and_predict(target, encoder, autocast):
    cfg = config(*TARGETS[target], *encoder)
    model = build_model(cfg)
    image, labels = two_squares()
    # Sizes that are no multiple of the stride, and differ within the batch.
    batch = [
        training_input(cfg, image, labels),
        training_input(cfg, image[:, :21, :33], 0 * labels[:21, :33]),
    ]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), EventStorage():
        losses = model(batch)
        names = {"loss_ce", "loss_dice"} | ({"loss_distance"} if target == "distance" else set())
        assert set(losses) == names
        assert all(v.dtype == torch.float32 and v.isfinite() for v in losses.values())
        sum(losses.values()).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        model.eval()
        with torch.no_grad():
            outputs = model(
                [{"image": image, "height": 80, "width": 104}, {"image": image[:, :21]}]
            )
    for output, size in zip(outputs, [(80, 104), (21, 52)], strict=True):
        assert output["sem_seg"].shape == (CLASSES[target], *size)
        assert output["sem_seg"].dtype == torch.float32
        assert torch.allclose(output["sem_seg"].sum(dim=0), torch.ones(size), atol=1e-5)
        found = output["instances"]
        assert isinstance(found, Instances)
        assert found.image_size == size
        assert isinstance(found.pred_masks, LabelMasks)
        assert found.pred_masks.shape == (len(found), *size)
        assert len(found.scores) == len(found.pred_boxes) == len(found.pred_classes) == len(found)


@pytest.mark.parametrize("encoder", [(), RESNET], ids=["plain", "resnet"])
@by_target
def test_inference_in_bfloat16(target, encoder, monkeypatch):
    monkeypatch.setattr("nuclei_d2.utils.precision.bfloat16_support", lambda: "fast")
    model = build(*TARGETS[target], *encoder).eval()
    mixed = build(*TARGETS[target], *encoder, "TEST.AMP.ENABLED", "True").eval()
    inputs = [{"image": two_squares()[0]}]
    with torch.no_grad():
        (expected,), (found,) = model.predict_maps(inputs), mixed.predict_maps(inputs)
        assert torch.is_tensor(mixed(inputs)[0]["sem_seg"])
    assert found.dtype == torch.float32
    assert not torch.equal(found, expected)
    torch.testing.assert_close(found, expected, atol=0.05, rtol=0)


@by_target
def test_an_image_is_learned_by_heart(target):
    cfg = config(*TARGETS[target], "MODEL.UNET.WIDTH", "8", "MODEL.UNET.DECODER.MIN_AREA", "20")
    torch.manual_seed(0)
    model = build_model(cfg)
    image, labels = two_squares()
    image[:, :, 20:37] -= 60 * (image[:, :, 20:37] > 100)  # something to tell them apart by
    batch = [training_input(cfg, image, labels)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    with EventStorage():
        for _ in range(60):
            loss = sum(model(batch).values())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        found = model.eval()([{"image": image}])[0]["instances"]
    if target == "two_class":  # touching nuclei become one
        assert len(found) == 1
        truth = torch.from_numpy(labels > 0)[None]
    else:
        assert len(found) == 2
        truth = torch.stack([torch.from_numpy(labels == k) for k in (1, 2)])
        found = found[found.pred_boxes.tensor[:, 0].argsort()]
    masks = found.pred_masks.tensor
    iou = (masks & truth).sum((1, 2)) / (masks | truth).sum((1, 2))
    assert iou.min() > 0.85
    assert found.scores.min() > 0.7


def test_predicts_where_gradients_are_recorded():
    model = build().eval()
    (output,) = model([{"image": torch.rand(3, 20, 24) * 255}])
    assert output["sem_seg"].requires_grad  # as with Detectron2's models
    assert not output["instances"].scores.requires_grad


def test_padding_repeats_the_edge():
    model = build(*TARGETS["two_class"]).eval()
    seen = []
    model.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model([{"image": torch.full((3, 5, 6), 255.0)}])
    assert seen[0].shape == (1, 3, 8, 8)
    assert (seen[0] == seen[0][0, 0, 0, 0]).all()


def test_what_pads_a_smaller_image_is_in_no_loss():
    cfg = config(*TARGETS["distance"])
    torch.manual_seed(0)
    model = build_model(cfg)
    for norm in model.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            norm.eval()
    image, labels = two_squares()
    batch = [
        training_input(cfg, image, labels),
        training_input(cfg, image[:, 10:31, 9:], labels[10:31, 9:]),
    ]
    with torch.no_grad():
        losses, maps = model(batch), model.predict_maps(batch)
    probs = torch.cat([m[:2].flatten(1) for m in maps], dim=1)
    classes = torch.cat([x["sem_seg"].flatten() for x in batch]).long()
    expected = -probs.gather(0, classes[None]).log().mean()
    assert losses["loss_ce"].item() == pytest.approx(expected.item(), rel=1e-5)
    overlap, total = probs[1, classes == 1].sum(), probs[1].sum() + classes.sum()
    expected = 1 - (2 * overlap + 1) / (total + 1)
    assert losses["loss_dice"].item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("size", [(1, 1), (32, 32), (3, 100)])
@pytest.mark.parametrize("value", [0.0, 255.0])
@by_target
def test_constant_images_of_any_size(target, size, value):
    model = build(*TARGETS[target]).eval()
    with torch.no_grad():
        output = model([{"image": torch.full((3, *size), value)}])[0]
    assert output["sem_seg"].shape[1:] == size
    assert output["sem_seg"].isfinite().all()


def test_a_large_image():
    model = build("MODEL.UNET.DEPTH", "2").eval()
    image, _ = two_squares(3000, 3000)
    with torch.no_grad():
        output = model([{"image": image}])[0]
    assert output["sem_seg"].shape == (3, 3000, 3000)
    assert output["instances"].image_size == (3000, 3000)


class Fixed(torch.nn.Module):
    """Stands for a trained head: whatever the image, logits of these labels."""

    stride = 1

    def __init__(self, classes):
        super().__init__()
        self.logits = 20 * torch.nn.functional.one_hot(classes, 3).permute(2, 0, 1)[None] - 10.0

    def forward(self, features):
        return self.logits


def test_a_thousand_nuclei_the_cap_and_the_order():
    cfg = config("MODEL.UNET.DECODER.MIN_AREA", "0", "TEST.DETECTIONS_PER_IMAGE", "600")
    labels = np.zeros((160, 160), np.int32)
    for k in range(1000):
        y, x = 5 * (k // 32), 5 * (k % 32)
        labels[y : y + 4, x : x + 4] = k + 1
    model = build_model(cfg).eval()
    model.head = Fixed(build_target(cfg)(labels)["sem_seg"].long())
    model.head.logits[:, :, :80] *= 0.2  # the upper half is less sure
    inputs = [{"image": torch.zeros(3, 160, 160), "height": 320, "width": 320}]
    with torch.no_grad():
        found = model(inputs)[0]["instances"]
        assert len(found) == 600
        assert (found.scores.diff() <= 0).all()
        assert found.pred_boxes.tensor[:400, 1].min() >= 160
        model.max_instances, model.score_threshold = None, 0.99
        sure = model(inputs)[0]["instances"]
    assert 400 <= len(sure) < 600
    assert (sure.pred_masks.area() == 64).all()  # 4 x 4, enlarged twice


def test_class_weights_need_one_number_per_class():
    with pytest.raises(NucleiError, match=r"CLASS_WEIGHTS has 3 .*'two_class' has 2"):
        build("MODEL.UNET.TARGET", "two_class", "MODEL.UNET.CLASS_WEIGHTS", "[1.0, 1.0, 10.0]")


def test_class_weights_and_loss_weights_reach_the_losses():
    image, labels = two_squares()

    def losses(*opts):
        cfg = config(*opts)
        torch.manual_seed(0)
        with EventStorage():
            return build_model(cfg)([training_input(cfg, image, labels)])

    plain = losses()
    scaled = losses("MODEL.UNET.CE_WEIGHT", "2.0", "MODEL.UNET.DICE_WEIGHT", "0.0")
    assert scaled["loss_ce"].item() == pytest.approx(2 * plain["loss_ce"].item(), rel=1e-5)
    assert scaled["loss_dice"] == 0
    weighted = losses("MODEL.UNET.CLASS_WEIGHTS", "[1.0, 1.0, 100.0]")
    assert weighted["loss_ce"].item() != pytest.approx(plain["loss_ce"].item(), rel=1e-5)
    assert weighted["loss_dice"].item() == pytest.approx(plain["loss_dice"].item(), rel=1e-5)
    whole = losses("MODEL.UNET.CLASS_WEIGHTS", "[1, 1, 100]")
    assert whole["loss_ce"].item() == pytest.approx(weighted["loss_ce"].item())


def test_a_backbone_that_does_not_fit_is_one_line():
    cfg = load_config("", ["MODEL.BACKBONE.NAME", "build_unet_encoder", "MODEL.DEVICE", "cpu"])
    with pytest.raises(NucleiError, match=r"build_unet_encoder makes no features 'res4'.*configs/"):
        build_model(cfg)
    with pytest.raises(NucleiError, match=r"UNet cannot be built with .* build_resnet_fpn"):
        build("MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone")
    with pytest.raises(NucleiError, match=r"cannot be built .*\(num_channels \(4\) must be divis"):
        build("MODEL.UNET.NORM", "GN", "MODEL.UNET.WIDTH", "4")


@pytest.mark.parametrize(
    ("norm", "device", "channels_last"),
    [("BN", "cpu", True), ("GN", "cpu", True), ("BN", "meta", True), ("GN", "meta", False)],
)
def test_channels_are_last_but_where_group_norm_puts_them_first(norm, device, channels_last):
    width = ("MODEL.UNET.WIDTH", "32")
    model = build("MODEL.UNET.NORM", norm, *width, "MODEL.DEVICE", device)  # meta stands for GPUs
    kernels = [p for p in model.parameters() if p.dim() == 4 and p.shape[2] > 1 < p.shape[1]]
    last = [kernel.is_contiguous(memory_format=torch.channels_last) for kernel in kernels]
    assert set(last) == {channels_last}


def test_an_encoder_without_group_norm_has_its_channels_last():
    pretrained = ("MODEL.DEVICE", "meta", "MODEL.RESNETS.NORM", "FrozenBN")
    cfg = load_config(str(CONFIGS / "mask_rcnn.yaml"), pretrained)
    backbone = build_model(cfg).backbone
    for part, last in (backbone.bottom_up, True), (backbone.fpn_output2, False):
        kernels = [p for p in part.parameters() if p.dim() == 4 and p.shape[2] > 1]
        assert kernels
        for kernel in kernels:
            assert kernel.is_contiguous(memory_format=torch.channels_last) == last


def test_the_network_of_the_paper_has_its_channels_and_strides():
    encoder = UNetEncoder(3)
    shapes = encoder.output_shape()
    assert {n: (s.channels, s.stride) for n, s in shapes.items()} == {
        "level1": (64, 1),
        "level2": (128, 2),
        "level3": (256, 4),
        "level4": (512, 8),
    }
    decoder = UNetDecoder(shapes, num_outputs=3)
    convs = [m for m in decoder.modules() if isinstance(m, torch.nn.Conv2d)]
    assert [(c.in_channels, c.out_channels) for c in convs] == [
        *((768, 256), (256, 256)),
        *((384, 128), (128, 128)),
        *((192, 64), (64, 64)),
        (64, 3),
    ]

import numpy as np
import pytest
import torch

from nuclei_d2.config import load_config
from nuclei_d2.data.datasets.synthetic import SyntheticConfig, generate
from nuclei_d2.data.normalization import ImageNormalizer
from nuclei_d2.engine.checkpoint import NucleiCheckpointer
from nuclei_d2.engine.trainer import NucleiTrainer
from nuclei_d2.inference.predictor import NucleiPredictor
from nuclei_d2.modeling import build_model
from nuclei_d2.utils.errors import NucleiError

CLASSICAL = ("MODEL.META_ARCHITECTURE", "Classical", "MODEL.DEVICE", "cpu")


def config(*opts):
    return load_config("", [*CLASSICAL, *opts])


def disks(*circles, size=(60, 90), inside=180.0, outside=20.0):
    """Grey image (3, H, W) of disks (y, x, radius)."""
    y, x = np.ogrid[: size[0], : size[1]]
    mask = np.any([(y - cy) ** 2 + (x - cx) ** 2 < r**2 for cy, cx, r in circles], axis=0)
    image = np.where(mask, inside, outside).astype(np.float32)
    return torch.from_numpy(image).expand(3, -1, -1), mask


TOUCHING = [(20, 20, 11), (20, 39, 11), (42, 70, 9)]


@pytest.mark.parametrize(("threshold", "tolerance"), [("otsu", 0.1), ("local", 0.25)])
def test_touching_disks_are_cut_at_the_neck(threshold, tolerance):
    image, mask = disks(*TOUCHING)
    model = build_model(config("MODEL.CLASSICAL.THRESHOLD", threshold))
    output = model([{"image": image, "height": 60, "width": 90}])[0]
    found = output["instances"]
    assert len(found) == 3
    left = found.pred_boxes.tensor[:, 0].sort().values
    assert left.numpy() == pytest.approx([10, 30, 62], abs=2)
    painted = found.pred_masks.numpy().any(axis=0)
    assert (painted ^ mask).sum() / mask.sum() < tolerance
    assert ((output["sem_seg"][1] > 0.5).numpy() == painted).mean() > 0.99
    assert 0.5 < found.scores.min() <= found.scores.max() <= 1


def test_dark_nuclei():
    image, _ = disks(*TOUCHING, inside=40.0, outside=230.0)
    assert (
        len(
            build_model(config("MODEL.CLASSICAL.DARK_NUCLEI", "True"))([{"image": image}])[0][
                "instances"
            ]
        )
        == 3
    )


@pytest.mark.parametrize(
    ("value", "size"), [(0.0, (1, 1)), (0.0, (32, 32)), (10.0, (32, 32)), (10.0, (3000, 3000))]
)
def test_nothing_is_found_in_a_dark_field(value, size):
    image = torch.full((3, *size), value)
    output = build_model(config())([{"image": image}])[0]
    assert len(output["instances"]) == 0
    assert output["sem_seg"].shape == (2, *size)


def test_a_bright_constant_image_is_one_nucleus():
    assert (
        len(build_model(config())([{"image": torch.full((3, 40, 40), 255.0)}])[0]["instances"]) == 1
    )


def test_most_generated_nuclei_are_found():
    raw, layers = generate(1, SyntheticConfig(empty=0, crowding=0, diameter=(18, 22)))
    normalized = ImageNormalizer(config())(raw[..., None].astype(np.float32))
    image = torch.from_numpy(normalized.transpose(2, 0, 1).copy())
    found = build_model(config())([{"image": image}])[0]["instances"]
    masks = found.pred_masks.numpy()
    hits = 0
    for label in range(1, layers.max() + 1):
        nucleus = (layers == label).any(axis=0)
        overlap = (masks & nucleus).sum((1, 2)) / (masks | nucleus).sum((1, 2))
        hits += overlap.max(initial=0) > 0.5
    assert hits >= 0.8 * layers.max()


def test_it_needs_no_weights_and_cannot_be_trained():
    cfg = config()
    model = build_model(cfg)
    NucleiCheckpointer(model).load_exactly("")
    with pytest.raises(NucleiError, match="--eval-only"):
        NucleiTrainer.build_optimizer(cfg, model)
    with pytest.raises(NucleiError, match=r"MODEL\.WEIGHTS is empty"):
        NucleiCheckpointer(torch.nn.Linear(1, 1)).load_exactly("")


def test_it_predicts_an_image_like_every_other_model():
    _, mask = disks(*TOUCHING)
    found = NucleiPredictor(config())(np.where(mask, 3000, 500).astype(np.float32)[..., None])
    assert len(found) == 3
    assert found.image_size == (60, 90)


@pytest.mark.parametrize("seed", range(3))
def test_noise_is_not_split_into_nuclei(seed):
    """As bright as normalisation leaves it: at most 255 / INPUT.NOISE_FLOOR grey levels."""
    noise = np.random.default_rng(seed).normal(0, 255 / 12, (3, 300, 300)).astype(np.float32)
    image = np.clip(noise[:1] + 50, 0, 255).repeat(3, axis=0)
    output = build_model(config())([{"image": torch.from_numpy(image)}])[0]
    assert len(output["instances"]) == 0


def test_tiles_with_the_histogram_of_the_image_have_its_threshold():
    image, _ = disks((20, 20, 11), (42, 70, 9), inside=150.0)
    image = (image + torch.linspace(0, 60, 90)).clamp(0, 255)
    model = build_model(config())
    maps = model._foreground(image.numpy(), None)
    left, right = np.s_[:, :, :60], np.s_[:, :, 30:]  # the tiles own 45 columns each
    histogram = model.histogram(image[left].numpy(), np.s_[:, :45])
    histogram = histogram + model.histogram(image[right].numpy(), np.s_[:, 15:])
    assert histogram.sum() == 60 * 90
    tiled = [model._foreground(image[part].numpy(), histogram) for part in (left, right)]
    np.testing.assert_array_equal(tiled[0][:, :, :50], maps[:, :, :50])
    np.testing.assert_array_equal(tiled[1][:, :, 10:], maps[:, :, 40:])
    alone = model._foreground(image[right].numpy(), None)
    assert np.abs(alone[:, :, 10:] - maps[:, :, 40:]).max() > 0.01

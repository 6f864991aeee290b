"""Stages of a package against those of the original."""

import numpy as np
import pytest
import torch
from detectron2.data import transforms as T
from hypothesis import given, settings
from hypothesis import strategies as st

from nuclei_d2.config import load_config
from nuclei_d2.data.augmentation import build_augmentation
from nuclei_d2.data.normalization import ImageNormalizer
from nuclei_d2.export.torchscript import DetectorPackage, Preprocessing, paste
from nuclei_d2.structures.boxed_masks import paste_masks


def original_preprocessing(cfg, image):
    network_input = T.AugInput(ImageNormalizer(cfg)(image))
    T.AugmentationList(build_augmentation(cfg, False))(network_input)
    return network_input.image.transpose(2, 0, 1)


@pytest.fixture(scope="module")
def preprocessings():
    """Scripted, by scale, with their configs."""
    made = {}
    for scale in ("0.55", "1.0", "1.5"):
        opts = ("MODEL.DEVICE", "cpu", "INPUT.SCALE", scale, "INPUT.FORMAT", "BGR")
        cfg = load_config("", opts)
        made[scale] = cfg, torch.jit.script(Preprocessing(cfg))
    return made


@settings(deadline=None, max_examples=60)
@given(
    scale=st.sampled_from(["0.55", "1.0", "1.5"]),
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    channels=st.sampled_from([1, 3]),
    kind=st.sampled_from(["integer", "float", "flat", "grey"]),
    peak=st.floats(1, 60000),
    seed=st.integers(0, 1000),
)
def test_the_network_sees_what_it_sees_in_the_original(
    preprocessings, scale, size, channels, kind, peak, seed
):
    image = np.random.default_rng(seed).gamma(1.0, peak / 4, (*size, channels)).astype(np.float32)
    if kind == "integer":
        image = np.rint(image)
    elif kind == "flat":
        image[:] = peak
    elif kind == "grey":
        image[:] = image[:, :, :1]
    cfg, preprocessing = preprocessings[scale]
    expected = original_preprocessing(cfg, image)
    np.testing.assert_allclose(preprocessing(torch.from_numpy(image)), expected, atol=0.01)
    if channels == 1:
        flat = preprocessing(torch.from_numpy(image[:, :, 0]))
        np.testing.assert_allclose(flat, expected, atol=0.01)


def test_sixteen_bits_of_any_type_give_the_same(preprocessings):
    image = np.random.default_rng(0).integers(0, 1 << 16, (20, 30), np.uint16)
    _, preprocessing = preprocessings["1.0"]
    assert torch.equal(
        preprocessing(torch.from_numpy(image)),
        preprocessing(torch.from_numpy(image.astype(np.float64))),
    )


@pytest.mark.parametrize("shape", [(5,), (5, 6, 2), (3, 5, 6), (0, 6)])
def test_what_is_no_image(preprocessings, shape):
    with pytest.raises(Exception, match="image: needs"):
        preprocessings["1.0"][1](torch.zeros(shape))


corner = st.floats(-10, 40, width=32)
side = st.floats(1 / 64, 60, width=32)


@settings(deadline=None, max_examples=100)
@given(x=corner, y=corner, width=side, height=side, seed=st.integers(0, 1000))
def test_masks_are_pasted_as_in_the_original(x, y, width, height, seed):
    size = (24, 31)
    box = torch.tensor([x, y, x + width, y + height])
    box = torch.minimum(box.clamp(min=0), torch.tensor([31.0, 24.0, 31.0, 24.0]))
    if not (box[2:] > box[:2]).all():
        return  # left out before
    probability = torch.rand(1, 7, 7, generator=torch.Generator().manual_seed(seed))
    labels = torch.zeros(size, dtype=torch.int32)
    paste(labels, probability, box, 5)
    expected = paste_masks(probability, box[None], size).tensor[0]
    assert torch.equal(labels, expected.int() * 5)


def package_of(boxes, scores, threshold=0.5):
    """The package of a network that sees twice the image, and full masks in these boxes of it."""
    boxes = torch.tensor(boxes, dtype=torch.float32).view(-1, 4)
    classes = torch.arange(len(boxes))

    def masks(boxes, _classes):
        assert 0 < len(boxes) <= 128
        return (torch.ones(len(boxes), 1, 28, 28),)

    return DetectorPackage(
        lambda image: torch.zeros(3, 2 * image.shape[0], 2 * image.shape[1]),
        lambda _pixels: (2 * boxes, classes, torch.tensor(scores)),
        masks,
        threshold,
    )


def test_the_pixel_belongs_to_the_highest_score():
    boxes = [[0, 0, 4, 2], [2, 0, 8, 2], [0, 0, 2, 2], [9, 0, 9, 2], [1, 0, 7, 3]]
    package = package_of(boxes, [0.7, 0.9, 0.6, 0.95, 0.4])
    nuclei = package(torch.zeros(4, 10))
    # Row 0 is the second box, row 1 the first; the third is hidden, the fourth has no width, and
    # the fifth is not sure enough.
    expected = np.zeros((4, 10), int)
    expected[:2, 2:8] = 1
    expected[:2, :2] = 2
    np.testing.assert_array_equal(nuclei["labels"], expected)
    assert nuclei["labels"].dtype == torch.int32
    assert nuclei["boxes"].tolist() == [[2, 0, 8, 2], [0, 0, 4, 2]]
    assert nuclei["scores"].tolist() == pytest.approx([0.9, 0.7])
    assert nuclei["classes"].tolist() == [1, 0]
    all_labels = package(torch.zeros(4, 10), 0.3)["labels"]
    expected[:3, 1:7][expected[:3, 1:7] == 0] = 3
    np.testing.assert_array_equal(all_labels, expected)


def test_boxes_are_cut_to_the_image():
    nuclei = package_of([[-5, 2, 3, 9]], [0.9])(torch.zeros(4, 6))
    assert nuclei["boxes"].tolist() == [[0, 2, 3, 4]]


def test_no_nuclei():
    for package in (package_of([], []), package_of([[0, 0, 2, 2]], [0.1])):
        nuclei = package(torch.zeros(4, 6))
        assert not nuclei["labels"].any()
        assert nuclei["boxes"].shape == (0, 4)
        assert nuclei["scores"].shape == nuclei["classes"].shape == (0,)


def test_more_nuclei_than_are_predicted_at_a_time():
    boxes = [[3 * k, 0, 3 * k + 2, 2] for k in range(300)]
    nuclei = package_of(boxes, [1 - k / 1000 for k in range(300)])(torch.zeros(2, 900))
    assert torch.equal(nuclei["labels"][0, ::3], torch.arange(1, 301, dtype=torch.int32))
    assert nuclei["boxes"].tolist() == boxes

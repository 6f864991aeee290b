import numpy as np
import pytest
from detectron2.data import transforms as T
from hypothesis import given, settings
from hypothesis import strategies as st

from nuclei_d2.config import load_config
from nuclei_d2.data.augmentation import (
    CenterCrop,
    IntensityTransform,
    RandomIntensity,
    RandomRotation90,
    RandomScaledCrop,
    ResampleTransform,
    Rotation90Transform,
    build_augmentation,
)


@pytest.fixture(autouse=True)
def _seed():
    np.random.seed(0)


def coordinate_image(height: int, width: int) -> np.ndarray:
    """Channels x, y and 0 of every pixel's centre: shows where a pixel came from."""
    y, x = np.mgrid[:height, :width] + 0.5
    return np.dstack([x, y, 0 * x]).astype(np.float32)


def mark(height: int, width: int, *pixels: tuple[int, int]) -> np.ndarray:
    """float32 label image with label k at the k-th (y, x)."""
    labels = np.zeros((height, width), np.float32)
    for k, pixel in enumerate(pixels, start=1):
        labels[pixel] = k
    return labels


# --- resampling


def test_labels_scale_up_to_blocks():
    labels = np.array([[0, 7], [70000, 3]], np.float32)
    scaled = ResampleTransform(2, 2, 6, 4).apply_segmentation(labels)
    assert scaled.dtype == np.float32
    assert np.array_equal(scaled, labels.repeat(3, axis=0).repeat(2, axis=1))


def test_labels_scale_down_to_the_central_pixel():
    labels = np.arange(81, dtype=np.float32).reshape(9, 9)
    scaled = ResampleTransform(9, 9, 3, 3).apply_segmentation(labels)
    assert np.array_equal(scaled, labels[1::3, 1::3])


@settings(max_examples=50, deadline=None)
@given(*[st.integers(1, 40)] * 4)
def test_label_is_the_one_whose_pixel_holds_the_centre(h, w, new_h, new_w):
    labels = np.arange(h * w, dtype=np.float32).reshape(h, w)
    y = np.floor((np.arange(new_h) + 0.5) * h / new_h).astype(int)
    x = np.floor((np.arange(new_w) + 0.5) * w / new_w).astype(int)
    scaled = ResampleTransform(h, w, new_h, new_w).apply_segmentation(labels)
    # Where a centre falls on the edge of two pixels, either is the nearest.
    tie_y = (2 * np.arange(new_h) + 1) * h % (2 * new_h) == 0
    tie_x = (2 * np.arange(new_w) + 1) * w % (2 * new_w) == 0
    expected = labels[y[:, None], x]
    assert np.array_equal(scaled[~tie_y][:, ~tie_x], expected[~tie_y][:, ~tie_x])


@pytest.mark.parametrize("factor", [0.4, 0.8, 1.25, 2.0, 2.7])
def test_masks_do_not_shift_against_the_image(factor):
    y, x = np.mgrid[:60, :80]
    disc = ((x - 33.3) ** 2 + (y - 28.7) ** 2 < 15**2).astype(np.float32)
    resample = ResampleTransform(60, 80, round(60 * factor), round(80 * factor))
    image, labels = resample.apply_image(disc), resample.apply_segmentation(disc)
    for axis in (0, 1):
        position = np.arange(image.shape[axis])
        centre_image = (image.sum(axis=1 - axis) * position).sum() / image.sum()
        centre_label = (labels.sum(axis=1 - axis) * position).sum() / labels.sum()
        assert centre_image == pytest.approx(centre_label, abs=0.2)  # plain nearest: 0.5


def test_resampling_keeps_channels_layers_and_coordinates():
    resample = ResampleTransform(10, 20, 20, 30)
    for channels in (1, 2, 3, 6):
        assert resample.apply_segmentation(np.zeros((10, 20, channels), np.float32)).shape == (
            20,
            30,
            channels,
        )
    assert resample.apply_image(np.zeros((10, 20, 1), np.float32)).shape == (20, 30, 1)
    assert resample.apply_coords(np.array([[4.0, 5.0]])).tolist() == [[6.0, 10.0]]
    assert resample.inverse().apply_coords(np.array([[6.0, 10.0]])).tolist() == [[4.0, 5.0]]


def test_same_size_changes_nothing():
    image = coordinate_image(5, 7)
    assert ResampleTransform(5, 7, 5, 7).apply_image(image) is image


# --- rotation


@given(st.integers(1, 9), st.integers(1, 9), st.integers(-4, 7))
def test_rotation_moves_points_as_pixels(h, w, k):
    image = coordinate_image(h, w)
    turn = Rotation90Transform(h, w, k)
    rotated = turn.apply_image(image)
    points = image[:, :, :2].reshape(-1, 2).astype(np.float64)
    x, y = np.floor(turn.apply_coords(points.copy())).astype(int).T
    assert np.array_equal(rotated[y, x, :2].reshape(-1, 2), points)
    assert np.array_equal(turn.inverse().apply_image(rotated), image)
    back = turn.inverse().apply_coords(turn.apply_coords(points.copy()))
    assert np.allclose(back, points)


def test_rotation_is_counter_clockwise_and_uniform():
    image = np.array([[1, 2], [3, 4]], np.float32)
    assert Rotation90Transform(2, 2, 1).apply_image(image).tolist() == [[2, 4], [1, 3]]
    turns = [RandomRotation90().get_transform(image).k for _ in range(400)]
    assert np.bincount(turns, minlength=4).min() > 70


# --- scaled crop


def apply(augmentation, image, labels=None):
    inputs = T.AugInput(image, sem_seg=labels)
    augmentation(inputs)
    return inputs.image, inputs.sem_seg


def test_without_arguments_the_image_stays():
    image, labels = coordinate_image(12, 15), mark(12, 15, (3, 4))
    new_image, new_labels = apply(RandomScaledCrop(), image, labels)
    assert np.array_equal(new_image, image)
    assert np.array_equal(new_labels, labels)


def test_whole_image_is_scaled():
    image, _ = apply(RandomScaledCrop(scale=1.5), coordinate_image(10, 21))
    assert image.shape == (15, 32, 3)


@pytest.mark.parametrize("factor", [0.5, 0.8, 1.0, 1.25, 2.0])
def test_crop_has_the_asked_size_and_scale(factor):
    augmentation = RandomScaledCrop(scale=factor, crop_size=(32, 48))
    for _ in range(5):
        image, _ = apply(augmentation, coordinate_image(120, 130))
        assert image.shape == (32, 48, 3)
        step_x = np.diff(image[16, 2:-2, 0]).mean()
        step_y = np.diff(image[2:-2, 16, 1]).mean()
        assert step_x == pytest.approx(1 / factor, rel=0.03)
        assert step_y == pytest.approx(1 / factor, rel=0.03)


def test_image_smaller_than_the_crop_is_kept_whole():
    image, labels = apply(
        RandomScaledCrop(2.0, crop_size=(64, 32), nucleus_prob=1.0),
        coordinate_image(20, 40),
        mark(20, 40, (10, 39)),
    )
    assert image.shape == (40, 32, 3)
    assert labels.shape == (40, 32)
    assert labels.any()


def test_crop_and_labels_stay_together():
    image = coordinate_image(90, 100)
    labels = np.arange(9000, dtype=np.float32).reshape(90, 100)
    new_image, new_labels = apply(RandomScaledCrop(crop_size=(20, 30)), image, labels)
    y, x = np.divmod(new_labels, 100)
    assert np.array_equal(new_image[:, :, 0], x + 0.5)
    assert np.array_equal(new_image[:, :, 1], y + 0.5)


def test_jitter_is_uniform_in_its_logarithm():
    augmentation = RandomScaledCrop(2.0, jitter=(0.5, 2.0))
    image = np.zeros((100, 100), np.float32)
    factors = [augmentation.get_transform(image, None).new_h / 100 for _ in range(500)]
    logs = np.log2(factors)
    assert 0 <= logs.min() < 0.05
    assert 1.95 < logs.max() <= 2
    assert logs.mean() == pytest.approx(1, abs=0.08)  # uniform in the factor itself: 1.2


def test_every_nucleus_is_equally_likely():
    labels = mark(200, 200, (20, 20))
    labels[100:180, 100:180] = 2  # 6400 times larger
    augmentation = RandomScaledCrop(crop_size=(16, 16), nucleus_prob=1.0)
    seen = [apply(augmentation, coordinate_image(200, 200), labels)[1].max() for _ in range(300)]
    assert set(seen) == {1, 2}
    assert 110 < seen.count(1) < 190


def test_window_is_uniform_among_those_with_the_centre():
    labels = mark(100, 100, (50, 60))
    augmentation = RandomScaledCrop(crop_size=(4, 4), nucleus_prob=1.0)
    places = set()
    for _ in range(300):
        _, crop = apply(augmentation, coordinate_image(100, 100), labels)
        places.add(tuple(np.argwhere(crop == 1)[0]))
    assert len(places) == 16


def test_nucleus_in_the_corner_and_in_another_layer():
    labels = np.dstack([np.zeros((50, 60), np.float32), mark(50, 60, (49, 59))])
    augmentation = RandomScaledCrop(crop_size=(8, 8), nucleus_prob=1.0)
    for _ in range(10):
        _, crop = apply(augmentation, coordinate_image(50, 60), labels)
        assert crop.shape == (8, 8, 2)
        assert crop.any()


def test_nucleus_probability():
    labels = mark(200, 200, (100, 100))
    augmentation = RandomScaledCrop(crop_size=(8, 8), nucleus_prob=0.5)
    hits = sum(apply(augmentation, coordinate_image(200, 200), labels)[1].any() for _ in range(300))
    assert 110 < hits < 190


def test_without_nuclei_the_window_falls_anywhere():
    augmentation = RandomScaledCrop(crop_size=(8, 8), nucleus_prob=1.0)
    image = coordinate_image(16, 16)
    starts = {apply(augmentation, image, mark(16, 16))[0][0, 0, 0] for _ in range(200)}
    assert starts == {k + 0.5 for k in range(9)}


# --- intensity


def test_intensity_by_hand():
    image = np.array([[0, 51, 102, 255]], np.float32)
    assert IntensityTransform().apply_image(image) == pytest.approx(image)
    inverted = IntensityTransform(invert=True).apply_image(image)
    assert inverted == pytest.approx(255 - image)
    gamma = IntensityTransform(gamma=2.0).apply_image(image)
    assert gamma == pytest.approx(np.array([[0, 10.2, 40.8, 255]]), abs=1e-3)
    bright = IntensityTransform(brightness=2.0).apply_image(image)
    assert bright.tolist() == [[0, 102, 204, 255]]
    contrast = IntensityTransform(contrast=0.5).apply_image(image)  # the mean is 102
    assert contrast == pytest.approx(np.array([[51, 76.5, 102, 178.5]]), abs=1e-3)


def test_noise_has_the_asked_size_and_is_the_same_in_every_channel():
    image = np.full((100, 100, 3), 127.5, np.float32)
    transform = IntensityTransform(noise=0.04, seed=3)
    noisy = transform.apply_image(image)
    assert noisy.std() == pytest.approx(0.04 * 255, rel=0.03)
    assert np.array_equal(noisy[:, :, 0], noisy[:, :, 2])
    assert np.array_equal(transform.apply_image(image), noisy)
    assert not np.array_equal(IntensityTransform(noise=0.04, seed=4).apply_image(image), noisy)


def test_intensity_stays_in_range_and_leaves_the_rest():
    image = np.random.uniform(0, 255, (40, 50, 3)).astype(np.float32)
    before, labels = image.copy(), mark(40, 50, (3, 4))
    augmentation = RandomIntensity((0.2, 3), (0.2, 3), (0.2, 3), (0, 0.5), invert_prob=0.5)
    for _ in range(20):
        new, new_labels = apply(augmentation, image, labels)
        assert new.dtype == np.float32
        assert new.min() >= 0
        assert new.max() <= 255
        assert new_labels is labels
    assert np.array_equal(image, before)


def test_inversion_probability():
    image = np.zeros((2, 2), np.float32)
    drawn = [RandomIntensity(invert_prob=0.25).get_transform(image).invert for _ in range(400)]
    assert 70 < sum(drawn) < 130
    assert not any(RandomIntensity().get_transform(image).invert for _ in range(50))


# --- from the config


def augment(opts: list[str], is_train: bool = True, shape=(40, 50)) -> np.ndarray:
    return apply(
        T.AugmentationList(build_augmentation(load_config(opts=opts), is_train)),
        coordinate_image(*shape),
        mark(*shape, (20, 20)),
    )[0]


PLAIN = [
    *("INPUT.SCALE_JITTER", "(1.0, 1.0)", "INPUT.RANDOM_FLIP", "none"),
    *("INPUT.RANDOM_ROTATE90", "False", "INPUT.CROP.ENABLED", "False"),
    *("INPUT.GAMMA", "(1.0, 1.0)", "INPUT.CONTRAST", "(1.0, 1.0)"),
    *("INPUT.BRIGHTNESS", "(1.0, 1.0)", "INPUT.NOISE", "(0.0, 0.0)"),
]


def test_everything_can_be_switched_off():
    assert augment(PLAIN) == pytest.approx(coordinate_image(40, 50), abs=1e-3)


def test_evaluation_only_scales():
    assert np.array_equal(augment([], is_train=False), coordinate_image(40, 50))
    assert augment(["INPUT.SCALE", "2.0"], is_train=False).shape == (80, 100, 3)


@pytest.mark.parametrize(
    ("flip", "expected"),
    [
        ("horizontal", {(False, False), (True, False)}),
        ("vertical", {(False, False), (False, True)}),
        ("both", {(False, False), (True, False), (False, True), (True, True)}),
    ],
)
def test_flips(flip, expected):
    images = [augment([*PLAIN, "INPUT.RANDOM_FLIP", flip]) for _ in range(40)]
    seen = {(bool(i[0, 0, 0] > i[0, -1, 0]), bool(i[0, 0, 1] > i[-1, 0, 1])) for i in images}
    assert seen == expected


def test_rotation_and_crop_keys():
    shapes = {augment([*PLAIN, "INPUT.RANDOM_ROTATE90", "True"]).shape for _ in range(20)}
    assert shapes == {(40, 50, 3), (50, 40, 3)}
    crop = ["INPUT.CROP.ENABLED", "True", "INPUT.CROP.SIZE", "[16, 24]"]
    assert augment([*PLAIN, *crop]).shape == (16, 24, 3)


def test_numpy_seed_decides_everything():
    first, second = [], []
    for images in (first, second):
        np.random.seed(5)
        images.extend(augment([]) for _ in range(3))
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    assert first[0].shape != first[1].shape or not np.array_equal(first[0], first[1])


def test_center_crop_is_the_middle_or_all_of_it():
    image = np.arange(7 * 9, dtype=np.float32).reshape(7, 9)
    assert np.array_equal(
        CenterCrop((3, 5)).get_transform(image).apply_image(image), image[2:5, 2:7]
    )
    assert np.array_equal(CenterCrop((20, 20)).get_transform(image).apply_image(image), image)

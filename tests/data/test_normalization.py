import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from nuclei_d2.config import load_config
from nuclei_d2.data.normalization import (
    ImageNormalizer,
    contrast_range,
    contrast_range_of_source,
    estimate_noise,
    normalize,
)
from nuclei_d2.utils.errors import NucleiError

RNG = np.random.default_rng(0)
GREY8 = RNG.integers(0, 256, (20, 30), np.uint8)
GREY16 = RNG.integers(0, 65536, (20, 30), np.uint16)
RGB8 = RNG.integers(0, 256, (20, 30, 3), np.uint8)
RGB16 = RNG.integers(0, 65536, (20, 30, 3), np.uint16)


def reference_normalize(image, percentiles, floor):
    low, high = np.percentile(image.astype(np.float64), percentiles)
    return np.clip((image - low) / max(high - low, floor), 0, 1) * 255


@settings(max_examples=60, deadline=None)
@given(
    image=arrays.arrays(
        np.int32, st.tuples(*[st.integers(1, 12)] * 2, st.just(1)), elements=st.integers(-99, 9999)
    ),
    offset=st.sampled_from([0.0, 0.25]),
    percentiles=st.sampled_from([(0, 100), (1, 99.8), (20, 65.3)]),
)
def test_normalize_is_numpys_percentile(image, offset, percentiles):
    """Counted (integers) or sorted (others), the percentiles are the same."""
    image = (image + offset).astype(np.float32)
    rounding = np.finfo(np.float32).eps * np.abs(image).max()
    expected = reference_normalize(image, percentiles, 4 if offset == 0 else rounding)
    result = normalize(image, percentiles, noise_floor=0, min_levels=4)
    assert result.dtype == np.float32
    assert np.abs(result - expected).max() < 0.02


def test_percentiles_are_taken_over_all_channels():
    image = np.zeros((10, 10, 3), np.float32)
    image[:, :, 1] = 50
    image[:, :, 2] = 100
    result = normalize(image, (0, 100), noise_floor=0, min_levels=0)
    assert np.unique(result).tolist() == [0, 127.5, 255]


def test_integers_of_a_very_wide_range_are_not_counted():
    image = np.array([[0, 2**30, 2**31, 2**32]], np.float32)
    assert normalize(image, (0, 100)).tolist() == [[0, 63.75, 127.5, 255]]


@pytest.mark.parametrize("value", [0, 7, 65535, 0.5, -3.25])
def test_a_constant_image_is_black(value):
    assert (normalize(np.full((32, 32, 1), value, np.float32)) == 0).all()


@pytest.mark.parametrize("level", [1e-6, 1, 100])
def test_sparse_bright_pixels_on_a_flat_background_stay(level):
    """Fewer pixels than the upper percentile leaves, so both percentiles are background."""
    image = np.full((100, 100), 0.5, np.float32)
    image[3, 4] += level
    assert np.argwhere(normalize(image) == 255).tolist() == [[3, 4]]


def test_min_levels_bounds_the_stretch_of_integer_images():
    image = np.zeros((100, 100), np.float32)
    image[:, 50:] = 2
    assert normalize(image, (0, 100), 0, min_levels=4).max() == 127.5
    assert normalize(image, (0, 100), 0, min_levels=2).max() == 255
    assert normalize(image / 16, (0, 100), 0, min_levels=4).max() == 255  # not integers


@pytest.mark.parametrize("sigma", [1.5, 5, 300])
def test_noise_is_estimated_whatever_the_image_shows(sigma):
    y, x = np.mgrid[:256, :256]
    nuclei = 200 * sigma * ((x % 64 - 32) ** 2 + (y % 64 - 32) ** 2 < 20**2)
    ramp = 3 * sigma * x
    noise = np.random.default_rng(0).normal(0, sigma, x.shape)
    for scene in (0 * x, nuclei, ramp, nuclei + ramp):
        assert estimate_noise((scene + noise).astype(np.float32)) == pytest.approx(sigma, rel=0.1)
    assert estimate_noise(ramp.astype(np.float32)) == 0
    assert estimate_noise(np.ones((2, 9), np.float32)) == 0


def test_an_empty_channel_hides_no_noise():
    """A dye with one channel of an RGB file, as microscopes save it."""
    noise = np.random.default_rng(0).normal(100, 5, (200, 200)).round()
    image = np.zeros((200, 200, 3), np.float32)
    image[:, :, 2] = noise
    assert estimate_noise(image) == estimate_noise(image[:, :, 2]) == pytest.approx(5, rel=0.1)
    contrast = contrast_range(image)
    assert contrast.noise[2] == pytest.approx(5, rel=0.1)
    assert contrast.noise[0] == contrast.noise[1] < 0.3
    assert contrast == contrast_range_of_source(ArraySource(image.astype(np.uint8)))
    assert contrast.apply(image[:, :, 2]).std() <= 255 / 12 * 1.1
    cfg = load_config("", ["INPUT.FORMAT", "BGR"])
    backwards = ImageNormalizer(cfg).visible_noise(contrast)
    assert backwards.tolist() == contrast.visible_noise[::-1].tolist()


@pytest.mark.parametrize("sigma", [1, 20, 2000])
def test_noise_is_not_stretched_to_full_scale(sigma):
    noise = np.random.default_rng(0).normal(8 * sigma, sigma, (256, 256, 1)).round()
    result = normalize(noise.astype(np.float32), noise_floor=12)
    assert result.std() == pytest.approx(255 / 12, rel=0.1)
    stretched = normalize(noise.astype(np.float32), noise_floor=0)
    assert stretched.std() > 2 * result.std()


def test_dim_nuclei_still_reach_full_scale():
    """As the dimmest real images: nuclei 15 grey levels above a background with noise 0.5."""
    y, x = np.mgrid[:256, :256]
    image = np.random.default_rng(0).normal(2, 0.5, x.shape)
    image[(x % 64 - 32) ** 2 + (y % 64 - 32) ** 2 < 8**2] += 15
    result = normalize(image.round().astype(np.float32))
    nuclei = (x % 64 - 32) ** 2 + (y % 64 - 32) ** 2 < 6**2
    assert result[nuclei].mean() > 220
    assert np.median(result[~nuclei]) < 30


def test_empty_array():
    assert normalize(np.zeros((0, 5, 1), np.float32)).shape == (0, 5, 1)


def test_normalizer_replicates_grey_and_orders_channels():
    cfg = load_config(opts=["INPUT.PERCENTILES", "(0.0, 100.0)", "INPUT.NOISE_FLOOR", "0.0"])
    grey = GREY8[:, :, None].astype(np.float32)
    rgb = RGB8.astype(np.float32)
    result = ImageNormalizer(cfg)(grey)
    assert result.shape == (20, 30, 3)
    assert np.array_equal(result, np.repeat(normalize(grey, (0, 100), 0), 3, axis=2))
    assert np.array_equal(ImageNormalizer(cfg)(np.repeat(grey, 3, axis=2)), result)
    assert np.array_equal(ImageNormalizer(cfg)(rgb), normalize(rgb, (0, 100), 0))
    cfg.INPUT.FORMAT = "BGR"
    assert np.array_equal(ImageNormalizer(cfg)(rgb), normalize(rgb, (0, 100), 0)[:, :, ::-1])


def test_normalizer_reads_the_contrast_floor():
    grey = np.zeros((20, 30, 1), np.float32)
    grey[:10] = 10
    cfg = load_config(opts=["INPUT.MIN_LEVELS", "40.0"])
    assert ImageNormalizer(cfg)(grey).max() == pytest.approx(255 / 4)


@pytest.mark.parametrize("percentiles", [(50, 50), (99, 1), (-1, 99), (0, 101)])
def test_wrong_percentiles(percentiles):
    with pytest.raises(NucleiError, match=r"INPUT\.PERCENTILES"):
        ImageNormalizer(percentiles=percentiles, noise_floor=0.0, min_levels=0.0)


class ArraySource:
    """An image that is read by windows, and says how large they were."""

    def __init__(self, array):
        self.array = np.atleast_3d(array)
        self.size = self.array.shape[:2]
        self.channels = tuple("abc")[: self.array.shape[2]]
        self.dtype = self.array.dtype
        self.rows_read = []

    def read(self, rows, cols):
        window = self.array[rows, cols].astype(np.float32)
        self.rows_read.append(len(window))
        return window


@pytest.fixture
def small_bands(monkeypatch):
    monkeypatch.setattr("nuclei_d2.data.normalization._BAND_ROWS", 8)
    monkeypatch.setattr("nuclei_d2.data.normalization._BAND_PIXELS", 8)


SCENES = {
    "8 bits": GREY8,
    "16 bits": np.repeat(GREY16, 3, axis=0),
    "signed": (GREY16[:17].astype(np.int32) - (1 << 15)).astype(np.int16),
    "colour": RGB16,
    "grey as colour": np.dstack([GREY8] * 3),
    "grey band, then colour": np.vstack([np.dstack([GREY8] * 3), RGB8]),
    "dark": np.zeros((33, 9), np.uint16),
    "two rows": GREY8[:2],
    "one row beyond a band": GREY8[:9],
    "float": np.random.default_rng(1).normal(size=(40, 31)).astype(np.float32),
    "float integers": GREY8.astype(np.float32),
    "32 bits": GREY16.astype(np.uint32) * 65537,
}


@pytest.mark.parametrize("name", SCENES)
def test_range_by_bands_is_the_range_of_the_whole(small_bands, name):
    source = ArraySource(SCENES[name])
    whole = source.array.astype(np.float32)
    if (whole == whole[:, :, :1]).all():
        whole = whole[:, :, :1]
    assert contrast_range_of_source(source) == contrast_range(whole)
    assert max(source.rows_read) <= 8


@settings(max_examples=40, deadline=None)
@given(
    arrays.arrays(
        np.uint8, st.tuples(st.integers(1, 40), st.integers(1, 9), st.sampled_from([1, 3]))
    )
)
def test_counted_range_is_exact(array):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nuclei_d2.data.normalization._BAND_ROWS", 8)
        patch.setattr("nuclei_d2.data.normalization._BAND_PIXELS", 8)
        found = contrast_range_of_source(ArraySource(array), (5, 95), 3.0, 0.0)
    if (array == array[:, :, :1]).all():
        array = array[:, :, :1]
    assert found == contrast_range(array, (5, 95), 3.0, 0.0)


def test_large_float_images_are_sampled(small_bands, monkeypatch):
    monkeypatch.setattr("nuclei_d2.data.normalization._MAX_SAMPLES", 100)
    image = np.random.default_rng(0).normal(100, 5, (61, 47)).astype(np.float32)
    found = contrast_range_of_source(ArraySource(image), (10, 90), 0.0, 0.0)
    step = 6  # the least that leaves 100 values
    low, high = np.percentile(image[::step, ::step], (10, 90))
    assert (found.low, found.span) == (pytest.approx(low), pytest.approx(high - low))


def test_windows_with_the_images_range_are_slices_of_the_normalised_image(small_bands, monkeypatch):
    monkeypatch.setattr("nuclei_d2.data.normalization._MAX_SAMPLES", 0)
    normalizer = ImageNormalizer(load_config(opts=["INPUT.FORMAT", "BGR"]))
    image = np.vstack([np.dstack([GREY8] * 3), RGB8]).astype(np.uint8)
    source = ArraySource(image)
    contrast = normalizer.range_of(source)
    whole = normalizer(image.astype(np.float32))
    for rows in (slice(0, 20), slice(3, 31), slice(20, 40)):  # the first of them is grey
        window = source.read(rows, slice(5, 9))
        assert np.array_equal(normalizer(window, contrast), whole[rows, 5:9])


def test_a_small_source_is_read_at_once():
    normalizer = ImageNormalizer(load_config())
    values = SCENES["float"]
    source = ArraySource(values)
    assert normalizer.range_of(source) == normalizer.range_of(values[:, :, None])
    assert source.rows_read == [40]


def test_a_twin_of_16_bits_looks_the_same():
    """As a camera's 12 bits, and an 8-bit image stretched to 16."""
    normalizer = ImageNormalizer(load_config())
    image = np.repeat(np.repeat(GREY8, 4, axis=0), 4, axis=1)[:, :, None].astype(np.float32)
    for factor in (16, 257):
        assert np.allclose(normalizer(image), normalizer(factor * image), atol=1e-4)

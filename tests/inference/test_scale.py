import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from skimage.draw import disk
from tiny import CONFIGS

from nuclei_d2.config import load_config
from nuclei_d2.data.normalization import ImageNormalizer
from nuclei_d2.inference.scale import (
    FACTORS,
    VIEW,
    Found,
    Window,
    choose_scale,
    estimate_factor,
    make_finder,
)
from nuclei_d2.modeling import build_model
from nuclei_d2.utils.errors import NucleiError

MODEL_DIAMETER = 20.0


class Image:
    """A grey image for what asks for its size, pixel size and windows."""

    channels, dtype = ("grey",), np.dtype(np.uint8)

    def __init__(self, size, pixel_size=None, pixels=None):
        self.size = size
        self.pixel_size = pixel_size
        self.pixels = np.zeros(size) if pixels is None else pixels
        self.read_pixels = 0

    def read(self, rows, cols):
        window = self.pixels[rows, cols]
        self.read_pixels += window.size
        return window[:, :, None].astype(np.float32)


class World:
    """Nuclei of one diameter at given places, and a network that finds some of them.

    It finds those that it sees within one octave of its diameter, with falling scores. With
    ``clumps``, ten smaller ones are found as one; with ``splits``, larger ones as two pieces.
    """

    def __init__(self, centres, diameter, *, clumps=False, splits=False):
        self.centres = np.asarray(centres, float).reshape(-1, 2)
        self.diameter = diameter
        self.clumps, self.splits = clumps, splits
        self.calls = []

    def __call__(self, window, factor):
        self.calls.append((window, factor))
        centres = self.centres[window.contains(self.centres)]
        seen = self.diameter * factor / MODEL_DIAMETER
        if 0.5 <= seen <= 2:
            score = 1 - 0.4 * abs(math.log2(seen))
            return self.found(centres, self.diameter, score)
        if seen < 0.5 and self.clumps:
            return self.found(centres[::10], self.diameter * math.sqrt(10), 0.6)
        if seen > 2 and self.splits:
            return self.found(np.repeat(centres, 2, axis=0), self.diameter / 2, 0.6)
        return self.found(centres[:0], 1.0, 1.0)

    @staticmethod
    def found(centres, diameter, score):
        count = len(centres)
        return Found(centres, np.full(count, float(diameter)), np.full(count, float(score)))


def never(window, factor):
    raise AssertionError("the model was asked")


def grid_of(size, spacing):
    return [(y, x) for y in range(9, size, spacing) for x in range(9, size, spacing)]


def config(diameter=MODEL_DIAMETER, pixel_size=0.0):
    opts = ["INPUT.NUCLEUS_DIAMETER", str(diameter), "INPUT.PIXEL_SIZE", str(pixel_size)]
    return load_config(opts=opts)


# ------------------------------------------------------------------ what is given


@pytest.mark.parametrize("diameter", [40, "40", 40.0])
def test_diameter_sets_the_factor(diameter):
    choice = choose_scale(Image((9, 9), pixel_size=0.5), config(), never, diameter=diameter)
    assert choice.factor == 0.5
    assert choice.explanation == "factor 0.5: nuclei of 40 px as given, the model's have 20 px"


def test_pixel_size_sets_the_factor():
    choice = choose_scale(Image((9, 9), 2.0), config(pixel_size=0.5), never, pixel_size=0.25)
    assert choice.factor == 0.5
    assert choice.explanation == "factor 0.5: 0.25 um/px as given, the model's 0.5"


@pytest.mark.parametrize("given", [{"diameter": 1e-4}, {"pixel_size": 325}, {"diameter": 2e4}])
def test_a_mistaken_unit_is_refused(given):
    with pytest.raises(NucleiError, match=r"would scale the image by .* in pixels, .* microm"):
        choose_scale(Image((9, 9)), config(pixel_size=0.5), never, **given)


def test_pixel_size_of_the_file_is_used_where_the_models_is_known():
    image = Image((9, 9), pixel_size=0.65)
    choice = choose_scale(image, config(pixel_size=0.325), never)
    assert choice.factor == 2.0
    assert "0.65 um/px in the file" in choice.explanation
    world = World(grid_of(200, 40), 20)
    assert choose_scale(image, config(), world).factor == 1.0
    assert world.calls
    world = World(grid_of(200, 40), 10)
    image = Image((200, 200), pixel_size=0.65)
    assert choose_scale(image, config(pixel_size=0.325), world, diameter="auto").factor == 2.0
    assert world.calls


def test_nothing_is_known():
    choice = choose_scale(Image((9, 9)), config(diameter=0.0), never)
    assert choice.factor == 1
    assert "unknown; --opts INPUT.NUCLEUS_DIAMETER" in choice.explanation


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"diameter": 0}, "--diameter is 0"),
        ({"diameter": "inf"}, "--diameter is 'inf'"),
        ({"diameter": "big"}, "--diameter is 'big'"),
        ({"pixel_size": -0.5}, "--pixel-size is -0.5"),
        ({"pixel_size": 0.5, "diameter": "auto"}, "give one of them"),
        ({"diameter": 20}, "--diameter needs .* --opts INPUT.NUCLEUS_DIAMETER"),
        ({"diameter": "auto"}, "--diameter auto needs .* --opts INPUT.NUCLEUS_DIAMETER"),
        ({"pixel_size": 0.5}, "--pixel-size needs .* --opts INPUT.PIXEL_SIZE"),
    ],
)
def test_refused(options, words):
    with pytest.raises(NucleiError, match=words) as caught:
        choose_scale(Image((9, 9)), config(diameter=0.0), never, **options)
    assert "\n" not in str(caught.value)


# ----------------------------------------------------------------------- estimate


@pytest.mark.parametrize("diameter", [5, 10, 20, 40, 80, 160])
@pytest.mark.parametrize("behaviour", [{}, {"clumps": True}, {"splits": True}])
def test_factor_brings_nuclei_to_the_models_diameter(diameter, behaviour):
    world = World(grid_of(1500, 2 * diameter), diameter, **behaviour)
    factor, width = estimate_factor(Image((1500, 1500)), MODEL_DIAMETER, world)
    assert factor == MODEL_DIAMETER / diameter
    assert width == diameter


@pytest.mark.parametrize("diameter", [17.0, 24.0, 31.0])
def test_the_measured_diameter_makes_the_factor_exact(diameter):
    world = World(grid_of(1000, 70), diameter)
    factor, width = estimate_factor(Image((1000, 1000)), MODEL_DIAMETER, world)
    assert (factor, width) == (pytest.approx(MODEL_DIAMETER / diameter), diameter)


def test_the_measured_diameter_moves_the_factor_by_one_step_at_most():
    """Found at half the size that the model knows, and at no other: it knows that size, too."""
    centres = grid_of(600, 60)

    def find(window, factor):
        inside = np.asarray(centres)[window.contains(np.asarray(centres, float))]
        return World.found(inside if factor == 1.0 else inside[:0], 10, 0.9)

    factor, width = estimate_factor(Image((600, 600)), MODEL_DIAMETER, find)
    assert (factor, width) == (pytest.approx(math.sqrt(2)), 10)


def test_halves_of_nuclei_are_no_nuclei():
    """Seen twice too large, every nucleus is found as two halves, nearly as sure as the whole."""
    whole = World(grid_of(600, 60), 20)

    def find(window, factor):
        found = whole(window, min(factor, 1.0))
        if factor < 1.9:
            return found
        return World.found(np.repeat(found.centres, 2, axis=0), 20 / math.sqrt(2), 0.8)

    assert estimate_factor(Image((600, 600)), MODEL_DIAMETER, find) == (1.0, 20)


def test_explanation_of_the_estimate():
    world = World(grid_of(500, 80), 40)
    choice = choose_scale(Image((500, 500)), config(), world, diameter="auto")
    assert choice.explanation == (
        "factor 0.5: nuclei of about 40 px by estimate, the model's have 20 px"
    )


def test_an_image_without_nuclei_keeps_its_size():
    choice = choose_scale(Image((300, 300)), config(), World([], 20))
    assert choice == (1.0, "factor 1: no nuclei found at any scale")


def test_one_nucleus_is_enough():
    world = World([(700, 100)], 40)
    assert estimate_factor(Image((1000, 1000)), MODEL_DIAMETER, world) == (0.5, 40)


def test_the_view_is_bounded_and_follows_the_nuclei():
    """Nuclei in one corner of a large image: each look stays within the bound, and sees them."""
    centres = np.add(grid_of(400, 30), (4500, 100))
    pixels = np.zeros((5000, 6000), np.uint8)
    pixels[4500:4900:2, 100:500] = 200
    image, world = Image((5000, 6000), pixels=pixels), World(centres, 10)
    assert estimate_factor(image, MODEL_DIAMETER, world) == (2.0, 10)
    for window, factor in world.calls:
        assert max(window.height, window.width) <= math.ceil(VIEW * MODEL_DIAMETER / factor)
        assert window.contains(centres).any()
    assert image.read_pixels < 0.5 * 5000 * 6000


def test_a_small_image_is_not_taken_for_one_nucleus():
    """Seen as large as one nucleus, a whole field may look like one."""
    world = World(grid_of(120, 20), 10)
    finder = lambda window, factor: (  # noqa: E731
        World.found(np.array([(60, 60)]), 100, 0.9) if factor < 0.2 else world(window, factor)
    )
    assert estimate_factor(Image((120, 120)), MODEL_DIAMETER, finder) == (2.0, 10)


def test_an_image_smaller_than_a_few_nuclei_is_looked_at_as_it_is():
    world = World([(7, 7)], 12)
    factor, width = estimate_factor(Image((14, 14)), MODEL_DIAMETER, world)
    assert (factor, width) == (pytest.approx(math.sqrt(2)), 12)
    assert [factor for _, factor in world.calls] == [1.0]


def test_the_search_ends_behind_the_best():
    world = World(grid_of(3000, 300), 160)
    estimate_factor(Image((3000, 3000)), MODEL_DIAMETER, world)
    assert len(world.calls) < len(FACTORS)


@given(
    st.tuples(st.integers(0, 99), st.integers(0, 99), st.integers(1, 99), st.integers(1, 99)),
    st.tuples(st.floats(-50, 250), st.floats(-50, 250)),
    st.integers(1, 150),
)
def test_a_crop_lies_in_its_window(window, centre, side):
    window = Window(*window)
    part = window.crop(centre, side)
    assert (part.height, part.width) == (min(window.height, side), min(window.width, side))
    assert window.top <= part.top <= window.top + window.height - part.height
    assert window.left <= part.left <= window.left + window.width - part.width
    corners = np.array([(part.top, part.left), (part.top + part.height, part.left)])
    assert part.contains(corners).tolist() == [True, False]


@pytest.mark.parametrize("factor", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("scale", ["1.0", "1.5"])
def test_the_finder_measures_in_pixels_of_the_image(factor, scale):
    pixels = np.full((120, 150), 10, np.uint8)
    for centre in ((30, 40), (80, 110)):
        rows, cols = disk(centre, 12.5)
        pixels[rows, cols] = 200
    cfg = load_config(str(CONFIGS / "classical.yaml"), ["INPUT.SCALE", scale])
    image = Image(pixels.shape, pixels=pixels)
    contrast = ImageNormalizer(cfg).range_of(image)
    find = make_finder(image, contrast, cfg, build_model(cfg).eval())
    found = find(Window(10, 20, 100, 120), factor)
    order = np.argsort(found.centres[:, 0])
    assert found.centres[order] == pytest.approx(np.array([(30.5, 40.5), (80.5, 110.5)]), abs=1)
    assert found.diameters == pytest.approx([25, 25], abs=2)
    assert (found.scores > 0.5).all()
    nothing = find(Window(0, 60, 9, 9), factor)
    assert nothing.centres.shape == (0, 2)
    assert nothing.diameters.shape == nothing.scores.shape == (0,)

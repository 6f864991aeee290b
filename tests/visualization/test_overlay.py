import matplotlib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nuclei_d2.data.normalization import contrast_range
from nuclei_d2.structures import LabelMasks
from nuclei_d2.visualization.overlay import (
    PALETTE,
    draw_boundaries,
    draw_contours,
    enlargement,
    neighbour_colors,
    panel,
    stretch,
)

FIRST, SECOND = PALETTE[:2].tolist()  # colours of two nuclei that lie close to each other


def black(height, width):
    return np.zeros((height, width, 3), np.uint8)


def bitmap(height, width, rows, columns):
    mask = np.zeros((height, width), bool)
    mask[rows, columns] = True
    return mask


def disc(size, centre, radius):
    y, x = np.ogrid[:size, :size]
    return (y - centre[0]) ** 2 + (x - centre[1]) ** 2 <= radius**2


def test_stretch_maps_the_percentiles_to_0_and_255():
    image = np.arange(101, dtype=np.float32).reshape(1, 101, 1) * 40  # 16-bit range
    picture = stretch(image, contrast_range(image, (10, 60), noise_floor=0, min_levels=0))
    assert picture.dtype == np.uint8
    assert picture.shape == (1, 101, 3)
    expected = np.rint(np.clip((np.arange(101) - 10) / 50, 0, 1) * 255)
    np.testing.assert_array_equal(picture, np.repeat(expected[None, :, None], 3, axis=2))


def test_stretch_keeps_the_balance_of_colours():
    image = np.zeros((2, 2, 3), np.float32)
    image[0, 0] = (100, 50, 0)
    picture = stretch(image, contrast_range(image, (0, 100), noise_floor=0, min_levels=0))
    assert picture[0, 0].tolist() == [255, 128, 0]


@pytest.mark.parametrize(
    ("size", "factor"),
    [((256, 256), 4), ((256, 320), 4), ((520, 696), 2), ((1000, 10), 1), ((3000, 4000), 1)],
)
def test_small_images_are_enlarged_by_an_integer_to_a_thousand_pixels(size, factor):
    assert enlargement(*size) == factor
    assert draw_contours(black(*size), np.zeros((0, *size), bool)).shape[:2] == (
        factor * size[0],
        factor * size[1],
    )


def test_the_line_runs_along_the_inner_edge():
    mask = bitmap(12, 12, slice(4, 8), slice(4, 8))
    drawn = draw_contours(black(12, 12), mask[None], line_width=3, factor=10)
    touched = drawn.any(axis=2)
    assert not touched[:40].any()
    assert not touched[80:].any()
    assert not touched[:, :40].any()
    assert not touched[:, 80:].any()
    assert not touched[48:72, 48:72].any()  # the interior
    for y, x in [(41, 60), (78, 60), (60, 41), (60, 78)]:  # the middles of the four sides
        assert drawn[y, x].tolist() == FIRST


def test_touching_nuclei_keep_a_line_each():
    masks = np.stack([bitmap(10, 20, slice(2, 8), slice(s, s + 6)) for s in (3, 9)])
    drawn = draw_contours(black(10, 20), masks, line_width=2, factor=8)
    assert drawn[40, 70].tolist() == FIRST  # the common edge lies at x = 72
    assert drawn[40, 73].tolist() == SECOND


def test_every_form_of_masks_gives_the_same_picture():
    labels = np.zeros((40, 50), np.int32)
    labels[2:10, 3:15] = 7
    labels[20:30, 30:50] = 1000
    labels[10:18, 3:9] = 9
    masks = np.stack([labels == k for k in (7, 9, 1000)])
    picture = np.random.default_rng(0).integers(0, 255, (40, 50, 3), np.uint8)
    expected = draw_contours(picture, masks)
    assert (expected != draw_contours(picture, masks[:0])).any()
    label_masks = LabelMasks(torch.from_numpy(labels)[None], torch.tensor([7, 9, 1000]))
    for form in (torch.from_numpy(masks), labels, labels.astype(np.uint16), label_masks):
        np.testing.assert_array_equal(draw_contours(picture, form), expected)


def test_a_label_image_without_background():
    labels = np.repeat(np.array([[3, 5]], np.int32), 8, axis=0).repeat(8, axis=1)
    expected = draw_contours(black(8, 16), np.stack([labels == 3, labels == 5]))
    np.testing.assert_array_equal(draw_contours(black(8, 16), labels), expected)


def test_overlapping_nuclei_of_label_masks():
    masks = np.stack([disc(40, (18, 14), 9), disc(40, (20, 24), 9)])
    layers = torch.from_numpy(masks.astype(np.int32)) * torch.tensor([4, 2])[:, None, None].int()
    overlapping = LabelMasks(layers, torch.tensor([4, 2]), torch.tensor([0, 1]))
    expected = draw_contours(black(40, 40), masks)
    np.testing.assert_array_equal(draw_contours(black(40, 40), overlapping), expected)


def test_input_is_left_alone_and_empty_masks_draw_nothing():
    picture = np.full((20, 20, 3), 90, np.uint8)
    masks = np.zeros((2, 20, 20), bool)
    for form in (
        masks,
        masks[0].astype(int),
        LabelMasks(torch.zeros(1, 20, 20), torch.tensor([1])),
    ):
        drawn = draw_contours(picture, form, factor=1)
        assert drawn is not picture
        np.testing.assert_array_equal(drawn, 90)
    draw_contours(picture, disc(20, (9, 9), 6)[None], factor=1)
    assert (picture == 90).all()


@pytest.mark.parametrize("where", [(0, 0), (0, 9), (9, 9), (4, 5)])
@pytest.mark.parametrize("factor", [1, 4])
def test_a_nucleus_of_one_pixel_is_seen_wherever_it_lies(where, factor):
    mask = np.zeros((1, 10, 10), bool)
    mask[0][where] = True
    drawn = draw_contours(black(10, 10), mask, factor=factor)
    y, x = (slice(factor * k, factor * (k + 1)) for k in where)
    assert drawn[y, x, 0].max() > 60
    drawn[y, x] = 0
    assert not drawn.any()


def test_a_wide_line_covers_the_nucleus_but_not_its_hole():
    mask = disc(80, (40, 40), 30) & ~disc(80, (40, 40), 12)
    drawn = draw_contours(black(80, 80), mask[None], line_width=4 * 18, factor=4)
    assert drawn[4 * 40, 4 * 62].tolist() == FIRST
    assert not drawn[4 * 40, 4 * 40].any()
    covered = drawn[:, :, 0].sum() / FIRST[0] / 16  # in pixels of the image
    assert covered == pytest.approx(mask.sum(), rel=0.03)


def test_masks_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"\(8, 9\).*\(9, 8\)"):
        draw_contours(black(9, 8), np.zeros((1, 8, 9), bool))


@settings(max_examples=30, deadline=None)
@given(
    boxes=st.lists(
        st.tuples(*[st.integers(0, 200)] * 2, *[st.integers(1, 40)] * 2), min_size=1, max_size=40
    )
)
def test_neighbours_differ_while_there_are_colours(boxes):
    boxes = np.array([(x, y, x + w, y + h) for x, y, w, h in boxes])
    colors = neighbour_colors(boxes)
    for i in range(len(boxes)):
        x1, y1, x2, y2 = boxes[i]
        others = boxes[:i]
        touching = (others[:, 0] <= x2) & (others[:, 2] >= x1)
        touching &= (others[:, 1] <= y2) & (others[:, 3] >= y1)
        reach = 6
        near = (others[:, 0] < x2 + reach) & (others[:, 2] + reach > x1)
        near &= (others[:, 1] < y2 + reach) & (others[:, 3] + reach > y1)
        if near.sum() < len(PALETTE):
            assert not (colors[:i][touching] == colors[i]).all(axis=1).any()


def colours_by_comparing_all(boxes):
    """The rule as it is said: each box against all before it."""
    chosen = np.zeros(len(boxes), np.intp)
    lower, upper = boxes[:, :2], boxes[:, 2:] + 6
    used = np.zeros(len(PALETTE), np.intp)
    for i in range(len(boxes)):
        near = ((lower[:i] < upper[i]) & (lower[i] < upper[:i])).all(axis=1)
        around = np.bincount(chosen[:i][near], minlength=len(PALETTE))
        chosen[i] = np.lexsort((used, around))[0]
        used[chosen[i]] += 1
    return PALETTE[chosen]


@pytest.mark.parametrize("count", [1, 10, 400])
@pytest.mark.parametrize("step", [1, 0.25])
def test_colours_are_those_of_comparing_all(count, step):
    rng = np.random.default_rng(count)
    corners = rng.integers(0, 300, (count, 2))
    boxes = np.hstack([corners, corners + rng.integers(0, 60, (count, 2))]) * step
    boxes[count // 2] = (0, 0, 300, 300)  # one around all others
    np.testing.assert_array_equal(neighbour_colors(boxes), colours_by_comparing_all(boxes))


def test_all_colours_are_used_where_nuclei_are_far_apart():
    boxes = np.array([(100 * k, 0, 100 * k + 10, 10) for k in range(len(PALETTE))])
    assert len(np.unique(neighbour_colors(boxes), axis=0)) == len(PALETTE)
    assert neighbour_colors(np.zeros((0, 4), int)).shape == (0, 3)


def test_boundary_map_shows_the_maximum_over_nuclei():
    boundaries = torch.zeros(2, 3, 1000, dtype=torch.uint8)  # as wide as is not enlarged
    boundaries[0, 1, 1], boundaries[1, 1, 1], boundaries[1, 2, 3] = 40, 200, 255
    colors = matplotlib.colormaps["inferno"](np.arange(256), bytes=True)[:, :3]
    drawn = draw_boundaries(boundaries)
    assert drawn.shape == (3, 1000, 3)
    assert drawn[1, 1].tolist() == colors[200].tolist()
    assert drawn[2, 3].tolist() == colors[255].tolist()
    assert drawn[0, 0].tolist() == colors[0].tolist()
    empty = draw_boundaries(torch.zeros(0, 3, 500, dtype=torch.uint8))
    assert empty.shape == (6, 1000, 3)
    assert (empty == colors[0]).all()


def test_panel_puts_titled_pictures_side_by_side():
    left, right = np.full((50, 200, 3), 10, np.uint8), np.full((30, 60, 3), 200, np.uint8)
    result = panel([("37 nuclei", left), ("", right)])
    top = result.shape[0] - 50
    assert top > 0
    np.testing.assert_array_equal(result[top:, :200], left)
    np.testing.assert_array_equal(result[top : top + 30, -60:], right)
    assert (result[top:, 200:-60] == 255).all()  # the gap
    assert (result[top + 30 :, -60:] == 255).all()
    assert (result[:top, :200] < 128).any()  # the first title
    assert (result[:top, 200:] == 255).all()  # the second has none


def test_a_title_wider_than_its_picture_keeps_its_place():
    narrow, title = np.zeros((50, 10, 3), np.uint8), "ground truth: 1000 nuclei"
    alone, both = panel([(title, narrow)]), panel([(title, narrow), ("", narrow)])
    np.testing.assert_array_equal(both[:, : alone.shape[1]], alone)
    assert (both[: alone.shape[0] - 50, alone.shape[1] :] == 255).all()

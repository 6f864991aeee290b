import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nuclei_d2.data.augmentation import ResampleTransform
from nuclei_d2.inference.nuclei import Nuclei
from nuclei_d2.inference.tiling import (
    ALIGNMENT,
    TileResult,
    judge_tile,
    load_result,
    make_grid,
    merge_tiles,
    resample_tile,
    save_result,
    source_window,
)
from nuclei_d2.structures.cropped_mask import CroppedMask
from nuclei_d2.utils.errors import NucleiError


def squares(size, *boxes):
    """Nuclei from (top, left, height, width, score)."""
    masks = [CroppedMask(np.ones((h, w), bool), y, x) for y, x, h, w, _ in boxes]
    return Nuclei.from_masks(masks, np.array([box[4] for box in boxes]), size)


def corners(nuclei):
    return [(mask.top, mask.left) for mask in nuclei.masks]


def test_an_image_that_fits_is_one_tile_that_owns_it():
    grid = make_grid((300, 500), 2.0, 1024, 128)
    assert grid.network_size == (600, 1000)
    (tile,) = grid.tiles
    assert tile.rows == (0, 600, 0, 600)
    assert tile.columns == (0, 1000, 0, 1000)


def test_cuts_lie_in_the_middle_of_the_overlap():
    grid = make_grid((256, 1000), 1.0, 512, 128)
    assert [tile.columns for tile in grid.tiles] == [
        (0, 512, 0, 448),
        (384, 896, 448, 832),
        (768, 1000, 832, 1000),
    ]
    assert [tile.index for tile in grid.tiles] == [(0, 0), (0, 1), (0, 2)]


def test_tile_and_overlap_are_rounded_up_to_the_feature_grid():
    grid = make_grid((2000, 2000), 1.0, 500, 100)
    assert grid.overlap == 128
    assert {tile.rows.start % ALIGNMENT for tile in grid.tiles} == {0}
    assert grid.tiles[0].shape == (512, 512)


@pytest.mark.parametrize(("tile", "overlap"), [(128, 128), (64, 64), (0, 0), (512, -64)])
def test_tiles_that_consist_of_overlap(tile, overlap):
    with pytest.raises(NucleiError, match="--overlap"):
        make_grid((100, 100), 1.0, tile, overlap)


@settings(max_examples=40, deadline=None)
@given(
    st.tuples(st.integers(1, 400), st.integers(1, 400)),
    st.floats(0.3, 3),
    st.sampled_from([(128, 0), (128, 64), (192, 64), (256, 128)]),
)
def test_owned_parts_cover_the_image_once(size, scale, tiling):
    grid = make_grid(size, scale, *tiling)
    owners = np.zeros(grid.network_size, int)
    for tile in grid.tiles:
        owners[tile.rows.first : tile.rows.last, tile.columns.first : tile.columns.last] += 1
        for span in (tile.rows, tile.columns):
            assert span.start <= span.first < span.last <= span.stop
    assert (owners == 1).all()


@settings(max_examples=40, deadline=None)
@given(
    st.tuples(st.integers(1, 300), st.integers(1, 300)), st.floats(0.2, 3), st.sampled_from([1, 3])
)
def test_tiles_are_windows_of_the_resized_image(size, scale, channels):
    image = np.random.default_rng(0).uniform(0, 255, (*size, channels)).astype(np.float32)
    grid = make_grid(size, scale, 128, 64)
    whole = ResampleTransform(*size, *grid.network_size).apply_image(image)
    # OpenCV averages over areas if the area shrinks, we on each axis: 3 x 300 may differ.
    ratios = grid.scale
    for tile in grid.tiles:
        window = image[source_window(grid, tile)]
        pixels = resample_tile(window, grid, tile)
        assert pixels.shape == (*tile.shape, channels)
        assert pixels.dtype == np.float32
        if (ratios >= 1).all() or (ratios < 1).all():
            rows, columns = tile.rows, tile.columns
            expected = whole[rows.start : rows.stop, columns.start : columns.stop]
            np.testing.assert_allclose(pixels, expected, atol=2e-2)


def test_only_the_needed_part_of_the_file_is_read():
    grid = make_grid((4000, 4000), 0.5, 512, 128)
    rows, columns = source_window(grid, grid.tiles[1])
    assert (rows.start, rows.stop) == (0, 1024)
    assert (columns.start, columns.stop) == (768, 1792)


COUNTS = np.arange(259.0)
SEEN = np.ones(9, bool)
GRID = make_grid((100, 1000), 1.0, 512, 128)  # cuts at column 448 and 832


def test_a_nucleus_belongs_to_the_tile_that_owns_its_centre():
    middle = GRID.tiles[1]
    found = squares(
        GRID.size,
        (10, 600, 20, 20, 0.9),  # owned
        (10, 428, 20, 20, 0.8),  # centre at 438: in the margin of 16
        (10, 418, 20, 20, 0.7),  # centre at 428: not any more
        (10, 838, 20, 20, 0.6),  # centre at 848: the first one outside the margin
    )
    result = judge_tile(found, SEEN[:4], middle, GRID, capped=False, counts=COUNTS)
    assert corners(result.nuclei) == [(10, 600), (10, 428)]
    assert result.cut == 0
    assert result.largest == 20


def test_a_nucleus_that_the_tile_cuts_is_left_out_and_counted():
    found = squares(GRID.size, (10, 385, 20, 200, 0.9), (0, 384, 20, 200, 0.8))
    result = judge_tile(found, SEEN[:2], GRID.tiles[1], GRID, capped=True, counts=COUNTS)
    assert len(result.nuclei) == 0
    assert result.cut == 2
    assert result.capped
    found = squares(GRID.size, (0, 0, 100, 300, 0.9))  # the image's own edges cut nothing
    assert judge_tile(found, SEEN[:1], GRID.tiles[0], GRID, False, COUNTS).cut == 0


def test_what_cannot_be_seen_is_counted_once_and_nowhere_else():
    found = squares(
        GRID.size,
        (10, 600, 20, 20, 0.9),
        (40, 600, 30, 30, 0.8),  # owned
        (10, 428, 20, 20, 0.7),  # in the margin
        (10, 385, 20, 200, 0.6),  # cut
    )
    visible = np.array([True, False, False, False])
    result = judge_tile(found, visible, GRID.tiles[1], GRID, capped=False, counts=COUNTS)
    assert corners(result.nuclei) == [(10, 600)]
    assert (result.invisible, result.cut, result.largest) == (2, 0, 20)


def results(*boxes_of_tiles, grid=GRID):
    return [
        TileResult(tile, squares(grid.size, *boxes), 0, 0, False, 0, COUNTS)
        for tile, boxes in zip(grid.tiles, boxes_of_tiles, strict=True)
    ]


def test_a_nucleus_that_two_tiles_report_is_kept_once():
    nuclei, seams = merge_tiles(
        results([(10, 430, 20, 20, 0.7), (50, 100, 9, 9, 0.8)], [(10, 431, 20, 20, 0.9)], []), GRID
    )
    # The centre, 440, is left of the cut: the first tile's stays although it scores less.
    assert corners(nuclei) == [(50, 100), (10, 430)]
    assert seams == (2, 2)


def test_a_nucleus_inside_another_tiles_one_goes():
    merged = (10, 438, 20, 40, 0.6)  # centre 458: owned by the second tile
    half = (10, 438, 20, 14, 0.9)  # IoU 0.35, but it lies inside; centre 445
    nuclei, _ = merge_tiles(results([half], [merged], []), GRID)
    assert corners(nuclei) == [(10, 438)]
    assert nuclei.scores.tolist() == [0.9]  # both are owned: the score decides


def test_a_fragment_inside_a_nucleus_of_its_tile_goes():
    nucleus, fragment = (10, 100, 20, 20, 0.9), (10, 100, 20, 8, 0.8)  # IoU 0.4, but inside
    nuclei, _ = merge_tiles(results([fragment, nucleus], [], []), GRID)
    assert nuclei.scores.tolist() == [0.9]


def test_a_fragment_goes_with_the_better_nucleus_of_another_tile():
    merged = (10, 438, 20, 40, 0.9)  # centre 458: owned by the second tile
    fragment = (10, 438, 20, 14, 0.7)  # owned by the first, which sees the other, too
    nuclei, _ = merge_tiles(results([merged, fragment], [merged], []), GRID)
    assert corners(nuclei) == [(10, 438)]
    assert nuclei.scores.tolist() == [0.9]


def test_overlapping_nuclei_of_one_tile_stay():
    nuclei, _ = merge_tiles(
        results([(10, 100, 20, 20, 0.9), (10, 110, 20, 20, 0.8)], [], []), GRID
    )  # half of each in common, IoU 1/3
    assert len(nuclei) == 2


def test_neighbours_that_only_touch_stay():
    left, right = (10, 430, 20, 18, 0.9), (10, 445, 20, 20, 0.8)  # 3 of 18 columns in common
    nuclei, seams = merge_tiles(results([left], [right], []), GRID)
    assert len(nuclei) == 2
    assert seams.agreed == 0
    assert seams.nuclei == 1  # the centre of `right`, 455, is less than 8 from the cut


def test_tiles_meet_at_corners():
    grid = make_grid((800, 800), 1.0, 512, 128)
    same = (440, 440, 16, 16, 0.5)
    nuclei, seams = merge_tiles(results([same], [same], [same], [same], grid=grid), grid)
    assert corners(nuclei) == [(440, 440)]
    assert seams == (12, 12)  # six pairs of tiles, both ways


def test_nothing_found():
    nuclei, seams = merge_tiles(results([], [], []), GRID)
    assert len(nuclei) == 0
    assert nuclei.size == GRID.size
    assert seams == (0, 0)


def test_a_result_of_another_version_is_not_used(tmp_path):
    path = tmp_path / "a.npz"
    save_result(path, TileResult(GRID.tiles[1], squares(GRID.size), 0, 0.0, False, 0, COUNTS))
    with np.load(path) as file:
        arrays = dict(file)
    for other in ({"rest": np.zeros(3)}, {"counts": None}):
        content = {k: v for k, v in (arrays | other).items() if v is not None}
        np.savez_compressed(path, **content)
        assert load_result(path, GRID.tiles[1], GRID) is None


@pytest.mark.parametrize("kept", [0, 0.5, 0.99])
@pytest.mark.parametrize("filled", [False, True])
def test_a_damaged_result_is_not_used(tmp_path, kept, filled):
    path = tmp_path / "a.npz"
    save_result(path, TileResult(GRID.tiles[1], squares(GRID.size), 0, 0.0, False, 0, COUNTS))
    content = path.read_bytes()
    half = content[: int(kept * len(content))]
    path.write_bytes(half + bytes(len(content) - len(half)) if filled else half)
    assert load_result(path, GRID.tiles[1], GRID) is None


def test_a_result_survives_its_file(tmp_path):
    rng = np.random.default_rng(0)
    masks = [CroppedMask(rng.random((h, w)) < 0.5, 5, 7) for h, w in [(3, 5), (1, 1), (8, 2)]]
    for boxed in masks:
        boxed.mask[0, 0] = True
    measures = {"agreement": np.array([0.5, 1.0, 0.75])}
    nuclei = Nuclei.from_masks(masks, np.array([0.9, 0.8, 0.7]), GRID.size, measures)
    for kept in (nuclei, squares(GRID.size)):
        result = TileResult(GRID.tiles[1], kept, 3, 17.5, True, 2, COUNTS)
        assert load_result(tmp_path / "a.npz", GRID.tiles[1], GRID) is None
        save_result(tmp_path / "a.npz", result)
        loaded = load_result(tmp_path / "a.npz", GRID.tiles[1], GRID)
        assert loaded[2:6] == result[2:6]
        np.testing.assert_array_equal(loaded.counts, COUNTS)
        np.testing.assert_array_equal(loaded.nuclei.scores, kept.scores)
        np.testing.assert_array_equal(loaded.nuclei.boxes, kept.boxes)
        for a, b in zip(loaded.nuclei.masks, kept.masks, strict=True):
            np.testing.assert_array_equal(a.mask, b.mask)
        assert {k: v.tolist() for k, v in loaded.nuclei.measures.items()} == {
            k: v.tolist() for k, v in kept.measures.items()
        }
        (tmp_path / "a.npz").unlink()

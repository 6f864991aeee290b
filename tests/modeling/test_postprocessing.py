import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from nuclei_d2.data.datasets.synthetic import SyntheticConfig, generate
from nuclei_d2.data.targets import (
    distance_target,
    flatten_labels,
    inner_boundary_target,
    thick_boundary_target,
    two_class_target,
)
from nuclei_d2.modeling.postprocessing import (
    Decoder,
    decode_boundary,
    decode_caicedo,
    decode_distance,
    decode_two_class,
    score_nuclei,
)

DECODERS = [decode_two_class, decode_caicedo, decode_boundary, decode_distance]
by_name = pytest.mark.parametrize("decode", DECODERS, ids=lambda d: d.__name__)


def one_hot(target, classes):
    return (target == np.arange(classes)[:, None, None]).astype(np.float32)


def perfect_maps(decode, labels):
    """What a network that makes no mistake hands to ``decode``."""
    if decode is decode_two_class:
        return one_hot(two_class_target(labels), 2)
    if decode is decode_caicedo:
        return one_hot(thick_boundary_target(labels), 3)
    if decode is decode_boundary:
        return one_hot(inner_boundary_target(labels), 3)
    return np.concatenate([one_hot(two_class_target(labels), 2), distance_target(labels)[None]])


def touching_nuclei(seed, **settings):
    config = SyntheticConfig(empty=0, crowding=0.9, overlapping=0, **settings)
    layers = generate(seed, config)[1]
    return np.unique(flatten_labels(np.moveaxis(layers, 0, 2)), return_inverse=True)[1]


def intersections(labels, found):
    table = np.zeros((labels.max() + 1, found.max() + 1))
    np.add.at(table, (labels, found), 1)
    return table


def best_ious(labels, found):
    """IoU of every nucleus with the best of those found."""
    table = intersections(labels, found)
    union = table.sum(axis=1, keepdims=True) + table.sum(axis=0) - table
    return (table / union)[1:, 1:].max(axis=1, initial=0)


def disagreement(labels, others):
    """Share of pixels that a one-to-one renumbering of the nuclei does not explain."""
    table = intersections(labels, others)
    return 1 - min(table.max(axis=0).sum(), table.max(axis=1).sum()) / labels.size


@pytest.mark.parametrize(
    ("decode", "ceiling"),
    [(decode_boundary, 0.99), (decode_caicedo, 0.92), (decode_distance, 0.98)],
)
def test_perfect_maps_of_touching_nuclei_decode_to_the_ceiling(decode, ceiling):
    ious = []
    for seed in range(8):
        labels = touching_nuclei(seed)
        found = decode(perfect_maps(decode, labels))
        ious.append(best_ious(labels, found))
        assert found.max() == labels.max()  # no split, no merge
    assert np.mean(np.concatenate(ious)) >= ceiling


def test_components_merge_what_touches():
    labels = np.zeros((20, 30), np.int32)
    labels[5:15, 3:10], labels[5:15, 10:18], labels[5:15, 20:28] = 1, 2, 3
    found = decode_two_class(perfect_maps(decode_two_class, labels))
    assert found.max() == 2
    assert (found > 0).sum() == (labels > 0).sum()


def check_label_image(found, shape):
    assert found.dtype == np.int32
    assert found.shape == shape
    assert (np.unique(found[found > 0]) == np.arange(1, found.max() + 1)).all()


@by_name
@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_any_maps_give_consecutive_labels_and_leave_the_background(decode, data):
    shape = (data.draw(st.integers(1, 20)), data.draw(st.integers(1, 20)))
    channels = 2 if decode is decode_two_class else 3
    levels = data.draw(arrays(np.uint8, (channels, *shape), elements=st.integers(0, 4)))
    maps = levels.astype(np.float32) + 0.25
    classes = 2 if decode is decode_distance else channels
    maps[:classes] /= maps[:classes].sum(axis=0)
    maps[classes:] /= maps[classes:].max(initial=1)
    found = decode(maps)
    check_label_image(found, shape)
    likeliest = maps[:classes].argmax(axis=0)
    background = likeliest == 0 if decode is decode_caicedo else maps[0] >= 0.5
    assert not found[background].any()


@by_name
@pytest.mark.parametrize("turn", [np.flipud, np.fliplr, np.rot90, lambda a: np.rot90(a, 2)])
def test_decoding_turns_with_the_image(decode, turn):
    labels = touching_nuclei(3, height=160, width=200, count=(30, 40), diameter=(14, 22))
    noise = np.random.default_rng(0).normal(0, 0.25, (3, 160, 200)).astype(np.float32)
    maps = perfect_maps(decode, labels)
    maps = np.clip(maps + noise[: len(maps)], 0, 1)
    turned = np.stack([turn(channel) for channel in maps])
    found, again = decode(maps), decode(np.ascontiguousarray(turned))
    assert found.max() > 5
    assert found.max() == again.max()
    assert disagreement(turn(found), again) <= 0.01


@by_name
def test_the_smallest_nuclei_and_those_at_the_border(decode):
    labels = np.zeros((32, 32), np.int32)
    labels[0:6, 0:5], labels[12:18, 25:32], labels[20, 20] = 1, 2, 3
    found = decode(perfect_maps(decode, labels))
    assert found[2, 2] != found[15, 30]
    assert best_ious(labels, found)[:2].min() > 0.8
    # Caicedo's boundary covers all of a pixel; every other decoder keeps it.
    assert found[20, 20] == 0 if decode is decode_caicedo else found[20, 20] > 0


@by_name
@pytest.mark.parametrize("shape", [(1, 1), (32, 32), (7, 300)])
def test_empty_and_full_images(decode, shape):
    empty = decode(perfect_maps(decode, np.zeros(shape, np.int32)))
    check_label_image(empty, shape)
    assert empty.max() == 0
    full = decode(perfect_maps(decode, np.ones(shape, np.int32)))
    assert (full == 1).all()


def test_a_boundary_separates_what_the_foreground_joins():
    maps = np.zeros((3, 5, 9), np.float32)
    maps[0] = 1
    maps[:, 1:4, 1:8] = np.array([0.1, 0.8, 0.1])[:, None, None]
    maps[:, 1:4, 4] = np.array([0.1, 0.3, 0.6])[:, None]
    for decode in (decode_boundary, decode_caicedo):
        found = decode(maps)
        assert found.max() == 2
        assert found[2, 2] != found[2, 6]
        assert (found[1:4, 4] > 0).all()
    assert decode_boundary(maps, seed_threshold=0.2).max() == 1
    assert decode_boundary(maps, seed_threshold=0.9).max() == 0


def test_thresholds_of_the_distance_decoder():
    depth = np.array([0.2, 0.6, 0.9, 0.6, 0.4, 0.6, 0.8, 0.6, 0.2], np.float32)
    maps = np.stack([np.full((3, 9), v, np.float32) for v in (0.2, 0.8, 0)])
    maps[2] = depth
    assert decode_distance(maps)[1].tolist() in (
        [1, 1, 1, 1, 1, 2, 2, 2, 2],
        [1, 1, 1, 1, 2, 2, 2, 2, 2],
    )
    assert decode_distance(maps, seed_threshold=0.3).max() == 1
    assert decode_distance(maps, seed_threshold=0.85).max() == 1
    assert decode_distance(maps, threshold=0.85).max() == 0


def test_small_nuclei_are_dropped_and_holes_of_one_nucleus_filled():
    foreground = np.zeros((12, 12), np.float32)
    foreground[1:8, 1:8] = 1
    foreground[3:5, 3:5] = 0  # a hole of 4
    foreground[10, 10] = 1
    foreground[0:4, 11] = 1
    foreground[1, 11] = 0  # open at the border
    maps = np.stack([1 - foreground, foreground])
    assert decode_two_class(maps).max() == 4
    found = decode_two_class(maps, min_area=2, hole_area=4)
    assert found.max() == 2
    assert (found[1:8, 1:8] == 1).all()
    assert found[1, 11] == 0
    assert decode_two_class(maps, hole_area=3)[3, 3] == 0


def test_a_gap_between_several_nuclei_is_no_hole():
    labels = np.zeros((14, 14), np.int32)
    labels[1:7, 1:7], labels[1:7, 7:13], labels[7:13, 1:7], labels[7:13, 7:13] = 1, 2, 3, 4
    labels[6:8, 6:8] = 0
    found = decode_boundary(perfect_maps(decode_boundary, labels), hole_area=100)
    assert (found == labels).all()


def test_score_is_the_mean_over_the_interior():
    labels = np.array([[1, 1, 1, 0, 2, 2]])
    interior = np.array([[0.2, 0.8, 0.6, 0.9, 0.3, 0.4]], np.float32)
    scores = score_nuclei(labels, interior, inside=interior >= 0.5)
    assert scores.dtype == np.float32
    assert scores == pytest.approx([0.7, 0.35])  # the second has no interior: all of it counts
    assert score_nuclei(np.zeros((2, 2), int), np.zeros((2, 2)), np.ones((2, 2), bool)).size == 0


def test_a_thousand_nuclei_take_less_than_a_second_and_500_megabytes():
    tile = np.zeros((64, 64), np.int32)
    y, x = np.ogrid[:64, :64]
    tile[(y - 31) ** 2 + (x - 20) ** 2 < 14**2] = 1
    tile[(y - 33) ** 2 + (x - 46) ** 2 < 13**2] = 2
    pair = np.arange(1024).reshape(32, 32).repeat(64, axis=0).repeat(64, axis=1)
    labels = np.tile(tile, (32, 32))
    labels += 2 * pair * (labels > 0)
    for decode in DECODERS:
        maps = perfect_maps(decode, labels)
        decoder = Decoder(decode, min_area=4, hole_area=16)
        start = time.process_time()
        found, scores = decoder(maps)
        seconds = time.process_time() - start
        tracemalloc.start()
        decoder(maps)
        megabytes = tracemalloc.get_traced_memory()[1] / 1e6
        tracemalloc.stop()
        assert len(scores) == found.max() == (1024 if decode is decode_two_class else 2048)
        assert seconds < 1
        assert megabytes < 500

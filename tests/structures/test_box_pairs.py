import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from nuclei_d2.structures.box_pairs import near_pairs


def test_a_gap_of_the_distance_is_not_near():
    boxes = np.array([(0, 0, 10, 10), (12, 0, 20, 10), (13, 13, 20, 20), (10, 10, 12, 12)])
    assert {tuple(sorted(pair)) for pair in near_pairs(boxes, 1)} == {(0, 3), (1, 3)}
    assert {tuple(sorted(pair)) for pair in near_pairs(boxes, 2)} == {(0, 3), (1, 3), (2, 3)}
    assert len(list(near_pairs(boxes, 3))) == 4  # all but 2 with 0 and with 1
    assert list(near_pairs(np.zeros((0, 4), int), 1)) == []


@given(
    st.lists(st.tuples(*[st.integers(0, 30)] * 2, *[st.integers(0, 12)] * 2), max_size=20),
    st.integers(1, 7),
)
def test_each_near_pair_once(corners, distance):
    boxes = np.array([(y, x, y + h, x + w) for y, x, h, w in corners]).reshape(-1, 4)
    low, high = boxes[:, :2], boxes[:, 2:] + distance
    expected = [
        (i, j)
        for j in range(len(boxes))
        for i in range(j)
        if (low[i] < high[j]).all() and (low[j] < high[i]).all()
    ]
    assert sorted(tuple(sorted(pair)) for pair in near_pairs(boxes, distance)) == sorted(expected)

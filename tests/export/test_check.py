import numpy as np
import pytest
import torch

from nuclei_d2.export import check
from nuclei_d2.export.check import Agreement, check_package, pixel_agreement, run_package
from nuclei_d2.utils.errors import NucleiError


def test_a_file_that_does_not_run(tmp_path):
    (tmp_path / "model.ts").write_bytes(b"PK")
    with pytest.raises(NucleiError, match=r"model\.ts does not run by itself: "):
        run_package(tmp_path / "model.ts", [])


def test_both_are_compared_in_full_precision(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(check, "run_package", lambda *_: [{}])
    monkeypatch.setattr(check, "compare", lambda *_: seen.append(torch.backends.cudnn.allow_tf32))
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    check_package("model.ts", None, None, {"image": np.zeros((2, 2, 1), np.float32)})
    assert seen == [False]
    assert torch.backends.cudnn.allow_tf32
    assert "torch.backends.cudnn.allow_tf32 = False" in check._RUNNER


@pytest.mark.parametrize(
    ("changes", "is_close"),
    [
        ({}, True),
        ({"exported": 6}, False),
        ({"original": 99, "exported": 98}, False),
        ({"original": 100, "exported": 101}, True),
        ({"original": 199, "exported": 197}, False),
        ({"pixels": 0.9989}, False),
        ({"difference": 0.002}, False),
        ({"difference": 0.0005}, True),
    ],
)
def test_how_close_is_close(changes, is_close):
    result = Agreement("a", (8, 8), 7, 7, 0.9991, 1.0, 1.0)
    assert result._replace(**changes).is_close == is_close


def test_pixels_are_compared_whatever_the_labels_are_called():
    first = np.array([[0, 0, 1, 1, 2, 2, 0, 0, 0, 0]])
    assert pixel_agreement(first, np.array([[0, 0, 7, 7, 3, 3, 0, 0, 0, 0]])) == 1
    assert pixel_agreement(first, np.array([[0, 0, 1, 1, 1, 1, 0, 0, 0, 0]])) == 0.8
    assert pixel_agreement(first, np.zeros((1, 10), int)) == 0.6

import hashlib
from argparse import Namespace

import pytest

from nuclei_d2.data.datasets.splits import hash_split, parse_split
from nuclei_d2.utils.errors import NucleiError


def test_default_split_is_the_fold_of_sha256():
    for image_id in map(str, range(300)):
        fold = int(hashlib.sha256(image_id.encode()).hexdigest(), 16) % 10
        assert hash_split(image_id) == {0: "test", 1: "val"}.get(fold, "train")


def test_split_shares_are_met_and_zero_and_one_are_exact():
    splits = [hash_split(f"image {k}", val=0.25, test=0.05) for k in range(4000)]
    assert splits.count("val") / 4000 == pytest.approx(0.25, abs=0.03)
    assert splits.count("test") / 4000 == pytest.approx(0.05, abs=0.015)
    assert {hash_split(str(k), val=0, test=0) for k in range(200)} == {"train"}
    assert {hash_split(str(k), val=0, test=1) for k in range(200)} == {"test"}


@pytest.mark.parametrize("shares", ["0.8/0.2", "a/b/c", "0.8/0.1/0.2", "1.2/-0.1/-0.1"])
def test_shares_that_are_none(shares):
    args = Namespace(split=shares, all_to=None)
    with pytest.raises(NucleiError, match="--split"):
        parse_split(args)


def test_all_images_in_one_split():
    rule, words = parse_split(Namespace(split="0.8/0.1/0.1", all_to="val"))
    assert {rule(str(k)) for k in range(50)} == {"val"}
    assert words == "all to val"

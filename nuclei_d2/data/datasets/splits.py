"""Which images train, validate and test."""

import argparse
import hashlib
from collections.abc import Callable
from functools import partial

from nuclei_d2.utils.errors import NucleiError

SPLITS = ("train", "val", "test")


def hash_split(image_id: str, val: float = 0.1, test: float = 0.1) -> str:
    """Split by the id alone, so that it is the same everywhere and new images move no old one.

    The decimal digits of sha256(image_id), read backwards, are a fraction in [0, 1): below
    ``test`` it is "test", in the next ``val`` "val", else "train". With 0.1 each that is
    fold = int(sha256, 16) mod 10, with 0 test, 1 val and the others train.
    """
    digits = str(int(hashlib.sha256(image_id.encode()).hexdigest(), 16))
    fraction = float(f"0.{digits[:-10:-1]}")
    if fraction < test:
        return "test"
    return "val" if fraction < test + val else "train"


def parse_split(args: argparse.Namespace) -> tuple[Callable[[str], str], str]:
    """The split that ``--split`` or ``--all-to`` ask for, as image id -> split, and in words.

    Raises:
        NucleiError: the shares are no three numbers that add up to 1.
    """
    if args.all_to:
        return lambda image_id: args.all_to, f"all to {args.all_to}"
    try:
        train, val, test = map(float, args.split.split("/"))
        valid = min(train, val, test) >= 0 and abs(train + val + test - 1) < 1e-6
    except ValueError:
        valid = False
    if not valid:
        raise NucleiError(f"--split is {args.split!r}; give three shares such as 0.8/0.1/0.1")
    rule = f"by sha256 of the image id, train/val/test {train:g}/{val:g}/{test:g}"
    return partial(hash_split, val=val, test=test), rule

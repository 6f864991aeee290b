import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pycocotools.mask as mask_util
import pytest
from scipy import ndimage

from nuclei_d2.data.datasets import synthetic
from nuclei_d2.data.datasets.statistics import find_touching
from nuclei_d2.data.datasets.synthetic import (
    SyntheticConfig,
    generate,
    layered_masks,
    load_synthetic,
)
from nuclei_d2.data.image_io import read_image, read_label
from nuclei_d2.utils.errors import NucleiError

FULL = SyntheticConfig(empty=0.0, count=(40, 40), diameter=(18.0, 18.0))


def test_shapes_types_and_numbering():
    image, labels = generate(3, SyntheticConfig(height=120, width=200, empty=0.0))
    assert (image.shape, image.dtype) == ((120, 200), np.uint8)
    assert (labels.shape, labels.dtype) == ((2, 120, 200), np.int32)
    assert np.unique(labels).tolist() == list(range(labels.max() + 1))
    image, _ = generate(3, SyntheticConfig(bits=12))
    assert image.dtype == np.uint16
    assert image.max() < 4096


def test_a_seed_means_one_field():
    first, second, other = generate(7), generate(7), generate(8)
    assert np.array_equal(first[0], second[0])
    assert np.array_equal(first[1], second[1])
    assert not np.array_equal(first[0], other[0])


def test_empty_field():
    image, labels = generate(0, SyntheticConfig(empty=1.0))
    assert not labels.any()
    assert image.std() > 0  # background and noise stay


def test_every_nucleus_is_one_visible_piece():
    for seed in range(5):
        masks = layered_masks(generate(seed, dataclasses.replace(FULL, crowding=0.9))[1])
        assert masks.sum(axis=(1, 2)).min() >= 12
        assert all(ndimage.label(mask)[1] == 1 for mask in masks)


def test_overlaps_are_in_both_masks_and_small():
    config = dataclasses.replace(FULL, crowding=1.0, overlapping=1.0)
    shares = []
    for seed in range(5):
        labels = generate(seed, config)[1]
        masks = layered_masks(labels)
        twice = masks.sum(axis=0) >= 2
        assert np.array_equal(twice, labels[1] > 0)
        shares += [(mask & twice).sum() / mask.sum() for mask in masks]
    assert max(shares) > 0.02
    # Nuclei cut off by the frame can have a larger part in common.
    assert np.mean(np.array(shares) <= config.max_overlap * 1.1) > 0.9


def test_no_overlaps_where_none_are_asked_for():
    config = dataclasses.replace(FULL, crowding=1.0, overlapping=0.0)
    assert not generate(0, config)[1][1].any()


def test_crowding_sets_the_touching_share():
    shares = []
    for crowding in (0.0, 0.25, 0.5, 0.75, 1.0):
        config = dataclasses.replace(FULL, crowding=crowding)
        touching = [find_touching(generate(seed, config)[1][0]) for seed in range(6)]
        shares.append(np.concatenate(touching).mean())
    assert shares[0] == 0
    assert all(np.diff(shares) > 0)
    assert shares[-1] > 0.9


def test_nuclei_are_brighter_than_the_background_and_their_size_is_as_asked():
    config = dataclasses.replace(FULL, crowding=0.0, mitotic=0.0, debris=(0, 0))
    image, labels = generate(1, config)
    assert np.median(image[labels[0] > 0]) > 2 * np.median(image[labels[0] == 0])
    areas = np.bincount(labels[0].ravel())[1:]
    # The outline's equal-area diameter is 18 px: an area of 254 px.
    assert np.median(areas) == pytest.approx(np.pi * 9**2, rel=0.2)


def test_time_grows_with_the_nuclei_not_with_nuclei_times_pixels():
    large = dataclasses.replace(FULL, height=2048, width=2048, count=(2000, 2000))
    small_time = min(process_time(FULL) for _ in range(3))
    # 50 times the nuclei on 64 times the pixels: full-frame work per nucleus costs 3200 times.
    assert process_time(large) < 400 * small_time


def process_time(config):
    start = time.process_time()
    _, labels = generate(0, config)
    assert labels.max() > 0.95 * config.count[0]
    return time.process_time() - start


@pytest.fixture
def root(tmp_path, monkeypatch):
    """Where a small synthetic set will be written."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    monkeypatch.setattr(synthetic, "IMAGES", {"train": 9, "val": 3, "test": 4})
    return tmp_path / "synthetic"


def test_loaded_splits_agree_with_their_files(root):
    records = load_synthetic("train")
    assert len(records) == 9
    assert [len(load_synthetic(split)) for split in ("val", "test")] == [3, 4]
    assert len({record["file_name"] for record in records}) == 9
    assert not records[7]["annotations"]  # one in twenty is empty
    for record in records:
        image, labels = read_image(record["file_name"]), read_label(record["label_file_name"])
        assert image.shape == (record["height"], record["width"], 1)
        rles = [annotation["segmentation"] for annotation in record["annotations"]]
        assert labels.max() == len(rles)
        masks = [mask_util.decode(rle).astype(bool) for rle in rles]
        for k, mask in enumerate(masks, start=1):
            assert mask[labels == k].all()
            assert record["overlaps"] or np.array_equal(mask, labels == k)
        assert record["overlaps"] == bool(masks and (np.sum(masks, axis=0) > 1).any())
    assert read_image(records[3]["file_name"]).max() > 255  # one in eight has 16 bits
    assert any(record["overlaps"] for record in records)


def test_set_is_drawn_once_and_the_same_everywhere(root, tmp_path, monkeypatch):
    path = load_synthetic("val")[0]["file_name"]
    written = Path(path).stat().st_mtime_ns
    assert Path(load_synthetic("val")[0]["file_name"]).stat().st_mtime_ns == written
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "elsewhere"))
    other = load_synthetic("val")[0]["file_name"]
    assert other != path
    assert np.array_equal(read_image(other), read_image(path))
    train, test = load_synthetic("train"), load_synthetic("test")
    assert not np.array_equal(read_image(train[0]["file_name"]), read_image(test[0]["file_name"]))


def test_changed_generator_draws_again(root):
    load_synthetic("val")
    stamp = root / "preparation.json"
    content = json.loads(stamp.read_text())
    stamp.write_text(json.dumps({**content, "generator": "older"}))
    (root / "images" / "val_000.png").unlink()
    load_synthetic("val")
    assert (root / "images" / "val_000.png").exists()
    assert json.loads(stamp.read_text()) == content
    assert sorted(p.name for p in root.parent.iterdir()) == ["synthetic", "synthetic.lock"]


def test_data_of_another_origin_are_left_alone(root):
    root.mkdir()
    (root / "mine.txt").write_text("precious")
    with pytest.raises(NucleiError, match="another origin"):
        load_synthetic("train")
    assert (root / "mine.txt").read_text() == "precious"


def test_unknown_split(root):
    with pytest.raises(NucleiError, match="valid: train, val, test"):
        load_synthetic("tset")


def test_unwritable_folder_is_one_clear_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "file"))
    with pytest.raises(NucleiError, match="set DETECTRON2_DATASETS"):
        load_synthetic("train")


def test_two_processes_at_once(root):
    script = (
        "from nuclei_d2.data.datasets import synthetic\n"
        "synthetic.IMAGES = {'train': 9, 'val': 3, 'test': 4}\n"
        "print(sum(len(r['annotations']) for r in synthetic.load_synthetic('train')))"
    )
    command = [sys.executable, "-c", script]
    workers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    counts = [int(worker.communicate()[0].split()[-1]) for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0]
    assert counts[0] == counts[1] == sum(len(r["annotations"]) for r in load_synthetic("train"))

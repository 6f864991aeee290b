"""Fixtures that several test folders share."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from tiny import write_split


@pytest.fixture
def tiny_data(tmp_path, monkeypatch) -> Iterator[Path]:
    """A prepared data set, tiny_{train,val,test}, below a fresh $DETECTRON2_DATASETS.

    One training image is empty.
    """
    root = tmp_path / "data"
    for seed, (split, counts) in enumerate(
        {"train": [8, 6, 0, 7], "val": [5], "test": [6, 4]}.items()
    ):
        write_split(root / "tiny", f"tiny_{split}", counts, seed)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(root))
    yield root
    for name in ("tiny_train", "tiny_val", "tiny_test"):
        if name in DatasetCatalog:
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)

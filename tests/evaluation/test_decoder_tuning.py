import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from tiny import TINY_DATA_OPTS

from nuclei_d2.config import load_config
from nuclei_d2.data.datasets.builtin import register_from_config
from nuclei_d2.data.image_io import read_label
from nuclei_d2.data.targets import inner_boundary_target
from nuclei_d2.evaluation.decoder_tuning import CANDIDATES, TuningSet, tune_settings
from nuclei_d2.modeling import build_model
from nuclei_d2.utils.errors import NucleiError

START = {"threshold": 0.5, "seed_threshold": 0.5, "min_area": 10}


def test_the_best_of_a_separable_score_is_found():
    goal = {"threshold": 0.3, "seed_threshold": 0.8, "min_area": 40}
    best, tried = tune_settings(lambda s: -sum(abs(s[k] - goal[k]) for k in goal), START)
    assert best == goal
    assert tried[0][0] == START
    assert len({tuple(settings.items()) for settings, _ in tried}) == len(tried)
    assert max(value for _, value in tried) == 0


def test_settings_without_effect_stay():
    best, tried = tune_settings(lambda settings: 0.7, START)
    assert best == START
    assert len(tried) == 1 + sum(len(set(CANDIDATES[k]) - {START[k]}) for k in START)


class Recorded:
    """Stands for a network: a perfect map, less sure of seeds than the default asks for."""

    def __init__(self, records):
        self.labels = {r["image_id"]: read_label(r["label_file_name"]) for r in records}

    def __call__(self, batch):
        maps = []
        for record in batch:
            classes = inner_boundary_target(self.labels[record["image_id"]])
            maps.append(torch.from_numpy(classes == np.arange(3)[:, None, None]).float())
            interior = maps[-1][1].clone()
            maps[-1][1] -= 0.55 * interior
            maps[-1][2] += 0.55 * interior
        return maps


@pytest.fixture
def unet(tiny_data):
    cfg = load_config(
        "",
        [
            *TINY_DATA_OPTS,
            *("MODEL.META_ARCHITECTURE", "UNet", "MODEL.BACKBONE.NAME", "build_unet_encoder"),
            *("MODEL.UNET.WIDTH", "2", "MODEL.DEVICE", "cpu", "MODEL.UNET.DECODER.MIN_AREA", "0"),
            *("MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0"),
        ],
    )
    register_from_config(cfg)
    records = DatasetCatalog.get("tiny_test")
    model = build_model(cfg).eval()
    model.predict_maps = Recorded(records)
    return model, records


def test_tuning_makes_a_recorded_network_perfect(unet):
    model, records = unet
    images = TuningSet(model, [records], "tiny_test", 0.0)
    start = model.decoder.settings
    assert images.score(start) == 0  # no seed is sure enough
    best, _ = tune_settings(images.score, start)
    assert best["seed_threshold"] < 0.45
    assert images.score(best) > 0.9
    assert TuningSet(model, [records], "tiny_test", 0.9).score(best) == 0


def test_a_set_without_nuclei_is_refused(unet, monkeypatch):
    model, records = unet
    empty = [{**record, "annotations": []} for record in records]
    monkeypatch.setattr(DatasetCatalog, "get", lambda name: empty)
    with pytest.raises(NucleiError, match="has no nuclei"):
        TuningSet(model, [records], "tiny_test", 0.0)

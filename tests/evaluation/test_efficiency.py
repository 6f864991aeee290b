import logging

import psutil
import pytest
import torch
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from tiny import CONFIGS, TINY_OPTS
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from nuclei_d2.config import load_config
from nuclei_d2.evaluation.efficiency import (
    efficiency_table,
    hardware,
    host_memory_mb,
    measured_inference,
    model_cost,
)
from nuclei_d2.modeling import build_model
from nuclei_d2.utils.hardware import cpu_name
from nuclei_d2.utils.timing import StageClock, stage

CPU = torch.device("cpu")


class Study:
    """Loader, model and evaluator that take known times: 1, 2 + 3 and 4 s per image, 7 s in all.

    The first five batches, the warm-up, take 1000 times as long.
    """

    def __init__(self, count, size=(1000, 500)):
        self.count, self.size = count, size
        self.now, self.factor = 0.0, 1000

    def clock(self):
        return StageClock(CPU, lambda: self.now)

    def pass_by(self, seconds):
        self.now += seconds * self.factor

    def __len__(self):
        return self.count

    def __iter__(self):
        for index in range(self.count):
            self.factor = 1000 if index < min(5, self.count - 1) else 1
            self.pass_by(1)
            yield [{"height": self.size[0], "width": self.size[1], "image": index}]

    def model(self):
        study = self

        class Model(nn.Module):
            def forward(self, batch):
                assert not self.training
                study.pass_by(1.5)
                with stage("postprocess"):
                    study.pass_by(3)
                study.pass_by(0.5)
                return [x["image"] for x in batch]

        return Model()

    def evaluator(self):
        study = self

        class Evaluator(DatasetEvaluator):
            def reset(self):
                self.seen = []

            def process(self, inputs, outputs):
                study.pass_by(4)
                self.seen += outputs

            def evaluate(self):
                study.pass_by(7)
                return {"segm": {"AP": sum(self.seen)}}

        return Evaluator()

    def run(self):
        return measured_inference(self.model(), self, self.evaluator(), CPU, self.clock())


def test_every_stage_is_measured_after_the_warm_up():
    results, cost = Study(8).run()
    assert results == {"segm": {"AP": sum(range(8))}}
    assert (cost["images"], cost["warmup_images"], cost["megapixels"]) == (3, 5, 1.5)
    assert cost["load_s_per_image"] == 1
    assert cost["network_s_per_image"] == 2
    assert cost["postprocess_s_per_image"] == 3
    assert cost["evaluation_s_per_image"] == pytest.approx(4 + 7 / 8)
    assert cost["images_per_second"] == pytest.approx(1 / 5)
    assert cost["megapixels_per_second"] == pytest.approx(0.5 / 5)
    assert cost["peak_device_memory_mb"] is None
    assert cost["peak_host_memory_mb"] > 0


def test_of_few_images_the_last_is_measured():
    _, cost = Study(1).run()
    assert (cost["images"], cost["warmup_images"]) == (1, 0)
    assert cost["network_s_per_image"] == 2
    _, cost = Study(3).run()
    assert (cost["images"], cost["warmup_images"]) == (1, 2)
    assert cost["load_s_per_image"] == 1


def test_a_process_without_images_has_no_speed():
    results, cost = Study(0).run()
    assert results == {"segm": {"AP": 0}}
    assert cost["images"] == 0
    assert "network_s_per_image" not in cost


def test_several_processes_add_up(monkeypatch):
    def two(own):
        other = {
            "counts": {"images": 1, "warmup_images": 5, "megapixels": 0.5},
            "seconds": {"load": 3.0, "network": 6.0, "postprocess": 3.0, "evaluation": 4.0},
            "device": 100.0,
            "host": 1e9,
        }
        return [own, other]

    monkeypatch.setattr(comm, "all_gather", two)
    _, cost = Study(8).run()
    assert (cost["images"], cost["warmup_images"], cost["megapixels"]) == (4, 10, 2)
    assert cost["load_s_per_image"] == (3 + 3) / 4
    assert cost["network_s_per_image"] == (3 * 2 + 6) / 4
    assert cost["evaluation_s_per_image"] == pytest.approx((3 * 4 + 4) / 4 + 7 / 14)
    # 4 images in 24 s of two processes that work at the same time.
    assert cost["images_per_second"] == pytest.approx(4 / 12)
    assert cost["peak_device_memory_mb"] == 100
    assert cost["peak_host_memory_mb"] == 1e9


class Convolution(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.frozen = nn.Parameter(torch.zeros(5), requires_grad=False)

    def forward(self, batch):
        return [self.layer(x["image"][None]) for x in batch]


def image(height, width):
    return {
        "image": torch.rand(3, height, width) * 255,
        "height": height // 2,
        "width": width // 2,
        "file_name": "image.png",
    }


def test_parameters_and_multiply_adds_by_hand():
    model = Convolution().train()
    state = torch.get_rng_state()
    inputs = image(8, 10)
    after = torch.get_rng_state()
    cost = model_cost(model, inputs)
    assert cost == {
        "parameters": 3 * 4 * 9 + 5,
        "trainable_parameters": 3 * 4 * 9,
        "flops": 8 * 10 * 3 * 4 * 9,
        "flops_image_size": [4, 5],
        "flops_network_size": [8, 10],
    }
    assert model.training
    assert torch.equal(torch.get_rng_state(), after)
    assert not torch.equal(state, after)
    assert set(model_cost(model, None)) == {"parameters", "trainable_parameters"}


def tiny_model(config, *opts):
    return build_model(load_config(str(CONFIGS / config), [*TINY_OPTS, *opts]))


@pytest.mark.parametrize(
    ("config", "opts"),
    [
        ("mask_boundary_rcnn.yaml", ("MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0")),
        ("unet_distance.yaml", ("MODEL.UNET.WIDTH", "8")),
    ],
)
def test_multiply_adds_of_the_models_agree_with_torch(config, opts):
    """torch counts convolutions and matrix products at 2 a multiply-add; fvcore a bit more."""
    model = tiny_model(config, *opts).eval()
    inputs = image(64, 96)
    cost = model_cost(model, inputs)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model([inputs])
    expected = counter.get_total_flops() / 2
    assert expected > 1e7
    assert expected <= cost["flops"] <= 1.05 * expected


def test_a_model_without_parameters_multiplies_nothing_that_counts():
    assert model_cost(tiny_model("classical.yaml"), image(16, 16))["flops"] is None


def test_a_model_that_cannot_be_traced_has_no_flops(caplog):
    class Broken(Convolution):
        def forward(self, batch):
            raise RuntimeError("two\nlines")

    with caplog.at_level(logging.WARNING):
        cost = model_cost(Broken(), image(8, 8))
    assert cost["flops"] is None
    assert cost["parameters"] == 113
    assert "FLOPs cannot be counted: two lines" in caplog.text


def test_host_memory_is_the_peak_of_this_process():
    before = host_memory_mb()
    now = psutil.Process().memory_info().rss / 2**20
    assert 0.9 * now < before < psutil.virtual_memory().total / 2**20
    big = torch.ones(int((before - now + 100) * 2**20 / 4))
    grown = host_memory_mb()
    del big
    assert before + 50 < grown < before + 200
    assert host_memory_mb() == grown


def test_the_hardware_is_named():
    named = hardware(CPU)
    assert named["device"] == named["cpu"] == cpu_name()
    assert named["threads"] == torch.get_num_threads()
    assert named["processes"] == 1


def test_the_table_shows_every_number():
    table = efficiency_table(
        {
            "hardware": {"device": "A Fast GPU"},
            "model": {"parameters": 1234567, "flops": None},
            "training": None,
            "evaluation": {"my_test": {"load_s_per_image": 0.0123456}},
        }
    )
    for text in ("A Fast GPU", "1234567", "my_test", "0.01235"):
        assert text in table

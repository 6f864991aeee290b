import logging

import pytest
import torch

from nuclei_d2.config import load_config
from nuclei_d2.utils import precision


@pytest.mark.parametrize(
    ("support", "fast"),
    [
        *(("fast (AMX)", True), ("slow (AVX-512 BF16)", False), ("slow (emulated)", False)),
        ("unknown", False),
    ],
)
def test_a_cpu_that_is_not_fast_at_bfloat16_does_without(monkeypatch, caplog, support, fast):
    monkeypatch.setattr(precision, "bfloat16_support", lambda: support)
    cfg = load_config("", ["MODEL.DEVICE", "cpu", "TEST.AMP.ENABLED", "True"])
    with caplog.at_level(logging.WARNING):
        assert precision.infers_in_bfloat16(cfg) is fast
    assert ("TEST.AMP.ENABLED is passed over" in caplog.text) is not fast


@pytest.mark.parametrize(("capability", "fast"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_a_gpu_before_ampere_does_without(monkeypatch, caplog, capability, fast):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with caplog.at_level(logging.WARNING):
        assert precision.has_bfloat16(torch.device("cuda"), "SOLVER.AMP.ENABLED") is fast
    assert ("not known to be faster than float32 on this GPU" in caplog.text) is not fast


def test_other_devices_are_trusted():
    assert precision.has_bfloat16(torch.device("mps"), "any key")


def test_only_who_asks_gets_it(caplog):
    assert not precision.infers_in_bfloat16(load_config("", ["MODEL.DEVICE", "cpu"]))
    assert not caplog.text

import pytest
import torch

from nuclei_d2.utils.errors import NucleiError
from nuclei_d2.utils.hardware import bfloat16_support, cpu_name, usable_gpus, use_device


def test_the_cpu_is_named(tmp_path):
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: A Fast CPU\nflags\t: fpu\n")
    assert cpu_name(tmp_path / "cpuinfo") == "A Fast CPU"
    assert cpu_name(tmp_path / "none")


@pytest.mark.parametrize(
    ("flags", "name"),
    [("fpu amx_bf16 avx512_bf16", "Xeon, AMX"), ("avx512_bf16", "Xeon, AVX-512 BF16")],
)
def test_cpus_of_one_name_are_told_apart_by_their_instructions(tmp_path, flags, name):
    (tmp_path / "cpuinfo").write_text(f"model name : Xeon\nflags : {flags}\n")
    assert cpu_name(tmp_path / "cpuinfo") == name


@pytest.mark.parametrize(
    ("flags", "answer"),
    [
        ("fpu amx_bf16 avx512_bf16", "fast (AMX)"),
        ("fpu avx512_bf16", "slow (AVX-512 BF16)"),
        ("fpu avx2", "slow (emulated)"),
    ],
)
def test_bfloat16_by_the_cpu_flags(tmp_path, flags, answer):
    (tmp_path / "cpuinfo").write_text(f"processor : 0\nflags : {flags}\n")
    assert bfloat16_support(tmp_path / "cpuinfo") == answer
    assert bfloat16_support(tmp_path / "nowhere") == "unknown"
    (tmp_path / "cpuinfo").write_text("processor : 0\nFeatures : fp asimd svebf16 bf16\n")
    assert bfloat16_support(tmp_path / "cpuinfo") == "unknown"  # an Arm CPU


@pytest.mark.parametrize("available", [True, False])
def test_a_gpu_that_is_there_may_be_of_no_use(monkeypatch, available):
    monkeypatch.setattr("torch.cuda.is_available", lambda: available)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)  # by its driver, however old
    assert usable_gpus() == 2 * available


def test_a_gpu_with_a_number_becomes_the_current_one(monkeypatch):
    chosen = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.set_device", chosen.append)
    for device in ("cuda", "cuda:1", "cuda:0"):
        use_device(device)
    assert chosen == [torch.device("cuda:1"), torch.device("cuda:0")]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU that can be used")
def test_a_gpu_whose_driver_is_too_old_is_one_line(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)  # it is seen, but not available
    with pytest.raises(NucleiError, match=r"MODEL\.DEVICE is 'cuda'.*add MODEL\.DEVICE cpu"):
        use_device("cuda")


def test_a_device_that_is_not_there_is_one_line():
    use_device("cpu")
    with pytest.raises(NucleiError, match=r"MODEL\.DEVICE is 'cuda:77'.*MODEL\.DEVICE cpu"):
        use_device("cuda:77")

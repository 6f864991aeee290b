import pytest

from nuclei_d2.utils.hardware import bfloat16_support, cpu_name


def test_the_cpu_is_named(tmp_path):
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: A Fast CPU\nflags\t: fpu\n")
    assert cpu_name(tmp_path / "cpuinfo") == "A Fast CPU"
    assert cpu_name(tmp_path / "none")


@pytest.mark.parametrize(
    ("flags", "answer"),
    [
        ("fpu amx_bf16 avx512_bf16", "fast (AMX)"),
        ("fpu avx512_bf16", "yes (AVX-512)"),
        ("fpu avx2", "emulated (slow)"),
    ],
)
def test_bfloat16_by_the_cpu_flags(tmp_path, flags, answer):
    (tmp_path / "cpuinfo").write_text(f"processor : 0\nflags : {flags}\n")
    assert bfloat16_support(tmp_path / "cpuinfo") == answer
    assert bfloat16_support(tmp_path / "nowhere") == "unknown"

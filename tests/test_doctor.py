import os
import subprocess
import sys
from pathlib import Path

import pytest

from nuclei_d2 import doctor

ROOT = Path(__file__).parents[1]


def test_a_complete_installation(monkeypatch, tmp_path, capsys):
    (tmp_path / "dsb2018/annotations").mkdir(parents=True)
    (tmp_path / "dsb2018/annotations/dsb2018_test.json").touch()
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    assert doctor.main() == 0
    report = capsys.readouterr().out
    assert "PROBLEM" not in report
    rows = {line[2:20].strip(): line[20:] for line in report.splitlines() if line[:2] == "  "}
    import detectron2
    import torch

    assert rows["torch"].startswith(torch.__version__.split("+")[0])
    assert str(Path(detectron2.__file__).parent) in rows["detectron2"]
    assert rows["root"] == f"{tmp_path} ($DETECTRON2_DATASETS)"
    assert rows["prepared"] == "dsb2018_test"
    assert rows["ROIAlign, NMS"] == "work"


def test_a_script_beside_the_clone_finds_the_package(tmp_path):
    (tmp_path / "nuclei_d2/nuclei_d2").mkdir(parents=True)  # the clone, named like the package
    (tmp_path / "script.py").write_text("import nuclei_d2\nprint(nuclei_d2.__file__)")
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    run = subprocess.run(
        [sys.executable, tmp_path / "script.py"], env=env, capture_output=True, text=True
    )
    assert run.stdout.strip() == doctor.__file__.replace("doctor.py", "__init__.py"), run.stderr


@pytest.mark.parametrize(
    ("module", "error"),
    [
        ("detectron2", "ModuleNotFoundError(\"No module named 'detectron2'\", name='detectron2')"),
        ("torch", "OSError('libtorch.so: undefined symbol')"),
    ],
)
def test_a_module_that_cannot_be_imported(tmp_path, module, error):
    (tmp_path / f"{module}.py").write_text(f"raise {error}\n")
    run = subprocess.run(
        [sys.executable, "-m", "nuclei_d2.doctor"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])},
    )
    assert run.returncode == 1
    assert f"PROBLEM: {module}: {error.split('(')[0]}: " in run.stdout
    assert "make install" in run.stdout
    assert "not tried" in run.stdout
    assert "Traceback" not in run.stderr


def test_operators_that_fail_or_lie(monkeypatch):
    import torch
    from detectron2 import layers

    assert doctor.check_operators() == []
    monkeypatch.setattr(layers, "batched_nms", lambda *args: torch.tensor([0, 1]))
    assert "wrong results on cpu" in doctor.check_operators()[0]

    def missing(*args):
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(layers, "batched_nms", missing)
    assert "operator torchvision::nms does not exist" in doctor.check_operators()[0]


def test_a_gpu_that_cannot_be_used_is_told_with_torchs_reason(monkeypatch):
    def fail():
        raise RuntimeError("The NVIDIA driver on your system is too old.\nUpdate it.")

    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.cuda.init", fail)
    monkeypatch.setattr("torch.version.cuda", "13.0")
    for count, found in (
        (
            1,
            "a GPU is there, but cannot be used (torch is built for CUDA 13.0: The NVIDIA driver "
            "on your system is too old.)",
        ),
        (0, "none (torch is built for CUDA 13.0)"),
    ):
        monkeypatch.setattr("torch.cuda.device_count", lambda count=count: count)
        assert next(doctor.accelerator_rows()) == ("cuda", f"{found}; set MODEL.DEVICE cpu")
    monkeypatch.setattr("torch.version.cuda", None)
    assert next(doctor.accelerator_rows()) == ("cuda", "none (CPU torch); set MODEL.DEVICE cpu")

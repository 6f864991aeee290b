"""``python -m nuclei_d2.doctor``: what is installed here, does it work, and what to do if not.

Only the standard library is imported up front: this has to run where the rest cannot.
"""

import functools
import importlib
import json
import os
import platform
import sys
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path

from nuclei_d2 import __version__
from nuclei_d2.utils.hardware import bfloat16_support, usable_cores, usable_gpus

MODULES = (
    "torch torchvision detectron2 numpy scipy cv2 skimage tifffile imagecodecs PIL pycocotools "
    "faster_coco_eval fvcore iopath omegaconf hydra yacs yaml cloudpickle tabulate termcolor "
    "tensorboard matplotlib tqdm packaging jinja2 roifile zarr"
)
_REMEDY = """\
What to do: `make install` in the folder of nuclei_d2 installs everything into .venv. In your own
environment: `pip install -r requirements/runtime.txt setuptools wheel`, then
`pip install --no-deps --no-build-isolation 'detectron2 @ git+https://github.com/facebookresearch/detectron2'`"""


def main() -> int:
    """Print the report; 0 if nuclei_d2 can run here, else 1."""
    print_table("Versions", [("nuclei_d2", __version__), ("python", python_version())])
    problems, rows = [], []
    for module in MODULES.split():
        version, problem = check_module(module)
        rows.append((module, version))
        problems += [problem] if problem else []
    print_table("", rows)
    print_table("Devices", [*cpu_rows(), *accelerator_rows()])
    print_table("Data sets", dataset_rows())
    operators = "not tried"
    if not problems:
        problems = check_operators()
        operators = "fail" if problems else "work"
    print_table("Detectron2", [("ROIAlign, NMS", operators)])
    for problem in problems:
        print(f"PROBLEM: {problem}")
    print(_REMEDY if problems else "Everything that nuclei_d2 needs is here.")
    return 1 if problems else 0


def print_table(title: str, rows: list[tuple[str, str]]) -> None:
    if title:
        print(f"\n{title}")
    for name, value in rows:
        print(f"  {name:<18}{value}")


def python_version() -> str:
    return f"{platform.python_version()}  {sys.executable}"


def check_module(module: str) -> tuple[str, str | None]:
    """The distribution and version that provide ``module``, and the problem in importing it."""
    try:
        imported = importlib.import_module(module)
    except Exception as error:  # a broken binary raises anything
        reason = " ".join(str(error).split())
        return "-- cannot be imported", f"{module}: {type(error).__name__}: {reason}"
    names = _distributions().get(module)
    if not names:  # a folder on PYTHONPATH
        return f"{getattr(imported, '__version__', 'unknown')}  ({imported.__file__})", None
    version = metadata.version(names[0])
    if module == "detectron2":  # it comes from several places
        version += f"  ({_origin(names[0])}, in {Path(imported.__file__).parent})"
    return version, None


@functools.cache
def _distributions() -> Mapping[str, list[str]]:
    return metadata.packages_distributions()


def _origin(distribution: str) -> str:
    source = metadata.distribution(distribution).read_text("direct_url.json")
    return json.loads(source)["url"] if source else f"package {distribution}"


def cpu_rows() -> list[tuple[str, str]]:
    return [("CPU cores", str(usable_cores())), ("CPU bfloat16", bfloat16_support())]


def accelerator_rows() -> Iterator[tuple[str, str]]:
    try:
        import torch
    except Exception:  # reported with the versions
        return
    for index in range(usable_gpus()):
        device = torch.cuda.get_device_properties(index)
        yield f"cuda:{index}", f"{device.name}, {device.total_memory / 2**30:.1f} GiB"
    if not torch.cuda.is_available():
        yield "cuda", f"{_why_no_cuda(torch)}; set MODEL.DEVICE cpu"
    if torch.backends.mps.is_available():
        yield "mps", "Apple GPU"


def _why_no_cuda(torch) -> str:
    if not torch.version.cuda:
        return "none (CPU torch)"
    reason = f"torch is built for CUDA {torch.version.cuda}"
    if not torch.cuda.device_count():
        return f"none ({reason})"
    try:
        torch.cuda.init()
    except Exception as error:  # the driver is too old, not initialised ..
        reason += f": {str(error).splitlines()[0]}"
    return f"a GPU is there, but cannot be used ({reason})"


def dataset_rows() -> list[tuple[str, str]]:
    root = Path(os.environ.get("DETECTRON2_DATASETS") or "datasets").expanduser()
    names = sorted(path.stem for path in root.glob("*/annotations/*.json"))
    given = "$DETECTRON2_DATASETS" if os.environ.get("DETECTRON2_DATASETS") else "default"
    return [("root", f"{root.absolute()} ({given})"), ("prepared", ", ".join(names) or "none")]


def check_operators() -> list[str]:
    """Run the two compiled operators of an R-CNN on every kind of device."""
    import torch
    from detectron2.layers import ROIAlign, batched_nms

    problems = []
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        try:
            box = torch.tensor([[0, 1.0, 1.0, 5.0, 5.0]], device=device)
            pooled = ROIAlign((2, 2), 1.0, 0)(torch.ones(1, 1, 8, 8, device=device), box)
            kept = batched_nms(box[[0, 0], 1:], box.new_tensor([0.9, 0.8]), box.new_zeros(2), 0.5)
            if pooled.flatten().tolist() != [1.0] * 4 or kept.tolist() != [0]:
                problems.append(f"ROIAlign or NMS give wrong results on {device}")
        except Exception as error:  # torch and torchvision that do not fit raise anything
            problems.append(f"ROIAlign or NMS fail on {device}: {' '.join(str(error).split())}")
    return problems


if __name__ == "__main__":
    sys.exit(main())

"""Compare a package with the model that it was made from, in a process with torch alone."""

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.structures import Instances
from scipy.optimize import linear_sum_assignment
from skimage.metrics import contingency_table

from nuclei_d2.data.datasets.synthetic import SyntheticConfig, generate
from nuclei_d2.evaluation.instances import layers_from_scored_masks
from nuclei_d2.inference.predictor import NucleiPredictor
from nuclei_d2.structures.cropped_mask import instances_to_masks
from nuclei_d2.utils.errors import NucleiError

LEAST_AGREEMENT = 0.999  # share of the pixels
# Of the maps of a U-Net. Sums in another order differ by 1e-6; a wrong pixel by much more.
MAP_TOLERANCE = 1e-3
_CHECK_SIZES = ((192, 256), (301, 223))  # of the images that every package is checked on


class Agreement(NamedTuple):
    """How a package compares with the model it was made from, on one image.

    Attributes:
        image: name.
        size: (H, W) in pixels.
        original, exported: number of nuclei.
        pixels: share of the pixels of the image that belong to the same nucleus, or to the
            background, in both label images.
        original_seconds, exported_seconds: of the second look at the image, and of the third,
            when TorchScript is done with optimising; without TensorFloat-32 on a GPU.
        difference: largest of the maps of a U-Net; None for an R-CNN.
    """

    image: str
    size: tuple[int, int]
    original: int
    exported: int
    pixels: float
    original_seconds: float
    exported_seconds: float
    difference: float | None = None

    @property
    def is_close(self) -> bool:
        """:data:`LEAST_AGREEMENT` of the pixels, maps within the tolerance, and the same number.

        Beyond 100 nuclei the number may differ by 1 %: of crowds that cover each other a last
        pixel remains, or not, for rounding.
        """
        return (
            abs(self.original - self.exported) <= self.original // 100
            and self.pixels >= LEAST_AGREEMENT
            and (self.difference or 0) <= MAP_TOLERANCE
        )


def check_images() -> dict[str, np.ndarray]:
    """Generated images, (H, W, 1) float32: two fields of nuclei, and noise without any."""
    images = {
        f"generated {number}": draw_image(size, seed=number)
        for number, size in enumerate(_CHECK_SIZES, start=1)
    }
    noise = np.random.default_rng(0).normal(100, 3, (128, 160, 1)).round()
    return {**images, "noise": noise.astype(np.float32)}


def draw_image(size: tuple[int, int], seed: int) -> np.ndarray:
    """A generated field of nuclei, (H, W, 1) float32."""
    image, _ = generate(seed, SyntheticConfig(height=size[0], width=size[1], empty=0.0))
    return image[:, :, None].astype(np.float32)


def check_package(
    path: str | Path, cfg: CfgNode, predictor: NucleiPredictor, images: Mapping[str, np.ndarray]
) -> list[Agreement]:
    """Compare a file with the model that it was made from.

    Args:
        images: by name, (H, W, 1 or 3) float32 raw grey levels.

    Raises:
        NucleiError: the file does not run in a process of its own.
    """
    outputs = run_package(path, list(images.values()))
    with _full_precision():
        return [
            compare(name, image, output, cfg, predictor)
            for (name, image), output in zip(images.items(), outputs, strict=True)
        ]


@contextmanager
def _full_precision() -> Iterator[None]:
    """No TensorFloat-32: its 10 bits alone make maps differ by :data:`MAP_TOLERANCE`."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


# Three times each: TorchScript optimises what it has seen twice.
_RUNNER = """
import sys, time
import torch, torchvision
torch.backends.cudnn.allow_tf32 = False
package, source, target, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
model = torch.jit.load(package)
results = []
for image in torch.load(source):
    for _ in range(3):
        start = time.perf_counter()
        with torch.no_grad():
            output = model(image)
        seconds = time.perf_counter() - start
    results.append({**output, "seconds": seconds})
assert not {"detectron2", "nuclei_d2"} & set(sys.modules)
torch.save(results, target)
"""


def run_package(path: str | Path, images: Sequence[np.ndarray]) -> list[dict]:
    """The outputs of a package, with ``seconds``, from a fresh process with torch alone.

    Raises:
        NucleiError: it fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "images.pt"), Path(folder, "outputs.pt")
        torch.save([torch.from_numpy(image) for image in images], source)
        words = ["-W", "ignore", "-c", _RUNNER, path, source, target, torch.get_num_threads()]
        process = subprocess.run(
            [sys.executable, "-I", *map(str, words)], capture_output=True, text=True, check=False
        )
        if process.returncode:
            reason = (process.stderr.strip() or f"exit {process.returncode}").splitlines()[-1]
            raise NucleiError(f"{path} does not run by itself: {reason}")
        return torch.load(target)


def compare(
    name: str, image: np.ndarray, output: dict, cfg: CfgNode, predictor: NucleiPredictor
) -> Agreement:
    """What a package put out for an image, as :func:`run_package` returns it, with the original."""
    size, difference = image.shape[:2], None
    predictor(image)  # warms up
    start = time.perf_counter()
    instances = predictor(image)
    seconds = time.perf_counter() - start
    if "maps" in output:
        maps = output["maps"].numpy()
        difference = float(np.abs(maps - _original_maps(image, predictor)).max())
        exported = _label_image(predictor.model.decode(maps, size), cfg)
    else:
        exported = output["labels"].numpy()
    original = _label_image(instances, cfg)
    return Agreement(
        name,
        size,
        int(original.max()),
        int(exported.max()),
        pixel_agreement(original, exported),
        seconds,
        output["seconds"],
        difference,
    )


@torch.no_grad()
def _original_maps(image: np.ndarray, predictor: NucleiPredictor) -> np.ndarray:
    (maps,) = predictor.model.predict_maps([predictor.preprocess(image)])
    return maps.cpu().numpy()


def _label_image(instances: Instances, cfg: CfgNode) -> np.ndarray:
    """As the package makes it."""
    masks, scores = instances_to_masks(instances)
    sure = np.flatnonzero(scores >= cfg.TEST.SCORE_THRESH_LABELS)
    layers = layers_from_scored_masks([masks[k] for k in sure], scores[sure], instances.image_size)
    return layers.labels[0]


def pixel_agreement(first: np.ndarray, second: np.ndarray) -> float:
    """Share of the pixels with the same label, whatever the numbers of the labels are.

    Labels of the two (H, W) images are matched one to one so that the share is largest.
    """
    first, second = first.astype(np.int64), second.astype(np.int64)
    table = contingency_table(first, second).toarray()
    return float(table[linear_sum_assignment(table, maximize=True)].sum() / first.size)

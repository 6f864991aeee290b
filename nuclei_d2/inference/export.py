"""A trained model with everything around it in one TorchScript file.

The file needs torch and torchvision to run, neither Detectron2 nor this package. Networks are
traced, by Detectron2's ``TracingAdapter``; what depends on the image is scripted: normalisation,
the order and number of nuclei, pasting. docs/export.md says how the file is used.
"""

import copy
import json
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, Optional

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import transforms as T
from detectron2.export import TracingAdapter
from detectron2.layers import ROIAlign
from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes, Instances
from scipy.optimize import linear_sum_assignment
from skimage.metrics import contingency_table
from torch import Tensor, nn
from torch.nn import functional as F

import nuclei_d2
from nuclei_d2.data.augmentation import build_augmentation
from nuclei_d2.data.datasets.synthetic import SyntheticConfig, generate
from nuclei_d2.data.image_io import ImageNormalizer
from nuclei_d2.data.targets import CLASS_NAMES
from nuclei_d2.evaluation.instances import layers_from_scored_masks
from nuclei_d2.evaluation.nuclei_evaluation import instances_to_masks
from nuclei_d2.inference.predictor import NucleiPredictor
from nuclei_d2.layers import SmallROIAlign
from nuclei_d2.modeling import UNet
from nuclei_d2.utils.errors import NucleiError
from nuclei_d2.utils.files import atomic_path

METADATA_FILE, CONFIG_FILE = "metadata.json", "config.yaml"  # in the archive, beside the code
LEAST_AGREEMENT = 0.999  # share of the pixels
# Of the maps of a U-Net. Sums in another order differ by 1e-6; a wrong pixel by much more.
MAP_TOLERANCE = 1e-3
_ROIS = 128  # masks predicted at a time; no more than the mask heads take in one go
_CHECK_SIZES = ((192, 256), (301, 223))  # of the images that every package is checked on
_TRACE_SIZE = (224, 288)


# ------------------------------------------------------------------- in TorchScript


class Preprocessing(nn.Module):
    """Raw image -> what the network sees, as :class:`ImageNormalizer` and INPUT.SCALE make it."""

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__()
        normalizer = ImageNormalizer(cfg)
        self.low_percentile, self.high_percentile = map(float, normalizer.percentiles)
        self.noise_floor = float(normalizer.noise_floor)
        self.min_levels = float(normalizer.min_levels)
        self.is_bgr = normalizer.image_format == "BGR"
        self.scale = float(cfg.INPUT.SCALE)
        self.device = cfg.MODEL.DEVICE

    def forward(self, image: Tensor) -> Tensor:
        """
        Args:
            image: (H, W), (H, W, 1) or (H, W, 3) raw grey levels of any type and range.

        Returns:
            (3, h, w) float32, 0..255, on the model's device.
        """
        if image.dim() == 2:
            image = image[:, :, None]
        if image.dim() != 3 or image.shape[2] not in (1, 3) or image.numel() == 0:
            raise ValueError("image: needs (H, W), (H, W, 1) or (H, W, 3), not empty")
        image = image.to(torch.device(self.device)).float().permute(2, 0, 1)
        if bool((image == image[:1]).all()):
            image = image[:1]  # grey stored as RGB is grey
        image = resample(self.normalize(image), self.scale).expand(3, -1, -1)
        return image.flip(0) if self.is_bgr else image

    def normalize(self, image: Tensor) -> Tensor:
        """:func:`nuclei_d2.data.image_io.normalize` of (C, H, W) float32."""
        values = image.flatten()
        darkest, brightest = float(values.min()), float(values.max())
        floor = self.noise_floor * estimate_noise(image)
        if bool((values.round() == values).all()):
            floor = max(floor, self.min_levels)
        low = percentile(values, self.low_percentile)
        stretch = percentile(values, self.high_percentile) - low
        rounding = 1.1920929e-07 * max(max(brightest, -darkest), 1e-20)  # float32's epsilon
        span = max(max(stretch, floor), rounding)
        return ((image - low) * (255 / span)).clamp(0, 255)


def percentile(values: Tensor, percent: float) -> float:
    """``np.percentile`` (linear) of (N,); ``torch.quantile`` refuses more than 2^24 values."""
    rank = percent / 100 * (values.numel() - 1)
    below = int(rank)
    low = float(values.kthvalue(below + 1)[0])
    high = float(values.kthvalue(min(below + 2, values.numel()))[0])
    return low + (high - low) * (rank - below)


def estimate_noise(image: Tensor) -> float:
    """:func:`nuclei_d2.data.image_io.estimate_noise` of (C, H, W) float32."""
    if min(image.shape[1], image.shape[2]) < 3:
        return 0.0
    # The mask is the second difference along the columns times that along the rows.
    image = image[:, 2:] - 2 * image[:, 1:-1] + image[:, :-2]
    image = image[:, :, 2:] - 2 * image[:, :, 1:-1] + image[:, :, :-2]
    median = 0.0
    for k in range(image.shape[0]):
        median = max(median, percentile(image[k].abs().flatten(), 50.0))
    # The median of |x| is 0.6745 for a normal distribution; the norm of the mask is 6.
    return median / 0.6745 / 6


def resample(image: Tensor, scale: float) -> Tensor:
    """:class:`nuclei_d2.data.augmentation.ResampleTransform` of (C, H, W) float32."""
    height, width = image.shape[1], image.shape[2]
    # In TorchScript round() gives a float.
    new_height = max(1, int(round(height * scale)))  # noqa: RUF046
    new_width = max(1, int(round(width * scale)))  # noqa: RUF046
    if new_height * new_width < height * width:
        rows = area_weights(height, new_height, image.device)
        columns = area_weights(width, new_width, image.device)
        return rows @ image @ columns.t()
    if (new_height, new_width) == (height, width):
        return image
    size = [new_height, new_width]
    return F.interpolate(image[None], size=size, mode="bilinear", align_corners=False)[0]


def area_weights(length: int, new_length: int, device: torch.device) -> Tensor:
    """(new_length, length): share of each old pixel in each new one, averaging over its area."""
    step = length / new_length
    start = torch.arange(new_length, device=device)[:, None] * step
    pixel = torch.arange(length, device=device)[None]
    shared = torch.minimum(start + step, pixel + 1) - torch.maximum(start, pixel)
    return shared.clamp(min=0) / step


def paste(labels: Tensor, probability: Tensor, box: Tensor, label: int) -> None:
    """Give the pixels of one mask its label.

    Same pixels as :func:`nuclei_d2.structures.boxed_masks.paste_masks` finds.

    Args:
        labels: (H, W) int32, changed in place.
        probability: (1, M, M) float inside the box.
        box: (4,) float, XYXY in pixels of the image.
    """
    low = (box[:2].floor() - 1).clamp(min=0).long()
    high = (box[2:].ceil() + 1).long()
    left, top = int(low[0]), int(low[1])
    right, bottom = min(int(high[0]), labels.shape[1]), min(int(high[1]), labels.shape[0])
    x = (torch.arange(left, right).float() + 0.5 - box[0]) / (box[2] - box[0]) * 2 - 1
    y = (torch.arange(top, bottom).float() + 0.5 - box[1]) / (box[3] - box[1]) * 2 - 1
    shape = (len(y), len(x))
    grid = torch.stack([x[None].expand(shape), y[:, None].expand(shape)], dim=2)
    sampled = F.grid_sample(probability[None], grid[None], align_corners=False)[0, 0]
    labels[top:bottom, left:right].masked_fill_(sampled >= 0.5, label)


class DetectorPackage(nn.Module):
    """An R-CNN from the raw image to a label image."""

    def __init__(
        self, preprocessing: nn.Module, detect: nn.Module, masks: nn.Module, score_threshold: float
    ) -> None:
        """
        Args:
            preprocessing: raw image -> (3, h, w).
            detect: (3, h, w) -> (boxes (N, 4) in pixels of the network, classes, scores, features).
            masks: (boxes, classes, features) of up to :data:`_ROIS` -> (N, 1, M, M) probabilities.
            score_threshold: used unless the caller gives one.
        """
        super().__init__()
        self.preprocessing = preprocessing
        self.detect = detect
        self.masks = masks
        self.score_threshold = score_threshold
        self.rois = _ROIS

    def forward(
        self,
        image: Tensor,
        score_threshold: Optional[float] = None,  # noqa: UP045 - TorchScript reads no "|"
    ) -> dict[str, Tensor]:
        """
        Args:
            image: (H, W), (H, W, 1) or (H, W, 3) raw grey levels of any type and range.
            score_threshold: least score of a nucleus, 0..1.

        Returns:
            On the CPU, nuclei best first:
                labels: (H, W) int32, 0 = background, k = the nucleus of row k - 1 below. A pixel
                    belongs to the highest score; who has no pixel left is dropped.
                boxes: (N, 4) float32, XYXY in pixels; scores: (N,) float32; classes: (N,) int64.
        """
        threshold = self.score_threshold if score_threshold is None else score_threshold
        pixels = self.preprocessing(image)
        found = self.detect(pixels)
        raw_boxes, classes, scores = found[0], found[1], found[2]
        height, width = image.shape[0], image.shape[1]
        factor = torch.tensor([width / pixels.shape[2], height / pixels.shape[1]]).repeat(2)
        corner = torch.tensor([width, height]).repeat(2)
        boxes = torch.minimum((raw_boxes.cpu() * factor).clamp(min=0), corner)

        usable = (boxes[:, 2:] > boxes[:, :2]).all(dim=1) & (scores.cpu() >= threshold)
        order = scores.cpu().argsort(descending=True, stable=True)
        order = order[usable[order]]
        boxes = boxes[order]
        order = order.to(scores.device)
        raw_boxes, classes, scores = raw_boxes[order], classes[order], scores[order]

        labels = torch.zeros([height, width], dtype=torch.int32)
        # The best come last: they are painted over the others.
        last = (len(boxes) - 1) // self.rois * self.rois
        for start in range(last, -1, -self.rois):
            part = slice(start, start + self.rois)
            probabilities = self.masks(raw_boxes[part], classes[part], *found[3:])[0].cpu()
            for k in range(len(probabilities) - 1, -1, -1):
                paste(labels, probabilities[k], boxes[start + k], start + k + 1)

        visible = labels.flatten().bincount(minlength=len(boxes) + 1)[1:] > 0
        renumbered = F.pad(visible.int().cumsum(0, dtype=torch.int32), [1, 0])
        return {
            "labels": renumbered[labels.long()],
            "boxes": boxes[visible],
            "scores": scores.cpu()[visible],
            "classes": classes.cpu()[visible],
        }


class MapsPackage(nn.Module):
    """A U-Net from the raw image to the maps that its decoder takes."""

    def __init__(self, preprocessing: nn.Module, network: nn.Module) -> None:
        super().__init__()
        self.preprocessing = preprocessing
        self.network = network

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """
        Args:
            image: (H, W), (H, W, 1) or (H, W, 3) raw grey levels of any type and range.

        Returns:
            maps: on the CPU, (C, h, w) float32 in 0..1 at the size of the image x INPUT.SCALE.
        """
        return {"maps": self.network(self.preprocessing(image))[0].cpu()}


# ------------------------------------------------------------------------- building


def build_package(cfg: CfgNode, model: nn.Module) -> torch.jit.ScriptModule:
    """Put a model and what is done before and after it into one callable.

    Args:
        model: an R-CNN with masks, or a UNet, in evaluation mode on ``cfg.MODEL.DEVICE``. It is
            left as it was.

    Raises:
        NucleiError: the model is of another kind.
    """
    with torch.no_grad(), _quiet_tracing():
        image = torch.from_numpy(_draw(_TRACE_SIZE, seed=0))
        preprocessing = torch.jit.script(Preprocessing(cfg))
        pixels = preprocessing(image)
        if isinstance(model, UNet):
            package = MapsPackage(preprocessing, _trace(model, UNet.predict_maps, _batch(pixels)))
        elif isinstance(model, GeneralizedRCNN) and cfg.MODEL.MASK_ON:
            package = _build_detector(cfg, model, preprocessing, pixels)
        else:
            raise NucleiError(
                f"MODEL.META_ARCHITECTURE is {cfg.MODEL.META_ARCHITECTURE}; only an R-CNN with "
                "masks or a UNet can be exported"
            )
        return torch.jit.script(package.eval())


def _build_detector(
    cfg: CfgNode, model: GeneralizedRCNN, preprocessing: nn.Module, pixels: Tensor
) -> DetectorPackage:
    """Two traces: whole images, and masks for a limited number of boxes."""
    model = _with_plain_pooling(model)
    features = model.backbone(model.preprocess_image(_batch(pixels)).tensor)
    masks = _trace(model, _predict_masks, *_some_boxes(pixels), features)
    model.roi_heads.mask_on = False
    detect = _trace(model, _detect, _batch(pixels))
    return DetectorPackage(preprocessing, detect, masks, float(cfg.TEST.SCORE_THRESH_LABELS))


def _detect(model: GeneralizedRCNN, batch: list[dict]) -> tuple:
    images = model.preprocess_image(batch)
    features = model.backbone(images.tensor)
    proposals, _ = model.proposal_generator(images, features, None)
    (found,), _ = model.roi_heads(images, features, proposals, None)
    return found.pred_boxes, found.pred_classes, found.scores, features


def _predict_masks(
    model: GeneralizedRCNN, boxes: Tensor, classes: Tensor, features: Mapping[str, Tensor]
) -> Tensor:
    # No mask head asks for the size of the image.
    found = Instances((0, 0), pred_boxes=Boxes(boxes), pred_classes=classes)
    (found,) = model.roi_heads.forward_with_given_boxes(features, [found])
    return found.pred_masks


def _some_boxes(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Boxes of any sizes for tracing, and their classes."""
    sides = torch.arange(8, 72, 8, device=pixels.device).float()
    boxes = torch.stack([sides / 4, sides / 3, sides * 1.2, sides], dim=1)
    return boxes, torch.zeros(len(boxes), dtype=torch.int64, device=pixels.device)


def _batch(pixels: Tensor) -> list[dict[str, Tensor]]:
    return [{"image": pixels}]


def _trace(model: nn.Module, function, *inputs) -> torch.jit.ScriptModule:
    adapter = TracingAdapter(model, inputs, function)
    # The trace is checked later, on images of other sizes.
    return torch.jit.trace(adapter, adapter.flattened_inputs, check_trace=False)


def _with_plain_pooling(model: nn.Module) -> nn.Module:
    """A copy with ROIAlign for SmallROIAlign, which groups the boxes by size while it runs."""
    model = copy.deepcopy(model)
    for pooler in model.modules():
        if isinstance(pooler, ROIPooler):
            pooler.level_poolers = nn.ModuleList(map(_plain, pooler.level_poolers))
    return model


def _plain(pooler: nn.Module) -> nn.Module:
    if not isinstance(pooler, SmallROIAlign):
        return pooler
    size, scale, samples = pooler.output_size, pooler.spatial_scale, pooler.sampling_ratio
    return ROIAlign(size, scale, samples, aligned=True)


@contextmanager
def _quiet_tracing() -> Iterator[None]:
    """Without warnings: of Python values in Detectron2's code (the check is what counts), and that
    PyTorch wants TorchScript to be replaced by what cannot express this yet.
    """
    with warnings.catch_warnings(action="ignore"):
        yield


def metadata(cfg: CfgNode) -> dict:
    """What the user of a package should know; it is in the archive as :data:`METADATA_FILE`."""
    is_unet = cfg.MODEL.META_ARCHITECTURE == "UNet"
    if is_unet:
        target = cfg.MODEL.UNET.TARGET
        names = [*CLASS_NAMES[target], *(["depth"] if target == "distance" else [])]
    else:
        count = cfg.MODEL.ROI_HEADS.NUM_CLASSES
        names = ["nucleus"] if count == 1 else [f"class {k}" for k in range(count)]
    return {
        "nuclei_d2": nuclei_d2.__version__,
        "torch": torch.__version__,
        "model": cfg.MODEL.META_ARCHITECTURE,
        "output": "maps" if is_unet else "labels",
        "class_names": names,  # of the maps, in order, or of the numbers in "classes"
        "device": cfg.MODEL.DEVICE,
        "scale": cfg.INPUT.SCALE,
        "score_threshold": cfg.TEST.SCORE_THRESH_LABELS,
        # 0: unknown
        "nucleus_diameter": cfg.INPUT.NUCLEUS_DIAMETER,
        "pixel_size": cfg.INPUT.PIXEL_SIZE,
    }


# ------------------------------------------------------------------------- checking


class Agreement(NamedTuple):
    """How a package compares with the model it was made from, on one image.

    Attributes:
        image: name.
        size: (H, W) in pixels.
        original, exported: number of nuclei.
        pixels: share of the pixels of the image that belong to the same nucleus, or to the
            background, in both label images.
        original_seconds, exported_seconds: of the second look at the image, and of the third,
            when TorchScript is done with optimising.
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


def export_model(
    cfg: CfgNode, path: str | Path, images: Mapping[str, np.ndarray] | None = None
) -> list[Agreement]:
    """Write a model as a package, after a check in a process that has torch and torchvision alone.

    Args:
        cfg: with MODEL.WEIGHTS. The package runs on MODEL.DEVICE.
        path: of the file.
        images: more images to check on, by name, as :func:`read_image` returns them.

    Returns:
        One comparison per image, generated ones first: two with nuclei, of different sizes, and
        one without.

    Raises:
        NucleiError: see :class:`NucleiPredictor` and :func:`build_package`; or the package does
            not agree with the model; then there is no file.
    """
    cfg = cfg.clone()
    cfg.TEST.AMP.ENABLED = False  # the package computes in float32
    predictor = NucleiPredictor(cfg)
    package = build_package(cfg, predictor.model)
    files = {METADATA_FILE: json.dumps(metadata(cfg), indent=2), CONFIG_FILE: cfg.dump()}
    with atomic_path(path) as temporary:
        with _quiet_tracing():
            torch.jit.save(package, str(temporary), _extra_files=files)
        results = check_package(temporary, cfg, predictor, {**check_images(), **(images or {})})
        wrong = [result for result in results if not result.is_close]
        if wrong:
            raise NucleiError(f"{path} is not written: {_complaint(wrong[0])}")
    return results


def _complaint(result: Agreement) -> str:
    maps = "" if result.difference is None else f", maps differ by {result.difference:.1e}"
    return (
        f"on the image {result.image!r} the export finds {result.exported} nuclei, the model "
        f"{result.original}, with {result.pixels:.2%} of the pixels alike{maps}; please report it"
    )


def check_images() -> dict[str, np.ndarray]:
    """Generated images, (H, W, 1) float32: two fields of nuclei, and noise without any."""
    images = {
        f"generated {number}": _draw(size, seed=number)
        for number, size in enumerate(_CHECK_SIZES, start=1)
    }
    noise = np.random.default_rng(0).normal(100, 3, (128, 160, 1)).round()
    return {**images, "noise": noise.astype(np.float32)}


def _draw(size: tuple[int, int], seed: int) -> np.ndarray:
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
    return [
        compare(name, image, output, cfg, predictor)
        for (name, image), output in zip(images.items(), outputs, strict=True)
    ]


# Three times each: TorchScript optimises what it has seen twice.
_RUNNER = """
import sys, time
import torch, torchvision
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
        difference = float(np.abs(maps - _original_maps(image, cfg, predictor.model)).max())
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
def _original_maps(image: np.ndarray, cfg: CfgNode, model: UNet) -> np.ndarray:
    network_input = T.AugInput(ImageNormalizer(cfg)(image))
    T.AugmentationList(build_augmentation(cfg, False))(network_input)
    pixels = np.ascontiguousarray(network_input.image.transpose(2, 0, 1))
    return model.predict_maps(_batch(torch.from_numpy(pixels)))[0].cpu().numpy()


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

"""Make a package: networks are traced, by Detectron2's ``TracingAdapter``, the rest is scripted."""

import copy
import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.export import TracingAdapter
from detectron2.layers import ROIAlign
from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

import nuclei_d2
from nuclei_d2.data.targets import CLASS_NAMES
from nuclei_d2.export.check import Agreement, check_images, check_package, draw_image
from nuclei_d2.export.torchscript import DetectorPackage, MapsPackage, Preprocessing
from nuclei_d2.inference.predictor import NucleiPredictor
from nuclei_d2.layers import SmallROIAlign
from nuclei_d2.modeling import UNet
from nuclei_d2.utils.errors import NucleiError
from nuclei_d2.utils.files import atomic_path

METADATA_FILE, CONFIG_FILE = "metadata.json", "config.yaml"  # in the archive, beside the code
_TRACE_SIZE = (224, 288)


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
            _save(package, temporary, files)
        results = check_package(temporary, cfg, predictor, {**check_images(), **(images or {})})
        wrong = [result for result in results if not result.is_close]
        if wrong:
            raise NucleiError(f"{path} is not written: {_complaint(wrong[0])}")
    return results


def _save(package: torch.jit.ScriptModule, path: Path, files: dict[str, str]) -> None:
    """``torch.jit.save`` that reports a full disk as the OSError it is."""
    try:
        torch.jit.save(package, str(path), _extra_files=files)
    except RuntimeError as error:
        raise OSError(str(error).splitlines()[0]) from error


def _complaint(result: Agreement) -> str:
    maps = "" if result.difference is None else f", maps differ by {result.difference:.1e}"
    return (
        f"on the image {result.image!r} the export finds {result.exported} nuclei, the model "
        f"{result.original}, with {result.pixels:.2%} of the pixels alike{maps}; please report it"
    )


def build_package(cfg: CfgNode, model: nn.Module) -> torch.jit.ScriptModule:
    """Put a model and what is done before and after it into one callable.

    Args:
        model: an R-CNN or a UNet, in evaluation mode on ``cfg.MODEL.DEVICE``. It is
            left as it was.

    Raises:
        NucleiError: the model is of another kind.
    """
    with torch.no_grad(), _quiet_tracing():
        image = torch.from_numpy(draw_image(_TRACE_SIZE, seed=0))
        preprocessing = torch.jit.script(Preprocessing(cfg))
        pixels = preprocessing(image)
        if isinstance(model, UNet):
            package = MapsPackage(preprocessing, _trace(model, UNet.predict_maps, _batch(pixels)))
        elif isinstance(model, GeneralizedRCNN):
            package = _build_detector(cfg, model, preprocessing, pixels)
        else:
            raise NucleiError(
                f"MODEL.META_ARCHITECTURE is {cfg.MODEL.META_ARCHITECTURE}; only an R-CNN or a "
                "UNet can be exported"
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

"""R-CNN whose predictions carry boundary maps."""

from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ROIAlign
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.modeling.proposal_generator.rpn import StandardRPNHead
from detectron2.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers
from detectron2.structures import ImageList, Instances
from torch import Tensor, nn

from nuclei_d2.layers.roi_align import SmallROIAlign
from nuclei_d2.structures.boxed_masks import paste_masks
from nuclei_d2.utils.precision import inference_precision, infers_in_bfloat16
from nuclei_d2.utils.timing import stage

# Probabilities inside the boxes, and the threshold at which they are pasted; a negative one keeps
# them, x 255 as uint8.
_PASTE_THRESHOLDS = {"pred_masks": 0.5, "pred_boundaries": -1}


@META_ARCH_REGISTRY.register()
class NucleiRCNN(GeneralizedRCNN):
    """Detectron2's R-CNN for any mask head, in bfloat16 autocast too.

    The output is Detectron2's, with ``pred_masks`` as :class:`BoxedMasks`, whose cost is that of
    the nuclei's pixels and not of N x H x W, and one more field where the mask head predicts
    boundaries: ``pred_boundaries``, BoxedMasks of uint8, boundary probability x 255, rounded down.
    """

    @configurable
    def __init__(self, *, bfloat16: bool = False, **kwargs):
        """
        Args:
            bfloat16: autocast in inference.
            kwargs: those of :class:`GeneralizedRCNN`.
        """
        super().__init__(**kwargs)
        self.bfloat16 = bfloat16
        self.backbone.register_forward_hook(_features_to_float32)
        for module in self.modules():
            if isinstance(module, (StandardRPNHead, FastRCNNOutputLayers)):
                module.register_forward_hook(_predictions_to_float32)
        for pooler in self.roi_heads.modules():
            if isinstance(pooler, ROIPooler):
                pooler.level_poolers = nn.ModuleList(map(_faster, pooler.level_poolers))

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        return {**super().from_config(cfg), "bfloat16": infers_in_bfloat16(cfg)}

    def preprocess_image(self, batched_inputs: list[dict]) -> ImageList:
        """Normalise and batch the images; what is padded looks like their background.

        Detectron2 pads with the mean intensity, next to which nuclei at the right and bottom
        edge were missed. The median of an image is background, dark or bright, unless nuclei
        cover half of it.
        """
        images = [
            (x["image"].to(self.device) - self.pixel_mean) / self.pixel_std for x in batched_inputs
        ]
        background = torch.stack(
            [image[:, ::4, ::4].flatten(1).median(dim=1).values for image in images]
        )[:, :, None, None]
        batch = ImageList.from_tensors(
            [image - level for image, level in zip(images, background, strict=True)],
            self.backbone.size_divisibility,
            padding_constraints=self.backbone.padding_constraints,
        )
        batch.tensor = batch.tensor + background
        if batch.tensor.device.type == "cpu":  # convolutions and SmallROIAlign are faster there
            batch.tensor = batch.tensor.contiguous(memory_format=torch.channels_last)
        return batch

    def inference(
        self,
        batched_inputs: list[dict],
        detected_instances: list[Instances] | None = None,
        do_postprocess: bool = True,
    ) -> list[dict] | list[Instances]:
        """Same as :meth:`GeneralizedRCNN.inference`, but see :func:`postprocess`."""
        with inference_precision(self.device, self.bfloat16):
            results = super().inference(batched_inputs, detected_instances, do_postprocess=False)
        for result in results:
            for name in _PASTE_THRESHOLDS.keys() & result.get_fields().keys():
                result.set(name, result.get(name).float())
        if not do_postprocess:
            return results
        with stage("postprocess"):
            return [
                {
                    "instances": postprocess(
                        result,
                        inputs.get("height", result.image_size[0]),
                        inputs.get("width", result.image_size[1]),
                    )
                }
                for inputs, result in zip(batched_inputs, results, strict=True)
            ]


def postprocess(results: Instances, height: int, width: int) -> Instances:
    """Scale the raw predictions of one image to ``height`` x ``width`` pixels.

    Args:
        results: pred_boxes; where present, pred_masks and pred_boundaries, (N, 1, M, M)
            probabilities inside the boxes. May be modified in place.

    Returns:
        What :func:`detector_postprocess` returns (boxes that became empty are dropped), but with
        pred_masks as BoxedMasks, the same pixels, and pred_boundaries as BoxedMasks of uint8.
    """
    fields = results.get_fields()
    maps = {name: fields[name] for name in _PASTE_THRESHOLDS if name in fields}
    others = {name: field for name, field in fields.items() if name not in maps}
    # Detectron2 pastes what is called pred_masks into N frames; it only sees which rows they are.
    rows = torch.arange(len(results), device=results.pred_boxes.device)
    results = detector_postprocess(
        Instances(results.image_size, **others, rows=rows), height, width
    )
    rows = results.rows
    results.remove("rows")
    for name, probabilities in maps.items():
        pasted = paste_masks(
            probabilities[rows, 0],
            results.pred_boxes.tensor,
            results.image_size,
            _PASTE_THRESHOLDS[name],
        )
        results.set(name, pasted)
    return results


def _faster(pooler: nn.Module) -> nn.Module:
    """SmallROIAlign in place of ROIAlign, where it can be."""
    square = type(pooler) is ROIAlign and pooler.output_size[0] == pooler.output_size[1]
    if not (square and pooler.aligned):
        return pooler
    return SmallROIAlign(pooler.output_size[0], pooler.spatial_scale, pooler.sampling_ratio)


def _features_to_float32(
    _backbone: nn.Module, _inputs: tuple, features: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Forward hook. ROIAlign rounds boxes to the type of the features: whole pixels in bfloat16."""
    return {name: feature.float() for name, feature in features.items()}


def _predictions_to_float32(module: nn.Module, _inputs: tuple, outputs: tuple) -> tuple | None:
    """Forward hook. Scores in bfloat16 have many ties, and suppression keeps the best of them."""
    if module.training:
        return None
    return tuple(
        [x.float() for x in part] if isinstance(part, list) else part.float() for part in outputs
    )

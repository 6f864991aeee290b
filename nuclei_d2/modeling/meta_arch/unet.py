"""Semantic segmentation of nuclei, decoded into instances."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, build_backbone
from detectron2.modeling.postprocessing import sem_seg_postprocess
from detectron2.structures import Instances
from torch import Tensor, nn
from torch.nn import functional as F

from nuclei_d2.data.targets import CLASS_NAMES, IGNORE
from nuclei_d2.modeling.backbone import UNetDecoder
from nuclei_d2.modeling.label_instances import predictions_from_labels
from nuclei_d2.modeling.losses import class_loss, dice_loss, distance_loss
from nuclei_d2.modeling.postprocessing import Decoder
from nuclei_d2.utils.errors import NucleiError
from nuclei_d2.utils.precision import inference_precision, infers_in_bfloat16
from nuclei_d2.utils.timing import stage


@META_ARCH_REGISTRY.register()
class UNet(nn.Module):
    """Classes (and depth) of every pixel by a U-Net, nuclei by a decoder of these maps.

    In training it takes what :class:`NucleiDatasetMapper` makes for it (``image``, ``sem_seg``
    and, for the distance target, ``distance``) and returns a dict of losses.

    In inference it returns one dict per image, both at the size ``height`` x ``width`` of the file:
        sem_seg: float32 (K, H, W) probabilities of the classes, K = 2 or 3;
        instances: pred_boxes, scores, pred_classes, pred_masks (:class:`LabelMasks`). The score
            is the mean interior probability, see :func:`score_nuclei`.
    Nuclei are decoded at the resolution of the network, where the boundary is as thick as it was
    in training, and their label image is scaled to the file's.
    """

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        head: UNetDecoder,
        decoder: Decoder,
        num_classes: int,
        with_distance: bool,
        class_weights: Sequence[float],
        loss_weights: dict[str, float],
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        score_threshold: float = 0.0,
        max_instances: int | None = None,
        bfloat16: bool = False,
    ):
        """
        Args:
            backbone: image -> features.
            head: features, and the image as ``image`` if it asks for it, -> logits of
                the classes, then with ``with_distance`` the depth.
            decoder: maps -> label image and scores.
            num_classes: K.
            with_distance: whether the depth is predicted too.
            class_weights: K weights in the cross-entropy; empty: all 1.
            loss_weights: ``loss_ce``, ``loss_dice``, ``loss_distance``.
            pixel_mean, pixel_std: per channel; as many as the image has.
            score_threshold: nuclei with a lower score are dropped.
            max_instances: at most so many nuclei per image are returned; None: all.
            bfloat16: autocast in inference.
        """
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.decoder = decoder
        self.num_classes = num_classes
        self.with_distance = with_distance
        self.loss_weights = loss_weights
        self.score_threshold = score_threshold
        self.max_instances = max_instances
        self.bfloat16 = bfloat16
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), False)
        weights = torch.tensor(class_weights or [1.0] * num_classes, dtype=torch.float32)
        self.register_buffer("class_weights", weights, False)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        keys = cfg.MODEL.UNET
        num_classes = len(CLASS_NAMES[keys.TARGET])
        if len(keys.CLASS_WEIGHTS) not in (0, num_classes):
            raise NucleiError(
                f"MODEL.UNET.CLASS_WEIGHTS has {len(keys.CLASS_WEIGHTS)} numbers, but the target "
                f"{keys.TARGET!r} has {num_classes} classes: {', '.join(CLASS_NAMES[keys.TARGET])}"
            )
        with_distance = keys.TARGET == "distance"
        backbone = build_backbone(cfg)
        shapes = backbone.output_shape()
        if all(shape.stride > 1 for shape in shapes.values()):
            # A ResNet has no features at full resolution, but outlines need them.
            shapes["image"] = ShapeSpec(channels=len(cfg.MODEL.PIXEL_MEAN), stride=1)
        return {
            "backbone": backbone,
            "head": UNetDecoder(
                shapes,
                num_outputs=num_classes + with_distance,
                width=keys.WIDTH,
                norm=keys.NORM,
            ),
            "decoder": Decoder(cfg),
            "num_classes": num_classes,
            "with_distance": with_distance,
            "class_weights": list(keys.CLASS_WEIGHTS),
            "loss_weights": {
                "loss_ce": keys.CE_WEIGHT,
                "loss_dice": keys.DICE_WEIGHT,
                "loss_distance": keys.DISTANCE_WEIGHT,
            },
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            # The keys that limit a detector's output, so that every tool can set them for both.
            "score_threshold": cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST,
            "max_instances": cfg.TEST.DETECTIONS_PER_IMAGE,
            "bfloat16": infers_in_bfloat16(cfg),
        }

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    def forward(self, batched_inputs: list[dict]) -> dict[str, Tensor] | list[dict]:
        """See the class."""
        if not self.training:
            return self.inference(batched_inputs)
        outputs = self._predict(batched_inputs)
        logits, size = outputs[:, : self.num_classes], outputs.shape[-2:]
        classes = self._stack([x["sem_seg"] for x in batched_inputs], size, IGNORE).long()
        losses = {
            "loss_ce": class_loss(logits, classes, self.class_weights, IGNORE),
            "loss_dice": dice_loss(logits, classes, IGNORE),
        }
        if self.with_distance:
            distance = self._stack([x["distance"] for x in batched_inputs], size, 0)
            losses["loss_distance"] = distance_loss(outputs[:, -1], distance, classes != IGNORE)
        return {name: loss * self.loss_weights[name] for name, loss in losses.items()}

    def inference(self, batched_inputs: list[dict]) -> list[dict]:
        """See the class."""
        predicted = self.predict_maps(batched_inputs)
        with stage("postprocess"):
            return [
                self._postprocess(maps, inputs)
                for inputs, maps in zip(batched_inputs, predicted, strict=True)
            ]

    def _postprocess(self, maps: Tensor, inputs: dict) -> dict:
        network_size = tuple(maps.shape[-2:])
        size = (inputs.get("height", network_size[0]), inputs.get("width", network_size[1]))
        instances = self.decode(maps.detach().cpu().numpy(), size).to(maps.device)
        sem_seg = sem_seg_postprocess(maps[: self.num_classes], network_size, *size)
        return {"sem_seg": sem_seg, "instances": instances}

    def decode(self, maps: np.ndarray, image_size: tuple[int, int]) -> Instances:
        """Nuclei of one image from what :meth:`predict_maps` returns for it, best first.

        Args:
            maps: (C, h, w).
            image_size: (H, W) of the result.
        """
        labels, scores = self.decoder(np.ascontiguousarray(maps))
        return predictions_from_labels(
            labels,
            scores,
            image_size,
            score_threshold=self.score_threshold,
            max_instances=self.max_instances,
        )

    def predict_maps(self, batched_inputs: list[dict]) -> list[Tensor]:
        """What the decoder takes: float32 (C, h, w) in 0..1 of every ``image``, at its size.

        C: probabilities of the classes, then with the distance target the depth.
        """
        with inference_precision(self.device, self.bfloat16):
            outputs = self._predict(batched_inputs)
        maps = [outputs[:, : self.num_classes].softmax(dim=1)]
        if self.with_distance:
            maps.append(outputs[:, self.num_classes :].clamp(0, 1))
        sizes = [x["image"].shape[-2:] for x in batched_inputs]
        return [m[:, :h, :w] for m, (h, w) in zip(torch.cat(maps, dim=1), sizes, strict=True)]

    def _predict(self, batched_inputs: list[dict]) -> Tensor:
        """Outputs of the network for the padded images, float32 (B, C, H, W)."""
        images = [
            (x["image"].to(self.device) - self.pixel_mean) / self.pixel_std for x in batched_inputs
        ]
        height, width = (max(image.shape[d] for image in images) for d in (1, 2))
        stride = self.head.stride
        height, width = (-(-length // stride) * stride for length in (height, width))
        # The edge is repeated, not zero: a dark background would get a bright frame.
        batch = torch.cat(
            [
                F.pad(
                    image[None],
                    (0, width - image.shape[2], 0, height - image.shape[1]),
                    mode="replicate",
                )
                for image in images
            ]
        )
        if batch.device.type == "cpu":  # convolutions are faster there
            batch = batch.contiguous(memory_format=torch.channels_last)
        features = self.backbone(batch)
        return self.head({**features, "image": batch}).float()

    def _stack(self, maps: Sequence[Tensor], size: Sequence[int], fill: int) -> Tensor:
        """Maps (h, w) of any size, padded at the bottom and right -> (B, *size)."""
        stacked = maps[0].new_full((len(maps), *size), fill)
        for padded, values in zip(stacked, maps, strict=True):
            padded[: values.shape[0], : values.shape[1]] = values
        return stacked.to(self.device)

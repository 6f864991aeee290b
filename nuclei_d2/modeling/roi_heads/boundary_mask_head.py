"""The mask head of Boundary-preserving Mask R-CNN."""

from collections.abc import Sequence

import fvcore.nn.weight_init as weight_init
import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.modeling.roi_heads import ROI_MASK_HEAD_REGISTRY
from detectron2.modeling.roi_heads.mask_head import mask_rcnn_inference
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import get_event_storage, has_event_storage
from torch import Tensor, nn
from torch.nn import functional as F

from nuclei_d2.layers.boundary import crop_masks_and_boundaries
from nuclei_d2.layers.roi_align import SmallROIPooler
from nuclei_d2.layers.upsample import UpsamplePredictor
from nuclei_d2.modeling.losses import bce_loss, boundary_dice_loss
from nuclei_d2.utils.errors import NucleiError

INFERENCE_ROIS = 128  # in memory at a time


@ROI_MASK_HEAD_REGISTRY.register()
class BoundaryMaskHead(nn.Module):
    """Predicts a mask and its boundary, each branch feeding the other.

    Boundary-preserving Mask R-CNN (Cheng et al., ECCV 2020, section 3)::

        mask RoIs     14 x 14 -> conv^4 -> F_m ------------(+)-> conv -> deconv -> 1x1: mask
                                            | 1x1           ^ 1x1
        boundary RoIs 28 x 28 -> conv / 2 -(+)-> conv^2 -> F_b -> deconv -> 1x1: boundary

    Convolutions are 3x3 unless marked 1x1; each is followed by the norm and a ReLU. The head
    pools its two inputs itself: with ``MODEL.ROI_MASK_HEAD.POOLER_TYPE: ""`` any Detectron2 ROI
    heads that can do without a mask pooler (standard, cascade) hand it the feature maps.

    With both boundary weights 0 the head is the control of equal size: same layers, mask loss
    alone. Its boundary maps mean nothing, so they are not attached to the predictions.
    """

    @configurable
    def __init__(
        self,
        *,
        input_shape: dict[str, ShapeSpec],
        mask_in_features: Sequence[str],
        mask_pooler: nn.Module,
        boundary_in_features: Sequence[str],
        boundary_pooler: nn.Module,
        num_classes: int,
        conv_dim: int = 256,
        num_mask_conv: int = 4,
        num_boundary_conv: int = 2,
        conv_norm: str = "",
        boundary_target: str = "exact",
        mask_weight: float = 1.0,
        bce_weight: float = 1.0,
        dice_weight: float = 1.0,
    ):
        """
        Args:
            input_shape: channels and stride of each feature map.
            mask_in_features, boundary_in_features: feature maps each branch is pooled from.
            mask_pooler: (feature maps, boxes) -> (N, C, R, R).
            boundary_pooler: (feature maps, boxes) -> (N, C, 2R, 2R).
            num_classes: channels of both predictions; 1 also for class-agnostic ones.
            conv_dim: channels of every hidden layer.
            num_mask_conv: 3x3 convolutions, at least 1, before the branches meet.
            num_boundary_conv: 3x3 convolutions of the boundary branch after that.
            conv_norm: see :func:`detectron2.layers.get_norm`.
            boundary_target: "exact" or "paper", see :func:`crop_masks_and_boundaries`.
            mask_weight, bce_weight, dice_weight: factors of the three losses.
        """
        super().__init__()
        self.mask_in_features = list(mask_in_features)
        self.mask_pooler = mask_pooler
        self.boundary_in_features = list(boundary_in_features)
        self.boundary_pooler = boundary_pooler
        self.boundary_target = boundary_target
        self.mask_weight = mask_weight
        self.bce_weight = bce_weight
        self.dice_weight = dice_weight

        def conv(in_channels: int = conv_dim, kernel_size: int = 3, stride: int = 1) -> Conv2d:
            layer = Conv2d(
                in_channels,
                conv_dim,
                kernel_size,
                stride=stride,
                padding=kernel_size // 2,
                bias=not conv_norm,
                norm=get_norm(conv_norm, conv_dim),
                activation=F.relu_,
            )
            weight_init.c2_msra_fill(layer)
            return layer

        mask_channels = input_shape[self.mask_in_features[0]].channels
        boundary_channels = input_shape[self.boundary_in_features[0]].channels
        self.mask_convs = nn.Sequential(
            conv(mask_channels), *(conv() for _ in range(num_mask_conv - 1))
        )
        self.boundary_downsample = conv(boundary_channels, stride=2)
        self.mask_to_boundary = conv(kernel_size=1)
        self.boundary_convs = nn.Sequential(*(conv() for _ in range(num_boundary_conv)))
        self.boundary_to_mask = conv(kernel_size=1)
        self.mask_fusion = conv()
        self.mask_predictor = UpsamplePredictor(conv_dim, conv_dim, num_classes)
        self.boundary_predictor = UpsamplePredictor(conv_dim, conv_dim, num_classes)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict:
        _check_config(cfg)
        head = cfg.MODEL.ROI_MASK_HEAD
        mask_in_features = cfg.MODEL.ROI_HEADS.IN_FEATURES
        boundary_in_features = head.BOUNDARY.IN_FEATURES

        def pooler(in_features: Sequence[str], resolution: int) -> SmallROIPooler:
            return SmallROIPooler(
                output_size=resolution,
                scales=[1.0 / input_shape[name].stride for name in in_features],
                sampling_ratio=head.POOLER_SAMPLING_RATIO,
            )

        return {
            "input_shape": input_shape,
            "mask_in_features": mask_in_features,
            "mask_pooler": pooler(mask_in_features, head.POOLER_RESOLUTION),
            "boundary_in_features": boundary_in_features,
            "boundary_pooler": pooler(boundary_in_features, head.BOUNDARY.POOLER_RESOLUTION),
            "num_classes": 1 if head.CLS_AGNOSTIC_MASK else cfg.MODEL.ROI_HEADS.NUM_CLASSES,
            "conv_dim": head.CONV_DIM,
            "num_mask_conv": head.NUM_CONV,
            "num_boundary_conv": head.BOUNDARY.NUM_CONV,
            "conv_norm": head.NORM,
            "boundary_target": head.BOUNDARY.TARGET,
            "mask_weight": head.BOUNDARY.MASK_WEIGHT,
            "bce_weight": head.BOUNDARY.BCE_WEIGHT,
            "dice_weight": head.BOUNDARY.DICE_WEIGHT,
        }

    def forward(
        self, features: dict[str, Tensor], instances: list[Instances]
    ) -> dict[str, Tensor] | list[Instances]:
        """
        Args:
            features: feature maps by name, each (images, C, H, W).
            instances: one per image. In training the foreground proposals with proposal_boxes,
                gt_classes and gt_masks; in inference the detections with pred_boxes and
                pred_classes.

        Returns:
            In training the weighted losses loss_mask, loss_boundary and loss_boundary_dice. In
            inference ``instances`` with pred_masks and, unless this is the control,
            pred_boundaries: probabilities inside the boxes, (N, 1, M, M) float32.
        """
        if self.training:
            logits = self._pool_and_apply(features, [x.proposal_boxes for x in instances])
            return self.losses(*logits, instances)
        # Hundreds of nuclei at a time would need gigabytes for the boundary RoIs.
        logits = [
            self._pool_and_apply(
                {name: f[k : k + 1] for name, f in features.items()}, [Boxes(part)]
            )
            for k, x in enumerate(instances)
            for part in x.pred_boxes.tensor.split(INFERENCE_ROIS)
        ]
        mask_logits, boundary_logits = (torch.cat(parts) for parts in zip(*logits, strict=True))
        return self.inference(mask_logits, boundary_logits, instances)

    def _pool_and_apply(
        self, features: dict[str, Tensor], boxes: list[Boxes]
    ) -> tuple[Tensor, Tensor]:
        return self.layers(
            self.mask_pooler([features[name] for name in self.mask_in_features], boxes),
            self.boundary_pooler([features[name] for name in self.boundary_in_features], boxes),
        )

    def layers(self, mask_features: Tensor, boundary_features: Tensor) -> tuple[Tensor, Tensor]:
        """Mask and boundary logits, float32 (N, classes, 2R, 2R) both.

        Args:
            mask_features: (N, C, R, R).
            boundary_features: (N, C, 2R, 2R).
        """
        if mask_features.device.type == "cpu":  # convolutions and UpsamplePredictor are faster
            mask_features = mask_features.contiguous(memory_format=torch.channels_last)
            boundary_features = boundary_features.contiguous(memory_format=torch.channels_last)
        mask = self.mask_convs(mask_features)
        boundary = self.boundary_downsample(boundary_features) + self.mask_to_boundary(mask)
        boundary = self.boundary_convs(boundary)
        mask = self.mask_fusion(self.boundary_to_mask(boundary) + mask)
        return self.mask_predictor(mask).float(), self.boundary_predictor(boundary).float()

    def losses(
        self, mask_logits: Tensor, boundary_logits: Tensor, instances: list[Instances]
    ) -> dict[str, Tensor]:
        """The three weighted losses, on each RoI's ground-truth class."""
        masks, boundaries = self._targets(instances, mask_logits)
        classes = torch.cat([x.gt_classes for x in instances])
        mask_logits = _select_class(mask_logits, classes)
        boundary_logits = _select_class(boundary_logits, classes)
        _log_mask_accuracy(mask_logits, masks)
        return {
            "loss_mask": bce_loss(mask_logits, masks) * self.mask_weight,
            "loss_boundary": bce_loss(boundary_logits, boundaries) * self.bce_weight,
            "loss_boundary_dice": boundary_dice_loss(boundary_logits, boundaries)
            * self.dice_weight,
        }

    def _targets(self, instances: list[Instances], logits: Tensor) -> tuple[Tensor, Tensor]:
        """Masks and boundaries, bool (N, M, M) for N RoIs and logits of M x M pixels."""
        size = logits.shape[-1]
        # Images without ground truth have no RoIs, and no gt_masks either.
        targets = [
            crop_masks_and_boundaries(
                x.gt_masks, x.proposal_boxes.tensor, size, self.boundary_target
            )
            for x in instances
            if len(x) > 0
        ]
        if not targets:
            empty = logits.new_zeros((0, size, size), dtype=torch.bool)
            return empty, empty
        masks, boundaries = zip(*targets, strict=True)
        return torch.cat(masks).to(logits.device), torch.cat(boundaries).to(logits.device)

    def inference(
        self, mask_logits: Tensor, boundary_logits: Tensor, instances: list[Instances]
    ) -> list[Instances]:
        """Attach the probabilities of the predicted classes to ``instances``."""
        if self.bce_weight or self.dice_weight:
            mask_rcnn_inference(boundary_logits, instances)
            for x in instances:
                x.pred_boundaries = x.pred_masks
        mask_rcnn_inference(mask_logits, instances)
        return instances


def _check_config(cfg: CfgNode) -> None:
    head = cfg.MODEL.ROI_MASK_HEAD
    if head.POOLER_TYPE:
        raise NucleiError(
            "BoundaryMaskHead pools its RoIs itself: set MODEL.ROI_MASK_HEAD.POOLER_TYPE to ''"
        )
    if head.BOUNDARY.POOLER_RESOLUTION != 2 * head.POOLER_RESOLUTION:
        raise NucleiError(
            "MODEL.ROI_MASK_HEAD.BOUNDARY.POOLER_RESOLUTION must be twice "
            f"MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION ({head.POOLER_RESOLUTION}), "
            f"got {head.BOUNDARY.POOLER_RESOLUTION}"
        )
    missing = set(head.BOUNDARY.IN_FEATURES) - set(cfg.MODEL.ROI_HEADS.IN_FEATURES)
    if missing:
        raise NucleiError(
            f"MODEL.ROI_MASK_HEAD.BOUNDARY.IN_FEATURES {sorted(missing)} must be among "
            f"MODEL.ROI_HEADS.IN_FEATURES {list(cfg.MODEL.ROI_HEADS.IN_FEATURES)}"
        )


def _select_class(logits: Tensor, classes: Tensor) -> Tensor:
    """(N, C, M, M) -> (N, M, M): the channel of each RoI's class; the only one if C = 1."""
    if logits.shape[1] == 1:
        return logits[:, 0]
    return logits[torch.arange(len(logits), device=logits.device), classes]


def _log_mask_accuracy(logits: Tensor, masks: Tensor) -> None:
    """Put the scalars that Detectron2's own mask heads log into the event storage, if any."""
    if masks.numel() == 0 or not has_event_storage():
        return
    wrong = (logits > 0) != masks
    counts = torch.stack([wrong.sum(), masks.sum(), (wrong & masks).sum()])
    num_wrong, num_positive, num_missed = counts.tolist()
    num_negative = masks.numel() - num_positive
    storage = get_event_storage()
    storage.put_scalar("mask_rcnn/accuracy", 1 - num_wrong / masks.numel())
    storage.put_scalar("mask_rcnn/false_positive", (num_wrong - num_missed) / max(num_negative, 1))
    storage.put_scalar("mask_rcnn/false_negative", num_missed / max(num_positive, 1))

"""What depends on the image, as TorchScript: normalisation, number and order of nuclei, pasting."""

from typing import Optional

import torch
from detectron2.config import CfgNode
from torch import Tensor, nn
from torch.nn import functional as F

from nuclei_d2.data.normalization import ImageNormalizer
from nuclei_d2.modeling.roi_heads.boundary_mask_head import INFERENCE_ROIS


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
        """:func:`nuclei_d2.data.normalization.normalize` of (C, H, W) float32."""
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
    """:func:`nuclei_d2.data.normalization.estimate_noise` of (C, H, W) float32."""
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
            masks: (boxes, classes, features) of up to :data:`INFERENCE_ROIS` -> (N, 1, M, M)
                probabilities.
            score_threshold: used unless the caller gives one.
        """
        super().__init__()
        self.preprocessing = preprocessing
        self.detect = detect
        self.masks = masks
        self.score_threshold = score_threshold
        self.rois = INFERENCE_ROIS

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

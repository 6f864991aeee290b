"""ROIAlign for small objects, fast on CPUs."""

from collections.abc import Sequence

import torch
from detectron2.layers import ROIAlign
from detectron2.modeling.poolers import ROIPooler
from torch import Tensor, nn
from torch.nn import functional as F


class SmallROIAlign(ROIAlign):
    """:class:`detectron2.layers.ROIAlign` (aligned), faster on CPUs for small boxes.

    Same results, up to the rounding of sums. Where a box has bins no wider than a feature pixel, as
    nuclei do, adaptive sampling takes one bilinear sample per bin: a weighted sum of four feature
    vectors. ``embedding_bag`` adds whole vectors; ROIAlign's CPU kernel goes channel by channel.
    All other boxes, and other devices, take the kernel.
    """

    def __init__(self, output_size: int, spatial_scale: float, sampling_ratio: int):
        """
        Args:
            output_size: bins along a side.
            spatial_scale: feature pixels per image pixel.
            sampling_ratio: samples along a side of a bin; 0: adaptive, one per feature pixel.
        """
        super().__init__((output_size, output_size), spatial_scale, sampling_ratio, aligned=True)

    def forward(self, features: Tensor, rois: Tensor) -> Tensor:
        """
        Args:
            features: (B, C, H, W) float; taken as float32, since ROIAlign would round the boxes to
                bfloat16 together with the features.
            rois: (N, 5) float32: index into B, then XYXY in image pixels.

        Returns:
            (N, C, output_size, output_size) float32.
        """
        features = features.float()
        # Half a pixel less: the centre of feature pixel i lies at i + 0.5.
        corners = rois[:, 1:] * self.spatial_scale - 0.5
        bins = (corners[:, 2:] - corners[:, :2]) / self.output_size[0]
        single = ((bins > 0) & (bins <= 1)).all(dim=1)
        if features.device.type != "cpu" or self.sampling_ratio > 0 or not single.any():
            return super().forward(features, rois)
        if single.all():
            return self._sample_bin_centres(features, rois[:, 0].long(), corners, bins)
        output = features.new_empty(len(rois), features.shape[1], *self.output_size)
        output[single] = self._sample_bin_centres(
            features, rois[single, 0].long(), corners[single], bins[single]
        )
        output[~single] = super().forward(features, rois[~single])
        return output

    def _sample_bin_centres(
        self, features: Tensor, image: Tensor, corners: Tensor, bins: Tensor
    ) -> Tensor:
        """One bilinear sample per bin.

        Args:
            features: (B, C, H, W).
            image: (N,) int64, index into B.
            corners: (N, 4) XYXY; 0 is the centre of the first feature pixel.
            bins: (N, 2) width and height of a bin, in feature pixels.
        """
        _, channels, height, width = features.shape
        size = self.output_size[0]
        x, x_weights = self._neighbours(corners[:, 0], bins[:, 0], width)
        y, y_weights = self._neighbours(corners[:, 1], bins[:, 1], height)
        rows = image[:, None, None] * height + y
        # (N, row, column, upper or lower neighbour, left or right neighbour)
        indices = rows[:, :, None, :, None] * width + x[:, None, :, None, :]
        weights = y_weights[:, :, None, :, None] * x_weights[:, None, :, None, :]
        vectors = features.permute(0, 2, 3, 1).reshape(-1, channels)
        output = F.embedding_bag(
            indices.view(-1, 4), vectors, per_sample_weights=weights.view(-1, 4), mode="sum"
        )
        return output.view(len(corners), size, size, channels).permute(0, 3, 1, 2)

    def _neighbours(self, start: Tensor, bins: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Feature pixels on both sides of each bin centre along one axis, and their weights.

        Args:
            start: (N,) first corners.
            bins: (N,) bin sizes.
            length: feature pixels along the axis.

        Returns:
            Indices, int64, and weights, float, both (N, bins, 2).
        """
        # The kernel's order of operations, so that even the rounding is the same.
        offsets = torch.arange(self.output_size[0]) * bins[:, None]
        position = start[:, None] + offsets + 0.5 * bins[:, None]
        # As in ROIAlign, the edge pixels reach half a pixel out, and all beyond is zero.
        inside = (position >= -1) & (position <= length)
        position = position.clamp(0, length - 1)
        lower = position.floor()
        upper_weight = position - lower
        lower = lower.long()
        indices = torch.stack([lower, (lower + 1).clamp(max=length - 1)], dim=2)
        weights = torch.stack([1 - upper_weight, upper_weight], dim=2)
        return indices, weights * inside[:, :, None]


class SmallROIPooler(ROIPooler):
    """:class:`detectron2.modeling.poolers.ROIPooler` of type ROIAlignV2 on SmallROIAlign."""

    def __init__(self, output_size: int, scales: Sequence[float], sampling_ratio: int):
        """Arguments as for :class:`ROIPooler`."""
        super().__init__(output_size, scales, sampling_ratio, "ROIAlignV2")
        self.level_poolers = nn.ModuleList(
            SmallROIAlign(output_size, scale, sampling_ratio) for scale in scales
        )

"""ROIAlign for small objects, fast on CPUs."""

from collections.abc import Sequence

import torch
from detectron2.layers import ROIAlign
from detectron2.modeling.poolers import ROIPooler
from torch import Tensor, nn
from torch.nn import functional as F

_CHUNK_TERMS = 1 << 22  # feature vectors added at a time: 48 MiB of indices and weights


class SmallROIAlign(ROIAlign):
    """:class:`detectron2.layers.ROIAlign` (aligned), faster on CPUs for small boxes.

    Same results, up to the rounding of sums. A bin is the mean of bilinear samples, one or a few
    where boxes are as small as nuclei: a weighted sum of feature vectors. ``embedding_bag`` adds
    whole vectors; ROIAlign's CPU kernel goes channel by channel. Other devices take the kernel.
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
            features: (B, C, H, W) float, best with the channels last in memory; taken as float32,
                since ROIAlign would round the boxes to bfloat16 together with the features.
            rois: (N, 5) float32: index into B, then XYXY in image pixels.

        Returns:
            (N, C, output_size, output_size) float32.
        """
        features = features.float()
        if features.device.type != "cpu" or len(rois) == 0:
            return super().forward(features, rois)
        # Half a pixel less: the centre of feature pixel i lies at i + 0.5.
        corners = rois[:, 1:] * self.spatial_scale - 0.5
        bins = (corners[:, 2:] - corners[:, :2]) / self.output_size[0]
        if self.sampling_ratio > 0:
            samples = torch.full_like(bins, self.sampling_ratio, dtype=torch.int64)
        else:
            samples = bins.ceil().long()
            # A box without area has no samples: what lies at -2 gets no weight.
            corners = corners.masked_fill((samples <= 0).any(dim=1, keepdim=True), -2)
        counts, group = samples.clamp(min=1).unique(dim=0, return_inverse=True)
        order, pooled = [], []
        for index, (columns, rows) in enumerate(counts.tolist()):
            terms = 4 * columns * rows * self.output_size[0] ** 2
            members = (group == index).nonzero()[:, 0]
            order.append(members)
            for chunk in members.split(max(1, _CHUNK_TERMS // terms)):
                image = rois[chunk, 0].int()
                pooled.append(
                    self._sample(features, image, corners[chunk], bins[chunk], (columns, rows))
                )
        output = torch.cat(pooled) if len(pooled) > 1 else pooled[0]
        if len(order) > 1:
            output = output[torch.cat(order).argsort()]
        return output.permute(0, 3, 1, 2)

    def _sample(
        self,
        features: Tensor,
        image: Tensor,
        corners: Tensor,
        bins: Tensor,
        samples: tuple[int, int],
    ) -> Tensor:
        """(N, size, size, C): bins of boxes with the same number of samples.

        Args:
            features: (B, C, H, W).
            image: (N,) int32, index into B.
            corners: (N, 4) XYXY; 0 is the centre of the first feature pixel.
            bins: (N, 2) width and height of a bin, in feature pixels.
            samples: along the width and the height of a bin.
        """
        _, channels, height, width = features.shape
        size = self.output_size[0]
        x, x_weights = self._neighbours(corners[:, 0], bins[:, 0], width, samples[0])
        y, y_weights = self._neighbours(corners[:, 1], bins[:, 1], height, samples[1])
        rows = image[:, None, None] * height + y
        # (N, row, column, vertical neighbour, horizontal neighbour)
        indices = rows[:, :, None, :, None] * width + x[:, None, :, None, :]
        weights = y_weights[:, :, None, :, None] * x_weights[:, None, :, None, :]
        terms = x.shape[2] * y.shape[2]
        vectors = features.permute(0, 2, 3, 1).reshape(-1, channels)
        output = F.embedding_bag(
            indices.view(-1, terms), vectors, per_sample_weights=weights.view(-1, terms), mode="sum"
        )
        return output.view(len(corners), size, size, channels)

    def _neighbours(
        self, start: Tensor, bins: Tensor, length: int, samples: int
    ) -> tuple[Tensor, Tensor]:
        """Feature pixels on both sides of each sample along one axis, and their weights.

        Args:
            start: (N,) first corners.
            bins: (N,) bin sizes.
            length: feature pixels along the axis.
            samples: of each bin.

        Returns:
            Indices, int32, and weights, float, both (N, bins, 2 * samples); the weights of a bin
            inside the feature map sum up to 1.
        """
        bins = bins[:, None, None]
        # The kernel's order of operations, so that even the rounding is the same.
        offsets = torch.arange(self.output_size[0])[:, None] * bins
        position = start[:, None, None] + offsets + (torch.arange(samples) + 0.5) * bins / samples
        # As in ROIAlign, the edge pixels reach half a pixel out, and all beyond is zero.
        inside = (position >= -1) & (position <= length)
        position = position.clamp(0, length - 1)
        lower = position.floor()
        upper_weight = position - lower
        lower = lower.int()
        indices = torch.stack([lower, (lower + 1).clamp(max=length - 1)], dim=3)
        weights = torch.stack([1 - upper_weight, upper_weight], dim=3) * inside[..., None]
        return indices.flatten(2), weights.flatten(2) / samples


class SmallROIPooler(ROIPooler):
    """:class:`detectron2.modeling.poolers.ROIPooler` of type ROIAlignV2 on SmallROIAlign."""

    def __init__(self, output_size: int, scales: Sequence[float], sampling_ratio: int):
        """Arguments as for :class:`ROIPooler`."""
        super().__init__(output_size, scales, sampling_ratio, "ROIAlignV2")
        self.level_poolers = nn.ModuleList(
            SmallROIAlign(output_size, scale, sampling_ratio) for scale in scales
        )

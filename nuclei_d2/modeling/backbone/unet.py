"""The two halves of a U-Net (Ronneberger et al., MICCAI 2015)."""

from collections import defaultdict
from collections.abc import Mapping

import fvcore.nn.weight_init as weight_init
import torch
from detectron2.config import CfgNode
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from torch import Tensor, nn
from torch.nn import functional as F

_MAX_WIDENING = 8  # 64 channels become 512, not more


def _channels(width: int, stride: int) -> int:
    return width * min(stride, _MAX_WIDENING)


def _two_convs(in_channels: int, out_channels: int, norm: str) -> nn.Sequential:
    """Two 3x3 convolutions, each with normalisation and ReLU."""
    convs = [
        Conv2d(
            channels,
            out_channels,
            kernel_size=3,
            padding=1,
            bias=not norm,
            norm=get_norm(norm, out_channels),
            activation=F.relu_,
        )
        for channels in (in_channels, out_channels)
    ]
    for conv in convs:
        weight_init.c2_msra_fill(conv)
    return nn.Sequential(*convs)


class UNetEncoder(Backbone):
    """Contracting path: two 3x3 convolutions per level, 2x2 max pooling between levels.

    Its features ``level1``, ``level2`` ... have strides 1, 2 ... and ``width``, 2 ``width`` ...
    channels, at most 8 ``width``.
    """

    def __init__(self, in_channels: int, *, depth: int = 4, width: int = 64, norm: str = "BN"):
        """
        Args:
            in_channels: of the image.
            depth: number of levels.
            width: channels of the first level.
            norm: as for :func:`detectron2.layers.get_norm`.
        """
        super().__init__()
        self._out_features = [f"level{level}" for level in range(1, depth + 1)]
        self._out_feature_strides = {f: 2**k for k, f in enumerate(self._out_features)}
        self._out_feature_channels = {
            f: _channels(width, stride) for f, stride in self._out_feature_strides.items()
        }
        self.levels = nn.ModuleList()
        for channels in self._out_feature_channels.values():
            self.levels.append(_two_convs(in_channels, channels, norm))
            in_channels = channels

    @property
    def size_divisibility(self) -> int:
        """Stride of the last level; height and width must be multiples of it."""
        return 2 ** (len(self.levels) - 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(B, in_channels, H, W) -> features by name."""
        features = {}
        for name, level in zip(self._out_features, self.levels, strict=True):
            x = level(F.max_pool2d(x, 2) if features else x)
            features[name] = x
        return features


@BACKBONE_REGISTRY.register()
def build_unet_encoder(cfg: CfgNode, input_shape: ShapeSpec) -> UNetEncoder:
    """:class:`UNetEncoder` by the MODEL.UNET keys."""
    keys = cfg.MODEL.UNET
    return UNetEncoder(input_shape.channels, depth=keys.DEPTH, width=keys.WIDTH, norm=keys.NORM)


class UNetDecoder(nn.Module):
    """Expanding path: from the coarsest features of any backbone to maps of full resolution.

    At every level the resolution is doubled (nearest neighbour), all features of that stride are
    concatenated, and two 3x3 convolutions follow. A level that the backbone has no features for
    (strides 2 and 1 of a ResNet) makes do without.
    """

    def __init__(
        self,
        input_shape: Mapping[str, ShapeSpec],
        *,
        num_outputs: int,
        width: int = 64,
        norm: str = "BN",
    ):
        """
        Args:
            input_shape: channels and strides (powers of 2) of the backbone's features.
            num_outputs: maps to predict.
            width: channels at stride 1; as many times more at coarser strides as the stride says,
                but at most 8 times.
            norm: as for :func:`detectron2.layers.get_norm`.
        """
        super().__init__()
        self._names = defaultdict(list)
        for name, shape in input_shape.items():
            self._names[shape.stride].append(name)
        stride = self.stride = max(self._names)
        channels = sum(input_shape[name].channels for name in self._names[stride])
        self.levels = nn.ModuleDict()
        while stride > 1:
            stride //= 2
            channels += sum(input_shape[name].channels for name in self._names[stride])
            self.levels[f"stride{stride}"] = _two_convs(channels, _channels(width, stride), norm)
            channels = _channels(width, stride)
        self.predictor = Conv2d(channels, num_outputs, kernel_size=1)
        nn.init.normal_(self.predictor.weight, std=0.01)
        nn.init.zeros_(self.predictor.bias)

    def forward(self, features: Mapping[str, Tensor]) -> Tensor:
        """Features by name -> (B, num_outputs, H, W) at stride 1."""
        x = self._concatenate(features, self.stride)
        stride = self.stride
        for level in self.levels.values():
            stride //= 2
            x = F.interpolate(x, scale_factor=2, mode="nearest")
            x = level(self._concatenate(features, stride, x))
        return self.predictor(x)

    def _concatenate(self, features: Mapping[str, Tensor], stride: int, *more: Tensor) -> Tensor:
        return torch.cat([*more, *(features[name] for name in self._names[stride])], dim=1)

"""The last layers of a mask branch, in the order that is cheapest."""

import fvcore.nn.weight_init as weight_init
from detectron2.layers import Conv2d, ConvTranspose2d
from torch import Tensor, nn
from torch.nn import functional as F


class UpsamplePredictor(nn.Module):
    """2x2 transposed convolution with stride 2, ReLU, 1x1 convolution to logits.

    The four output pixels of an input pixel depend on that pixel alone, so both layers are 1x1
    convolutions at the input's resolution, and only the logits are spread over the output grid.
    Same result as layer after layer, in less time on CPUs.
    """

    def __init__(self, in_channels: int, hidden_channels: int, num_classes: int):
        super().__init__()
        self.deconv = ConvTranspose2d(in_channels, hidden_channels, kernel_size=2, stride=2)
        self.predictor = Conv2d(hidden_channels, num_classes, kernel_size=1)
        weight_init.c2_msra_fill(self.deconv)
        nn.init.normal_(self.predictor.weight, std=0.001)
        nn.init.zeros_(self.predictor.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> (N, num_classes, 2H, 2W)."""
        num, _, height, width = x.shape
        hidden_channels = self.deconv.out_channels
        weight = self.deconv.weight.permute(2, 3, 1, 0).reshape(4 * hidden_channels, -1, 1, 1)
        x = F.conv2d(x, weight, self.deconv.bias.repeat(4)).relu_()
        x = x.permute(0, 2, 3, 1).reshape(num, height, width, 2, 2, hidden_channels)
        x = F.linear(x, self.predictor.weight.flatten(1), self.predictor.bias)
        # (N, H, W, row, column, classes) -> (N, classes, H, row, W, column)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(
            num, self.predictor.out_channels, 2 * height, 2 * width
        )

"""Instance masks of one image, kept as one label image instead of one bitmap per nucleus."""

import math
from collections.abc import Iterator, Sequence

import torch
from detectron2.structures import Boxes
from torchvision.ops import roi_align

from nuclei_d2.structures.compact_masks import CompactMasks

_LAYER_STRIDE = 1 << 32  # above any int32 label: layer * stride + label identifies an instance
_CHUNK_PIXELS = 1 << 22  # label pixels gathered at a time by crop_and_resize


class LabelMasks(CompactMasks):
    """Masks of N instances: mask k is ``labels[layers[k]] == ids[k]``.

    As ``Instances.gt_masks``, and as ``Instances.pred_masks`` where no two overlap. Its memory does
    not grow with N: indexing copies N numbers and shares the label image. An instance may occur
    several times (sampled proposals repeat their ground truth).

    Attributes:
        labels: int32 (L, H, W), 0 = background. L is 1 unless nuclei overlap; overlapping ones lie
            in different layers.
        ids: int64 (N,), each >= 1.
        layers: int64 (N,) in 0..L-1.
    """

    def __init__(
        self, labels: torch.Tensor, ids: torch.Tensor, layers: torch.Tensor | None = None
    ) -> None:
        """``layers`` defaults to 0 for every instance."""
        assert labels.dim() == 3, labels.shape
        layers = torch.zeros_like(ids) if layers is None else layers
        assert ids.dim() == 1, ids.shape
        assert ids.shape == layers.shape, (ids.shape, layers.shape)
        self.labels = labels
        self.ids = ids
        self.layers = layers

    @property
    def image_size(self) -> torch.Size:
        """(H, W)."""
        return self.labels.shape[1:]

    @property
    def dtype(self) -> torch.dtype:
        """Of the masks."""
        return torch.bool

    @property
    def device(self) -> torch.device:
        return self.labels.device

    def to(self, *args, **kwargs) -> "LabelMasks":
        """Move to a device; takes the device arguments of :meth:`torch.Tensor.to`."""
        tensors = (self.labels, self.ids, self.layers)
        return LabelMasks(*(tensor.to(*args, **kwargs) for tensor in tensors))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, item: int | slice | torch.Tensor) -> "LabelMasks":
        """Select instances by an int, a slice, or a bool or integer tensor; always LabelMasks."""
        if isinstance(item, int):
            item = [item]
        return LabelMasks(self.labels, self.ids[item], self.layers[item])

    def __iter__(self) -> Iterator[torch.Tensor]:
        """Yield each mask as a bool (H, W) tensor."""
        for index, layer in zip(self.ids, self.layers, strict=True):
            yield self.labels[layer] == index

    @staticmethod
    def cat(masks: Sequence["LabelMasks"]) -> "LabelMasks":
        """Concatenate instances of images of one size; each label image is kept once."""
        images, layers = [], []
        for part in masks:
            same = (k for k, image in enumerate(images) if _is_same(image, part.labels))
            k = next(same, len(images))
            if k == len(images):
                assert not images or images[0].shape[1:] == part.image_size, part.image_size
                images.append(part.labels)
            layers.append(part.layers + sum(len(image) for image in images[:k]))
        labels = torch.cat(images) if len(images) > 1 else images[0]
        return LabelMasks(labels, torch.cat([m.ids for m in masks]), torch.cat(layers))

    def area(self) -> torch.Tensor:
        """Pixels of each mask, int64 (N,)."""
        if len(self) == 0:
            return torch.zeros_like(self.ids)
        instance, owner, _, _ = self._pixels()
        return torch.bincount(owner, minlength=len(self))[instance]

    def get_bounding_boxes(self) -> Boxes:
        """Tight XYXY boxes, x2 and y2 one past the last pixel; zeros where a mask is empty."""
        if len(self) == 0:
            return Boxes(torch.zeros(0, 4, device=self.device))
        instance, owner, y, x = self._pixels()
        first = torch.stack([x, y], dim=1)
        owner = owner[:, None].expand_as(first)
        boxes = first.new_zeros(len(self), 4)
        # Pixels of no instance leave the zeros: include_self=False only replaces what is reached.
        boxes[:, :2].scatter_reduce_(0, owner, first, "amin", include_self=False)
        boxes[:, 2:].scatter_reduce_(0, owner, first + 1, "amax", include_self=False)
        return Boxes(boxes[instance].float())

    def _pixels(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Row of each instance (N,) in a table without repeats, then for every pixel that one of
        them owns its row, y and x."""
        keys, instance = torch.unique(self.layers * _LAYER_STRIDE + self.ids, return_inverse=True)
        layer, y, x = self.labels.nonzero(as_tuple=True)
        key = layer * _LAYER_STRIDE + self.labels[layer, y, x]
        owner = torch.searchsorted(keys, key).clamp_(max=len(keys) - 1)
        owned = keys[owner] == key
        return instance, owner[owned], y[owned], x[owned]

    @torch.no_grad()
    def crop_and_resize(self, boxes: torch.Tensor, mask_size: int) -> torch.Tensor:
        """Crop mask k to box k and resample it to ``mask_size`` x ``mask_size``.

        As :meth:`BitMasks.crop_and_resize` (RoIAlign, aligned, adaptive sampling, value >= 0.5)
        for boxes inside the image, but only the pixels around each box are read. Outside the
        image the edge pixels are repeated: a nucleus cut by the image border continues in a box
        that reaches beyond it. A box without area gives an empty mask.

        Args:
            boxes: (N, 4) XYXY pixels.

        Returns:
            bool (N, mask_size, mask_size).
        """
        assert len(boxes) == len(self), (len(boxes), len(self))
        masks = torch.zeros((len(self), mask_size, mask_size), dtype=torch.bool, device=self.device)
        boxes = _clamp_boxes(boxes.to(self.device, torch.float32), self.image_size)
        # RoIAlign reads pixels floor(x1 - 0.5) to floor(x2 - 0.5) + 1.
        origin = (boxes[:, :2] - 0.5).floor()
        side = ((boxes[:, 2:] - 0.5).floor() + 2 - origin).amax(dim=1)
        # Windows are squares of 2^(k/2) pixels: few shapes, little padding.
        exponent = (side.log2() * 2).ceil().long()
        order = exponent.argsort()
        start = 0
        for k, count in enumerate(torch.bincount(exponent).tolist()):
            window = math.ceil(2 ** (k / 2))
            for rows in order[start : start + count].split(max(1, _CHUNK_PIXELS // window**2)):
                windows = self._windows(rows, origin[rows].long(), window)
                shifted = boxes[rows] - origin[rows].repeat(1, 2)
                index = torch.arange(len(rows), device=self.device, dtype=shifted.dtype)
                rois = torch.cat([index[:, None], shifted], dim=1)
                values = roi_align(windows, rois, mask_size, sampling_ratio=0, aligned=True)
                masks[rows] = values[:, 0] >= 0.5
            start += count
        return masks

    def _windows(self, rows: torch.Tensor, origin: torch.Tensor, side: int) -> torch.Tensor:
        """float (K, 1, side, side): masks of instances ``rows`` from their (x, y) ``origin``."""
        height, width = self.image_size
        offset = torch.arange(side, device=self.device)
        x = (origin[:, :1] + offset).clamp_(0, width - 1)
        y = (origin[:, 1:] + offset).clamp_(0, height - 1)
        layer = self.layers[rows][:, None, None]
        window = self.labels[layer, y[:, :, None], x[:, None, :]]
        return (window == self.ids[rows][:, None, None]).float()[:, None]


def _is_same(first: torch.Tensor, second: torch.Tensor) -> bool:
    return first is second or torch.equal(first, second)


def _clamp_boxes(boxes: torch.Tensor, image_size: torch.Size) -> torch.Tensor:
    """Bound boxes to one image size around the image; inverted and NaN ones have no area."""
    height, width = image_size
    size = boxes.new_tensor([width, height, width, height])
    boxes = torch.minimum(torch.maximum(boxes.nan_to_num(0), -size), 2 * size)
    return torch.cat([boxes[:, :2], torch.maximum(boxes[:, :2], boxes[:, 2:])], dim=1)

"""Instance masks of one image, each kept in a window around it instead of a whole bitmap."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from detectron2.structures import Boxes
from torch.nn import functional as F

from nuclei_d2.structures.compact_masks import CompactMasks

_BATCH_BYTES = 1 << 26  # memory for the samples that paste_masks takes at a time
_SAMPLE_BYTES = 20  # of one of them: two float32 coordinates, twice while stacked; the value


class BoxedMasks(CompactMasks):
    """Masks, or uint8 maps, of N instances: zero outside a window of pixels each.

    Takes the memory of the windows. Indexing copies N numbers and shares the pixels.

    Attributes:
        values: 1-D, bool (masks) or uint8 (maps); the windows' pixels, row by row.
        windows: int64 (N, 4): x1, y1, x2, y2 in pixels, half-open, inside the image.
        image_size: (H, W).
        offsets: int64 (N,): where in ``values`` each window begins.
    """

    def __init__(
        self,
        values: torch.Tensor,
        windows: torch.Tensor,
        image_size: tuple[int, int],
        offsets: torch.Tensor | None = None,
    ) -> None:
        """``offsets`` defaults to windows that follow each other without gaps."""
        assert values.dim() == 1, values.shape
        assert windows.dim() == 2, windows.shape
        assert windows.shape[1] == 4, windows.shape
        if offsets is None:
            areas = _areas(windows)
            offsets = areas.cumsum(0) - areas
        assert len(offsets) == len(windows), (len(offsets), len(windows))
        self.values = values
        self.windows = windows
        self.image_size = tuple(image_size)
        self.offsets = offsets

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        return self.values.device

    def to(self, device: torch.device | str, **kwargs) -> "BoxedMasks":
        """Move to a device; keyword arguments as for :meth:`torch.Tensor.to`."""
        values, windows, offsets = (
            tensor.to(device, **kwargs) for tensor in (self.values, self.windows, self.offsets)
        )
        return BoxedMasks(values, windows, self.image_size, offsets)

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, item: int | slice | torch.Tensor) -> "BoxedMasks":
        """Select instances by an int, a slice, or a bool or integer tensor; always BoxedMasks."""
        if isinstance(item, int):
            item = [item]
        return BoxedMasks(self.values, self.windows[item], self.image_size, self.offsets[item])

    def __iter__(self) -> Iterator[torch.Tensor]:
        """Yield each instance as an (H, W) tensor, made when it is asked for."""
        for rows, columns, pixels in self._crops():
            mask = self.values.new_zeros(self.image_size)
            mask[rows, columns] = pixels
            yield mask

    def crop(self, k: int) -> tuple[int, int, np.ndarray]:
        """Instance ``k`` of masks on the CPU: top and left pixel of its window, and the pixels.

        The array (h, w) shares memory with ``values``; it may have margins without a nucleus.
        """
        x1, y1, x2, y2 = self.windows[k].tolist()
        start = int(self.offsets[k])
        pixels = self.values[start : start + (y2 - y1) * (x2 - x1)]
        return y1, x1, pixels.view(y2 - y1, x2 - x1).numpy()

    def _crops(self) -> Iterator[tuple[slice, slice, torch.Tensor]]:
        """Each window's rows and columns in the image, and its (h, w) pixels."""
        for (x1, y1, x2, y2), start in zip(
            self.windows.tolist(), self.offsets.tolist(), strict=True
        ):
            pixels = self.values[start : start + (y2 - y1) * (x2 - x1)]
            yield slice(y1, y2), slice(x1, x2), pixels.view(y2 - y1, x2 - x1)

    @staticmethod
    def cat(masks: Sequence["BoxedMasks"]) -> "BoxedMasks":
        """Concatenate instances of images of one size."""
        size = masks[0].image_size
        assert all(m.image_size == size for m in masks), [m.image_size for m in masks]
        shifts = np.cumsum([0, *(len(m.values) for m in masks[:-1])]).tolist()
        return BoxedMasks(
            torch.cat([m.values for m in masks]),
            torch.cat([m.windows for m in masks]),
            size,
            torch.cat([m.offsets + shift for m, shift in zip(masks, shifts, strict=True)]),
        )

    def area(self) -> torch.Tensor:
        """Nonzero pixels of each instance, int64 (N,)."""
        counts = [pixels.count_nonzero() for _, _, pixels in self._crops()]
        return torch.stack(counts) if counts else self.offsets.new_zeros(0)

    def get_bounding_boxes(self) -> Boxes:
        """Tight XYXY boxes, x2 and y2 one past the last pixel; zeros where a mask is empty."""
        boxes = torch.zeros(len(self), 4)
        for box, (rows, columns, pixels) in zip(boxes, self._crops(), strict=True):
            y, x = pixels.nonzero(as_tuple=True)
            if len(x):
                box[:] = torch.stack([x.min(), y[0], x.max() + 1, y[-1] + 1])
                box += torch.tensor([columns.start, rows.start] * 2)
        return Boxes(boxes.to(self.device))


@torch.no_grad()
def paste_masks(
    probabilities: torch.Tensor,
    boxes: torch.Tensor,
    image_size: tuple[int, int],
    threshold: float = 0.5,
) -> BoxedMasks:
    """Paste maps that were predicted inside boxes into an image.

    The pixels of :func:`detectron2.layers.paste_masks_in_image`, bit for bit as on the CPU, where
    nothing is pasted further than two pixels from the box. (On a GPU Detectron2 samples the whole
    frame: below a threshold of 0.5 a large box there has a wider seam.) Windows of about the same
    size are sampled together, in batches of bounded memory.

    Args:
        probabilities: (N, M, M) float in 0..1.
        boxes: (N, 4) float, XYXY in pixels of the image; they may reach outside.
        image_size: (H, W).
        threshold: least probability of a bool mask; a negative one asks for probabilities x 255,
            rounded down to uint8.
    """
    windows = _windows(boxes, image_size)
    size = windows[:, 2:] - windows[:, :2]
    # Windows are sampled in frames of 2^(k/2) pixels a side: few shapes, little padding.
    # In float32, since Apple's GPUs have no float64.
    exponents = (size.clamp(min=1).float().log2() * 2).ceil().long()
    frames, frame = exponents.unique(dim=0, return_inverse=True)
    order = frame.argsort(stable=True)
    areas = _areas(windows)
    offsets = torch.empty_like(areas)
    offsets[order] = areas[order].cumsum(0) - areas[order]
    values = probabilities.new_empty(
        int(areas.sum()), dtype=torch.bool if threshold >= 0 else torch.uint8
    )
    end = 0
    groups = order.split(torch.bincount(frame, minlength=len(frames)).tolist())
    for rows, exponent in zip(groups, frames.tolist(), strict=True):
        width, height = (int(np.ceil(2 ** (k / 2))) for k in exponent)
        for batch in rows.split(max(1, _BATCH_BYTES // (_SAMPLE_BYTES * width * height))):
            pixels = _sample(probabilities[batch], boxes[batch], windows[batch], width, height)
            start, end = end, end + len(pixels)
            values[start:end] = pixels >= threshold if threshold >= 0 else pixels * 255
    return BoxedMasks(values, windows, image_size, offsets)


def _areas(windows: torch.Tensor) -> torch.Tensor:
    return (windows[:, 2] - windows[:, 0]) * (windows[:, 3] - windows[:, 1])


def _windows(boxes: torch.Tensor, image_size: tuple[int, int]) -> torch.Tensor:
    """int64 (N, 4): one pixel more on each side than the boxes touch, cut to the image."""
    low, high = boxes[:, :2].floor() - 1, boxes[:, 2:].ceil() + 1
    corner = boxes.new_tensor(image_size[::-1])
    windows = torch.cat([low, torch.maximum(low, high)], dim=1).clamp(min=0)
    return torch.minimum(windows, corner.repeat(2)).long()


def _sample(
    probabilities: torch.Tensor,
    boxes: torch.Tensor,
    windows: torch.Tensor,
    width: int,
    height: int,
) -> torch.Tensor:
    """Probabilities, float 1-D, at the pixel centres of windows of at most ``width`` x ``height``.

    The arithmetic is that of ``paste_masks_in_image``, in its order.
    """
    grid, inside = [], []
    for axis, length in enumerate((width, height)):
        offset = torch.arange(length, device=boxes.device)
        pixel = windows[:, axis, None] + offset
        low, high = boxes[:, axis, None], boxes[:, axis + 2, None]
        grid.append((pixel.to(torch.float32) + 0.5 - low) / (high - low) * 2 - 1)
        inside.append(pixel < windows[:, axis + 2, None])
    shape = (len(boxes), height, width)
    positions = torch.stack(
        [grid[0][:, None, :].expand(shape), grid[1][:, :, None].expand(shape)], dim=3
    )
    values = F.grid_sample(
        probabilities[:, None], positions.to(probabilities.dtype), align_corners=False
    )
    return values[:, 0][inside[1][:, :, None] & inside[0][:, None, :]]

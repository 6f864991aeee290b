"""What Detectron2 may expect of instance masks, of those that are not kept as bitmaps."""

import numpy as np
import torch
from detectron2.structures import BitMasks


class CompactMasks(BitMasks):
    """Masks of N instances in less memory than N x H x W: the bitmaps are made when asked for.

    A :class:`detectron2.structures.BitMasks` for whatever takes one, Detectron2's evaluators and
    visualizers among them, and with the few methods of a tensor that are called on
    ``Instances.pred_masks``. A subclass has ``image_size`` (H, W), ``dtype``, ``device``, ``to``,
    ``area``, ``len`` and items, and yields (H, W) tensors.
    """

    @property
    def shape(self) -> torch.Size:
        """(N, H, W), of :attr:`tensor`."""
        return torch.Size((len(self), *self.image_size))

    @property
    def tensor(self) -> torch.Tensor:
        """All instances at once, (N, H, W), made anew each time: N x H x W bytes."""
        dense = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        for mask, found in zip(dense, self, strict=True):
            mask.copy_(found)
        return dense

    def any(self, *args, **kwargs) -> torch.Tensor:
        """:meth:`torch.Tensor.any` of :attr:`tensor`."""
        return self.tensor.any(*args, **kwargs)

    def cpu(self) -> "CompactMasks":
        return self.to("cpu")

    def numpy(self) -> np.ndarray:
        """:attr:`tensor` as an array."""
        return self.tensor.cpu().numpy()

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        """For ``np.asarray``, as Detectron2's visualizer calls it on ``pred_masks``."""
        dense = self.numpy()
        return dense.astype(dtype or dense.dtype, copy=False)

    def nonempty(self) -> torch.Tensor:
        """Whether each instance has a nonzero pixel, bool (N,)."""
        return self.area() > 0

    def __repr__(self) -> str:
        size = tuple(self.image_size)
        return f"{type(self).__name__}(num_instances={len(self)}, image_size={size})"

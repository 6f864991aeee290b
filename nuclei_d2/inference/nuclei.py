"""What the writers get: the nuclei of one image, and the image they were found in."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from detectron2.structures import Instances

from nuclei_d2.data.normalization import ContrastRange
from nuclei_d2.structures.cropped_mask import CroppedMask, instances_to_masks

_DETECTRON2_FIELDS = {"pred_boxes", "scores", "pred_classes", "pred_masks", "pred_boundaries"}


@dataclass(frozen=True, eq=False)
class Nuclei:
    """N nuclei of one image, best first. They may overlap.

    The k-th of them has label k (1..N) in every output. The two constructors below establish the
    order and leave out empty masks.

    Attributes:
        masks: N nonempty masks in the coordinates of the full image.
        scores: (N,) float, descending.
        size: (H, W) of the image.
        measures: more columns for the table, by name, each (N,), such as "quality".
    """

    masks: list[CroppedMask]
    scores: np.ndarray
    size: tuple[int, int]
    measures: dict[str, np.ndarray] = field(default_factory=dict)

    @classmethod
    def from_masks(
        cls,
        masks: Sequence[CroppedMask],
        scores: np.ndarray,
        size: tuple[int, int],
        measures: dict[str, np.ndarray] | None = None,
    ) -> "Nuclei":
        """Put nuclei in order, the earlier first of equal scores, and leave out empty masks.

        Args:
            masks: N masks in the coordinates of the full image.
            scores: (N,) numbers.
            size: (H, W) of the image.
            measures: named (N,) arrays.

        Raises:
            ValueError: scores or a measure are not (N,).
        """
        columns = {"scores": np.asarray(scores, float)}
        columns |= {name: np.asarray(values) for name, values in (measures or {}).items()}
        for name, values in columns.items():
            if values.shape != (len(masks),):
                raise ValueError(f"{name} of shape {values.shape} for {len(masks)} masks")
        order = np.argsort(-columns["scores"], kind="stable")
        order = [k for k in order.tolist() if masks[k].mask.size]
        scores, *values = (column[order] for column in columns.values())
        named = dict(zip(measures or {}, values, strict=True))
        return cls([masks[k] for k in order], scores, (int(size[0]), int(size[1])), named)

    @classmethod
    def from_instances(cls, instances: Instances) -> "Nuclei":
        """Nuclei of a prediction, in any form of masks.

        Fields with one number per instance, other than Detectron2's, become measures.

        Args:
            instances: see :func:`~nuclei_d2.structures.cropped_mask.instances_to_masks`.
        """
        masks, scores = instances_to_masks(instances)
        fields = instances.get_fields().items()
        measures = {
            name: np.asarray(values.cpu() if hasattr(values, "cpu") else values)
            for name, values in fields
            if name not in _DETECTRON2_FIELDS
        }
        measures = {name: values for name, values in measures.items() if values.ndim == 1}
        return cls.from_masks(masks, scores, instances.image_size, measures)

    def __len__(self) -> int:
        return len(self.masks)

    @cached_property
    def areas(self) -> np.ndarray:
        """(N,) int64: pixels of every mask."""
        return np.array([boxed.area for boxed in self.masks], np.int64)

    @cached_property
    def boxes(self) -> np.ndarray:
        """(N, 4) int64: top, left, bottom, right; bottom and right are one past the last pixel."""
        boxes = [(top, left, *mask.shape) for mask, top, left in self.masks]
        boxes = np.array(boxes, np.int64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        return boxes

    @property
    def label_dtype(self) -> np.dtype:
        """Type of the label image: uint16 up to 65,535 nuclei, uint32 above."""
        return np.dtype(np.uint16 if len(self) < 1 << 16 else np.uint32)

    def label_strips(self, rows: int) -> Iterator[np.ndarray]:
        """The label image from top to bottom in strips of ``rows`` rows; the last may be lower.

        0 is background. A pixel that several nuclei cover belongs to the one with the highest
        score, so a nucleus may lose all its pixels.

        Yields:
            (at most rows, W) of :attr:`label_dtype`.
        """
        height, width = self.size
        tops, bottoms = self.boxes[:, 0], self.boxes[:, 2]
        for start in range(0, height, rows):
            stop = min(start + rows, height)
            strip = np.zeros((stop - start, width), self.label_dtype)
            inside = np.flatnonzero((tops < stop) & (bottoms > start))
            for k in inside[::-1]:  # the best last: on top
                mask, top, left = self.masks[k]
                part = mask[max(start - top, 0) : stop - top]
                first = max(top - start, 0)
                window = strip[first : first + len(part), left : left + part.shape[1]]
                window[part] = k + 1
            yield strip

    def label_image(self) -> np.ndarray:
        """The whole label image, (H, W); see :meth:`label_strips`."""
        return next(self.label_strips(max(self.size[0], 1)))


def take(nuclei: Nuclei, chosen: np.ndarray) -> Nuclei:
    """Some of the nuclei, by indices or bool, in the order asked for."""
    indices = np.arange(len(nuclei))[chosen]
    measures = {name: values[indices] for name, values in nuclei.measures.items()}
    masks = [nuclei.masks[k] for k in indices.tolist()]
    return Nuclei(masks, nuclei.scores[indices], nuclei.size, measures)


def concatenate(parts: Sequence[Nuclei], size: tuple[int, int]) -> Nuclei:
    """All nuclei of an image of ``size`` (H, W), part by part; the parts have the same measures."""
    names = parts[0].measures if parts else ()
    return Nuclei(
        [mask for part in parts for mask in part.masks],
        np.concatenate([np.zeros(0), *(part.scores for part in parts)]),
        size,
        {name: np.concatenate([part.measures[name] for part in parts]) for name in names},
    )


def sort(nuclei: Nuclei) -> Nuclei:
    """Best first, as :class:`Nuclei` promises."""
    return take(nuclei, np.argsort(-nuclei.scores, kind="stable"))


def nuclei_quality(nuclei: Nuclei) -> np.ndarray:
    """How far each nucleus can be trusted, (N,) float, 0..1.

    The score; with test-time augmentation the mean score over all views, one that did not find the
    nucleus counting as 0. docs/outputs.md tells why nothing else is in it.
    """
    return nuclei.scores * nuclei.measures.get("agreement", 1.0)


@dataclass(frozen=True, eq=False)
class ImageInfo:
    """The image that nuclei were found in, as far as writers need it.

    Attributes:
        file_name: of the image, as it should be quoted.
        read: (rows, columns), two slices with start and stop -> (h, w, C) float32 raw grey
            levels. It is called for small windows, so the image need not be in memory.
        channels: C names.
        pixel_size: side of a pixel in micrometres; None: unknown.
        image_id: COCO's id of the image.
        contrast: grey levels that pictures show as black and white; None: chosen for the picture.
    """

    file_name: str
    read: Callable[[slice, slice], np.ndarray]
    channels: tuple[str, ...]
    pixel_size: float | None = None
    image_id: int = 1
    contrast: ContrastRange | None = None

    @classmethod
    def from_array(
        cls,
        image: np.ndarray,
        file_name: str,
        channels: Sequence[str] | None = None,
        pixel_size: float | None = None,
        image_id: int = 1,
    ) -> "ImageInfo":
        """Describe an image in memory.

        Args:
            image: (H, W, C) raw grey levels.
            channels: C names; None: "grey", or "red", "green" and "blue", or "channel_1" and on.

        Raises:
            ValueError: not C names.
        """
        count = image.shape[2]
        if channels is None:
            common = {1: ["grey"], 3: ["red", "green", "blue"]}
            channels = common.get(count, [f"channel_{c}" for c in range(1, count + 1)])
        if len(channels) != count:
            raise ValueError(f"{len(channels)} channel names for {count} channels")

        def read(rows: slice, columns: slice) -> np.ndarray:
            return image[rows, columns].astype(np.float32, copy=False)

        return cls(file_name, read, tuple(channels), pixel_size, image_id)

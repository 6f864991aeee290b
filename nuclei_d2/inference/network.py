"""Any model of this package on one tile: what it finds, in the coordinates of the full image."""

from collections.abc import Iterable, Iterator, Mapping

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data.transforms import Transform
from detectron2.modeling import GeneralizedRCNN
from detectron2.structures import Boxes, Instances
from torch import Tensor

from nuclei_d2.inference.nuclei import Nuclei
from nuclei_d2.inference.predictor import NucleiPredictor
from nuclei_d2.inference.tiling import Grid, Tile
from nuclei_d2.inference.tta import UPRIGHT, View
from nuclei_d2.modeling.meta_arch import Classical
from nuclei_d2.modeling.meta_arch.rcnn import postprocess
from nuclei_d2.structures import BoxedMasks, LabelMasks
from nuclei_d2.structures.cropped_mask import CroppedMask, split_masks


class TileNetwork:
    """A model in evaluation mode that looks at one tile of an image at a time.

    A detector's boxes and small mask maps are turned upright, moved to their place and pasted into
    the full image; a label image is turned, and sampled at the full image's pixels. Both are the
    arithmetic of an image that was not tiled.

    Attributes:
        model: the network, on ``cfg.MODEL.DEVICE``.
        max_instances: the model's cap, ``cfg.TEST.DETECTIONS_PER_IMAGE``.
    """

    def __init__(self, cfg: CfgNode):
        """Build the model and load ``cfg.MODEL.WEIGHTS``.

        Raises:
            NucleiError: as :class:`NucleiPredictor`.
        """
        self.model = NucleiPredictor(cfg).model
        self.max_instances = cfg.TEST.DETECTIONS_PER_IMAGE

    @property
    def needs_survey(self) -> bool:
        """Whether :meth:`survey` has to see all tiles of an image first."""
        return isinstance(self.model, Classical) and self.model.threshold == "otsu"

    def survey(self, tiles: Iterable[tuple[Tile, np.ndarray]]) -> dict[str, np.ndarray]:
        """What the model has to know about the whole image: for Otsu's threshold, its histogram.

        Args:
            tiles: all of them, with their pixels as for calling.

        Returns:
            ``inputs`` for calling.
        """
        counts = np.zeros(256, np.int64)
        for tile, pixels in tiles:
            counts += self.model.histogram(pixels.transpose(2, 0, 1), tile.owned)
        return {"histogram": counts}

    @torch.no_grad()
    def __call__(
        self,
        pixels: np.ndarray,
        grid: Grid,
        tile: Tile,
        view: View = UPRIGHT,
        inputs: Mapping[str, np.ndarray] | None = None,
    ) -> tuple[Nuclei, bool]:
        """
        Args:
            pixels: (*tile.shape, 3) float32, 0..255, the upright tile as the network sees it.
            view: how it is turned for the network.
            inputs: what :meth:`survey` returned.

        Returns:
            The nuclei, those cut by the tile's edge included, in the coordinates of the full
            image, and whether the cap bound. With a boundary head they have the measure
            "boundary_uncertainty": 1 - mean boundary probability over the outermost pixels of the
            mask, 0 to 1.
        """
        transform = view.transform(*tile.shape)
        turned = np.ascontiguousarray(transform.apply_image(pixels).transpose(2, 0, 1))
        inputs = {**(inputs or {}), "image": torch.from_numpy(turned)}
        if isinstance(self.model, GeneralizedRCNN):
            raw = self.model.inference([inputs], do_postprocess=False)[0].to("cpu")
            nuclei = _place_boxes(_upright(raw, view, tile), grid, tile)
        else:
            raw = self.model([inputs])[0]["instances"].to("cpu")
            nuclei = _place_labels(raw, transform.inverse(), grid, tile)
        return nuclei, len(raw) >= self.max_instances


def _upright(raw: Instances, view: View, tile: Tile) -> Instances:
    """Turn a detector's raw output, boxes and the maps inside them, back."""
    boxes = view.transform(*tile.shape).inverse().apply_box(raw.pred_boxes.tensor.numpy())
    fields = {name: value for name, value in raw.get_fields().items() if name != "pred_boxes"}
    for name, value in fields.items():
        if isinstance(value, Tensor) and value.dim() == 4:  # (N, 1, M, M)
            back = view.transform(*value.shape[2:]).inverse()
            turned = back.apply_image(value[:, 0].permute(1, 2, 0).numpy())
            fields[name] = torch.from_numpy(turned.transpose(2, 0, 1).copy())[:, None]
    tensor = torch.from_numpy(boxes).to(torch.float32).reshape(-1, 4)
    return Instances(tile.shape, pred_boxes=Boxes(tensor), **fields)


def _place_boxes(raw: Instances, grid: Grid, tile: Tile) -> Nuclei:
    """Paste a detector's upright output into the full image."""
    origin = raw.pred_boxes.tensor.new_tensor([tile.columns.start, tile.rows.start] * 2)
    fields = raw.get_fields() | {"pred_boxes": Boxes(raw.pred_boxes.tensor + origin)}
    placed = postprocess(Instances(grid.network_size, **fields), *grid.size)
    masks, measures = split_masks(placed.pred_masks), {}
    if placed.has("pred_boundaries"):
        uncertainty = map(_boundary_uncertainty, masks, _crops(placed.pred_boundaries))
        measures["boundary_uncertainty"] = np.fromiter(uncertainty, float, len(masks))
    return Nuclei.from_masks(masks, placed.scores.numpy(), grid.size, measures)


def _crops(maps: BoxedMasks) -> Iterator[tuple[int, int, np.ndarray]]:
    return (maps.crop(k) for k in range(len(maps)))


def _boundary_uncertainty(boxed: CroppedMask, boundary: tuple[int, int, np.ndarray]) -> float:
    """1 - mean boundary probability over the mask's outermost pixels; NaN for an empty mask.

    Args:
        boundary: top, left and values (probability x 255) of a window that encloses the mask.
    """
    if not boxed.mask.size:
        return float("nan")
    top, left, values = boundary
    height, width = boxed.mask.shape
    y, x = boxed.top - top, boxed.left - left
    mask = np.pad(boxed.mask, 1).view(np.uint8)
    outermost = (mask > cv2.erode(mask, np.ones((3, 3), np.uint8)))[1:-1, 1:-1]
    return 1 - float(values[y : y + height, x : x + width][outermost].mean()) / 255


def _place_labels(raw: Instances, upright: Transform, grid: Grid, tile: Tile) -> Nuclei:
    """Sample a label image of the tile at the pixels of the full image that lie in the tile."""
    labels = upright.apply_segmentation(raw.pred_masks.labels[0].numpy())
    starts, places = [], []
    axes = zip((tile.rows, tile.columns), grid.size, grid.network_size, strict=True)
    for span, old, new in axes:
        nearest = (2 * np.arange(old) + 1) * new // (2 * old)  # pixel centre
        start, stop = np.searchsorted(nearest, (span.start, span.stop))
        starts.append(int(start))
        places.append(nearest[start:stop] - span.start)
    sampled = torch.from_numpy(labels[np.ix_(*places)])[None]
    masks = split_masks(LabelMasks(sampled, raw.pred_masks.ids))
    masks = [m._replace(top=m.top + starts[0], left=m.left + starts[1]) for m in masks]
    return Nuclei.from_masks(masks, raw.scores.numpy(), grid.size)

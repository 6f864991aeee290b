"""Dataset dict -> what the model is trained or evaluated on."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import transforms as T
from detectron2.structures import Boxes, Instances
from pycocotools import mask as mask_util
from scipy import ndimage

from nuclei_d2.data.augmentation import build_augmentation
from nuclei_d2.data.datasets.coco import segmentation_to_rle
from nuclei_d2.data.image_io import read_image, read_label
from nuclei_d2.data.normalization import ImageNormalizer
from nuclei_d2.data.targets import build_target
from nuclei_d2.structures import LabelMasks
from nuclei_d2.utils.errors import NucleiError


class NucleiDatasetMapper:
    """Read, normalise, augment one image and its nuclei.

    The image is normalised once, as a whole, before it is cropped. Its nuclei are read from
    ``label_file_name`` where the dict has one and no masks overlap, else from the annotations'
    masks. They stay one label image throughout, so the cost hardly grows with their number.

    Called with a dict in Detectron2's dataset format, returns a copy without ``annotations``, with
        image: float32 (3, H, W), 0..255, channels in INPUT.FORMAT order;
        height, width: of the file;
        instances (training only): ``gt_boxes`` (tight), ``gt_classes`` (0), ``gt_masks``
            (:class:`LabelMasks`), of length 0 for an empty image;
        what MODEL.META_ARCHITECTURE needs besides (training only), see :func:`build_target`.

    Raises:
        NucleiError: a file cannot be read, or image, label image and annotations do not fit.
    """

    @configurable
    def __init__(
        self,
        is_train: bool,
        *,
        augmentations: list[T.Augmentation | T.Transform],
        normalizer: ImageNormalizer,
        min_instance_area: int = 1,
        target: Callable[[np.ndarray], dict[str, torch.Tensor]] | None = None,
    ) -> None:
        """
        Args:
            is_train: whether to add ``instances``.
            augmentations: applied to the normalised image and the labels.
            normalizer: the one that inference uses too.
            min_instance_area: nuclei with fewer pixels after augmentation are dropped.
            target: function of the augmented labels -> more keys for training.
        """
        self.is_train = is_train
        self.augmentations = T.AugmentationList(augmentations)
        self.normalizer = normalizer
        self.min_instance_area = max(1, min_instance_area)
        self.target = target

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict[str, Any]:
        return {
            "is_train": is_train,
            "augmentations": build_augmentation(cfg, is_train),
            "normalizer": ImageNormalizer(cfg),
            "min_instance_area": cfg.INPUT.MIN_INSTANCE_AREA,
            "target": build_target(cfg),
        }

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        output = {k: v for k, v in dataset_dict.items() if k != "annotations"}
        image = read_image(output["file_name"])
        _check_size(output, image.shape[:2])
        labels = read_labels(dataset_dict, image.shape[:2]) if self.is_train else None
        inputs = T.AugInput(self.normalizer(image), sem_seg=labels)
        self.augmentations(inputs)
        output["image"] = torch.from_numpy(np.ascontiguousarray(inputs.image.transpose(2, 0, 1)))
        if self.is_train:
            output["instances"] = labels_to_instances(inputs.sem_seg, self.min_instance_area)
            if self.target:
                output.update(self.target(inputs.sem_seg))
        return output


def labels_to_instances(labels: np.ndarray, min_area: int = 1) -> Instances:
    """Ground truth of a label image: (H, W), or (H, W, L) with overlapping nuclei in other layers.

    Args:
        labels: integer values of any type, 0 = background.
        min_area: nuclei with fewer pixels are left out.
    """
    layers = np.moveaxis(np.atleast_3d(labels), 2, 0).astype(np.int32, order="C")
    boxes, ids, layer_of = [], [], []
    for index, layer in enumerate(layers):
        areas = np.bincount(layer.ravel())
        found = ndimage.find_objects(layer)
        for label in np.flatnonzero(areas[1:] >= min_area) + 1:
            y, x = found[label - 1]
            boxes.append((x.start, y.start, x.stop, y.stop))
            ids.append(label)
            layer_of.append(index)
    instances = Instances(layers.shape[1:])
    instances.gt_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    instances.gt_classes = torch.zeros(len(ids), dtype=torch.int64)
    instances.gt_masks = LabelMasks(
        torch.from_numpy(layers),
        torch.tensor(ids, dtype=torch.int64),
        torch.tensor(layer_of, dtype=torch.int64),
    )
    return instances


def _check_size(output: dict[str, Any], size: tuple[int, int]) -> None:
    """Compare with the declared size, or declare it: results are scaled back to it."""
    declared = (output.setdefault("height", size[0]), output.setdefault("width", size[1]))
    if declared != size:
        raise NucleiError(
            f"{output['file_name']}: image is {_hw(size)} but its annotations say {_hw(declared)}; "
            "prepare the data set again"
        )


def read_labels(dataset_dict: dict[str, Any], size: tuple[int, int]) -> np.ndarray:
    """Labels of a dataset dict whose image is ``size`` (H, W).

    Returns:
        float32 (H, W) from ``label_file_name``; from annotations, where there is no such file or
        masks overlap, (H, W, L).
    """
    annotations = dataset_dict.get("annotations")
    label_file = dataset_dict.get("label_file_name")
    if label_file is None or dataset_dict.get("overlaps", False):
        return paint_annotations(annotations or [], size, dataset_dict["file_name"])
    labels = read_label(label_file)
    if labels.shape != size:
        raise NucleiError(
            f"{label_file} is {_hw(labels.shape)} but its image {dataset_dict['file_name']} is "
            f"{_hw(size)}; pair each image with its own label image"
        )
    if annotations is not None and labels.max() != len(annotations):
        raise NucleiError(
            f"{label_file}: labels reach {labels.max()} but the annotations list "
            f"{len(annotations)} nuclei; prepare the data set again"
        )
    return labels.astype(np.float32)


def paint_annotations(
    annotations: list[dict[str, Any]], size: tuple[int, int], file_name: str
) -> np.ndarray:
    """Paint COCO masks (RLE or polygons) into as few label layers as a greedy search finds.

    Args:
        annotations: in Detectron2's format; crowds are left out.
        size: (H, W) of the image.
        file_name: named in errors.

    Returns:
        float32 (H, W, L), L >= 1; the k-th annotation, from 1, has label k in one of the layers.
    """
    layers = [np.zeros(size, np.float32)]
    for label, annotation in enumerate(annotations, start=1):
        if annotation.get("iscrowd", 0):
            continue
        rle = segmentation_to_rle(annotation.get("segmentation"), size, file_name)
        x, y, w, h = mask_util.toBbox(rle).astype(int)
        box = np.s_[y : y + h, x : x + w]
        mask = mask_util.decode(rle)[box].astype(bool)
        free = next((layer for layer in layers if not layer[box][mask].any()), None)
        if free is None:
            free = np.zeros(size, np.float32)
            layers.append(free)
        free[box][mask] = label
    return np.stack(layers, axis=2)


def _hw(size: tuple[int, ...]) -> str:
    return f"{size[0]} x {size[1]} pixels (height x width)"

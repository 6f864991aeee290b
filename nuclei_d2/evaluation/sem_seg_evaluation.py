"""Pixel scores of ``sem_seg``: what a semantic network is trained for, before any decoding."""

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import cached_property

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from detectron2.utils.logger import create_small_table

from nuclei_d2.data.dataset_mapper import read_labels
from nuclei_d2.data.targets import (
    CLASS_NAMES,
    build_class_target,
    flatten_labels,
    two_class_target,
)

_logger = logging.getLogger(__name__)


def build_sem_seg_evaluators(cfg: CfgNode, dataset_name: str) -> list[DatasetEvaluator]:
    """One evaluator for models that return ``sem_seg``, none for the others."""
    if cfg.MODEL.META_ARCHITECTURE == "UNet":
        names, target = CLASS_NAMES[cfg.MODEL.UNET.TARGET], build_class_target(cfg)
    elif cfg.MODEL.META_ARCHITECTURE == "Classical":
        names, target = CLASS_NAMES["two_class"], two_class_target
    else:
        return []
    return [NucleiSemSegEvaluator(dataset_name, class_names=names, target=target)]


class NucleiSemSegEvaluator(DatasetEvaluator):
    """IoU, Dice and accuracy of classes of pixels.

    Detectron2's SemSegEvaluator reads class images from files; here they are made from the
    labels by the function that makes the training target, at the resolution of the file.
    """

    def __init__(
        self,
        dataset_name: str,
        *,
        class_names: Sequence[str],
        target: Callable[[np.ndarray], np.ndarray],
    ):
        """
        Args:
            dataset_name: registered data set; its dicts are the ground truth.
            class_names: of the K classes; the first is the background.
            target: label image (H, W) -> classes (H, W), integers in 0..K-1.
        """
        self._dataset_name = dataset_name
        self.class_names = class_names
        self._target = target
        self.reset()

    def reset(self) -> None:
        k = len(self.class_names)
        self._confusion = np.zeros((k, k), np.int64)  # true class x predicted class, pixels

    @cached_property
    def _records(self) -> dict[int | str, dict]:
        return {record["image_id"]: record for record in DatasetCatalog.get(self._dataset_name)}

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        """Count the pixels of one batch: dicts with image_id, and ``sem_seg`` (K, H, W)."""
        k = len(self.class_names)
        for record, output in zip(inputs, outputs, strict=True):
            predicted = output["sem_seg"].argmax(dim=0).cpu().numpy()
            labels = read_labels(self._records[record["image_id"]], predicted.shape)
            true = self._target(flatten_labels(labels)).astype(np.int64)
            pairs = np.bincount((true * k + predicted).ravel(), minlength=k * k)
            self._confusion += pairs.reshape(k, k)

    def evaluate(self) -> OrderedDict | None:
        """``{"sem_seg": ...}`` as :func:`sem_seg_scores`; None but on the main process."""
        gathered = comm.gather(self._confusion, dst=0)
        if not comm.is_main_process():
            return None
        scores = sem_seg_scores(sum(gathered), self.class_names)
        _logger.info(
            f"{self._dataset_name}: pixels of all images together, in percent:\n"
            f"{create_small_table(scores)}"
        )
        return OrderedDict(sem_seg=scores)


def sem_seg_scores(confusion: np.ndarray, class_names: Sequence[str]) -> dict[str, float]:
    """Scores from pixel counts, all in percent.

    IoU is TP / (TP + FP + FN), Dice 2 TP / (2 TP + FP + FN), over the pixels of all images
    together; NaN for a class that is neither there nor predicted. mIoU is the mean of the
    defined ones and pACC the share of right pixels, as in Detectron2's SemSegEvaluator.
    "foreground" is all classes but the first taken together, comparable between targets.

    Args:
        confusion: (K, K) pixels: true class x predicted class; class 0 is the background.
        class_names: K names.
    """
    confusion = np.asarray(confusion, float)
    common = np.diag(confusion)
    total = confusion.sum(axis=0) + confusion.sum(axis=1)
    names = [*class_names, "foreground"]
    common = np.append(common, confusion[1:, 1:].sum())
    total = np.append(total, confusion[1:].sum() + confusion[:, 1:].sum())
    defined = total > 0
    iou, dice = np.full((2, len(names)), np.nan)
    iou[defined] = 100 * common[defined] / (total - common)[defined]
    dice[defined] = 200 * common[defined] / total[defined]
    classes = iou[:-1][defined[:-1]]
    scores = {"mIoU": float(classes.mean()) if classes.size else float("nan")}
    scores |= {f"IoU-{name}": float(value) for name, value in zip(names, iou, strict=True)}
    scores |= {f"Dice-{name}": float(value) for name, value in zip(names, dice, strict=True)}
    pixels = confusion.sum()
    scores["pACC"] = float(100 * np.trace(confusion) / pixels) if pixels else float("nan")
    return scores

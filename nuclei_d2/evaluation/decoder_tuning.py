"""Fit the thresholds of a U-Net's decoder to held-out images."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import torch
from detectron2.data import DatasetCatalog
from tqdm import tqdm

from nuclei_d2.evaluation.boundary import compute_overlaps
from nuclei_d2.evaluation.instances import LabelLayers, layers_from_scored_masks
from nuclei_d2.evaluation.matching import IOU_THRESHOLDS, true_positives
from nuclei_d2.evaluation.nuclei_evaluation import record_to_layers
from nuclei_d2.modeling.meta_arch.unet import UNet
from nuclei_d2.structures.cropped_mask import instances_to_masks
from nuclei_d2.utils.errors import NucleiError

Settings = dict[str, float]
# Values tried of each setting of the decoders.
CANDIDATES = {
    "threshold": (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95),
    "seed_threshold": tuple(k / 20 for k in range(4, 20)),  # 0.2, 0.25 .. 0.95
    "min_area": (0, 5, 10, 20, 40, 80, 160, 320),
    "hole_area": (0, 20, 50, 200, 800),
}


def tune_settings(
    score: Callable[[Settings], float], start: Settings
) -> tuple[Settings, list[tuple[Settings, float]]]:
    """Coordinate ascent: the best of :data:`CANDIDATES` for one setting after the other.

    Ends when a round changes nothing. Of equal scores the earlier one stays.

    Args:
        score: what is to be as large as possible.
        start: the settings to begin with; names are keys of :data:`CANDIDATES`.

    Returns:
        The best settings, and all that were tried, in order, with their scores.
    """
    scores: dict[tuple, float] = {}

    def cached_score(settings: Settings) -> float:
        key = tuple(settings.items())
        if key not in scores:
            scores[key] = score(settings)
        return scores[key]

    best, before = start, None
    while best != before:
        before = best
        for name in start:
            options = ({**best, name: value} for value in CANDIDATES[name])
            best = max([best, *options], key=cached_score)
    return best, [(dict(key), value) for key, value in scores.items()]


class _Image(NamedTuple):
    maps: np.ndarray  # float16: exact enough for thresholds of two digits
    gt: LabelLayers


class TuningSet:
    """The network's maps of the images of one data set, predicted once, decoded at will."""

    def __init__(self, model: UNet, data_loader: Iterable, dataset_name: str, min_score: float):
        """
        Args:
            model: in evaluation mode.
            data_loader: test batches of the data set.
            dataset_name: registered; its dicts are the ground truth.
            min_score: predictions with a lower score do not count.

        Raises:
            NucleiError: no image has nuclei.
        """
        self._model = model
        self._min_score = min_score
        self._images = []
        records = {record["image_id"]: record for record in DatasetCatalog.get(dataset_name)}
        for batch in tqdm(data_loader, f"network on {dataset_name}", unit="batch"):
            with torch.no_grad():
                predicted = model.predict_maps(batch)
            for inputs, maps in zip(batch, predicted, strict=True):
                gt = record_to_layers(records[inputs["image_id"]])
                self._images.append(_Image(maps.half().cpu().numpy(), gt))
        if not any(image.gt.count for image in self._images):
            raise NucleiError(f"{dataset_name} has no nuclei: nothing to tune the decoder to")

    def score(self, settings: Settings) -> float:
        """TP / (TP + FP + FN) over all images together, mean over IoU 0.50, 0.55 .. 0.95."""
        self._model.decoder.settings = settings
        found, expected, predicted = np.zeros(len(IOU_THRESHOLDS)), 0, 0
        for maps, gt in self._images:
            size = gt.labels.shape[1:]
            instances = self._model.decode(maps.astype(np.float32), size)
            masks, scores = instances_to_masks(instances[instances.scores >= self._min_score])
            overlap, _ = compute_overlaps(gt, layers_from_scored_masks(masks, scores, size), ())
            found += true_positives(overlap, overlap.iou)
            expected += len(overlap.gt_areas)
            predicted += len(overlap.pred_areas)
        return float((found / (expected + predicted - found)).mean())

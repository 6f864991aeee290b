"""From a label image to Detectron2's predictions."""

import numpy as np
import torch
from detectron2.structures import Boxes, Instances
from scipy import ndimage

from nuclei_d2.data.augmentation import ResampleTransform
from nuclei_d2.structures.label_masks import LabelMasks


def predictions_from_labels(
    labels: np.ndarray,
    scores: np.ndarray,
    image_size: tuple[int, int],
    *,
    score_threshold: float = 0.0,
    max_instances: int | None = None,
) -> Instances:
    """Predictions of one image, best first.

    Args:
        labels: (h, w) int32: 0 = background, nuclei 1..N. Scaled to ``image_size``, where a
            nucleus that is left without a pixel is dropped.
        scores: (N,) float32, of nucleus 1..N.
        image_size: (H, W) of the result.
        score_threshold: nuclei with a lower score are dropped.
        max_instances: only so many of the best are kept; None: all.

    Returns:
        Instances on the CPU: pred_boxes (tight), scores, pred_classes (0), and pred_masks:
        :class:`LabelMasks`, which act as a bool (M, H, W) tensor without being one.
    """
    resample = ResampleTransform(*labels.shape, *image_size)
    labels = resample.apply_segmentation(labels.astype(np.float32)).astype(np.int32)
    found = ndimage.find_objects(labels, max_label=len(scores))
    ids = np.array([k for k, box in enumerate(found) if box is not None], np.int64)
    ids = ids[scores[ids] >= score_threshold]
    ids = ids[np.argsort(-scores[ids], kind="stable")][:max_instances]
    boxes = [
        (found[k][1].start, found[k][0].start, found[k][1].stop, found[k][0].stop) for k in ids
    ]
    return Instances(
        tuple(image_size),
        pred_boxes=Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)),
        scores=torch.from_numpy(scores[ids].astype(np.float32)),
        pred_classes=torch.zeros(len(ids), dtype=torch.int64),
        pred_masks=LabelMasks(torch.from_numpy(labels)[None], torch.from_numpy(ids + 1)),
    )

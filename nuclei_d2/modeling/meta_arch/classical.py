"""The floor that every network must clear: what was done before anything was learned."""

from typing import Any

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.postprocessing import sem_seg_postprocess
from skimage.filters import threshold_otsu
from torch import nn

from nuclei_d2.modeling.label_instances import predictions_from_labels
from nuclei_d2.modeling.postprocessing import decode_by_shape, score_nuclei
from nuclei_d2.utils.timing import stage


@META_ARCH_REGISTRY.register()
class Classical(nn.Module):
    """Gaussian smoothing, threshold (Otsu's, or local), distance watershed. Has no parameters.

    Input and output are those of :class:`UNet` in inference. The grey level stands in for the
    probability of ``nucleus``: 0 at 0, 1/2 at the threshold, 1 at 255, linear between; the score is
    its mean over the nucleus.
    """

    @configurable
    def __init__(
        self,
        *,
        sigma: float,
        threshold: str,
        local_size: int,
        min_level: float,
        dark_nuclei: bool,
        decoder: dict[str, int],
        score_threshold: float = 0.0,
        max_instances: int | None = None,
    ):
        """
        Args:
            sigma: standard deviation of the smoothing, pixels; 0: none.
            threshold: "otsu", one for the image; or "local", the mean of the surroundings.
            local_size: side of the surroundings, pixels.
            min_level: no threshold lies below this grey level, 0..255, and Otsu's finds nothing
                where its two classes differ by less.
            dark_nuclei: whether nuclei are darker than the background.
            decoder: keyword arguments of :func:`decode_by_shape`.
            score_threshold: nuclei with a lower score are dropped.
            max_instances: at most so many nuclei per image are returned; None: all.
        """
        super().__init__()
        self.sigma = sigma
        self.threshold = threshold
        self.local_size = local_size
        self.min_level = min_level
        self.dark_nuclei = dark_nuclei
        self.decoder = decoder
        self.score_threshold = score_threshold
        self.max_instances = max_instances

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        keys = cfg.MODEL.CLASSICAL
        return {
            "sigma": keys.SIGMA,
            "threshold": keys.THRESHOLD,
            "local_size": keys.LOCAL_SIZE,
            "min_level": keys.MIN_LEVEL,
            "dark_nuclei": keys.DARK_NUCLEI,
            "decoder": {
                "min_distance": keys.MIN_DISTANCE,
                "min_area": keys.MIN_AREA,
                "hole_area": keys.HOLE_AREA,
            },
            "score_threshold": cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST,
            "max_instances": cfg.TEST.DETECTIONS_PER_IMAGE,
        }

    def forward(self, batched_inputs: list[dict]) -> list[dict]:
        """See the class; with ``histogram`` among the inputs, Otsu's threshold is that of it."""
        return [self._find(inputs) for inputs in batched_inputs]

    def histogram(self, image: np.ndarray, window: tuple[slice, slice]) -> np.ndarray:
        """How many pixels have each grey level: int64 (256,), of smoothed levels 0..255.

        For an image that comes in tiles: with their sum as ``histogram`` of every tile, all have
        the threshold of the whole image.

        Args:
            image: (C, H, W) float32, 0..255.
            window: rows and columns that are counted.
        """
        levels = np.rint(self._smooth(image)[window]).astype(np.uint8)
        return np.bincount(levels.ravel(), minlength=256)

    def _find(self, inputs: dict) -> dict:
        maps = self._foreground(inputs["image"].cpu().numpy(), inputs.get("histogram"))
        with stage("postprocess"):
            return self._decode(maps, inputs)

    def _decode(self, maps: np.ndarray, inputs: dict) -> dict:
        size = (inputs.get("height", maps.shape[1]), inputs.get("width", maps.shape[2]))
        labels = decode_by_shape(maps, **self.decoder)
        instances = predictions_from_labels(
            labels,
            score_nuclei(labels, maps[1], labels > 0),
            size,
            score_threshold=self.score_threshold,
            max_instances=self.max_instances,
        )
        sem_seg = sem_seg_postprocess(torch.from_numpy(maps), maps.shape[1:], *size)
        return {"sem_seg": sem_seg, "instances": instances}

    def _smooth(self, image: np.ndarray) -> np.ndarray:
        """(C, H, W) -> (H, W) float32, 0..255, nuclei bright."""
        grey = image.mean(axis=0, dtype=np.float32)
        if self.dark_nuclei:
            grey = 255 - grey
        return cv2.GaussianBlur(grey, (0, 0), self.sigma) if self.sigma > 0 else grey

    def _foreground(self, image: np.ndarray, histogram: np.ndarray | None) -> np.ndarray:
        """(C, H, W), 0..255 -> stand-in for probabilities of background and nucleus, (2, H, W)."""
        grey = self._smooth(image)
        if self.threshold == "otsu":
            if histogram is None:
                histogram = self.histogram(image, np.s_[:, :])
            threshold = _otsu(histogram, self.min_level)
        else:
            threshold = cv2.blur(grey, (self.local_size,) * 2, borderType=cv2.BORDER_REPLICATE)
        threshold = np.clip(threshold, self.min_level, 254)
        below, above = grey / threshold, (grey - threshold) / (255 - threshold)
        nucleus = np.clip((np.minimum(below, 1) + np.maximum(above, 0)) / 2, 0, 1)
        return np.stack([1 - nucleus, nucleus])


def _otsu(histogram: np.ndarray, min_contrast: float) -> np.float32:
    """Otsu's threshold of (256,) counts of grey levels, between two levels.

    It splits anything, noise too: 255 if the classes' means differ by less than ``min_contrast``.
    """
    levels = np.flatnonzero(histogram)
    used = np.arange(levels[0], levels[-1] + 1)
    counts = histogram[used]
    last_dark = threshold_otsu(hist=(counts, used)) if len(levels) > 1 else levels[0]
    means = [
        np.average(used[part], weights=counts[part]) if counts[part].any() else -np.inf
        for part in (used <= last_dark, used > last_dark)
    ]
    has_contrast = means[1] - means[0] >= min_contrast
    return np.float32(last_dark + 0.5 if has_contrast else 255)

"""From an image to its nuclei with a trained model."""

import os
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import transforms as T
from detectron2.structures import Instances

from nuclei_d2.data.augmentation import build_augmentation
from nuclei_d2.data.image_io import read_image
from nuclei_d2.data.normalization import ImageNormalizer
from nuclei_d2.engine.checkpoint import NucleiCheckpointer
from nuclei_d2.modeling import build_model
from nuclei_d2.utils.hardware import use_device


class NucleiPredictor:
    """Find the nuclei of one image at a time, on the way that evaluation takes.

    As in evaluation, a detector may report a nucleus and a fragment of it:
    :func:`~nuclei_d2.inference.duplicates.drop_duplicates` leaves one of them.

    raw image -> :class:`ImageNormalizer` -> INPUT.SCALE -> model -> ``Instances`` at the original
    resolution.

    Attributes:
        model: the network, in evaluation mode on ``cfg.MODEL.DEVICE``.
    """

    def __init__(self, cfg: CfgNode):
        """Build the model and load ``cfg.MODEL.WEIGHTS``.

        Raises:
            NucleiError: MODEL.WEIGHTS is empty, missing, unreadable or of another model, or
                MODEL.DEVICE is not there.
        """
        use_device(cfg.MODEL.DEVICE)
        self.model = build_model(cfg.clone()).eval()
        checkpointer = NucleiCheckpointer(self.model, allow_pickle=cfg.MODEL.ALLOW_PICKLE)
        checkpointer.load_exactly(cfg.MODEL.WEIGHTS)
        self._normalize = ImageNormalizer(cfg)
        self._augment = T.AugmentationList(build_augmentation(cfg, False))

    @torch.no_grad()
    def __call__(self, image: np.ndarray | str | os.PathLike) -> Instances:
        """
        Args:
            image: (H, W, 1 or 3) float32 raw grey levels as :func:`read_image` returns them, or
                the path of an image file.

        Returns:
            On the CPU: pred_boxes, scores, pred_classes, pred_masks and, with a boundary head,
            pred_boundaries (probability x 255). They are :class:`BoxedMasks`, or
            :class:`LabelMasks` for the masks of a U-Net: ``np.asarray`` makes (N, H, W) of both.

        Raises:
            NucleiError: the file is not a readable image.
        """
        if not isinstance(image, np.ndarray):
            image = read_image(image)
        return self.model([self.preprocess(image)])[0]["instances"].to("cpu")

    def preprocess(self, image: np.ndarray) -> dict[str, Any]:
        """An (H, W, 1 or 3) image of raw grey levels as the model takes it in a batch.

        Returns:
            "image" ((3, h, w) float32, 0..255), and "height" and "width" of the file.
        """
        height, width = image.shape[:2]
        network_input = T.AugInput(self._normalize(image))
        self._augment(network_input)
        pixels = np.ascontiguousarray(network_input.image.transpose(2, 0, 1))
        return {"image": torch.from_numpy(pixels), "height": height, "width": width}

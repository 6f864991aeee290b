"""Augmentations of an image (float32, 0..255) and its labels, as Detectron2 transforms.

Labels travel as ``AugInput.sem_seg``: float32 (H, W), or (H, W, L) where nuclei overlap; exact up
to 2^24. All randomness comes from ``np.random``, which Detectron2 seeds in every worker.
"""

from collections.abc import Sequence

import cv2
import numpy as np
from detectron2.config import CfgNode
from detectron2.data import transforms as T
from scipy import ndimage


def build_augmentation(cfg: CfgNode, is_train: bool) -> list[T.Augmentation]:
    """The augmentations of the INPUT keys, in order; for evaluation only INPUT.SCALE."""
    if not is_train:
        return [RandomScaledCrop(cfg.INPUT.SCALE)]
    augmentations: list[T.Augmentation] = [
        RandomScaledCrop(
            cfg.INPUT.SCALE,
            cfg.INPUT.SCALE_JITTER,
            tuple(cfg.INPUT.CROP.SIZE) if cfg.INPUT.CROP.ENABLED else None,
            cfg.INPUT.CROP.NUCLEUS_PROB,
        )
    ]
    if cfg.INPUT.RANDOM_FLIP in ("horizontal", "both"):
        augmentations.append(T.RandomFlip(horizontal=True, vertical=False))
    if cfg.INPUT.RANDOM_FLIP in ("vertical", "both"):
        augmentations.append(T.RandomFlip(horizontal=False, vertical=True))
    if cfg.INPUT.RANDOM_ROTATE90:
        augmentations.append(RandomRotation90())
    augmentations.append(
        RandomIntensity(
            gamma=cfg.INPUT.GAMMA,
            contrast=cfg.INPUT.CONTRAST,
            brightness=cfg.INPUT.BRIGHTNESS,
            noise=cfg.INPUT.NOISE,
            invert_prob=cfg.INPUT.INVERT_PROB,
        )
    )
    return augmentations


def scaled_size(size: Sequence[int], factor: float) -> tuple[int, int]:
    """(height, width) of an image that is enlarged by ``factor``, at least one pixel."""
    height, width = (max(1, round(length * factor)) for length in size)
    return height, width


class RandomScaledCrop(T.Augmentation):
    """Crop a window, then scale it: only the pixels that the network sees are resampled."""

    input_args = ("image", "sem_seg")

    def __init__(
        self,
        scale: float = 1.0,
        jitter: tuple[float, float] = (1.0, 1.0),
        crop_size: tuple[int, int] | None = None,
        nucleus_prob: float = 0.0,
    ) -> None:
        """
        Args:
            scale: enlargement of every image.
            jitter: range of the random factor on ``scale``, uniform in its logarithm.
            crop_size: (height, width) in pixels after scaling, less where the image is smaller;
                None keeps the whole image.
            nucleus_prob: probability of placing the window around the centre of a nucleus, each
                nucleus equally likely, uniformly among the positions that contain it; otherwise,
                and without nuclei, the window falls anywhere.
        """
        super().__init__()
        self.scale = scale
        self.jitter = jitter
        self.crop_size = crop_size
        self.nucleus_prob = nucleus_prob

    def get_transform(self, image: np.ndarray, sem_seg: np.ndarray | None) -> T.Transform:
        factor = self.scale * np.exp(np.random.uniform(*np.log(self.jitter)))
        height, width = image.shape[:2]
        new = scaled_size((height, width), factor)
        if self.crop_size is None:
            return ResampleTransform(height, width, *new)
        new_h, new_w = map(min, new, self.crop_size)
        h, w = min(height, max(1, round(new_h / factor))), min(width, max(1, round(new_w / factor)))
        centre = None
        if sem_seg is not None and np.random.uniform() < self.nucleus_prob:
            centre = _random_centre(sem_seg)
        y, x = centre or (None, None)
        y0, x0 = _random_start(height, h, y), _random_start(width, w, x)
        crop = T.CropTransform(x0, y0, w, h, orig_w=width, orig_h=height)
        return T.TransformList([crop, ResampleTransform(h, w, new_h, new_w)])


class CenterCrop(T.Augmentation):
    """The middle of an image, ``crop_size`` (height, width) pixels, or less if it is smaller."""

    def __init__(self, crop_size: tuple[int, int]) -> None:
        super().__init__()
        self.crop_size = crop_size

    def get_transform(self, image: np.ndarray) -> T.Transform:
        height, width = image.shape[:2]
        h, w = min(height, self.crop_size[0]), min(width, self.crop_size[1])
        return T.CropTransform((width - w) // 2, (height - h) // 2, w, h, width, height)


def _random_centre(labels: np.ndarray) -> tuple[int, int] | None:
    """(y, x) of the centre of a random nucleus' box; None if there is none."""
    layers = np.moveaxis(np.atleast_3d(labels), 2, 0)
    boxes = [box for layer in layers for box in ndimage.find_objects(layer.astype(np.int32)) if box]
    if not boxes:
        return None
    y, x = boxes[np.random.randint(len(boxes))]
    return (y.start + y.stop - 1) // 2, (x.start + x.stop - 1) // 2


def _random_start(length: int, window: int, inside: int | None) -> int:
    """Random start of a window within 0..length that contains ``inside``, if given."""
    first, last = 0, length - window
    if inside is not None:
        first, last = max(first, inside - window + 1), min(last, inside)
    return np.random.randint(first, last + 1)


class ResampleTransform(T.Transform):
    """Resize from (h, w) to (new_h, new_w).

    Images: linear, or area-averaging when shrinking. Labels: the nearest pixel centre. Both
    align pixel centres in the same way, so that masks do not shift against the image.
    """

    def __init__(self, h: int, w: int, new_h: int, new_w: int) -> None:
        super().__init__()
        self.h, self.w, self.new_h, self.new_w = h, w, new_h, new_w

    def apply_image(self, img: np.ndarray) -> np.ndarray:
        shrinks = self.new_h * self.new_w < self.h * self.w
        return self._resize(img, cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        return self._resize(segmentation, cv2.INTER_NEAREST_EXACT)

    def _resize(self, array: np.ndarray, interpolation: int) -> np.ndarray:
        assert array.shape[:2] == (self.h, self.w), (array.shape, self.h, self.w)
        if (self.new_h, self.new_w) == (self.h, self.w):
            return array
        resized = cv2.resize(array, (self.new_w, self.new_h), interpolation=interpolation)
        return resized.reshape(self.new_h, self.new_w, *array.shape[2:])  # cv2 drops a last 1

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        coords[:, 0] *= self.new_w / self.w
        coords[:, 1] *= self.new_h / self.h
        return coords

    def inverse(self) -> T.Transform:
        return ResampleTransform(self.new_h, self.new_w, self.h, self.w)


class RandomRotation90(T.Augmentation):
    """Rotate by 0, 90, 180 or 270 degrees, each equally likely."""

    def get_transform(self, image: np.ndarray) -> T.Transform:
        return Rotation90Transform(*image.shape[:2], k=np.random.randint(4))


class Rotation90Transform(T.Transform):
    """Rotate an (h, w) image counter-clockwise by k * 90 degrees, without interpolation."""

    def __init__(self, h: int, w: int, k: int) -> None:
        super().__init__()
        self.h, self.w, self.k = h, w, k % 4

    def apply_image(self, img: np.ndarray) -> np.ndarray:
        return np.rot90(img, self.k)

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        x, y = coords[:, 0], coords[:, 1]
        turned = {
            0: (x, y),
            1: (y, self.w - x),
            2: (self.w - x, self.h - y),
            3: (self.h - y, x),
        }
        return np.stack(turned[self.k], axis=1)

    def inverse(self) -> T.Transform:
        h, w = (self.w, self.h) if self.k % 2 else (self.h, self.w)
        return Rotation90Transform(h, w, -self.k)


class RandomIntensity(T.Augmentation):
    """Random :class:`IntensityTransform`, its parameters uniform in the given ranges."""

    def __init__(
        self,
        gamma: tuple[float, float] = (1.0, 1.0),
        contrast: tuple[float, float] = (1.0, 1.0),
        brightness: tuple[float, float] = (1.0, 1.0),
        noise: tuple[float, float] = (0.0, 0.0),
        invert_prob: float = 0.0,
    ) -> None:
        super().__init__()
        self.gamma = gamma
        self.contrast = contrast
        self.brightness = brightness
        self.noise = noise
        self.invert_prob = invert_prob

    def get_transform(self, image: np.ndarray) -> T.Transform:
        return IntensityTransform(
            gamma=np.random.uniform(*self.gamma),
            contrast=np.random.uniform(*self.contrast),
            brightness=np.random.uniform(*self.brightness),
            noise=np.random.uniform(*self.noise),
            invert=bool(np.random.uniform() < self.invert_prob),
            seed=np.random.randint(2**31),
        )


class IntensityTransform(T.Transform):
    """Change grey levels of a 0..255 image; coordinates and labels stay.

    In this order: inversion (255 - x), gamma (255 (x / 255)^gamma), contrast (factor on the
    distance to the image's mean), brightness (factor), Gaussian noise, clipping to 0..255.

    Args:
        noise: standard deviation as a share of full scale; one value for all channels of a pixel.
        seed: of the noise, so that the transform gives the same image again.
    """

    def __init__(
        self,
        gamma: float = 1.0,
        contrast: float = 1.0,
        brightness: float = 1.0,
        noise: float = 0.0,
        invert: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.gamma, self.contrast, self.brightness = gamma, contrast, brightness
        self.noise, self.invert, self.seed = noise, invert, seed

    def apply_image(self, img: np.ndarray) -> np.ndarray:
        image = img.astype(np.float32) / 255
        if self.invert:
            image = 1 - image
        if self.gamma != 1:
            image = cv2.pow(image, self.gamma).reshape(img.shape)
        offset = (1 - self.contrast) * float(image.mean())
        image = (image * self.contrast + offset) * self.brightness
        if self.noise > 0:
            shape = (*img.shape[:2], *(1 for _ in img.shape[2:]))
            generator = np.random.default_rng(self.seed)
            image += np.float32(self.noise) * generator.standard_normal(shape, np.float32)
        return np.clip(image, 0, 1, out=image) * np.float32(255)

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        return coords

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        return segmentation

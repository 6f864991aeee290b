"""Which values the keys of a config may have; a wrong one is told in one line, before any work."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import (
    ANCHOR_GENERATOR_REGISTRY,
    BACKBONE_REGISTRY,
    META_ARCH_REGISTRY,
    PROPOSAL_GENERATOR_REGISTRY,
    RPN_HEAD_REGISTRY,
)
from detectron2.modeling.roi_heads import (
    ROI_BOX_HEAD_REGISTRY,
    ROI_HEADS_REGISTRY,
    ROI_MASK_HEAD_REGISTRY,
)

from nuclei_d2.utils.errors import NucleiError

_NORMS = ("", "BN", "SyncBN", "FrozenBN", "GN", "nnSyncBN", "naiveSyncBN", "LN")
_CHOICES = {
    "INPUT.FORMAT": ("RGB", "BGR"),
    "INPUT.MASK_FORMAT": ("bitmask",),
    "INPUT.CROP.TYPE": ("absolute",),
    "INPUT.RANDOM_FLIP": ("none", "horizontal", "vertical", "both"),
    "MODEL.ROI_MASK_HEAD.BOUNDARY.TARGET": ("exact", "paper"),
    "MODEL.UNET.TARGET": ("two_class", "boundary", "distance"),
    "MODEL.UNET.BOUNDARY": ("inner", "thick"),
    "MODEL.CLASSICAL.THRESHOLD": ("otsu", "local"),
    "SOLVER.OPTIMIZER": ("SGD", "AdamW"),
    "SOLVER.LR_SCHEDULER_NAME": (
        "WarmupMultiStepLR",
        "WarmupCosineLR",
        "WarmupStepWithFixedGammaLR",
    ),
    "MODEL.RESNETS.DEPTH": (18, 34, 50, 101, 152),
    "MODEL.RESNETS.NORM": _NORMS,
    "MODEL.FPN.NORM": _NORMS,
    "MODEL.UNET.NORM": _NORMS,
    "MODEL.ROI_BOX_HEAD.NORM": _NORMS,
    "MODEL.ROI_MASK_HEAD.NORM": _NORMS,
}

# Detectron2's keys that nothing reads here, and what does their work. A value other than
# Detectron2's default would be ignored in silence.
_SIZE_REMEDY = "images are scaled by INPUT.SCALE, and in training by INPUT.SCALE_JITTER as well"
_PROPOSALS_REMEDY = "proposals are the model's own (MODEL.PROPOSAL_GENERATOR)"
_UNUSED = {
    "INPUT.MIN_SIZE_TRAIN": _SIZE_REMEDY,
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": _SIZE_REMEDY,
    "INPUT.MAX_SIZE_TRAIN": _SIZE_REMEDY,
    "INPUT.MIN_SIZE_TEST": _SIZE_REMEDY,
    "INPUT.MAX_SIZE_TEST": _SIZE_REMEDY,
    "MODEL.LOAD_PROPOSALS": _PROPOSALS_REMEDY,
    "DATASETS.PROPOSAL_FILES_TRAIN": _PROPOSALS_REMEDY,
    "DATASETS.PROPOSAL_FILES_TEST": _PROPOSALS_REMEDY,
    "MODEL.KEYPOINT_ON": "nuclei have no keypoints",
    "TEST.AUG.ENABLED": "tools/predict.py --tta predicts with augmentation",
    "TEST.PRECISE_BN.ENABLED": "MODEL.RESNETS.NORM GN needs no batch statistics",
}

# Names that must be registered, by our package, Detectron2 or the user's own code.
_REGISTRIES = {
    "MODEL.META_ARCHITECTURE": META_ARCH_REGISTRY,
    "MODEL.BACKBONE.NAME": BACKBONE_REGISTRY,
    "MODEL.PROPOSAL_GENERATOR.NAME": PROPOSAL_GENERATOR_REGISTRY,
    "MODEL.ANCHOR_GENERATOR.NAME": ANCHOR_GENERATOR_REGISTRY,
    "MODEL.RPN.HEAD_NAME": RPN_HEAD_REGISTRY,
    "MODEL.ROI_HEADS.NAME": ROI_HEADS_REGISTRY,
    "MODEL.ROI_BOX_HEAD.NAME": ROI_BOX_HEAD_REGISTRY,
    "MODEL.ROI_MASK_HEAD.NAME": ROI_MASK_HEAD_REGISTRY,
}


class _Range(NamedTuple):
    """The numbers that a key may have: one, or a pair of the lowest and the highest."""

    low: float = 0.0
    high: float = math.inf
    above: bool = False  # whether low itself is left out
    pair: bool = False

    def check(self, key: str, value: float | Sequence[float]) -> None:
        numbers = list(value) if self.pair else [value]
        are_numbers = all(type(number) in (int, float) for number in numbers)
        if len(numbers) != 1 + self.pair or not are_numbers or numbers != sorted(numbers):
            raise NucleiError(f"{key} is {numbers}; give [lowest, highest]{self._limits(', ')}")
        least = math.nextafter(self.low, math.inf) if self.above else self.low
        if not all(least <= number <= self.high and number < math.inf for number in numbers):
            raise NucleiError(f"{key} is {value}; give {self._numbers()}{self._limits(' ')}")

    def _numbers(self) -> str:
        return "numbers" if self.pair else "a number"

    def _limits(self, before: str) -> str:
        if self.low == -math.inf:
            return ""
        if self.high < math.inf:
            return f"{before}from {self.low:g} to {self.high:g}"
        return f"{before}{'above' if self.above else 'from'} {self.low:g}"


_SHARE, _FACTOR, _COUNT, _FROM_0 = _Range(high=1), _Range(above=True), _Range(low=1), _Range()
_FACTORS = _Range(above=True, pair=True)
_RANGES = {
    "INPUT.PERCENTILES": _Range(high=100, pair=True),
    "INPUT.NOISE_FLOOR": _FROM_0,
    "INPUT.MIN_LEVELS": _FROM_0,
    "INPUT.SCALE": _FACTOR,
    "INPUT.NUCLEUS_DIAMETER": _FROM_0,
    "INPUT.PIXEL_SIZE": _FROM_0,
    "INPUT.SCALE_JITTER": _FACTORS,
    "INPUT.CROP.NUCLEUS_PROB": _SHARE,
    "INPUT.GAMMA": _FACTORS,
    "INPUT.CONTRAST": _FACTORS,
    "INPUT.BRIGHTNESS": _FACTORS,
    "INPUT.NOISE": _Range(high=1, pair=True),
    "INPUT.INVERT_PROB": _SHARE,
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": _SHARE,
    "MODEL.ROI_MASK_HEAD.BOUNDARY.POOLER_RESOLUTION": _COUNT,
    "MODEL.ROI_MASK_HEAD.BOUNDARY.MASK_WEIGHT": _FROM_0,
    "MODEL.ROI_MASK_HEAD.BOUNDARY.BCE_WEIGHT": _FROM_0,
    "MODEL.ROI_MASK_HEAD.BOUNDARY.DICE_WEIGHT": _FROM_0,
    "MODEL.UNET.DEPTH": _COUNT,
    "MODEL.UNET.WIDTH": _COUNT,
    "MODEL.UNET.CE_WEIGHT": _FROM_0,
    "MODEL.UNET.DICE_WEIGHT": _FROM_0,
    "MODEL.UNET.DISTANCE_WEIGHT": _FROM_0,
    "MODEL.UNET.DECODER.THRESHOLD": _SHARE,
    "MODEL.UNET.DECODER.SEED_THRESHOLD": _SHARE,
    "MODEL.CLASSICAL.SIGMA": _FROM_0,
    "MODEL.CLASSICAL.LOCAL_SIZE": _COUNT,
    "MODEL.CLASSICAL.MIN_DISTANCE": _COUNT,
    "TEST.DETECTIONS_PER_IMAGE": _COUNT,
    "TEST.SCORE_THRESH_LABELS": _SHARE,
}


def check_config(cfg: CfgNode) -> None:
    """Raise :class:`NucleiError` for a value that cannot be, saying which ones can."""
    _check_empty(cfg, get_cfg())
    _check_unused(cfg)
    for key, choices in _CHOICES.items():
        check_choice(key, value_at(cfg, key), choices)
    for key, registry in _REGISTRIES.items():
        check_choice(key, value_at(cfg, key), sorted(name for name, _ in registry))
    for key, span in _RANGES.items():
        span.check(key, value_at(cfg, key))
    for entry in cfg.DATASETS.CUSTOM:
        if not isinstance(entry, (list, tuple)) or len(entry) != 3:
            raise NucleiError(
                f"DATASETS.CUSTOM: an entry is [name, annotation JSON, image folder], got {entry}"
            )
    _check_image_keys(cfg)
    for name, ends in cfg.INPUT.TRAINING_RANGES.items():
        if len(ends):
            _Range(pair=True, low=-math.inf).check(f"INPUT.TRAINING_RANGES.{name}", ends)


def _check_empty(cfg: CfgNode, defaults: CfgNode | None, prefix: str = "") -> None:
    """A key without a value, ``KEY:`` in YAML, is None."""
    for name, value in cfg.items():
        default = defaults.get(name, "") if defaults is not None else ""
        if isinstance(value, CfgNode):
            _check_empty(value, default or None, f"{prefix}{name}.")
        elif value is None and default is not None:
            raise NucleiError(f"{prefix}{name} is empty; give it a value, or leave it out")


def _check_image_keys(cfg: CfgNode) -> None:
    crop = list(cfg.INPUT.CROP.SIZE)
    if len(crop) != 2 or not all(isinstance(side, int) and side > 0 for side in crop):
        raise NucleiError(f"INPUT.CROP.SIZE is {crop}; give [height, width] in whole pixels")
    for key in ("PIXEL_MEAN", "PIXEL_STD"):
        if len(cfg.MODEL[key]) != 3:
            raise NucleiError(
                f"MODEL.{key} is {list(cfg.MODEL[key])}; images have three channels, grey ones "
                "three equal ones: give three numbers"
            )
    if not cfg.MODEL.MASK_ON:
        raise NucleiError("MODEL.MASK_ON is False, but masks are what nuclei are: leave it True")


def _check_unused(cfg: CfgNode) -> None:
    defaults = get_cfg()
    for key, remedy in _UNUSED.items():
        if value_at(cfg, key) != value_at(defaults, key):
            raise NucleiError(
                f"{key} is {value_at(cfg, key)!r}, but nuclei_d2 does not use it: {remedy}; "
                f"leave it at {value_at(defaults, key)!r}"
            )


def value_at(cfg: CfgNode, key: str) -> Any:
    """The value of a key such as "INPUT.SCALE"; raises KeyError or TypeError without it."""
    for part in key.split("."):
        cfg = cfg[part]
    return cfg


def check_choice(key: str, value: str, choices: Iterable[str]) -> None:
    """Raise :class:`NucleiError` naming ``key`` unless ``value`` is one of ``choices``."""
    choices = tuple(choices)
    if value not in choices:
        raise NucleiError(f"{key} is {value!r}; valid: {', '.join(map(str, choices))}")

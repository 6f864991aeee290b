"""Every configuration key that nuclei_d2 adds to Detectron2's, and how configs are loaded."""

import difflib
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch
import yaml
from detectron2.config import CfgNode, get_cfg

from nuclei_d2.config_checks import check_config, value_at
from nuclei_d2.utils.errors import NucleiError


def add_nuclei_config(cfg: CfgNode) -> None:
    """Add nuclei_d2's keys, with their defaults, to Detectron2's default config in place."""
    _add_data_keys(cfg)
    _add_model_keys(cfg)
    _add_unet_keys(cfg)
    _add_classical_keys(cfg)
    _add_solver_keys(cfg)
    _add_test_keys(cfg)


def _add_data_keys(cfg: CfgNode) -> None:
    # The synthetic set is generated on first use, so a config that names no data still runs.
    cfg.DATASETS.TRAIN = ("synthetic_train",)
    cfg.DATASETS.TEST = ("synthetic_test",)
    # Names of the sets evaluated during training, and used to choose the best checkpoint.
    # DATASETS.TEST is looked at once, after training.
    cfg.DATASETS.VAL = ("synthetic_val",)
    # Your own COCO-format sets: a list of [name, annotation JSON, image folder].
    cfg.DATASETS.CUSTOM = []

    # Nuclei are stored as run-length encoded bitmaps, never as polygons.
    cfg.INPUT.MASK_FORMAT = "bitmask"
    cfg.INPUT.FORMAT = "RGB"  # "RGB" or "BGR": channel order the network sees
    # Percentiles of the whole image that become 0 and 255 for the network.
    cfg.INPUT.PERCENTILES = (1.0, 99.8)
    # Contrast floor: the normalised range spans at least this many standard deviations of
    # the image's noise, so that an empty field is not stretched into false nuclei.
    cfg.INPUT.NOISE_FLOOR = 12.0
    # Contrast floor for integer images, in grey levels.
    cfg.INPUT.MIN_LEVELS = 4.0
    # Factor by which every image is enlarged before the network (training and test).
    cfg.INPUT.SCALE = 1.0
    # What the model learnt from, to which prediction scales. Median diameter of the nuclei,
    # 2 sqrt(area / pi), in pixels of the image files; training measures it. 0: unknown.
    cfg.INPUT.NUCLEUS_DIAMETER = 0.0
    # Micrometres per pixel of the image files, where it is the same for all of them. 0: unknown.
    cfg.INPUT.PIXEL_SIZE = 0.0
    # Least and greatest value of each measure in the training images, as the network sees them,
    # outside of which prediction warns; training measures them. []: unknown.
    # nuclei_d2.data.image_measures defines the measures.
    cfg.INPUT.TRAINING_RANGES = CfgNode()
    cfg.INPUT.TRAINING_RANGES.FOCUS = []  # 0 to 1: fine edges over coarse ones
    cfg.INPUT.TRAINING_RANGES.NOISE = []  # standard deviation, share of full scale
    cfg.INPUT.TRAINING_RANGES.SATURATED = []  # share of the pixels at full scale
    cfg.INPUT.TRAINING_RANGES.BACKGROUND = []  # median grey level, share of full scale
    cfg.INPUT.TRAINING_RANGES.DIAMETER = []  # median of the image's nuclei, network pixels
    # Range of the random factor that multiplies INPUT.SCALE in training.
    cfg.INPUT.SCALE_JITTER = (0.8, 1.25)
    # Training crops of INPUT.CROP.SIZE (height, width) pixels as the network sees them.
    cfg.INPUT.CROP.ENABLED = True
    cfg.INPUT.CROP.TYPE = "absolute"
    cfg.INPUT.CROP.SIZE = [256, 256]
    # Share of the crops that are placed around a random nucleus; the others fall anywhere.
    cfg.INPUT.CROP.NUCLEUS_PROB = 0.9
    # "none", "horizontal", "vertical" or "both" (each with probability 1/2).
    cfg.INPUT.RANDOM_FLIP = "both"
    cfg.INPUT.RANDOM_ROTATE90 = True  # rotate by a random multiple of 90 degrees
    # Random intensity changes on the normalised image: ranges of the gamma exponent, of the
    # factors on contrast and brightness, and of the added noise (share of full scale).
    cfg.INPUT.GAMMA = (0.75, 1.33)
    cfg.INPUT.CONTRAST = (0.8, 1.2)
    cfg.INPUT.BRIGHTNESS = (0.8, 1.2)
    cfg.INPUT.NOISE = (0.0, 0.03)
    cfg.INPUT.INVERT_PROB = 0.0  # probability of swapping dark and bright
    # Instances left with fewer pixels than this after augmentation are dropped.
    cfg.INPUT.MIN_INSTANCE_AREA = 4
    # Empty images teach the detector what is not a nucleus.
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = False


def _add_model_keys(cfg: CfgNode) -> None:
    cfg.MODEL.META_ARCHITECTURE = "NucleiRCNN"
    # Unless a config or an option names a device, the best one that is there.
    cfg.MODEL.DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
    cfg.MODEL.MASK_ON = True
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 1
    cfg.MODEL.ROI_BOX_HEAD.NAME = "FastRCNNConvFCHead"
    # Our images are normalised to 0..255 (float).
    cfg.MODEL.PIXEL_MEAN = [127.5, 127.5, 127.5]
    cfg.MODEL.PIXEL_STD = [64.0, 64.0, 64.0]
    cfg.MODEL.WEIGHTS = ""
    # A .pkl checkpoint is a Python pickle and can run code when loaded; True trusts the file.
    cfg.MODEL.ALLOW_PICKLE = False

    head = cfg.MODEL.ROI_MASK_HEAD
    head.BOUNDARY = CfgNode()
    # Boundary branch of BoundaryMaskHead (Mask Boundary R-CNN).
    head.BOUNDARY.IN_FEATURES = ["p2"]  # feature maps pooled for the boundary branch
    head.BOUNDARY.POOLER_RESOLUTION = 28  # pixels; twice the mask branch's POOLER_RESOLUTION
    head.BOUNDARY.NUM_CONV = 2  # 3x3 convolutions after the mask-to-boundary fusion
    # "exact": boundary of a crop with one more target pixel on each side, so that a nucleus
    # filling the RoI has no false frame. "paper": Laplacian with zero padding, as published.
    head.BOUNDARY.TARGET = "exact"
    # Loss weights. Both boundary weights 0 make the control of equal size: the same layers
    # without boundary supervision.
    head.BOUNDARY.MASK_WEIGHT = 1.0
    head.BOUNDARY.BCE_WEIGHT = 1.0
    head.BOUNDARY.DICE_WEIGHT = 1.0


def _add_unet_keys(cfg: CfgNode) -> None:
    # UNet: predict classes for every pixel, then decode them into nuclei. Its encoder is
    # MODEL.BACKBONE.NAME: build_unet_encoder or build_resnet_backbone.
    cfg.MODEL.UNET = CfgNode()
    # "two_class": nucleus or background, decoded by connected components.
    # "boundary": background, interior, boundary.
    # "distance": nucleus or background, and the depth inside the nucleus; watershed.
    cfg.MODEL.UNET.TARGET = "boundary"
    # The boundary target and the decoder made for it. "inner": the outermost pixel of every
    # nucleus, watershed from the interiors. "thick": two pixels, components of the interior
    # dilated (Caicedo et al. 2019).
    cfg.MODEL.UNET.BOUNDARY = "inner"
    cfg.MODEL.UNET.DEPTH = 4  # levels of build_unet_encoder; resolution halves at each
    # Channels at full resolution; doubled at every level, up to 8 times as many.
    cfg.MODEL.UNET.WIDTH = 64
    cfg.MODEL.UNET.NORM = "BN"  # as Detectron2's NORM keys: "", "BN", "SyncBN", "GN"
    # Weights of the classes in the cross-entropy, in the order above; [] weighs them equally.
    cfg.MODEL.UNET.CLASS_WEIGHTS = []
    cfg.MODEL.UNET.CE_WEIGHT = 1.0  # of the cross-entropy
    cfg.MODEL.UNET.DICE_WEIGHT = 1.0  # of the Dice loss over all classes but the background
    cfg.MODEL.UNET.DISTANCE_WEIGHT = 5.0  # of the smooth L1 loss of the depth
    # Decoders; tools/tune_decoder.py fits these four. Areas are in pixels as the network sees
    # them, that is after INPUT.SCALE.
    cfg.MODEL.UNET.DECODER = CfgNode()
    cfg.MODEL.UNET.DECODER.THRESHOLD = 0.5  # least probability of the foreground
    cfg.MODEL.UNET.DECODER.SEED_THRESHOLD = 0.5  # least interior probability, or depth, of a seed
    cfg.MODEL.UNET.DECODER.MIN_AREA = 10  # smaller nuclei are dropped
    cfg.MODEL.UNET.DECODER.HOLE_AREA = 50  # holes in a nucleus up to this size are filled


def _add_classical_keys(cfg: CfgNode) -> None:
    # Classical: smoothing, threshold, distance watershed; nothing is trained. Lengths are in
    # pixels after INPUT.SCALE.
    cfg.MODEL.CLASSICAL = CfgNode()
    cfg.MODEL.CLASSICAL.SIGMA = 1.0  # standard deviation of the Gaussian smoothing
    cfg.MODEL.CLASSICAL.THRESHOLD = "otsu"  # one for the image: "otsu", or "local"
    cfg.MODEL.CLASSICAL.LOCAL_SIZE = 101  # window of the local threshold, odd
    # No pixel below this grey level (0..255, after normalisation) is nucleus, and Otsu's threshold
    # finds nothing where the means of its classes differ by less.
    cfg.MODEL.CLASSICAL.MIN_LEVEL = 25.0
    cfg.MODEL.CLASSICAL.DARK_NUCLEI = False  # True: dark nuclei on bright ground
    # Of places deepest inside the foreground that are closer than this, one becomes a nucleus.
    cfg.MODEL.CLASSICAL.MIN_DISTANCE = 6
    cfg.MODEL.CLASSICAL.MIN_AREA = 20  # smaller nuclei are dropped
    cfg.MODEL.CLASSICAL.HOLE_AREA = 200  # holes in a nucleus up to this size are filled


def _add_solver_keys(cfg: CfgNode) -> None:
    cfg.SOLVER.OPTIMIZER = "SGD"  # "SGD" or "AdamW"
    # SOLVER.AMP.ENABLED means bfloat16 autocast here, on CUDA devices and CPUs alike.
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = "norm"  # of each parameter, as Detectron2 does
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE = 5.0
    cfg.SOLVER.CLIP_GRADIENTS.NORM_TYPE = 2.0
    # Batch, rate and schedule in a config are meant for one GPU. With N, the batch is
    # multiplied by N, the schedule divided by it; the rate is multiplied by N, AdamW's by root N.
    cfg.SOLVER.REFERENCE_WORLD_SIZE = 1


def _add_test_keys(cfg: CfgNode) -> None:
    # One cap for the model and the evaluator: about 1.5 x the fullest image
    # (tools/analyze_dataset.py proposes it).
    cfg.TEST.DETECTIONS_PER_IMAGE = 600
    # Evaluation and prediction in bfloat16 autocast, as in training: faster on GPUs and on CPUs
    # with such instructions; a few nuclei differ.
    cfg.TEST.AMP = CfgNode({"ENABLED": False})
    # Number on DATASETS.VAL that chooses model_best.pth; with several sets "<name>/segm/AP".
    cfg.TEST.BEST_METRIC = "segm/AP"
    # Least score, 0 to 1, of the predictions that the label-based metrics (F1, PQ, AJI ..) count;
    # where they overlap and nuclei do not, the pixel belongs to the highest score. The tools keep
    # predictions from it on, unless --confidence-threshold says otherwise.
    cfg.TEST.SCORE_THRESH_LABELS = 0.5


def load_config(config_file: str = "", opts: Sequence[str] = ()) -> CfgNode:
    """Default config <- ``config_file`` <- ``opts`` (``KEY VALUE KEY VALUE ...``).

    The file is read with a safe YAML loader: a config is untrusted input.

    Returns:
        An unfrozen, checked config.

    Raises:
        NucleiError: no such file, broken or unsafe YAML, an unknown key or choice (the valid
            ones are listed), or a value of the wrong type.
    """
    cfg = get_cfg()
    add_nuclei_config(cfg)
    if config_file:
        _merge_file(cfg, config_file)
    if len(opts) % 2:
        raise NucleiError(f"options come as KEY VALUE pairs, got {len(opts)} words: {list(opts)}")
    for key, value in zip(opts[::2], opts[1::2], strict=True):
        pair = [key, _as_float(cfg, key, value)]
        _merge(cfg, lambda pair=pair: cfg.merge_from_list(pair), f"option {key}")
    check_config(cfg)
    return cfg


def _as_float(cfg: CfgNode, key: str, value: str) -> str:
    """``INPUT.SCALE 2`` means 2.0; yacs would call it the wrong type."""
    with suppress(KeyError, TypeError):
        if isinstance(value_at(cfg, key), float) and re.fullmatch(r"[+-]?\d+", value):
            return f"{value}.0"
    return value


def _make_floats(cfg: CfgNode, values: dict) -> None:
    """The same for a tree of values, in place."""
    for key, value in values.items():
        if isinstance(value, dict) and isinstance(cfg.get(key), CfgNode):
            _make_floats(cfg[key], value)
        elif type(value) is int and isinstance(cfg.get(key), float):
            values[key] = float(value)


def _merge_file(cfg: CfgNode, config_file: str) -> None:
    if not Path(config_file).is_file():
        raise NucleiError(f"no config file {config_file}")
    try:
        values = CfgNode.load_yaml_with_base(config_file, allow_unsafe=False)
    except OSError as error:
        raise NucleiError(f"{config_file}: no file {error.filename}, its _BASE_") from error
    except RecursionError as error:
        raise NucleiError(f"{config_file}: its _BASE_ leads back to itself") from error
    except (yaml.YAMLError, UnicodeDecodeError, AssertionError) as error:
        reason = " ".join(str(error).split())
        raise NucleiError(f"{config_file}: not a plain YAML config: {reason}") from error
    except (TypeError, AttributeError):  # an empty file, or a list, as a config or as its _BASE_
        values = None
    if not isinstance(values, dict):
        raise NucleiError(
            f"{config_file}: a config, and its _BASE_, is a YAML mapping of keys to values"
        )
    values.pop("VERSION", None)
    _make_floats(cfg, values)
    _merge(cfg, lambda: cfg.merge_from_other_cfg(CfgNode(values)), config_file)


def _merge(cfg: CfgNode, merge, source: str) -> None:
    """Run ``merge`` and turn yacs' complaints into one clear line."""
    try:
        merge()
    except (KeyError, AssertionError, ValueError, TypeError) as error:
        reason = " ".join(str(error.args[0] if error.args else error).split())
        missing = re.fullmatch(r"Non-existent (?:config )?key: (\S+)", reason)
        if missing:
            reason = _unknown_key(cfg, missing[1])
        raise NucleiError(f"{source}: {reason}") from error


def _unknown_key(cfg: CfgNode, key: str) -> str:
    node, known = cfg, ""
    for part in key.split("."):
        if not isinstance(node, CfgNode) or part not in node:
            break
        node, known = node[part], f"{known}{part}."
    names = sorted(node) if isinstance(node, CfgNode) else []
    missing = key.removeprefix(known).split(".")[0]
    close = difflib.get_close_matches(missing, names, n=1)
    hint = f"; did you mean {known}{close[0]}?" if close else "."
    return f"unknown config key {key}{hint} Keys under {known or 'the top'}: {', '.join(names)}"

"""Data and configs that several test folders share. Everything is generated; nothing is read."""

import argparse
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image
from skimage.draw import disk

from nuclei_d2.data.datasets.coco import mask_to_annotation, write_coco_json
from nuclei_d2.structures.cropped_mask import label_image_to_masks

REPOSITORY = Path(__file__).parent.parent
CONFIGS = REPOSITORY / "configs"
# The smallest model that has every part of the real ones.
TINY_OPTS = (
    *("MODEL.DEVICE", "cpu"),
    *("MODEL.RESNETS.DEPTH", "18", "MODEL.RESNETS.RES2_OUT_CHANNELS", "64"),
    *("MODEL.FPN.OUT_CHANNELS", "32", "MODEL.FPN.NORM", "", "MODEL.RPN.CONV_DIMS", "[32]"),
    *("MODEL.RPN.PRE_NMS_TOPK_TRAIN", "50", "MODEL.RPN.POST_NMS_TOPK_TRAIN", "50"),
    *("MODEL.RPN.PRE_NMS_TOPK_TEST", "50", "MODEL.RPN.POST_NMS_TOPK_TEST", "50"),
    *("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "16"),
    *("MODEL.ROI_BOX_HEAD.NUM_CONV", "0", "MODEL.ROI_BOX_HEAD.FC_DIM", "32"),
    *("MODEL.ROI_MASK_HEAD.CONV_DIM", "16", "MODEL.ROI_MASK_HEAD.NORM", ""),
    *("INPUT.SCALE", "1.0", "INPUT.CROP.SIZE", "[64, 64]"),
    *("DATALOADER.NUM_WORKERS", "0", "SOLVER.IMS_PER_BATCH", "2"),
    *("TEST.DETECTIONS_PER_IMAGE", "20"),
)
TINY_DATA_OPTS = (
    *("DATASETS.TRAIN", "('tiny_train',)"),
    *("DATASETS.VAL", "('tiny_val',)"),
    *("DATASETS.TEST", "('tiny_test',)"),
)


def tiny_args(
    output: Path,
    *opts: str,
    config: str = "mask_boundary_rcnn.yaml",
    num_gpus: int = 1,
    eval_only: bool = False,
) -> argparse.Namespace:
    """The command line of a run of four steps, as Detectron2 parses it."""
    schedule = ("SOLVER.MAX_ITER", "4", "SOLVER.WARMUP_ITERS", "1", "TEST.EVAL_PERIOD", "2")
    places = ("SOLVER.CHECKPOINT_PERIOD", "2", "OUTPUT_DIR", str(output))
    return argparse.Namespace(
        config_file=str(CONFIGS / config),
        eval_only=eval_only,
        num_gpus=num_gpus,
        num_machines=1,
        opts=[*TINY_OPTS, *TINY_DATA_OPTS, *schedule, *places, *opts],
    )


def draw_nuclei(rng: np.random.Generator, size: tuple[int, int], count: int):
    """Bright noisy disks that may touch: (H, W) uint8 image and (H, W) int32 labels."""
    labels = np.zeros(size, np.int32)
    for label in range(1, count + 1):
        centre = rng.integers(4, np.array(size) - 4)
        rows, columns = disk(centre, rng.integers(4, 9), shape=size)
        free = labels[rows, columns] == 0
        labels[rows[free], columns[free]] = label
    image = 20 + 120 * (labels > 0) + rng.normal(0, 5, size)
    return image.clip(0, 255).astype(np.uint8), labels


def write_split(folder: Path, name: str, counts: list[int], seed: int) -> None:
    """One registered name in the layout of a prepared data set; one image per count."""
    rng = np.random.default_rng(seed)
    images = []
    for index, count in enumerate(counts, start=1):
        image, labels = draw_nuclei(rng, (64, 80), count)
        pairs = label_image_to_masks(labels)
        dense = np.zeros_like(labels, np.uint16)
        for k, (label, _) in enumerate(pairs, start=1):
            dense[labels == label] = k
        places = {
            "file_name": f"images/{name}_{index}.png",
            "label_file_name": f"labels/{name}_{index}.png",
        }
        for place, array in zip(places.values(), (image, dense), strict=True):
            (folder / place).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(folder / place)
        height, width = image.shape
        annotations = [mask_to_annotation(mask, image.shape) for _, mask in pairs]
        images.append(
            {"id": index, "height": height, "width": width, **places, "annotations": annotations}
        )
    write_coco_json(folder / "annotations" / f"{name}.json", images)


def in_two_processes(function: Callable[[int], Any], folder: Path) -> list:
    """``[function(0), function(1)]``, called by the two processes of a gloo group.

    The processes are forked: ``function`` may use whatever the test has registered.
    """
    mp.start_processes(_in_group, (function, folder), nprocs=2, start_method="fork")
    return [pickle.loads((folder / f"rank{rank}.pkl").read_bytes()) for rank in range(2)]


def _in_group(rank: int, function: Callable[[int], Any], folder: Path) -> None:
    # Threads do not survive a fork.
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    dist.init_process_group("gloo", f"file://{folder / 'group'}", rank=rank, world_size=2)
    (folder / f"rank{rank}.pkl").write_bytes(pickle.dumps(function(rank)))
    dist.barrier()
    dist.destroy_process_group()

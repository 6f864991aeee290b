"""What benchmark.py measures: every stage by every rival, one measurement a process.

Apart from it, so that the measuring processes load this module only, without tables and plots.
"""

import contextlib
import copy
import hashlib
import io
import json
import resource
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import nuclei_d2  # noqa: F401 - first, as it silences what importing Detectron2 prints

# isort: split
import numpy as np
import torch
from benchmark_measure import address_space, measure_run, timed
from detectron2.config import CfgNode
from detectron2.data import (
    DatasetCatalog,
    DatasetMapper,
    MetadataCatalog,
    build_detection_test_loader,
)
from detectron2.data import transforms as T
from detectron2.evaluation import COCOEvaluator, DatasetEvaluator, inference_on_dataset
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import BitMasks, Boxes, ImageList, Instances
from detectron2.utils.events import EventStorage
from PIL import Image
from torch import nn
from torch.nn import functional as F

from nuclei_d2.config import load_config
from nuclei_d2.data.augmentation import build_augmentation
from nuclei_d2.data.dataset_mapper import NucleiDatasetMapper, labels_to_instances, read_labels
from nuclei_d2.data.datasets.coco import load_nuclei_json, mask_to_annotation, write_coco_json
from nuclei_d2.data.datasets.synthetic import SyntheticConfig, generate
from nuclei_d2.data.image_io import read_image
from nuclei_d2.data.normalization import ImageNormalizer
from nuclei_d2.engine.checkpoint import NucleiCheckpointer
from nuclei_d2.evaluation.coco_evaluation import NucleiCOCOEvaluator, instances_to_results
from nuclei_d2.evaluation.efficiency import count_flops
from nuclei_d2.inference.nuclei import Nuclei
from nuclei_d2.modeling import build_model
from nuclei_d2.modeling.meta_arch.rcnn import NucleiRCNN, postprocess
from nuclei_d2.structures.cropped_mask import label_image_to_masks
from nuclei_d2.utils.precision import has_bfloat16

OURS, STOCK, BOUNDARY, PLAIN = "nuclei_d2", "Detectron2", "boundary head", "Mask R-CNN"
MIXED, STARDIST = "nuclei_d2 in bfloat16", "StarDist"
ROIS, TARGET_SIZE = 128, 28  # RoIs of an image in training, and their masks' side in pixels


@dataclass(frozen=True)
class Job:
    """One measurement: a stage on images of one kind, by one of two rivals."""

    stage: str
    rival: str
    nuclei: int
    size: int
    images: int = 1

    @property
    def data(self) -> str:
        """Name of the generated data set."""
        return f"benchmark_{self.nuclei}_{self.size}_{self.images}"


@dataclass(frozen=True)
class Options:
    """What all measurements share."""

    folder: Path  # of the generated data
    config_file: str
    weights: str  # "": not trained
    dataset: str  # registered name, of the stage "data set"
    threads: int
    memory_limit: float  # bytes
    stardist: str = ""  # interpreter that has it


def draw_images(folder: Path, job: Job) -> None:
    """Write images, label images and COCO JSON of nuclei that do not overlap."""
    config = SyntheticConfig(
        height=job.size,
        width=job.size,
        count=(job.nuclei, job.nuclei),
        empty=0,
        diameter=(18, 22),
        overlapping=0,
    )
    entries = []
    for k in range(job.images):
        image, labels = generate(k, config)
        files = {"file_name": f"{job.data}_{k}.png", "label_file_name": f"{job.data}_{k}_label.png"}
        Image.fromarray(image).save(folder / files["file_name"])
        Image.fromarray(labels[0].astype(np.uint16)).save(folder / files["label_file_name"])
        masks = label_image_to_masks(labels[0])
        annotations = [mask_to_annotation(mask, image.shape) for _, mask in masks]
        size = {"height": job.size, "width": job.size}
        entries.append({"id": k + 1, **files, **size, "annotations": annotations})
    write_coco_json(folder / f"{job.data}.json", entries)


# ------------------------------------------------------------------------- measuring


def run_apart(sender, job: Job | None, options: Options) -> None:
    """Body of a measuring process: send what :func:`measure` finds.

    Without a job, the rates of the device. "error" stands for a measurement that ran out of memory.
    """
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    np.random.seed(0)
    limit = int(address_space() + options.memory_limit)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # COCO's evaluator prints
            sender.send(measure_rates() if job is None else measure(job, options))
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "allocate memory" not in str(error):
            raise
        sender.send({"error": f"> {options.memory_limit / 1e9:.0f} GB"})


def measure(job: Job, options: Options) -> dict[str, Any]:
    """What :func:`measure_run` finds of a stage, and its least possible work."""
    run, (flops, traffic) = STAGES[job.stage](job, options)
    return {**measure_run(run), "flops": flops, "bytes": traffic}


def measure_rates() -> dict[str, float]:
    """What the device does at best: float32 matrix products, and copies in memory."""
    matrix, large = torch.rand(2048, 2048), torch.rand(1 << 26)
    target = torch.empty_like(large)

    def least(run: Callable) -> float:
        return min(timed(run)[1] for _ in range(8))

    return {
        "flops_per_s": 2 * 2048**3 / least(lambda: matrix @ matrix),
        "bytes_per_s": 8 * len(large) / least(lambda: target.copy_(large)),
    }


# ------------------------------------------------------------------------------ data


def config(job: Job, options: Options) -> CfgNode:
    """The config, with room for all nuclei; an untrained network finds as many as there are."""
    cfg = load_config(options.config_file, ["MODEL.DEVICE", "cpu"])
    trained = options.weights and job.rival in (OURS, STOCK)
    if job.stage != "data set":
        cfg.TEST.DETECTIONS_PER_IMAGE = 2 * job.nuclei if trained else job.nuclei
        for key in ("PRE_NMS_TOPK_TEST", "POST_NMS_TOPK_TEST"):
            cfg.MODEL.RPN[key] = max(cfg.MODEL.RPN[key], 2 * job.nuclei)
    if not trained:
        cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0
    cfg.TEST.AMP.ENABLED = job.rival == MIXED
    if job.rival == STOCK:
        cfg.MODEL.META_ARCHITECTURE = "GeneralizedRCNN"
    if job.rival in (BOUNDARY, PLAIN):
        name = "BoundaryMaskHead" if job.rival == BOUNDARY else "MaskRCNNConvUpsampleHead"
        cfg.MODEL.ROI_MASK_HEAD.NAME = name
        cfg.MODEL.ROI_MASK_HEAD.POOLER_TYPE = "" if job.rival == BOUNDARY else "ROIAlignV2"
    return cfg


def detector(job: Job, options: Options) -> nn.Module:
    cfg = config(job, options)
    model = build_model(cfg).eval()
    if options.weights and job.rival in (OURS, STOCK):
        NucleiCheckpointer(model, allow_pickle=cfg.MODEL.ALLOW_PICKLE).load_exactly(options.weights)
    if job.rival == STOCK:
        model.preprocess_image = partial(pad_with_background, model)
    return model


def pad_with_background(model: nn.Module, batched_inputs: list[dict]) -> ImageList:
    """Our padding for Detectron2's model: it changes what is found, not what that costs."""
    batch = NucleiRCNN.preprocess_image(model, batched_inputs)
    batch.tensor = batch.tensor.contiguous()
    return batch


def records(job: Job, options: Options) -> list[dict[str, Any]]:
    """Dataset dicts of the generated images, which are registered too."""
    path = options.folder / f"{job.data}.json"
    found = load_nuclei_json(path, options.folder, job.data)
    if job.data not in DatasetCatalog:
        DatasetCatalog.register(job.data, lambda: found)
        MetadataCatalog.get(job.data).json_file = str(path)
    return found


def evaluation_input(job: Job, options: Options) -> dict[str, Any]:
    return NucleiDatasetMapper(config(job, options), False)(records(job, options)[0])


def ground_truth(job: Job, options: Options) -> Instances:
    return labels_to_instances(read_labels(records(job, options)[0], (job.size, job.size)))


def jittered(boxes: torch.Tensor, image_size: tuple[int, int]) -> Boxes:
    """Boxes (N, 4) XYXY with edges moved by about 5 % of the box, inside the image."""
    sides = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
    moved = Boxes(boxes + 0.05 * sides * torch.randn(boxes.shape))
    moved.clip(image_size)
    return moved


def raw_detections(job: Job, options: Options) -> Instances:
    """What a good network's heads would give for one image."""
    truth = ground_truth(job, options)
    boxes = jittered(truth.gt_boxes.tensor, truth.image_size)
    masks = truth.gt_masks.crop_and_resize(boxes.tensor, TARGET_SIZE)[:, None].float()
    return Instances(
        truth.image_size,
        pred_boxes=boxes,
        scores=torch.rand(len(truth)),
        pred_classes=truth.gt_classes,
        pred_masks=F.avg_pool2d(masks, kernel_size=3, stride=1, padding=1),
    )


def build_evaluator(job: Job, options: Options, name: str, cap: int) -> DatasetEvaluator:
    if job.rival == OURS:
        return NucleiCOCOEvaluator(name, max_dets=cap)
    folder = str(options.folder / job.data)
    return COCOEvaluator(name, ("bbox", "segm"), False, folder, max_dets_per_image=cap)


def average_precision(results: dict[str, dict[str, float]]) -> dict[str, float]:
    return {task: values["AP"] for task, values in results.items()}


# ---------------------------------------------------------------------------- stages
#
# Each takes a job and the options, and returns the function to measure and its least possible work:
# floating-point operations, and bytes read and written. What the function returns is compared
# between the rivals.


def mapper(job: Job, options: Options):
    """Read one image and its nuclei, enlarge, flip: what training does before it crops."""
    record, cfg = records(job, options)[0], config(job, options)
    side = round(job.size * cfg.INPUT.SCALE)
    augmentations = [T.Resize((side, side)), T.RandomFlip()]
    if job.rival == OURS:
        normalizer = ImageNormalizer(cfg)
        read = NucleiDatasetMapper(True, augmentations=augmentations, normalizer=normalizer)
    else:
        read = DatasetMapper(
            True,
            augmentations=augmentations,
            image_format="RGB",
            use_instance_mask=True,
            instance_mask_format="bitmask",
        )
    # The file's pixels and 16-bit labels in; float32 RGB and int32 labels out.
    return lambda: len(read(record)["instances"]), (0, 3 * job.size**2 + 16 * side**2)


def targets(job: Job, options: Options):
    """Mask targets of 128 RoIs on the nuclei of one image."""
    instances = ground_truth(job, options)
    chosen = torch.randint(len(instances), (ROIS,))
    boxes = jittered(instances.gt_boxes.tensor[chosen], instances.image_size)
    masks = instances.gt_masks if job.rival == OURS else BitMasks(instances.gt_masks.tensor)

    def run() -> np.ndarray:
        return np.packbits(masks[chosen].crop_and_resize(boxes.tensor, TARGET_SIZE).numpy())

    return run, (0, 4 * float(boxes.area().sum()) + ROIS * TARGET_SIZE**2)


def network(job: Job, options: Options):
    """One image to raw detections: backbone, proposals, heads."""
    model, inputs = detector(job, options), evaluation_input(job, options)
    parameters = sum(p.numel() for p in model.parameters())
    flops = 2 * (count_flops(model, inputs) or 0) if job.rival == OURS else 0

    def run() -> int:
        with torch.no_grad():
            return len(model.inference([inputs], do_postprocess=False)[0])

    return run, (flops, 4 * (parameters + inputs["image"].numel()))


def postprocessing(job: Job, options: Options):
    """Raw detections of one image to COCO results."""
    raw = raw_detections(job, options)
    size, pixels = raw.image_size, float(raw.pred_boxes.area().sum())

    def run() -> str:
        found = Instances(size, **raw.get_fields())
        found.pred_boxes = raw.pred_boxes.clone()  # they are scaled in place
        if job.rival == OURS:
            results = instances_to_results(postprocess(found, *size), 1)
        else:
            results = instances_to_coco_json(detector_postprocess(found, *size), 1)
        masks = [result["segmentation"]["counts"] for result in results]
        return hashlib.sha256(json.dumps(masks).encode()).hexdigest()

    # Bilinear interpolation takes 7 operations a pixel.
    return run, (7 * pixels, 4 * raw.pred_masks.numel() + pixels)


def metrics(job: Job, options: Options):
    """COCO results of one image to box and mask AP."""
    raw, dataset = raw_detections(job, options), records(job, options)
    evaluator = build_evaluator(job, options, job.data, 2 * job.nuclei)
    evaluator.reset()
    evaluator.process(dataset, [{"instances": postprocess(raw, *raw.image_size)}])

    def run() -> dict[str, float]:
        # Detectron2's changes the predictions that it has collected.
        fresh = evaluator if job.rival == OURS else copy.deepcopy(evaluator)
        return average_precision(fresh.evaluate())

    return run, (0, 0)


def whole_evaluation(job: Job, options: Options):
    """Image files to AP, by Detectron2's inference_on_dataset."""
    return evaluate_on(job.data, records(job, options), 2 * job.nuclei, job, options)


def registered_set(job: Job, options: Options):
    """The same, of real images with the instance cap of the config."""
    cap = config(job, options).TEST.DETECTIONS_PER_IMAGE
    return evaluate_on(options.dataset, DatasetCatalog.get(options.dataset), cap, job, options)


def evaluate_on(name: str, dataset: list[dict], cap: int, job: Job, options: Options):
    read = NucleiDatasetMapper(config(job, options), False)
    model, evaluator = detector(job, options), build_evaluator(job, options, name, cap)

    def run() -> dict[str, float]:
        loader = build_detection_test_loader(dataset, mapper=read, num_workers=0)
        return average_precision(inference_on_dataset(model, loader, evaluator))

    return run, (0, 0)


def training_step(job: Job, options: Options):
    """Forward and backward on a batch of crops, as configured."""
    cfg = config(job, options)
    read = NucleiDatasetMapper(cfg, True)
    batch = [read(record) for record in records(job, options)]
    model = detector(job, options).train()
    mixed = cfg.SOLVER.AMP.ENABLED and has_bfloat16(torch.device("cpu"), "SOLVER.AMP.ENABLED")

    def run() -> None:
        with EventStorage(), torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            losses = sum(model(batch).values())
        losses.backward()

    return run, (0, 0)


def inference(job: Job, options: Options):
    """One image to pasted masks."""
    model, inputs = detector(job, options), evaluation_input(job, options)

    def run() -> int:
        with torch.no_grad():
            return len(model([inputs])[0]["instances"])

    return run, (0, 0)


def label_image(job: Job, options: Options):
    """Grey levels of one image to its label image: all that finding nuclei takes.

    The network runs in full and its raw detections are replaced by those of a good one, as
    benchmark_stardist.py replaces StarDist's.
    """
    cfg = config(job, options)
    model, normalizer = detector(job, options), ImageNormalizer(cfg)
    enlarge = T.AugmentationList(build_augmentation(cfg, False))
    raw = raw_detections(job, options)
    image = read_image(records(job, options)[0]["file_name"])
    side = round(job.size * cfg.INPUT.SCALE)

    def perfect(*_) -> tuple[list[Instances], dict]:
        found = Instances((side, side), **raw.get_fields())
        found.pred_boxes = Boxes(raw.pred_boxes.tensor * cfg.INPUT.SCALE)
        return [found], {}

    model.roi_heads.register_forward_hook(perfect)

    def run() -> int:
        pixels = T.AugInput(normalizer(image))
        enlarge(pixels)
        tensor = torch.from_numpy(np.ascontiguousarray(pixels.image.transpose(2, 0, 1)))
        with torch.no_grad():
            inputs = {"image": tensor, "height": job.size, "width": job.size}
            instances = model([inputs])[0]["instances"]
        return int(Nuclei.from_instances(instances).label_image().max())

    return run, (0, 0)


STAGES = {
    "mapper": mapper,
    "mask targets": targets,
    "network": network,
    "post-processing": postprocessing,
    "metrics": metrics,
    "whole evaluation": whole_evaluation,
    "data set": registered_set,
    "training step": training_step,
    "inference": inference,
    "label image": label_image,
}

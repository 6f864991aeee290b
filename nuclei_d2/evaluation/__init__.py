"""Evaluators, chosen by a data set's ``evaluator_type``."""

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator, DatasetEvaluators

from nuclei_d2.config_checks import check_choice
from nuclei_d2.evaluation.boundary_ap import boundary_ap
from nuclei_d2.evaluation.coco_evaluation import NucleiCOCOEvaluator, coco_ap, dataset_to_coco
from nuclei_d2.evaluation.nuclei_evaluation import NucleiEvaluator
from nuclei_d2.evaluation.scores import HEADLINE, is_better_high
from nuclei_d2.evaluation.sem_seg_evaluation import (
    NucleiSemSegEvaluator,
    build_sem_seg_evaluators,
    sem_seg_scores,
)

__all__ = [
    "NucleiCOCOEvaluator",
    "NucleiEvaluator",
    "NucleiSemSegEvaluator",
    "build_evaluator",
    "measured_metrics",
]


def build_evaluator(cfg: CfgNode, dataset_name: str, output_dir: str | None) -> DatasetEvaluator:
    """The evaluator of a registered data set, by its metadata's ``evaluator_type``.

    "nuclei" (the default) gives COCO's numbers, boundary AP and the label-based metrics, "coco"
    COCO's alone. Models that return ``sem_seg`` have its pixels scored, too.

    Raises:
        NucleiError: the metadata's ``evaluator_type`` is none we know.
    """
    evaluator_type = _evaluator_type(dataset_name)
    max_dets = cfg.TEST.DETECTIONS_PER_IMAGE
    coco = NucleiCOCOEvaluator(dataset_name, max_dets=max_dets, output_dir=output_dir)
    sem_seg = build_sem_seg_evaluators(cfg, dataset_name)
    if evaluator_type == "coco":
        return DatasetEvaluators([coco, *sem_seg])
    nuclei = NucleiEvaluator(
        dataset_name,
        score_threshold=cfg.TEST.SCORE_THRESH_LABELS,
        max_dets=max_dets,
        output_dir=output_dir,
    )
    return DatasetEvaluators([coco, nuclei, *sem_seg])


def measured_metrics(cfg: CfgNode, dataset_name: str) -> list[str]:
    """Names of what :func:`build_evaluator` has measured, if more of it is better: "segm/AP", ...

    Raises:
        NucleiError: as :func:`build_evaluator`.
    """
    average_precision = coco_ap(dataset_to_coco([]), [], "segm", 1)
    tasks = {"segm": average_precision, "bbox": average_precision}
    if _evaluator_type(dataset_name) == "nuclei":
        tasks["nuclei"] = ["_".join(path) for path in HEADLINE if is_better_high(path)]
        tasks["boundary"] = [f"AP_{name}" for name in boundary_ap([])]
    for evaluator in build_sem_seg_evaluators(cfg, dataset_name):
        classes = evaluator.class_names
        tasks["sem_seg"] = sem_seg_scores(np.zeros((len(classes), len(classes))), classes)
    return [f"{task}/{metric}" for task, metrics in tasks.items() for metric in metrics]


def _evaluator_type(dataset_name: str) -> str:
    known = MetadataCatalog.get(dataset_name).get("evaluator_type", "nuclei")
    check_choice(f"evaluator_type of {dataset_name}", known, ("nuclei", "coco"))
    return known

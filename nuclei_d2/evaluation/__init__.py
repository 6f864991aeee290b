"""Evaluators, chosen by a data set's ``evaluator_type``."""

from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator, DatasetEvaluators

from nuclei_d2.config import CfgNode, check_choice
from nuclei_d2.evaluation.coco_evaluation import NucleiCOCOEvaluator
from nuclei_d2.evaluation.nuclei_evaluation import NucleiEvaluator
from nuclei_d2.evaluation.sem_seg_evaluation import (
    NucleiSemSegEvaluator,
    build_sem_seg_evaluators,
)

__all__ = ["NucleiCOCOEvaluator", "NucleiEvaluator", "NucleiSemSegEvaluator", "build_evaluator"]


def build_evaluator(cfg: CfgNode, dataset_name: str, output_dir: str | None) -> DatasetEvaluator:
    """The evaluator of a registered data set, by its metadata's ``evaluator_type``.

    "nuclei" (the default) gives COCO's numbers, boundary AP and the label-based metrics, "coco"
    COCO's alone. Models that return ``sem_seg`` have its pixels scored, too.

    Raises:
        NucleiError: the metadata's ``evaluator_type`` is none we know.
    """
    evaluator_type = MetadataCatalog.get(dataset_name).get("evaluator_type", "nuclei")
    check_choice(f"evaluator_type of {dataset_name}", evaluator_type, ("nuclei", "coco"))
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

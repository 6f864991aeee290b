"""Evaluators, chosen by a data set's ``evaluator_type``."""

from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator

from nuclei_d2.config import CfgNode, check_choice
from nuclei_d2.evaluation.coco_evaluation import NucleiCOCOEvaluator

__all__ = ["NucleiCOCOEvaluator", "build_evaluator"]


def build_evaluator(cfg: CfgNode, dataset_name: str, output_dir: str | None) -> DatasetEvaluator:
    """The evaluator of a registered data set.

    Raises:
        NucleiError: the metadata's ``evaluator_type`` is none we know.
    """
    evaluator_type = MetadataCatalog.get(dataset_name).get("evaluator_type", "nuclei")
    check_choice(f"evaluator_type of {dataset_name}", evaluator_type, ("nuclei", "coco"))
    return NucleiCOCOEvaluator(
        dataset_name, max_dets=cfg.TEST.DETECTIONS_PER_IMAGE, output_dir=output_dir
    )

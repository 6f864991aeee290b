"""What stops a run or spoils its numbers: found before it starts, not in its results."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from pycocotools import mask as mask_util

from nuclei_d2.config_checks import check_choice
from nuclei_d2.data.datasets.coco import annotations_as_rle
from nuclei_d2.data.image_io import read_label
from nuclei_d2.evaluation import measured_metrics
from nuclei_d2.utils.errors import NucleiError

# A detector needs several proposals for every nucleus. On full images of DSB 2018, caps of two per
# nucleus lost 1 to 3 % of the sure detections (score > 0.5) of a Mask R-CNN, caps of one 5 to 12 %.
_PROPOSALS_PER_NUCLEUS = 2
_RPN_CAPS = ("PRE_NMS_TOPK_TEST", "POST_NMS_TOPK_TEST")


def check_run(cfg: CfgNode, eval_only: bool) -> None:
    """Look at what a training, or an evaluation, needs beyond a config that can be loaded.

    Raises:
        NucleiError: no data set; a metric that is not measured.
    """
    sets = "TEST" if eval_only else "TRAIN"
    if not cfg.DATASETS[sets]:
        raise NucleiError(f"DATASETS.{sets} is empty: name a data set")
    if cfg.DATASETS.VAL and cfg.TEST.EVAL_PERIOD > 0 and not eval_only:
        check_choice("TEST.BEST_METRIC", cfg.TEST.BEST_METRIC, best_metrics(cfg))


def best_metrics(cfg: CfgNode) -> list[str]:
    """Names of what the evaluators of ``DATASETS.VAL`` measure, if more of it is better: "segm/AP",
    ..., or, of several sets, "<name>/segm/AP", ...
    """
    several = len(cfg.DATASETS.VAL) > 1
    return [
        f"{name}/{metric}" if several else metric
        for name in cfg.DATASETS.VAL
        for metric in measured_metrics(cfg, name)
    ]


def data_warnings(cfg: CfgNode, evaluated: Iterable[str], trained: Iterable[str] = ()) -> list[str]:
    """One line for every thing about the data sets that would make the numbers worthless.

    These are: no nuclei in a set; crowds in an evaluated one; more nuclei in an evaluated image
    than the RPN's caps leave room for; annotations that are older than the label images they were
    made from.

    Args:
        cfg: of the run.
        evaluated: names of registered sets that are evaluated on.
        trained: of those that are trained on.

    Raises:
        NucleiError: a set cannot be read.
    """
    warnings = []
    for name in dict.fromkeys(trained):
        if not _fullest(DatasetCatalog.get(name)):
            warnings.append(f"{name} has no nuclei at all: training on it finds none")
    for name in dict.fromkeys(evaluated):
        records = DatasetCatalog.get(name)
        fullest = _fullest(records)
        if not fullest:
            warnings.append(f"{name} has no nuclei at all: AP and F1 are undefined on it")
        crowds = sum(a.get("iscrowd", 0) for r in records for a in r.get("annotations", []))
        if crowds:
            warnings.append(
                f"{name} has {crowds} crowd annotations: box and mask AP ignore what is found in "
                "them, all other metrics count it as spurious"
            )
        if cfg.MODEL.META_ARCHITECTURE.endswith("RCNN"):
            warnings += _rpn_warnings(cfg, name, fullest)
        warnings += _stale_warnings(name, records)
    return warnings


def _fullest(records: list[dict[str, Any]]) -> int:
    """Nuclei in the fullest image; crowds are none."""
    return max(
        sum(not a.get("iscrowd", 0) for a in record.get("annotations", [])) for record in records
    )


def _rpn_warnings(cfg: CfgNode, name: str, fullest: int) -> list[str]:
    needed = _PROPOSALS_PER_NUCLEUS * fullest
    return [
        f"MODEL.RPN.{key} = {cfg.MODEL.RPN[key]} binds: the fullest image of {name} has {fullest} "
        f"nuclei, each of which needs several proposals; set it to {needed} or more"
        for key in _RPN_CAPS
        if cfg.MODEL.RPN[key] < needed
    ]


def _stale_warnings(name: str, records: list[dict[str, Any]]) -> list[str]:
    """Label images that were edited after the annotations had been made from them.

    Training reads the label images, evaluation the annotations. Only files younger than the
    annotations are read: copying makes files young, too, so the nuclei's areas decide.
    """
    json_file = Path(MetadataCatalog.get(name).get("json_file", ""))
    if not json_file.is_file():
        return []
    written = json_file.stat().st_mtime
    stale = [
        record["label_file_name"]
        for record in records
        if _has_label_image(record)
        and Path(record["label_file_name"]).stat().st_mtime > written
        and not _same_areas(record)
    ]
    if not stale:
        return []
    others = f" and {len(stale) - 1} more" if len(stale) > 1 else ""
    return [
        f"{stale[0]}{others}: changed after {json_file} was made from it, so {name} is evaluated "
        "against the old nuclei; prepare the data set again"
    ]


def _has_label_image(record: dict[str, Any]) -> bool:
    """Whether there is one from which the annotations were made, nucleus by nucleus."""
    path = record.get("label_file_name")
    return path is not None and Path(path).is_file() and not record.get("overlaps", False)


def _same_areas(record: dict[str, Any]) -> bool:
    """Whether label k has as many pixels as the k-th annotation, for all k."""
    labels = read_label(record["label_file_name"])
    annotated = [int(mask_util.area(a["segmentation"])) for a in annotations_as_rle(record)]
    return np.bincount(labels.ravel(), minlength=1)[1:].tolist() == annotated

"""Measure what a run predicted, the same way for every model and program.

``python -m nuclei_d2.study.measure REQUEST`` does it in a process of its own; the request is a
JSON file with the arguments of :func:`measure`.

The least score of a prediction that counts is chosen on the validation set, never on a test set.
"""

import argparse
import base64
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from nuclei_d2.data.datasets.statistics import find_touching
from nuclei_d2.evaluation.boundary import BOUNDARIES, compute_overlaps
from nuclei_d2.evaluation.boundary_ap import ScoredImage
from nuclei_d2.evaluation.comparison import Evaluation, evaluate_files
from nuclei_d2.evaluation.inputs import (
    GroundTruth,
    ScoredMasks,
    open_ground_truth,
    open_predictions,
)
from nuclei_d2.evaluation.instances import LabelLayers, layers_from_predictions
from nuclei_d2.evaluation.matching import IOU_THRESHOLDS, true_positives
from nuclei_d2.evaluation.scores import ImageScores
from nuclei_d2.study.contested import contested_pixels
from nuclei_d2.utils.errors import NucleiError, run_tool
from nuclei_d2.utils.files import write_json

SCORE_THRESHOLDS = (*(k / 20 for k in range(20)), 0.97, 0.99)  # 0, 0.05 .. 0.95, and two more
HITS = ("mask", *BOUNDARIES)  # what a prediction can hit by: mask IoU, or boundary IoU


def measure(
    val: Sequence[str] | None, tests: Mapping[str, Sequence[str]], output: str, max_dets: int
) -> None:
    """Choose the score threshold on VAL and write ``<output>/<test>.json`` for every test.

    Args:
        val: ground truth and predictions, paths as tools/evaluate.py takes them; None for
            predictions without scores.
        tests: the same for every test set, by its name.
        output: a folder.
        max_dets: most predictions of an image that AP counts.
    """
    threshold, tried = 0.0, {}
    if val is not None:
        threshold, tried = choose_score_threshold(*val)
    for name, (truth, predictions) in tests.items():
        content = measure_set(truth, predictions, threshold, max_dets)
        content = {"test": name, "score_threshold": threshold, "validation": tried, **content}
        write_json(Path(output) / f"{name}.json", content, indent=None)


# ------------------------------------------------------------------------- score threshold


def choose_score_threshold(truth: str, predictions: str) -> tuple[float, dict[str, float]]:
    """The least score, of :data:`SCORE_THRESHOLDS`, with which the predictions do best.

    Best is TP / (TP + FP + FN) of all images together, mean over IoU 0.50, 0.55 .. 0.95, which
    also chooses the settings of U-Net decoders. Of equals the one nearest to 0.5 is taken.

    Returns:
        The threshold, and what each reaches, by its name ("0.50").

    Raises:
        NucleiError: the ground truth has no nuclei.
    """
    gt = open_ground_truth(truth)
    found = open_predictions(predictions, gt)
    sums = np.zeros((len(SCORE_THRESHOLDS), len(IOU_THRESHOLDS) + 2))
    for name in tqdm(sorted(gt.images), "score threshold", unit="image"):
        sums += _counts(gt.images[name].read(), found.images[name].read())
    matched, objects = sums[:, :-2], sums[:, -2:].sum(axis=1, keepdims=True)
    if not sums[0, -2]:
        raise NucleiError(f"{truth}: no nuclei to choose a score threshold by")
    scores = (matched / (objects - matched)).mean(axis=1)
    best = max(
        range(len(SCORE_THRESHOLDS)), key=lambda k: (scores[k], -abs(SCORE_THRESHOLDS[k] - 0.5))
    )
    names = [f"{t:.2f}" for t in SCORE_THRESHOLDS]
    tried = {name: round(float(s), 4) for name, s in zip(names, scores, strict=True)}
    return SCORE_THRESHOLDS[best], tried


def _counts(gt: LabelLayers, found: ScoredMasks) -> np.ndarray:
    """(thresholds, 12) of one image: true positives at IOU_THRESHOLDS, nuclei, predictions."""
    rows = np.zeros((len(SCORE_THRESHOLDS), len(IOU_THRESHOLDS) + 2))
    before = -1
    for k, threshold in enumerate(SCORE_THRESHOLDS):
        count = int((found.scores >= threshold).sum())
        if count == before:  # the same predictions as with the last threshold
            rows[k] = rows[k - 1]
            continue
        before = count
        pred = layers_from_predictions(found.masks, found.scores, threshold, gt)
        overlap, _ = compute_overlaps(gt, pred)
        sizes = len(overlap.gt_areas), len(overlap.pred_areas)
        rows[k] = *true_positives(overlap, overlap.iou), *sizes
    return rows


# ------------------------------------------------------------------------------- test sets


def measure_set(
    truth: str, predictions: str, score_threshold: float, max_dets: int
) -> dict[str, Any]:
    """Everything about one test set that a report needs: see :class:`Measured`."""
    gt = open_ground_truth(truth)
    found = open_predictions(predictions, gt)
    (evaluation,) = evaluate_files(gt, [found], score_threshold, max_dets)
    return {
        "names": evaluation.names,
        "touching": [_touching(gt, name) for name in evaluation.names],
        "images": _image_columns(evaluation.images),
        "scored": _pack_hits(evaluation.scored) if evaluation.scored else None,
        "coco": _coco(evaluation),
        "contested": contested_pixels(gt, found, score_threshold),
    }


def _touching(truth: GroundTruth, name: str) -> int:
    """Nuclei of an image that have another one directly beside them."""
    layers = truth.images[name].read()
    return int(find_touching(layers.labels.max(axis=0)).sum())


def _coco(evaluation: Evaluation) -> dict[str, Any] | None:
    coco = evaluation.coco
    return coco and {task: coco[task] for task in ("bbox", "segm", "boundary")}


def _image_columns(images: Sequence[ImageScores]) -> dict[str, list]:
    """Field of ImageScores -> its value for every image, rounded to what matters."""
    rows = [asdict(image) for image in images]
    return {
        field.name: [_rounded(row[field.name]) for row in rows] for field in fields(ImageScores)
    }


def _rounded(value: Any) -> Any:
    return np.round(value, 5).tolist()


def _pack_hits(scored: Sequence[ScoredImage]) -> dict[str, Any]:
    """Predictions of all images, best first, as columns of 16-bit integers in text.

    ``image`` is the index of each one's image; every other column has bit k set where the
    prediction hits at the k-th of IOU_THRESHOLDS. Scores are not kept: AP needs their order only.
    """
    order = np.argsort(-np.concatenate([image.scores for image in scored]), kind="stable")
    owners = np.repeat(np.arange(len(scored)), [len(image.scores) for image in scored])
    bits = 1 << np.arange(len(IOU_THRESHOLDS))
    columns = {"image": owners}
    for k, name in enumerate(HITS):
        hits = [image.hits[k - 1] if k else image.mask_hits for image in scored]
        columns[name] = bits @ np.concatenate(hits, axis=1)
    return {name: _pack(column[order]) for name, column in columns.items()}


def _pack(column: np.ndarray) -> str:
    data = column.astype("<u2").tobytes()
    return base64.b85encode(zlib.compress(data, 9)).decode("ascii")


def _unpack(text: str) -> np.ndarray:
    return np.frombuffer(zlib.decompress(base64.b85decode(text)), "<u2").astype(np.int64)


# -------------------------------------------------------------------------------- reading


class Measured(NamedTuple):
    """One run's predictions on one test set of n images."""

    names: list[str]
    touching: np.ndarray  # (n,) nuclei that touch another one
    images: list[ImageScores]  # (n,)
    owner: np.ndarray  # (P,) index of the image of every scored prediction, best first
    hits: dict[str, np.ndarray]  # by name of HITS: (10, P) bool; {} without scores
    score_threshold: float
    validation: float | None  # what chose the threshold: accuracy on VAL; None without scores
    coco: dict[str, Any] | None  # AP in percent
    contested: dict[str, Any] | None  # see nuclei_d2.study.contested


def read_measured(path: Path) -> Measured:
    """What :func:`measure` wrote.

    Raises:
        NucleiError: it is not such a file.
    """
    try:
        content = json.loads(path.read_bytes())
        rows = zip(*content["images"].values(), strict=True)
        images = [_image_scores(zip(content["images"], row, strict=True)) for row in rows]
        scored = {key: _unpack(text) for key, text in (content["scored"] or {}).items()}
        return Measured(
            names=content["names"],
            touching=np.array(content["touching"]),
            images=images,
            owner=scored.pop("image", np.zeros(0, int)),
            hits={name: _bits(column) for name, column in scored.items()},
            score_threshold=content["score_threshold"],
            validation=content["validation"].get(f"{content['score_threshold']:.2f}"),
            coco=content["coco"],
            contested=content["contested"],
        )
    except OSError as error:
        raise NucleiError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError, zlib.error) as error:
        raise NucleiError(
            f"{path}: not a study's result file ({error}); measure it again"
        ) from error


def _image_scores(values) -> ImageScores:
    return ImageScores(**{k: np.array(v) if isinstance(v, list) else v for k, v in values})


def _bits(column: np.ndarray) -> np.ndarray:
    return (column >> np.arange(len(IOU_THRESHOLDS))[:, None] & 1).astype(bool)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure a run of a study.")
    parser.add_argument("request", help="JSON file with the arguments of measure()")
    measure(**json.loads(Path(parser.parse_args().request).read_text()))


if __name__ == "__main__":
    run_tool(main)

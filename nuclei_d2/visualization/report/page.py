"""The report's HTML: one file without scripts that loads nothing from anywhere."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nuclei_d2 import __version__
from nuclei_d2.data.datasets.sources import SourceFile
from nuclei_d2.evaluation.bootstrap import FEW_IMAGES, LEVEL
from nuclei_d2.evaluation.boundary_ap import ScoredImage
from nuclei_d2.evaluation.comparison import Evaluation
from nuclei_d2.evaluation.inputs import GroundTruth
from nuclei_d2.evaluation.matching import DETECTION_IOU, IOU_THRESHOLDS
from nuclei_d2.evaluation.scores import ERRORS, HEADLINE, SIZE_NAMES, definition, is_better_high
from nuclei_d2.evaluation.scores import Path as MetricPath
from nuclei_d2.visualization.report.charts import Axis, bar_chart, line_chart, marker, style
from nuclei_d2.visualization.report.curves import (
    FEWEST,
    by_threshold,
    precision_recall,
    reliability,
    score_edges,
)
from nuclei_d2.visualization.report.findings import (
    METRICS,
    QUESTIONS,
    WORDS,
    Statistics,
    answer,
    cost_rows,
    format_value,
)
from nuclei_d2.visualization.report.overlays import KINDS, draw_overlay, pick_images
from nuclei_d2.visualization.report.templates import render_template

_TENTHS = np.arange(0, 11, 2) / 10
_RATE = Axis("", 0, 1, _TENTHS)
_IOU = Axis("IoU threshold", 0.5, 0.95, (0.5, 0.6, 0.7, 0.8, 0.9))
_SIZES = [
    f"≥ {low}" if high == "inf" else f"{low} to {high}"
    for low, high in (name.split("-") for name in SIZE_NAMES)
]
_CURVES = {"f1": "F1", "accuracy": "DSB score"}
_FAVOUR = (
    "Where the interval of a difference excludes 0, the better method is named; among so many rows "
    "some may do so by chance."
)
_NO_FAVOUR = "So few images cannot settle which method is better, whatever the interval."
_PRECISION_RECALL = {0: "0.50", 5: "0.75"}  # index in IOU_THRESHOLDS


def render_report(
    names: Sequence[str],
    truth: GroundTruth,
    evaluations: Sequence[Evaluation],
    weights: np.ndarray,
    settings: dict[str, Any],
    raw_images: dict[str, SourceFile],
    results: Sequence[dict[str, Any]] = (),
) -> str:
    """One self-contained HTML page about one or several prediction sets.

    Args:
        names: of the sets; untrusted, like every file name.
        truth: what the sets were measured with.
        evaluations: of the sets, from ``evaluate_files``.
        weights: (B, n) from ``bootstrap_weights``.
        settings: shown; "score_threshold" is the one of ``evaluate_files``.
        raw_images: from ``find_raw_images``; where one is missing, outlines are on black.
        results: content of each set's ``results.json``, for the table of costs; or none.

    Raises:
        NucleiError: an image cannot be read, or is of another size than its nuclei.
    """
    statistics = Statistics(evaluations, weights)
    return render_template(
        "page.html",
        names=names,
        styles=[style(k) for k in range(len(names))],
        markers=[marker(k) for k in range(len(names))],
        level=f"{LEVEL:.0%}",
        answers=[answer(question, names, statistics) for question in QUESTIONS],
        words=WORDS,
        n_images=evaluations[0].table.n_images,
        n_nuclei=sum(image.n_gt for image in evaluations[0].images),
        warnings=list(dict.fromkeys(w for e in evaluations for w in e.warnings)),
        metrics=METRICS,
        main_rows=_metric_rows([metric.path for metric in METRICS], len(names), statistics),
        all_rows=_metric_rows(HEADLINE, len(names), statistics),
        definition=definition,
        is_better_high=is_better_high,
        favour=_FAVOUR if statistics.n_images >= FEW_IMAGES else _NO_FAVOUR,
        detection_iou=DETECTION_IOU,
        curves=_curves(names, evaluations),
        errors=_errors(names, evaluations),
        scores=_scores(names, evaluations),
        kinds=KINDS,
        cases=_cases(names, truth, evaluations, settings["score_threshold"], raw_images),
        has_images=bool(raw_images),
        costs=cost_rows(results),
        has_results=bool(results),
        settings=settings,
        truth_name=Path(truth.path).name,
        resamples=len(weights),
        version=__version__,
        paths=[evaluation.predictions.path for evaluation in evaluations],
    )


def _metric_rows(paths: Sequence[MetricPath], n_sets: int, statistics: Statistics) -> list[dict]:
    """A row for each metric: the sets' values with intervals, and differences to the first."""
    return [
        {
            "path": path,
            "values": [format_value(value, path) for value in statistics.values(path)],
            "intervals": [statistics.interval(k, path) for k in range(n_sets)],
            "changes": [statistics.change(0, k, path) for k in range(1, n_sets)],
        }
        for path in paths
    ]


def _curves(names: Sequence[str], evaluations: Sequence[Evaluation]) -> list[dict]:
    """F1 and DSB score against the IoU threshold."""
    found = []
    for rate, title in _CURVES.items():
        rows = [by_threshold(evaluation.table, rate) for evaluation in evaluations]
        chart = line_chart(
            f"{title} against IoU threshold. {_describe(names, rows)}",
            _IOU,
            _RATE._replace(label=title),
            [(IOU_THRESHOLDS, row) for row in rows],
        )
        cells = [[format_value(row[k]) for row in rows] for k in range(len(rows[0]))]
        table = list(zip(IOU_THRESHOLDS, cells, strict=True))
        found.append({"title": title, "chart": chart, "rows": table})
    return found


def _describe(names: Sequence[str], rows: Sequence[np.ndarray]) -> str:
    shown = {0: "0.50", 5: "0.75", 8: "0.90"}
    return " ".join(
        f"{name}: {', '.join(f'{format_value(row[k])} at {t}' for k, t in shown.items())}."
        for name, row in zip(names, rows, strict=True)
        if np.isfinite(row).all()
    )


def _errors(names: Sequence[str], evaluations: Sequence[Evaluation]) -> dict[str, Any]:
    """Counts of every kind of error, in all and by size."""
    counts = [sum(image.errors for image in e.images) for e in evaluations]  # (4, 4) each
    found = [sum(image.found_sizes for image in e.images) for e in evaluations]
    charts = {}
    for k, error in enumerate(ERRORS):
        described = [
            f"{name}: {', '.join(map(str, part[k]))}."
            for name, part in zip(names, counts, strict=True)
        ]
        charts[error] = bar_chart(
            f"{error.capitalize()} by size, {', '.join(_SIZES)} px². {' '.join(described)}",
            ["all", *_SIZES],
            [[int(part[k].sum()), *part[k].tolist()] for part in counts],
        )
    return {
        "charts": charts,
        "sizes": [
            {
                "name": size,
                "nuclei": int(sum(image.gt_sizes[s] for image in evaluations[0].images)),
                "rows": {
                    "found at IoU 0.50": [int(part[s]) for part in found],
                    **{e: [int(part[k, s]) for part in counts] for k, e in enumerate(ERRORS)},
                },
            }
            for s, size in enumerate(_SIZES)
        ],
    }


def _scores(names: Sequence[str], evaluations: Sequence[Evaluation]) -> dict[str, Any]:
    """Average precision, precision against recall, and the reliability of the scores."""
    scored = [evaluation.scored for evaluation in evaluations]
    have = [evaluation.predictions.has_scores for evaluation in evaluations]
    return {
        "without": [name for name, has in zip(names, have, strict=True) if not has],
        "any": any(have),
        "ap": [
            [*(_percent(e.coco["segm"][k]) for k in ("AP", "AP50", "AP75")), e.coco["max_dets"]]
            if e.coco
            else []
            for e in evaluations
        ],
        "curves": {
            title: line_chart(
                f"Precision against recall at IoU {title}; the area below is AP.",
                _RATE._replace(label="recall"),
                _RATE._replace(label="precision"),
                [precision_recall(part, k) for part in scored],
            )
            for k, title in _PRECISION_RECALL.items()
        },
        **_reliability(names, scored),
    }


def _percent(value: float) -> str:
    return "" if np.isnan(value) else f"{value:.1f}"


def _reliability(names: Sequence[str], scored: Sequence[Sequence[ScoredImage]]) -> dict[str, Any]:
    edges = score_edges([image for part in scored for image in part])
    parts = [reliability(part, edges) for part in scored]
    gaps = ", ".join(
        f"{part.error:.3f} ({name})"
        for name, part in zip(names, parts, strict=True)
        if part.counts.any()
    )
    chart = line_chart(
        f"Share of correct predictions against their score. Mean gap: {gaps}.",
        Axis("score", edges[0], edges[-1], edges[::2]),
        _RATE._replace(label="share correct"),
        [part.line() for part in parts],
        diagonal=edges[0] == 0 and edges[-1] == 1,
    )
    rows = [
        {
            "bin": f"{edges[k]:.2g} to {edges[k + 1]:.2g}",
            "cells": [(int(part.counts[k]), format_value(part.shares[k])) for part in parts],
        }
        for k in range(len(edges) - 1)
    ]
    return {"reliability": chart, "fewest": FEWEST, "gaps": gaps, "bins": rows}


def _cases(
    names: Sequence[str],
    truth: GroundTruth,
    evaluations: Sequence[Evaluation],
    score_threshold: float,
    raw_images: dict[str, SourceFile],
) -> dict[str, list[dict]]:
    """The worst and the median images, each with every set's overlay."""
    scores = np.array([e.table.image_metrics()["f1", "mean"] for e in evaluations])
    names_of_images = evaluations[0].names

    def case(k: int) -> dict:
        image = names_of_images[k]
        overlays = [
            draw_overlay(
                truth.images[image],
                evaluation.predictions.images[image],
                score_threshold,
                raw_images.get(image),
            )
            for evaluation in evaluations
        ]
        return {
            "name": image,
            "sets": [
                {
                    "name": name,
                    "overlay": overlay,
                    "f1": format_value(row[k]),
                    "rank": _rank(row, k),
                }
                for name, overlay, row in zip(names, overlays, scores, strict=True)
            ],
        }

    worst, median = pick_images(scores)
    return {"worst": [case(k) for k in worst], "median": [case(k) for k in median]}


def _rank(scores: np.ndarray, k: int) -> str:
    """Of one image among those where the score is defined."""
    if np.isnan(scores[k]):
        return ""
    return f"rank {(scores < scores[k]).sum() + 1} of {np.isfinite(scores).sum()} from the worst"

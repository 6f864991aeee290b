"""The numbers of the report's curves."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from nuclei_d2.evaluation.boundary_ap import RECALLS, ScoredImage, precision_curve
from nuclei_d2.evaluation.matching import IOU_THRESHOLDS
from nuclei_d2.evaluation.scores import ScoreTable

FEWEST = 20  # predictions behind a point of the reliability


def by_threshold(table: ScoreTable, rate: str) -> np.ndarray:
    """(10,) pooled "f1", "accuracy" .. at each of ``IOU_THRESHOLDS``."""
    metrics = table.metrics()
    return np.array([metrics["pooled", rate, f"{t:.2f}"][0] for t in IOU_THRESHOLDS])


def precision_recall(
    scored: Sequence[ScoredImage], threshold: int
) -> tuple[np.ndarray, np.ndarray]:
    """Recall and COCO's interpolated precision at one of ``IOU_THRESHOLDS``, by its index.

    The curve ends at the highest recall that is reached.
    """
    scores, hits = _pool(scored, threshold)
    n_gt = sum(image.n_gt for image in scored)
    if not n_gt:
        return np.zeros(0), np.zeros(0)
    precision = precision_curve(hits[np.argsort(-scores, kind="stable")], n_gt)
    reached = precision > 0
    return RECALLS[reached], precision[reached]


def _pool(scored: Sequence[ScoredImage], threshold: int) -> tuple[np.ndarray, np.ndarray]:
    """(D,) scores and hits of all images."""
    scores = [image.scores for image in scored]
    hits = [image.mask_hits[threshold] for image in scored]
    return np.concatenate([[], *scores]), np.concatenate([np.zeros(0, bool), *hits])


class Reliability(NamedTuple):
    """Do scores mean what they say? By bins of the score; NaN in empty ones."""

    counts: np.ndarray  # (bins,) predictions
    scores: np.ndarray  # (bins,) their mean score
    shares: np.ndarray  # (bins,) share that is correct at IoU 0.5
    error: float  # expected calibration error: mean of |share - score|, weighted by counts

    def line(self) -> tuple[np.ndarray, np.ndarray]:
        """Scores and shares; NaN where fewer than ``FEWEST`` predictions say little."""
        return self.scores, np.where(self.counts >= FEWEST, self.shares, np.nan)


def score_edges(scored: Sequence[ScoredImage], bins: int = 10) -> np.ndarray:
    """Edges of equal bins from 0 to 1, or further if scores go beyond."""
    scores = np.concatenate([[0.0, 1.0], *(image.scores for image in scored)])
    return np.linspace(scores.min(), scores.max(), bins + 1)


def reliability(scored: Sequence[ScoredImage], edges: np.ndarray) -> Reliability:
    """Scores against the share of correct predictions (Guo et al., On calibration of modern neural
    networks, ICML 2017, section 2).

    Args:
        scored: the images' predictions, all scores.
        edges: (bins + 1,) increasing; the last one belongs to the last bin.
    """
    scores, hits = _pool(scored, 0)
    places = np.clip(np.searchsorted(edges, scores, side="right") - 1, 0, len(edges) - 2)
    counts, score_sums, hit_sums = (
        np.bincount(places, weights, len(edges) - 1) for weights in (None, scores, hits)
    )
    filled = np.where(counts > 0, counts, np.nan)
    means, shares = score_sums / filled, hit_sums / filled
    gap = np.nansum(np.abs(shares - means) * counts) / max(len(scores), 1)
    return Reliability(counts, means, shares, float(gap) if len(scores) else float("nan"))

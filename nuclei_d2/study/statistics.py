"""Numbers of models with several seeds, and how sure they are.

Two things make a number uncertain: which images happened to be tested, and which random numbers the
training happened to draw. An interval counts both. The variance of the mean over seeds is that of a
paired bootstrap over images plus, for each model, that of its seeds divided by their number; the
quantile is Student's, with the degrees of freedom of Welch and Satterthwaite (B. L. Welch,
Biometrika 34, 1947), as two or three seeds tell little of their own spread. Trainings count as
independent, those of one seed too.

Images with many nuclei weigh more: n images tell as much as (sum w)^2 / sum w^2 equal ones
(L. Kish, Survey Sampling, 1965), with w the nuclei of each.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
from scipy.stats import t as student

from nuclei_d2.evaluation.bootstrap import LEVEL, bootstrap_weights
from nuclei_d2.evaluation.boundary import TOLERANCE
from nuclei_d2.evaluation.boundary_ap import RECALLS
from nuclei_d2.evaluation.matching import IOU_THRESHOLDS
from nuclei_d2.evaluation.scores import ERRORS, HEADLINE, Path, ScoreTable
from nuclei_d2.study.measure import Measured
from nuclei_d2.utils.errors import NucleiError

# Share of an image's nuclei that touch another one: few, some, many.
TOUCHING_EDGES = (0.0, 0.1, 0.3, 1.0)


class Scores:
    """One run on the n images of one test set, under W weightings of the images."""

    def __init__(self, measured: Measured, weights: np.ndarray):
        """
        Args:
            measured: of the run.
            weights: (W, n) how often each image counts.
        """
        self._measured = measured
        self._weights = weights
        self._table = ScoreTable(measured.images).metrics(weights)
        self._aps: dict[str, np.ndarray] = {}
        self.nuclei = weights @ np.array([image.n_gt for image in measured.images])

    def at(self, path: Path) -> np.ndarray:
        """(W,) a label-based metric by its place, see ``ScoreTable.metrics``."""
        return self._table[path]

    def ap(self, name: str) -> np.ndarray:
        """(W, 10) AP in percent by mask or boundary IoU (a name of ``HITS``) at IOU_THRESHOLDS.

        NaN for predictions without scores.
        """
        if name not in self._aps:
            rows = self._measured.hits.get(name)
            if rows is None:
                aps = np.full((len(self._weights), len(IOU_THRESHOLDS)), np.nan)
            else:
                aps = weighted_ap(rows, self._weights[:, self._measured.owner], self.nuclei)
            self._aps[name] = 100 * aps
        return self._aps[name]

    def overlooked(self) -> np.ndarray:
        """(W,) share of the nuclei that no prediction of any score has at IoU 0.5.

        NaN for predictions without scores.
        """
        if "mask" not in self._measured.hits:
            return np.full(len(self._weights), np.nan)
        owners = self._measured.owner[self._measured.hits["mask"][0]]
        found = self._weights[:, owners].sum(axis=1)
        return np.where(self.nuclei > 0, 1 - found / np.maximum(self.nuclei, 1), np.nan)

    def recall_by_size(self) -> np.ndarray:
        """(W, 4) share of the nuclei found at IoU 0.5, by ``SIZE_NAMES``."""
        images = self._measured.images
        found, all_ = (
            self._weights @ np.stack([getattr(image, name) for image in images])
            for name in ("found_sizes", "gt_sizes")
        )
        with np.errstate(invalid="ignore"):
            return np.where(all_ > 0, found / np.maximum(all_, 1), np.nan)


def weighted_ap(rows: np.ndarray, drawn: np.ndarray, nuclei: np.ndarray) -> np.ndarray:
    """COCO's average precision, 0 to 1, of a set in which images occur several times or never.

    Args:
        rows: (T, P) bool, whether each prediction, best first, is a true positive, in T ways.
        drawn: (W, P) how often its image occurs, for each of W draws.
        nuclei: (W,) in all images of a draw.

    Returns:
        (W, T); NaN for a draw without nuclei.
    """
    needed = _hits_for_recall(nuclei)
    seen = np.cumsum(drawn, axis=1)
    aps = []
    for hits in rows:
        found = np.cumsum(drawn[:, hits], axis=1)
        precision = found / np.maximum(seen[:, hits], 1)
        # The best at this recall or a higher one; none beyond the last hit.
        precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        precision = np.pad(precision, ((0, 0), (0, 1)))
        aps.append(np.take_along_axis(precision, _first_at_least(found, needed), 1).mean(axis=1))
    return np.where(nuclei[:, None] > 0, np.stack(aps, axis=1), np.nan)


def _hits_for_recall(nuclei: np.ndarray) -> np.ndarray:
    """(W, 101) fewest hits that make a recall of each of RECALLS, computed as hits / nuclei."""
    nuclei = np.maximum(nuclei, 1)[:, None]
    hits = np.maximum(np.floor(RECALLS * nuclei) - 1, 0)
    for _ in range(2):  # rounding can be off by one
        hits += hits / nuclei < RECALLS
    return hits.astype(np.int64)


def _first_at_least(counts: np.ndarray, needed: np.ndarray) -> np.ndarray:
    """(W, R) index in each row of ``counts`` (W, P), increasing, of the first >= ``needed``."""
    rows, width = counts.shape
    # One search for all rows: each is lifted above the one before.
    lift = np.arange(rows)[:, None] * (max(counts.max(initial=0), needed.max(initial=0)) + 1)
    places = np.searchsorted((counts + lift).ravel(), (needed + lift).ravel(), side="left")
    return np.clip(places.reshape(needed.shape) - np.arange(rows)[:, None] * width, 0, width)


# -------------------------------------------------------------------------------- metrics


class Metric(NamedTuple):
    """A number of the report."""

    title: str
    unit: str  # "%", "" (fraction of 1), "px", "per 100 nuclei"
    compute: Callable[[Scores], np.ndarray]  # (W,), 0 or more
    higher_is_better: bool = True
    is_share: bool = False  # of the nuclei

    @property
    def highest(self) -> float:
        """What it can be at most."""
        if self.is_share:
            return 100.0
        return {"%": 100.0, "": 1.0}.get(self.unit, np.inf)


def _ap(name: str, threshold: int | None, scores: Scores) -> np.ndarray:
    aps = scores.ap(name)
    return aps.mean(axis=1) if threshold is None else aps[:, threshold]


def _boundary_ap(scores: Scores) -> np.ndarray:
    return np.mean([scores.ap(name).mean(axis=1) for name in ("1px", "2px", "3px")], axis=0)


def _accuracy(scores: Scores) -> np.ndarray:
    """Mean over IoU 0.50, 0.55 .. 0.90, StarDist's thresholds (Schmidt et al., MICCAI 2018)."""
    values = [scores.at(("pooled", "accuracy", f"{t:.2f}")) for t in IOU_THRESHOLDS[:-1]]
    return np.mean(values, axis=0)


def _per_100(names: Sequence[str], scores: Scores) -> np.ndarray:
    counts = sum(scores.at(("errors", name)) for name in names)
    return np.where(scores.nuclei > 0, 100 * counts / np.maximum(scores.nuclei, 1), np.nan)


def _not_found(scores: Scores) -> np.ndarray:
    return 100 * (1 - scores.at(("pooled", "recall", "0.50")))


def _overlooked(scores: Scores) -> np.ndarray:
    return 100 * scores.overlooked()


def _label(path: Path, scores: Scores) -> np.ndarray:
    return scores.at(path)


_TITLES: dict[Path, str] = {
    ("boundary", "f1"): f"boundary F1, within {TOLERANCE:g} px",
    ("boundary", "hd95"): "distance between outlines of matched nuclei (Hausdorff, 95 %)",
}

METRICS: dict[str, Metric] = {
    "boundary_ap": Metric("boundary AP (mean of 1, 2 and 3 px)", "%", _boundary_ap),
    **{
        f"boundary_ap_{d}": Metric(f"boundary AP at {d}", "%", partial(_ap, d, None))
        for d in ("1px", "2px", "3px", "2%")
    },
    "ap": Metric("mask AP", "%", partial(_ap, "mask", None)),
    "ap50": Metric("mask AP50", "%", partial(_ap, "mask", 0)),
    "ap75": Metric("mask AP75", "%", partial(_ap, "mask", 5)),
    "accuracy": Metric("TP / (TP + FP + FN), mean over IoU 0.50:0.05:0.90", "", _accuracy),
    **{
        f"accuracy_{t}": Metric(
            f"TP / (TP + FP + FN) at IoU 0.{t}",
            "",
            partial(_label, ("pooled", "accuracy", f"0.{t}")),
        )
        for t in (50, 75, 90)
    },
    **{
        "_and_".join(names): Metric(
            " and ".join(names), "per 100 nuclei", partial(_per_100, names), False
        )
        for names in (("merges", "splits"), *((name,) for name in ERRORS))
    },
    "not_found": Metric(
        "nuclei not found at IoU 0.5", "per 100 nuclei", _not_found, False, is_share=True
    ),
    "overlooked": Metric(
        "nuclei not found at IoU 0.5 whatever the score",
        "per 100 nuclei",
        _overlooked,
        False,
        is_share=True,
    ),
    **{
        "_".join(path): Metric(
            _TITLES.get(path, " ".join(path)),
            "px" if path[-1] == "hd95" else "",
            partial(_label, path),
            path[-1] != "hd95",
        )
        for path in HEADLINE
        if path[0] != "errors" and path[1] != "accuracy"
    },
}


# ------------------------------------------------------------------------------- estimates


class Estimate(NamedTuple):
    """A number, its interval over images and trainings, and what each seed says."""

    value: float  # mean over seeds
    low: float
    high: float
    seeds: tuple[float, ...]
    p: float = np.nan  # how often chance alone would bring it so far from 0

    @property
    def is_known(self) -> bool:
        return bool(np.isfinite(self.value))

    @property
    def sign(self) -> int:
        """Of a difference: 1 or -1 where its interval excludes zero, else 0."""
        return int(self.low > 0) - int(self.high < 0)


@dataclass(frozen=True)
class Sample:
    """The seeds of one model on one test set. Weightings: every image once, then B draws."""

    scores: dict[int, Scores]  # by seed
    images: tuple[tuple[str, int], ...]  # name and number of nuclei of each

    @classmethod
    def of(cls, measured: dict[int, Measured]) -> "Sample":
        """
        Raises:
            NucleiError: the seeds were not measured on the same images.
        """
        sets = {
            tuple(zip(m.names, (i.n_gt for i in m.images), strict=True)) for m in measured.values()
        }
        if len(sets) > 1:
            raise NucleiError(_OTHER_IMAGES)
        (images,) = sets
        n = len(images)
        weights = np.concatenate([np.ones((1, n), np.int64), bootstrap_weights(n)])
        return cls({seed: Scores(part, weights) for seed, part in measured.items()}, images)

    @property
    def nuclei(self) -> np.ndarray:
        """(n,) in each image."""
        return np.array([nuclei for _, nuclei in self.images])

    def values(self, compute: Callable[[Scores], np.ndarray]) -> np.ndarray:
        """(seeds, 1 + B, ...) of every seed and weighting."""
        return np.stack([compute(scores) for scores in self.scores.values()])


_OTHER_IMAGES = (
    "results of one test set are of different images: the data were prepared anew in between; "
    "remove the older results, or use other --output and --results"
)


def estimate(
    sample: Sample, compute: Callable[[Scores], np.ndarray], highest: float = np.inf
) -> Estimate:
    """A metric (W,) of one model, which is between 0 and ``highest``; so is its interval.

    None where the metric is the same in all draws.
    """
    values = sample.values(compute)
    found = _summary(values.mean(axis=0), [values[:, 0]], values[:, 0], sample.nuclei)
    low, high = np.clip((found.low, found.high), 0, highest)
    if low == high:  # such as no merge in any image: other images may have some
        low = high = np.nan
    return found._replace(low=float(low), high=float(high))


def difference(first: Sample, second: Sample, compute: Callable[[Scores], np.ndarray]) -> Estimate:
    """``first - second`` on the same images; ``seeds`` are the differences of equal seeds.

    Raises:
        NucleiError: they were not measured on the same images.
    """
    if first.images != second.images:
        raise NucleiError(_OTHER_IMAGES)
    values = [sample.values(compute) for sample in (first, second)]
    mean = values[0].mean(axis=0) - values[1].mean(axis=0)
    common = [seed for seed in first.scores if seed in second.scores]
    pairs = (first.scores[seed] for seed in common), (second.scores[seed] for seed in common)
    seeds = [compute(x)[0] - compute(y)[0] for x, y in zip(*pairs, strict=True)]
    trainings = [part[:, 0] for part in values]
    return _summary(mean, trainings, np.array(seeds), first.nuclei)


def _summary(
    mean: np.ndarray, trainings: Sequence[np.ndarray], seeds: np.ndarray, nuclei: np.ndarray
) -> Estimate:
    """
    Args:
        mean: (1 + B,) over seeds, of every weighting.
        trainings: of each model that it is made of, (its seeds,) numbers.
        seeds: of equal seeds.
        nuclei: (n,) in each image of the test set.
    """
    draws = mean[1:][np.isfinite(mean[1:])]
    if not draws.size:
        return Estimate(float(mean[0]), np.nan, np.nan, tuple(seeds.tolist()))
    several = [part for part in trainings if len(part) > 1]
    # Variances of the mean, and the degrees of freedom that each was estimated with.
    n = len(nuclei)  # a bootstrap's variance is too small by (n - 1) / n
    parts = [(draws.var() * n / (n - 1), max(equal_images(nuclei) - 1, 1))]
    parts += [(part.var(ddof=1) / len(part), len(part) - 1) for part in several]
    variance = sum(part for part, _ in parts)
    if variance == 0:
        p = float(mean[0] == 0)
        return Estimate(float(mean[0]), float(mean[0]), float(mean[0]), tuple(seeds.tolist()), p)
    freedom = variance**2 / sum(part**2 / df for part, df in parts)
    half = student.ppf((1 + LEVEL) / 2, freedom) * np.sqrt(variance)
    p = 2 * student.sf(abs(mean[0]) / np.sqrt(variance), freedom)
    ends = float(mean[0] - half), float(mean[0] + half)
    return Estimate(float(mean[0]), *ends, tuple(seeds.tolist()), float(p))


def equal_images(nuclei: np.ndarray) -> float:
    """How many images with equally many nuclei tell as much as those with ``nuclei`` (n,)."""
    total = nuclei.sum()
    return float(total**2 / np.square(nuclei).sum()) if total else float(len(nuclei))


def holm(p: Sequence[float]) -> list[float]:
    """P-values corrected for their number (S. Holm, Scandinavian Journal of Statistics 6, 1979)."""
    order = np.argsort(p)
    adjusted = np.empty(len(order))
    steps = (len(order) - np.arange(len(order))) * np.asarray(p, float)[order]
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1)
    return adjusted.tolist()


def touching_bins(measured: Measured) -> list[np.ndarray]:
    """Indices of the images with few, some and many touching nuclei, see TOUCHING_EDGES.

    Images without nuclei are in none.
    """
    nuclei = np.array([image.n_gt for image in measured.images])
    share = measured.touching / np.maximum(nuclei, 1)
    bins = np.searchsorted(TOUCHING_EDGES[1:-1], share, side="right")
    return [np.flatnonzero((bins == k) & (nuclei > 0)) for k in range(len(TOUCHING_EDGES) - 1)]


def part_of(measured: Measured, images: Sequence[int]) -> Measured:
    """Some of the images, as a test set of their own."""
    images = np.asarray(images, int)
    position = np.full(len(measured.images), -1)
    position[images] = np.arange(len(images))
    kept = position[measured.owner] >= 0
    return measured._replace(
        names=[measured.names[k] for k in images],
        touching=measured.touching[images],
        images=[measured.images[k] for k in images],
        owner=position[measured.owner][kept],
        hits={name: rows[:, kept] for name, rows in measured.hits.items()},
    )

"""How far a number would move with other images: bootstrap over images, seeded.

Images are drawn with replacement, as many as there are; the interval is that of the percentiles
(Efron & Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13). Nuclei of one image are
not independent, so images are drawn, never nuclei. Of a single image there is no interval, and
those of a few images are too narrow.
"""

import numpy as np

from nuclei_d2.evaluation.scores import Path, ScoreTable

RESAMPLES = 1000
SEED = 0
LEVEL = 0.95
FEW_IMAGES = 10  # with fewer, intervals of a mean hold the truth in clearly less than LEVEL


def bootstrap_weights(n_images: int, resamples: int = RESAMPLES, seed: int = SEED) -> np.ndarray:
    """(resamples, n_images) how often each image is drawn; no rows for fewer than two images."""
    if n_images < 2:
        return np.zeros((0, n_images), np.int64)
    chances = np.full(n_images, 1 / n_images)
    return np.random.default_rng(seed).multinomial(n_images, chances, size=resamples)


def sample_warning(n_images: int) -> str | None:
    """What the number of images means for the intervals; None where they are enough."""
    if n_images == 1:
        return "only one image: no interval can be given, and any difference may be chance"
    if n_images < FEW_IMAGES:
        return f"only {n_images} images: intervals are too narrow, differences may be chance"
    return None


def bootstrap_intervals(
    table: ScoreTable, weights: np.ndarray, level: float = LEVEL
) -> dict[Path, tuple[float, float]]:
    """Lower and upper end of the interval of every metric; NaN where it is undefined."""
    return {
        path: percentile_interval(values, level) for path, values in table.metrics(weights).items()
    }


def paired_differences(
    first: ScoreTable, second: ScoreTable, weights: np.ndarray, level: float = LEVEL
) -> dict[Path, dict[str, float]]:
    """``second - first`` on the same images, for every metric.

    Both are resampled together, so that what is hard for both cancels out.

    Returns:
        "difference", "low" and "high" (its interval) for each metric.
    """
    before, after = first.metrics(), second.metrics()
    resampled = first.metrics(weights), second.metrics(weights)
    differences = {}
    for path in before:
        low, high = percentile_interval(resampled[1][path] - resampled[0][path], level)
        difference = float(after[path][0] - before[path][0])
        differences[path] = {"difference": difference, "low": low, "high": high}
    return differences


def percentile_interval(values: np.ndarray, level: float = LEVEL) -> tuple[float, float]:
    """Of (B,) resampled values, NaN left out; NaN where there are none."""
    values = values[~np.isnan(values)]
    if not values.size:
        return float("nan"), float("nan")
    low, high = np.percentile(values, [50 * (1 - level), 50 * (1 + level)])
    return float(low), float(high)

"""What the report says: answers in a sentence, and the numbers of its tables."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from nuclei_d2.evaluation.bootstrap import FEW_IMAGES, bootstrap_intervals, paired_differences
from nuclei_d2.evaluation.comparison import Evaluation
from nuclei_d2.evaluation.matching import CONTACT_IOU, DETECTION_IOU
from nuclei_d2.evaluation.scores import Path, is_better_high

MAIN: Path = ("pooled", "f1", "mean")
MERGES: Path = ("errors", "merges")
SPLITS: Path = ("errors", "splits")


class Metric(NamedTuple):
    """A row of the headline table."""

    path: Path
    title: str
    meaning: str  # in plain words


METRICS = (
    Metric(
        MAIN,
        "Mean F1",
        "F1 is 2 x correct / (nuclei + predictions): 1 if every nucleus is found and nothing else, "
        "0 if nothing is right. A prediction is correct if its IoU with a nucleus (the area that "
        "both share, divided by the area that either covers) reaches a threshold; one prediction "
        "per nucleus. This is the mean over the thresholds 0.50, 0.55, ..., 0.95, so it rewards "
        "good outlines, too. All images together: every nucleus counts the same.",
    ),
    Metric(
        ("pooled", "f1", "0.50"),
        "F1 at IoU 0.50",
        "F1 where a rough outline is enough: how well nuclei are found.",
    ),
    Metric(
        ("pooled", "f1", "0.75"), "F1 at IoU 0.75", "F1 where the outline has to be good as well."
    ),
    Metric(("pooled", "f1", "0.90"), "F1 at IoU 0.90", "F1 where only very close outlines count."),
    Metric(
        ("pooled", "accuracy", "mean"),
        "DSB score",
        "Correct / (correct + nuclei not found + wrong predictions), mean over the same "
        "thresholds: the score of the Data Science Bowl 2018. StarDist and Cellpose call it "
        "average precision.",
    ),
    Metric(
        ("pooled", "pq"),
        "Panoptic quality",
        "F1 at IoU above 0.5, times the mean IoU of the correct pairs: finding and outlining in "
        "one number.",
    ),
    Metric(
        ("boundary", "f1"),
        "Boundary F1",
        "F1 of outline pixels: correct is what lies within 2 px of an outline of the other side, "
        "whichever nucleus that belongs to.",
    ),
    Metric(
        MERGES,
        "Merges",
        "Predictions that cover several nuclei (IoU above 0.1 with each of them).",
    ),
    Metric(
        SPLITS,
        "Splits",
        "Nuclei that are cut into several predictions (IoU above 0.1 with each of them).",
    ),
    Metric(
        ("errors", "missed"),
        "Missed",
        "Nuclei that no prediction agrees with (IoU above 0.7). Nuclei in a merge usually count "
        "here as well, and so do those with a poor outline.",
    ),
    Metric(
        ("errors", "spurious"),
        "Spurious",
        "Predictions that agree with no nucleus (IoU above 0.7): merges and poor outlines, too.",
    ),
)

# The words of the answers, where they are read first.
WORDS = {
    "merge": f"a prediction that covers several nuclei (IoU above {CONTACT_IOU} with each)",
    "split": f"a nucleus cut into several predictions (IoU above {CONTACT_IOU} with each)",
    "missed": f"a nucleus without a prediction of IoU above {DETECTION_IOU}",
    "spurious": f"a prediction without a nucleus of IoU above {DETECTION_IOU}",
    "IoU": "the area that two outlines share, divided by the area that either covers",
}


# ----------------------------------------------------------------------------- numbers


def format_value(value: float, path: Path = MAIN) -> str:
    """Counts (of errors) as integers, everything else with three digits; nothing for NaN."""
    if np.isnan(value):
        return ""
    return f"{value:,.0f}" if path[0] == "errors" else f"{value:.3f}"


def format_change(value: float, path: Path = MAIN) -> str:
    """With its sign, unless it is rounded to 0."""
    shown = format_value(abs(value), path)
    if not shown.strip("0."):
        return shown
    return ("\N{MINUS SIGN}" if value < 0 else "+") + shown


class Change(NamedTuple):
    """A difference of two sets, formatted."""

    value: str
    interval: str
    favours: int | None  # the better set, if the interval excludes 0, and images are not too few


class Statistics:
    """Every metric of S sets, with bootstrap intervals and paired differences.

    Args:
        evaluations: of the sets, on the same images.
        weights: (B, n) from ``bootstrap_weights``.
    """

    def __init__(self, evaluations: Sequence[Evaluation], weights: np.ndarray):
        self._tables = [evaluation.table for evaluation in evaluations]
        self.n_images = self._tables[0].n_images
        self._weights = weights
        self._intervals = [bootstrap_intervals(table, weights) for table in self._tables]
        self._values = [table.metrics() for table in self._tables]
        self._changes: dict[tuple[int, int], dict[Path, dict[str, float]]] = {}

    def values(self, path: Path) -> np.ndarray:
        """(S,) of a metric."""
        return np.array([values[path][0] for values in self._values])

    def interval(self, k: int, path: Path) -> str:
        """Of set ``k``; nothing where it is undefined."""
        low, high = (format_value(end, path) for end in self._intervals[k][path])
        return f"{low} to {high}" if low else ""

    def change(self, first: int, second: int, path: Path) -> Change:
        """Set ``second`` minus set ``first``."""
        if (first, second) not in self._changes:
            self._changes[first, second] = paired_differences(
                self._tables[first], self._tables[second], self._weights
            )
        change = self._changes[first, second][path]
        low, high = format_change(change["low"], path), format_change(change["high"], path)
        favours = None
        if self.n_images >= FEW_IMAGES and (change["low"] > 0 or change["high"] < 0):
            favours = second if (change["low"] > 0) == is_better_high(path) else first
        return Change(
            format_change(change["difference"], path), f"{low} to {high}" if low else "", favours
        )


# ----------------------------------------------------------------------------- answers


class Question(NamedTuple):
    """What a reader wants to know of one metric."""

    path: Path
    noun: str
    of_one: str
    of_two: str
    of_many: str


QUESTIONS = (
    Question(MAIN, "mean F1", "How good is it?", "Which is better?", "Which is best?"),
    Question(
        MERGES,
        "merges",
        "How often does it merge nuclei?",
        "Which merges more nuclei?",
        "Which merges most nuclei?",
    ),
    Question(
        SPLITS,
        "splits",
        "How often does it split nuclei?",
        "Which splits more nuclei?",
        "Which splits most nuclei?",
    ),
)


class Answer(NamedTuple):
    """A headline, and what stands behind it."""

    question: str
    headline: str  # who it is; or that nobody can tell
    sentence: str
    named: int | None = None  # the set that it is, if it is one
    difference: str = ""  # whether it is more than chance; empty without one
    beside: str = ""  # which other metrics speak for whom, where that is not yet said


def answer(question: Question, names: Sequence[str], statistics: Statistics) -> Answer:
    """Which of the named sets has the highest value, unless that could be chance."""
    path = question.path
    asked = (question.of_one, question.of_two, question.of_many)[min(len(names), 3) - 1]
    values = statistics.values(path)
    if not np.isfinite(values).all():
        return Answer(asked, "", "Nothing to measure: no nuclei and no predictions.")
    order = np.argsort(-values, kind="stable").tolist()
    shown = [format_value(value, path) for value in values]
    best = [k for k in order if values[k] == values[order[0]]]
    others = order[len(best) :]
    name = " and ".join(names[k] for k in best)
    against = ", ".join(f"{shown[k]} of {names[k]}" for k in others)
    against = f" against {against}." if others else "."
    if len(best) > 1:
        headline = name if others else "No difference"
        found = Answer(asked, headline, f"{shown[best[0]]} {question.noun} each{against}")
        pairs = [sorted((k, others[0])) for k in best] if others else []
        sure = all(statistics.change(*pair, path).favours is not None for pair in pairs)
        return found if sure else _undecided(found, statistics.n_images)
    interval = statistics.interval(best[0], path)
    interval = interval and f" ({interval})"
    sentence = f"{shown[best[0]]} {question.noun}{interval}{against}"
    found = Answer(asked, name, sentence, best[0])
    return _against(others[0], found, path, names, statistics) if others else found


def _against(
    other: int, found: Answer, path: Path, names: Sequence[str], statistics: Statistics
) -> Answer:
    """The answer with its difference to another set; it names none if that could be chance."""
    first, second = sorted((found.named, other))  # later minus earlier, as in the table
    change = statistics.change(first, second, path)
    interval = change.interval and f" ({change.interval})"
    if change.favours is not None:
        ahead = names[change.favours]
        verdict = (
            f"On other images like these {ahead} would be ahead, too: the interval excludes 0."
        )
    elif 1 < statistics.n_images < FEW_IMAGES:
        verdict = f"It may be chance: {statistics.n_images} images cannot settle it."
    elif interval:
        verdict = "It may be chance: the interval holds 0."
    else:
        verdict = "It may be chance."
    difference = f"{names[second]} minus {names[first]}: {change.value}{interval}. {verdict}"
    if change.favours is None:
        found = _undecided(found, statistics.n_images)
    beside = _beside(names, statistics, first, second) if path == MAIN else ""
    return found._replace(difference=difference, beside=beside)


def _undecided(found: Answer, n_images: int) -> Answer:
    """The answer without a name in its headline."""
    headline = "Too close to call" if n_images >= FEW_IMAGES else "Too few images to tell"
    if n_images == 1:
        headline = "One image cannot tell"
    return found._replace(
        headline=headline, sentence=f"{found.headline}: {found.sentence}", named=None
    )


def _beside(names: Sequence[str], statistics: Statistics, first: int, second: int) -> str:
    """Which metrics favour one of two sets, unless the main one does so, too."""
    favoured = {m.path: statistics.change(first, second, m.path).favours for m in METRICS}
    rows = {
        k: ", ".join(metric.title for metric in METRICS if favoured[metric.path] == k)
        for k in (first, second)
        if k != favoured[MAIN]
    }
    parts = [f"{names[k]} is ahead in: {row}." for k, row in rows.items() if row]
    remark = (
        f"Among {len(METRICS)} metrics some intervals exclude 0 by chance, more so if another "
        "training of the same method would find other nuclei."
    )
    return " ".join([*parts, remark]) if parts else ""


# ------------------------------------------------------------------------------- costs


def cost_rows(results: Sequence[dict[str, Any]]) -> dict[str, list[str]]:
    """Every value below "efficiency" in the sets' ``results.json``, by its place.

    Returns:
        ``{"training: seconds per iteration": [of each set, "" where it was not measured]}``.
    """
    found = [dict(_values(content.get("efficiency"))) for content in results]
    places = dict.fromkeys(place for values in found for place in values)
    return {
        ": ".join((*place[:-1], place[-1].replace("_", " "))): [
            _format_cost(values.get(place)) for values in found
        ]
        for place in places
    }


def _values(value: Any, place: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(value, dict):
        for key, part in value.items():
            yield from _values(part, (*place, str(key)))
    elif place:
        yield place, value


def _format_cost(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list):  # a size
        return " x ".join(_format_cost(part) for part in value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 1000 else f"{value:.4g}"

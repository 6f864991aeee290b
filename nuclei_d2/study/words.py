"""Sentences that choose their words from the numbers."""

import numpy as np

from nuclei_d2.evaluation.bootstrap import LEVEL
from nuclei_d2.study.findings import ENOUGH_SEEDS, Findings
from nuclei_d2.study.plan import Comparison, Model
from nuclei_d2.study.statistics import METRICS, Estimate, Metric
from nuclei_d2.study.tables import number, seed_range, with_interval

# Verdict on a difference -> how the answer begins, and why.
_OPENINGS = {
    "unknown": "Not measured yet.",
    "one image": "One image: no claim.",
    "few seeds": "Too few seeds: no claim.",
    "better": "Yes, here.",
    "worse": "No, the reverse.",
    "likely better": "Perhaps.",
    "likely worse": "Perhaps the reverse.",
    "unsure": "The trainings disagree.",
    "none": "Not that we can tell.",
}
_REASONS = {
    "unknown": "",
    "one image": "One image cannot tell what others would.",
    "few seeds": "Fewer than three trainings of a model cannot tell a method from luck.",
    "better": "The interval excludes zero, and every seed agrees.",
    "worse": "The interval excludes zero, and every seed agrees.",
    "unsure": "The interval excludes zero, but not every seed agrees.",
    "none": "The interval includes zero.",
}
_PHRASES = {
    "unknown": "not measured",
    "one image": "one image, no claim",
    "few seeds": "too few seeds, no claim",
    "better": "better",
    "worse": "worse",
    "likely better": "perhaps better, see below",
    "likely worse": "perhaps worse, see below",
    "unsure": "better or worse, by seed",
    "none": "no difference shown",
}


def verdict(change: Estimate, higher_is_better: bool = True) -> str:
    """ "unknown", "one image", "few seeds", "better", "worse", "unsure" or "none".

    A claim needs three seeds, an interval that excludes zero, and seeds that agree with it.
    """
    if not change.is_known:
        return "unknown"
    if not np.isfinite(change.low):
        return "one image"
    if len(change.seeds) < ENOUGH_SEEDS:
        return "few seeds"
    if change.sign == 0:
        return "none"
    if any(seed * change.sign <= 0 for seed in change.seeds):
        return "unsure"
    return "better" if (change.sign > 0) == higher_is_better else "worse"


def digits(metric: Metric) -> int:
    """After the point: percent have one, counts per 100 nuclei and pixels two, fractions three."""
    return {"%": 1, "": 3}.get(metric.unit, 2)


def unit(metric: Metric) -> str:
    """As it follows a difference."""
    return {"%": " points", "": ""}.get(metric.unit, f" {metric.unit}")


def answer(findings: Findings, comparison: Comparison) -> str:
    """Answer to the comparison's question, with the numbers it rests on."""
    change, kind = _judge(findings, comparison)
    parts = [f"**{_OPENINGS[kind]}**"]
    if kind != "unknown":
        parts += [_numbers(findings, comparison, change), _reason(findings, comparison, kind)]
    return " ".join(parts)


def short_answer(findings: Findings, comparison: Comparison) -> str:
    """Question, answer and the difference it rests on."""
    change, kind = _judge(findings, comparison)
    told = f"{comparison.ask} **{_OPENINGS[kind]}**"
    if kind == "unknown":
        return told
    metric = METRICS[comparison.metric]
    value = with_interval(change, digits(metric), sign=True)
    told += f" {metric.title[0].upper()}{metric.title[1:]}: {value}{unit(metric)}"
    if not kind.startswith("likely"):
        return f"{told}."
    return (
        f"{told}; corrected for {len(findings.questions())} questions, {_p(findings, comparison)}."
    )


def _judge(findings: Findings, comparison: Comparison) -> tuple[Estimate, str]:
    """The difference that answers the comparison's question, and the verdict on it: "likely" where
    it is a claim only as long as no other question is asked.
    """
    change = findings.change(comparison, comparison.metric)
    kind = verdict(change, METRICS[comparison.metric].higher_is_better)
    if kind in ("better", "worse") and findings.corrected_p(comparison) > 1 - LEVEL:
        kind = f"likely {kind}"
    return change, kind


def _reason(findings: Findings, comparison: Comparison, kind: str) -> str:
    reason = _REASONS[kind.removeprefix("likely ")]
    asked = len(findings.questions())
    if kind in ("better", "worse") and asked > 1:
        reason += (
            f" So it stays if corrected for the {asked} questions that this page can answer "
            f"(Holm, {_p(findings, comparison)})."
        )
    elif kind.startswith("likely"):
        reason += (
            f" But this page answers {asked} questions; corrected for that, it may be chance "
            f"(Holm, {_p(findings, comparison)})."
        )
    return reason


def _p(findings: Findings, comparison: Comparison) -> str:
    p = findings.corrected_p(comparison)
    return f"p = {number(p, 3)}" if p >= 0.001 else "p < 0.001"


def _numbers(findings: Findings, comparison: Comparison, change: Estimate) -> str:
    kind, task = METRICS[comparison.metric], findings.main
    first, second = (
        findings.estimate(task, task.test[0], name, comparison.metric).value
        for name in (comparison.first, comparison.second)
    )
    n = digits(kind)
    seeds = seed_range(change, n, sign=True)
    ends = [number(end, n, sign=True) for end in (change.low, change.high)]
    interval = f", 95 % interval {' to '.join(ends)}" if all(ends) else ""
    title, other = map(findings.study.model_title, (comparison.first, comparison.second))
    return (
        f"In {kind.title}, {title} reaches {number(first, n)} and {other} {number(second, n)}: "
        f"{number(change.value, n, sign=True)}{unit(kind)}{interval}"
        f"{f', seeds {seeds}' if seeds else ''}.{_unequal_times(findings, comparison)}"
    )


def _unequal_times(findings: Findings, comparison: Comparison) -> str:
    """A sentence where a budget did not give both the same time."""
    names = comparison.first, comparison.second
    minutes = [findings.training_minutes(findings.main, name) for name in names]
    if findings.study.budget is None or not all(minutes) or max(minutes) < 1.05 * min(minutes):
        return ""
    return f" They were trained for {number(minutes[0])} and {number(minutes[1])} minutes."


def change_line(findings: Findings, comparison: Comparison, metric: str) -> str:
    """``merges per 100 nuclei: -0.8 [-1.5, -0.1], better``; empty if unknown."""
    change, kind = findings.change(comparison, metric), METRICS[metric]
    if not change.is_known:
        return ""
    pair = (comparison.first, comparison.second, metric)
    asked = [
        c for c in findings.study.comparisons.values() if (c.first, c.second, c.metric) == pair
    ]
    found = _judge(findings, asked[0])[1] if asked else verdict(change, kind.higher_is_better)
    name = f"{kind.title} {kind.unit}" if kind.unit.startswith("per") else kind.title
    value = with_interval(change, digits(kind), sign=True)
    return f"{name}: {value}{_suffix(kind)}, {_PHRASES[found]}"


def _suffix(metric: Metric) -> str:
    """The unit behind a number, where the metric's name does not have it."""
    return "" if metric.unit.startswith("per") else unit(metric)


def cost_sentence(findings: Findings, comparison: Comparison) -> str:
    """What the first model of a comparison costs more than the second; empty if unknown."""
    task = findings.main
    known = {
        "the parameters": lambda m: findings.cost(task, m, "model", "parameters"),
        "the multiply-adds": lambda m: findings.cost(task, m, "model", "flops"),
        "the time for an image": lambda m: findings.seconds_per_megapixel(task, m),
        "the time for a training step": lambda m: findings.step_seconds(task, m),
    }
    ratios = []
    for name, cost in known.items():
        first, second = cost(comparison.first), cost(comparison.second)
        if first and second:
            n = 1 if "time" in name else 2  # what was timed varies by some percent
            ratios.append(f"{first / second:.{n}f} times {name}")
    if not ratios:
        return ""
    title, other = map(findings.study.model_title, (comparison.first, comparison.second))
    return f"{title} takes {listed(ratios)} of {other}."


def recipe(model: Model) -> str:
    """A model's config and options, in Markdown."""
    options = listed([f"`{key} {value}`" for key, value in model.options.items()])
    return f"`{model.config}`" + (f" with {options}" if options else "")


def listed(words: list[str]) -> str:
    """``a, b and c``."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)

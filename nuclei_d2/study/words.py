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
    "likely better": "It seems so.",
    "likely worse": "It seems not; rather the reverse.",
    "unsure": "Perhaps.",
    "none": "Not that we can tell.",
}
_REASONS = {
    "unknown": "",
    "one image": "One image cannot tell what others would.",
    "few seeds": "One or two trainings of each cannot tell a method from luck.",
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
    """After the point: fractions of 1 have three."""
    return 1 if metric.unit else 3


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
    return f"{told} {metric.title[0].upper()}{metric.title[1:]}: {value}{unit(metric)}."


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
        p = number(findings.corrected_p(comparison), 3)
        reason += (
            f" So it stays if corrected for the {asked} questions of this page (Holm, p = {p})."
        )
    elif kind.startswith("likely"):
        p = number(findings.corrected_p(comparison), 3)
        reason += (
            f" But {asked} questions are asked on this page; corrected for that, it may be chance "
            f"(Holm, p = {p})."
        )
    return reason


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
        f"{f', seeds {seeds}' if seeds else ''}."
    )


def change_line(findings: Findings, comparison: Comparison, metric: str) -> str:
    """``merges per 100 nuclei: -0.8 [-1.5, -0.1], better``; empty if unknown."""
    change, kind = findings.change(comparison, metric), METRICS[metric]
    if not change.is_known:
        return ""
    name = f"{kind.title} {kind.unit}" if kind.unit.startswith("per") else kind.title
    value = with_interval(change, digits(kind), sign=True)
    phrase = _PHRASES[verdict(change, kind.higher_is_better)]
    return f"{name}: {value}{unit(kind) if kind.unit == '%' else ''}, {phrase}"


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

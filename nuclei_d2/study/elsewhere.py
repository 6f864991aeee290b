"""The paper's section on other data: what was trained or tested on, besides the main question's."""

from collections.abc import Iterable, Sequence

from nuclei_d2.evaluation.bootstrap import FEW_IMAGES
from nuclei_d2.study.findings import Findings
from nuclei_d2.study.plan import Comparison, Task
from nuclei_d2.study.statistics import METRICS, Estimate
from nuclei_d2.study.tables import markdown, number, with_interval
from nuclei_d2.study.words import digits, unit

# Of the first comparison: what is told of its difference on other data.
_DIFFERENCES = {
    "boundary_ap": "boundary AP, points",
    "accuracy": "TP / (TP + FP + FN)",
    "merges_and_splits": "merges and splits per 100 nuclei",
    "not_found": "not found per 100 nuclei",
    "overlooked": "not found whatever the score, per 100 nuclei",
}
# Told at every step of a ladder.
_LADDER_METRICS = ("merges_and_splits", "not_found", "overlooked")

Place = tuple[Task, str]  # trained on, tested on


def other_data(findings: Findings) -> str:
    """A section on all test sets but the main one; empty without others."""
    study, places = findings.study, _places(findings)
    if not places:
        return ""
    comparison = next(iter(study.comparisons.values()), None)
    parts = [
        "## Other data\n\nThe same models trained on other sets, and tested on their kind and on "
        "others. Nothing is claimed here. Where there is one seed, intervals are those of other "
        f"images, not of other trainings; with fewer than {FEW_IMAGES} images they are too narrow. "
        "A model's least score, from which predictions count, is the one that was best on its "
        "validation images. Where many are nearly as good, luck decides between them, and a higher "
        "one finds fewer nuclei, more so on images that are harder than those.",
        _accuracies(findings, places),
        _differences(findings, places, comparison) if comparison else "",
        *(
            _ladder(findings, task, metric, comparison)
            for task in study.tasks.values()
            if task.ladder
            for metric in _LADDER_METRICS
        ),
    ]
    return "\n\n".join(part for part in parts if part)


def range_elsewhere(findings: Findings, comparison: Comparison) -> str:
    """Between what a comparison's differences lie on other data; empty without any."""
    told = []
    for metric, name in (
        ("boundary_ap", "boundary AP"),
        ("not_found", "nuclei not found"),
        ("overlooked", "nuclei not found whatever the score"),
    ):
        changes = [findings.change(comparison, metric, place) for place in _places(findings)]
        values = [change.value for change in changes if change.is_known]
        if values:
            n = digits(METRICS[metric])
            ends = [number(end, n, sign=True) for end in (min(values), max(values))]
            told.append(f"{name} {' to '.join(ends)}{unit(METRICS[metric])}")
    return f"on [other data](#other-data), no claim: {'; '.join(told)}" if told else ""


def last_steps(findings: Findings, comparison: Comparison) -> list[str]:
    """A comparison's differences at the last step of each ladder where it was measured."""
    lines = []
    for task in findings.study.tasks.values():
        steps = findings.steps(task) if task.ladder else {}
        if not steps:
            continue
        test, share = [*steps.items()][-1]
        changes = {m: findings.change(comparison, m, (task, test)) for m in _LADDER_METRICS}
        if all(change.is_known for change in changes.values()):
            told = [
                f"{METRICS[m].title} {with_interval(change, digits(METRICS[m]), sign=True)}"
                for m, change in changes.items()
            ]
            lines.append(
                f"where {100 * share:.0f} % touch ({task.title or task.name}; "
                f"seeds: {_common_seeds(changes.values())}), no claim: "
                f"{'; '.join(told)} per 100 nuclei"
            )
    return lines


def _places(findings: Findings) -> list[Place]:
    """What was measured besides the main question's; of ladders the first test set."""
    main = findings.main.name, findings.main.test[0]
    return [
        (task, test)
        for task in findings.study.tasks.values()
        for test in (task.test[:1] if task.ladder else task.test)
        if findings.images(task, test) and (task.name, test) != main
    ]


def _accuracies(findings: Findings, places: Sequence[Place]) -> str:
    """One row for each place, one column for each model."""
    models = [*findings.study.models, *findings.study.others]
    header = [
        "trained on",
        "tested on",
        "images",
        "seeds",
        *map(findings.study.model_title, models),
    ]
    rows = [
        [
            *_place(findings, place),
            _seeds(findings, place[0]),
            *(with_interval(findings.estimate(*place, model, "accuracy"), 3) for model in models),
        ]
        for place in places
    ]
    return f"{METRICS['accuracy'].title}, of every model:\n\n{markdown(header, rows)}"


def _differences(findings: Findings, places: Sequence[Place], comparison: Comparison) -> str:
    """The first comparison, place by place; empty where it was not measured."""
    rows = []
    for place in places:
        changes = [findings.change(comparison, metric, place) for metric in _DIFFERENCES]
        if any(change.is_known for change in changes):
            cells = [
                with_interval(change, digits(METRICS[metric]), sign=True)
                for metric, change in zip(_DIFFERENCES, changes, strict=True)
            ]
            scores = _least_scores(findings, place[0], comparison)
            rows.append([*_place(findings, place), _common_seeds(changes), *cells, scores])
    if not rows:
        return ""
    header = ["trained on", "tested on", "images", "seeds", *_DIFFERENCES.values()]
    header += ["least scores"]
    return f"{_minus(findings, comparison)}:\n\n{markdown(header, rows)}"


def _place(findings: Findings, place: Place) -> list[str]:
    task, test = place
    images = findings.images(task, test)
    return [task.title or task.name, f"`{test}`", str(len(images.images)) if images else ""]


def _seeds(findings: Findings, task: Task) -> str:
    models = findings.models(task)
    trained = [m for m in models if findings.cost(task, m, "iterations") is not None]
    counts = [findings.seeds(task, model) for model in trained or models]
    return " to ".join(str(n) for n in dict.fromkeys((min(counts), max(counts))))


def _ladder(findings: Findings, task: Task, metric: str, comparison: Comparison | None) -> str:
    """A metric, step by step, and the comparison's difference in it; empty without results."""
    steps, models = findings.steps(task), findings.models(task)
    if not steps or not models:
        return ""
    header = ["model", "seeds", *(f"{100 * share:.0f} % touch" for share in steps.values())]
    rows = [
        [findings.study.model_title(model), str(findings.seeds(task, model))]
        + [with_interval(findings.estimate(task, test, model, metric), 1) for test in steps]
        for model in models
    ]
    if comparison and {comparison.first, comparison.second} <= {*models}:
        changes = [findings.change(comparison, metric, (task, test)) for test in steps]
        rows.append(
            [_minus(findings, comparison), _common_seeds(changes)]
            + [with_interval(change, 1, sign=True) for change in changes]
        )
    return (
        f"{task.title or task.name}: {METRICS[metric].title} per 100 nuclei, by the share of "
        f"the nuclei that touch another one.\n\n{markdown(header, rows)}"
    )


def _minus(findings: Findings, comparison: Comparison) -> str:
    return " minus ".join(map(findings.study.model_title, (comparison.first, comparison.second)))


def _least_scores(findings: Findings, task: Task, comparison: Comparison) -> str:
    """Of both models of a comparison, means over seeds."""
    scores = (findings.least_score(task, name) for name in (comparison.first, comparison.second))
    return ", ".join(number(score, 2) for score in scores)


def _common_seeds(changes: Iterable[Estimate]) -> str:
    """How many seeds both models of a comparison have."""
    return str(max(len(change.seeds) for change in changes))

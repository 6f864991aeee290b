"""The paper's section on other data: what was trained or tested on, besides the main question's."""

from nuclei_d2.evaluation.bootstrap import FEW_IMAGES
from nuclei_d2.study.findings import Findings
from nuclei_d2.study.plan import Task
from nuclei_d2.study.statistics import METRICS
from nuclei_d2.study.tables import markdown, number, with_interval


def other_data(findings: Findings) -> str:
    """A section on all test sets but the main one; empty without others."""
    rows = []
    for task in findings.study.tasks.values():
        for test in task.test[:1] if task.ladder else task.test:
            if (task.name, test) != (findings.main.name, findings.main.test[0]):
                models = findings.models(task)
                rows += [_row(findings, task, test, model) for model in models]
    if not rows:
        return ""
    header = ["trained on", "tested on", "images", "model", "seeds"]
    header += ["boundary AP, %", "TP / (TP + FP + FN)", "merges", "splits", "not found"]
    return (
        "## Other data\n\n"
        "The same models trained on other sets. Where there is one seed, nothing is claimed, and "
        "intervals are those of other images, not of other trainings; with fewer than "
        f"{FEW_IMAGES} images they are too narrow.\n\n{markdown(header, rows)}\n"
        + "".join(_ladder(findings, task) for task in findings.study.tasks.values() if task.ladder)
    )


def _row(findings: Findings, task: Task, test: str, model: str) -> list[str]:
    keys = ("boundary_ap", "accuracy", "merges", "splits", "not_found")
    boundary_ap, accuracy, *errors = (findings.estimate(task, test, model, key) for key in keys)
    return [
        task.title or task.name,
        f"`{test}`",
        str(len(findings.images(task, test).images)),
        findings.study.model_title(model),
        str(findings.seeds(task, model)),
        with_interval(boundary_ap, 1),
        with_interval(accuracy, 3),
        *(number(error.value) for error in errors),
    ]


def _ladder(findings: Findings, task: Task) -> str:
    """How separation degrades, step by step; empty without results."""
    steps, models = findings.steps(task), findings.models(task)
    if not steps or not models:
        return ""
    header = ["model", "seeds", *(f"{100 * share:.0f} % touch" for share in steps.values())]
    text = ""
    for metric in ("merges_and_splits", "not_found"):
        rows = [
            [findings.study.model_title(model), str(findings.seeds(task, model))]
            + [with_interval(findings.estimate(task, test, model, metric), 1) for test in steps]
            for model in models
        ]
        text += (
            f"\n{task.title or task.name}: {METRICS[metric].title} per 100 nuclei, by the share of "
            f"the nuclei that touch another one.\n\n{markdown(header, rows)}\n"
        )
    return text

"""The study as a short paper for a biologist: ``paper.md``, filled from the findings."""

import os
import re
from pathlib import Path
from string import Template

from nuclei_d2.evaluation.bootstrap import sample_warning
from nuclei_d2.study.collect import read_calibration
from nuclei_d2.study.elsewhere import last_steps, other_data, range_elsewhere
from nuclei_d2.study.findings import Findings, machines, touching_share
from nuclei_d2.study.plan import Task
from nuclei_d2.study.rebuild import rebuild_command
from nuclei_d2.study.statistics import METRICS, difference
from nuclei_d2.study.tables import markdown, number, seed_range, with_interval
from nuclei_d2.study.words import answer, change_line, cost_sentence, listed, recipe, verdict

# Metrics told after the answer.
_FOLLOWING = (
    *("boundary_ap", "boundary_f1", "boundary_hd95", "accuracy", "ap"),
    *("merges", "splits", "not_found", "overlooked"),
)
_METRICS_PAGE = Path("docs/metrics.md")


def render_paper(findings: Findings, study_file: str, page: Path, tables: Path) -> str:
    """The whole page, as Markdown.

    Args:
        findings: of the study.
        study_file: as the user gave it, for the command that makes this page.
        page: where it will lie; links start there. Its figures are in the folder of its name.
        tables: folder of the CSV files.
    """
    study, task = findings.study, findings.main
    comparison = next(iter(study.comparisons.values()), None)
    ladder = any(t.ladder and findings.models(t) for t in study.tasks.values())
    template = Template((Path(__file__).parent / "paper.md").read_text(encoding="utf-8"))
    text = template.substitute(
        question=comparison.ask if comparison else study.title or study.name,
        about=_about(findings),
        results=study.results_dir.as_posix(),
        command=f"python tools/study.py {study_file} --report-only",
        answer=_answer(findings),
        figures=page.stem,
        table=_table(findings),
        tables=_link(page, tables),
        ladder=" Right: nuclei not found in generated images, more and more crowded."
        if ladder
        else "",
        elsewhere=other_data(findings),
        models=_models(findings),
        train=listed([f"`{name}`" for name in task.train]),
        val=task.val,
        test=task.test[0],
        training=_training(findings),
        metrics=_link(page, _METRICS_PAGE),
        hardware=_hardware(findings),
        seeds=_count(_most_seeds(findings), "training"),
        equal_time=_equal_time(findings),
        caveats="\n".join(f"- {caveat}" for caveat in study.caveats),
        others=_others(findings),
        rebuild=_rebuild(findings),
    )
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def _link(page: Path, target: Path) -> str:
    return Path(os.path.relpath(target, page.parent)).as_posix()


def _count(n: int, word: str) -> str:
    return f"{n} {word}{'s' if n != 1 else ''}"


def _about(findings: Findings) -> str:
    study = findings.study
    planned = len(study.runs()) + sum(len(o.predictions) for o in study.others.values())
    done = len(findings.results)
    unfinished = f" **So far {done} of {planned} runs are done.**" if done < planned else ""
    return f"{study.title or study.name}.{unfinished}"


# --------------------------------------------------------------------------------- answer


def _answer(findings: Findings) -> str:
    comparisons = list(findings.study.comparisons.values())
    parts = [_test_images(findings)]
    if comparisons:
        parts += [answer(findings, comparisons[0]), _following(findings)]
        parts += [f"**{c.ask}** {answer(findings, c)}" for c in comparisons[1:]]
        cost = cost_sentence(findings, comparisons[0])
        parts.append(f"**What does it cost?** {cost}" if cost else "")
        parts.append(_overlaps(findings, comparisons[0].first))
    parts.append(_best(findings))
    return "\n\n".join(part for part in parts if part)


def _test_images(findings: Findings) -> str:
    task = findings.main
    measured = findings.images(task, task.test[0])
    if measured is None:
        return ""
    nuclei = sum(image.n_gt for image in measured.images)
    few = sample_warning(len(measured.images))
    return (
        f"Tested on {task.title or task.name}: {_count(len(measured.images), 'image')} that no "
        f"model was trained on, with {nuclei:,} nuclei, "
        f"{number(100 * touching_share(measured), 0)} % of which touch another one."
        f"{f' **Mind: {few}.**' if few else ''}"
    )


def _following(findings: Findings) -> str:
    """The other numbers of the first comparison."""
    comparison = next(iter(findings.study.comparisons.values()))
    others = (metric for metric in _FOLLOWING if metric != comparison.metric)
    lines = [change_line(findings, comparison, metric) for metric in others]
    lines += [range_elsewhere(findings, comparison), *last_steps(findings, comparison)]
    told = [f"- {line}" for line in lines if line]
    if not told:
        return ""
    title, other = map(findings.study.model_title, (comparison.first, comparison.second))
    return "\n".join([f"{title} minus {other}, with 95 % intervals:", "", *told])


def _overlaps(findings: Findings, model: str) -> str:
    """What dividing contested pixels rightly would gain."""
    task, metric = findings.main, METRICS["accuracy"]
    contested = findings.contested(task, model)
    if contested is None:
        return ""
    pixels, divided = contested
    now = findings.estimate(task, task.test[0], model, "accuracy").value
    return (
        f"**Could overlaps be divided better?** Of the pixels in what "
        f"{findings.study.model_title(model)} finds, {number(100 * pixels)} % lie in more than one "
        "prediction. If the ground truth gave each to a prediction of its nucleus, all predictions "
        f"kept, {metric.title} would be {number(divided, 3)} instead of {number(now, 3)}: so much "
        "could boundary maps gain by dividing pixels."
    )


def _best(findings: Findings) -> str:
    task = findings.main
    names = findings.models(task)
    best = findings.best(task, names)
    second = findings.best(task, [name for name in names if name != best])
    if best is None or second is None:
        return ""
    metric = METRICS["accuracy"]
    found = findings.estimate(task, task.test[0], best, "accuracy")
    samples = [findings.sample(task, task.test[0], name) for name in (best, second)]
    lead = difference(*samples, metric.compute)
    phrase = {
        "better": "the interval and every seed confirm it",
        "one image": "one image, no claim",
        "few seeds": "too few seeds, no claim",
        "worse": "the tests reverse the order",
    }.get(verdict(lead), "the difference may be chance")
    title, other = map(findings.study.model_title, (best, second))
    seeds = findings.seeds(task, best)
    of = f"of the models with {seeds} seeds or nothing to train, " if seeds > 1 else ""
    return (
        f"**Which is best?** On the validation images, {of}{title}, which on the test images has "
        f"{with_interval(found, 3)} in {metric.title}: {with_interval(lead, 3, sign=True)} more "
        f"than the next one in validation, {other}; {phrase}.{_not_chosen_from(findings, names)}"
    )


def _not_chosen_from(findings: Findings, names: list[str]) -> str:
    """Programs that were not run on the validation images."""
    titles = [findings.study.model_title(n) for n in names if n in findings.study.others]
    return f" Without results on these, {listed(titles)} could not be chosen." if titles else ""


# --------------------------------------------------------------------------------- tables


def _table(findings: Findings) -> str:
    header = ["", "seeds", "steps", "boundary AP, %", "its seeds", "mask AP, %"]
    header += ["TP / (TP + FP + FN)", "its seeds", "at IoU 0.5", "at 0.75", "merges", "splits"]
    header += ["not found", "s per megapixel", "million parameters"]
    task = findings.main
    return markdown(header, [_row(findings, task, model) for model in findings.models(task)])


def _row(findings: Findings, task: Task, model: str) -> list[str]:
    found = {
        key: findings.estimate(task, task.test[0], model, key)
        for key in (
            "boundary_ap",
            "ap",
            "accuracy",
            "accuracy_50",
            "accuracy_75",
            "merges",
            "splits",
            "not_found",
        )
    }
    steps = findings.cost(task, model, "iterations")
    parameters = findings.cost(task, model, "model", "parameters")
    return [
        findings.study.model_title(model),
        str(findings.seeds(task, model)),
        f"{steps:,.0f}" if steps else "",
        with_interval(found["boundary_ap"], 1),
        seed_range(found["boundary_ap"], 1),
        number(found["ap"].value),
        with_interval(found["accuracy"], 3),
        seed_range(found["accuracy"], 3),
        number(found["accuracy_50"].value, 3),
        number(found["accuracy_75"].value, 3),
        number(found["merges"].value),
        number(found["splits"].value),
        number(found["not_found"].value),
        number(findings.seconds_per_megapixel(task, model), 2),
        "" if parameters is None else number(parameters / 1e6),
    ]


# --------------------------------------------------------------------------------- method


def _models(findings: Findings) -> str:
    study = findings.study
    rows = [(model, recipe(model)) for model in study.models.values()]
    rows += [(other, "predictions of that program") for other in study.others.values()]
    return "\n".join(
        f"- **{named.title or named.name}**{f' {named.about}' if named.about else ''}: {made}"
        for named, made in rows
    )


def _training(findings: Findings) -> str:
    study, task = findings.study, findings.main
    text = f"From scratch, with up to {_count(_most_seeds(findings), 'seed')} (Table 1)."
    if study.budget is not None:
        text += (
            f" Every model was given a budget of {study.budget:g} minutes, validation apart: "
            "before its first seed the time of a step was measured, at the end of a training of "
            f"{_calibrations(findings)}, and its schedule stretched to as many steps as fit."
        )
        for model in (study.models.get(name) for name in findings.models(task)):
            if model and model.steps_of:
                other = study.model_title(model.steps_of)
                text += f" {study.model_title(model.name)} got the number of steps of {other}."
    own = [model for model in findings.models(task) if model in study.models]
    minutes = {model: findings.training_minutes(task, model) for model in own}
    told = [
        f"{number(value)} ({study.model_title(model)})" for model, value in minutes.items() if value
    ]
    if told:
        by = "Later steps, and other work on the machine, made it" if study.budget else "It took"
        text += f" {by} {listed(told)} minutes in the fastest seed: medians of 20 steps, summed."
    return text


def _most_seeds(findings: Findings) -> int:
    task = findings.main
    return max((findings.seeds(task, model) for model in findings.models(task)), default=0)


def _calibrations(findings: Findings) -> str:
    """How many steps of each model were measured, in words."""
    study, task = findings.study, findings.main
    titles: dict[int, list[str]] = {}
    for name in findings.models(task):
        measured = read_calibration(study, task.name, name)
        if measured and name in study.models and not study.models[name].steps_of:
            titles.setdefault(measured["iterations"], []).append(study.model_title(name))
    if not titles:
        return "steps"
    usual = max(titles, key=lambda steps: len(titles[steps]))
    others = [f"{steps} for {listed(titles[steps])}" for steps in titles if steps != usual]
    return f"{usual} steps" + (f" ({listed(others)})" if others else "")


def _others(findings: Findings) -> str:
    """In what other programs differ from our models."""
    others, measured = findings.study.others, findings.models(findings.main)
    titles = [other.title or name for name, other in others.items() if name in measured]
    if not titles:
        return ""
    return (
        f" {listed(titles)} came as predictions: by a recipe, thresholds and a choice of weights "
        f"of its own{_versions(findings)}."
    )


def _versions(findings: Findings) -> str:
    """Of other programs, as their ``run.json`` tell: " (stardist 0.9.2)"."""
    runs = [run for run in findings.results if run.model in findings.study.others]
    versions = {k: v for run in runs for k, v in (run.cost("versions") or {}).items()}
    told = ", ".join(f"{name} {version}" for name, version in versions.items())
    return f" ({told})" if told else ""


def _hardware(findings: Findings) -> str:
    titles: dict[str, list[str]] = {}
    for task in findings.study.tasks.values():
        for name in machines(findings.runs(task.name)):
            titles.setdefault(name, []).append(task.title or task.name)
    told = [f"{name} ({'; '.join(where)})" for name, where in titles.items()]
    return "\n".join(f"- {line}" for line in told) if told else "- Not recorded."


def _equal_time(findings: Findings) -> str:
    if findings.study.budget is None:
        return ""
    return (
        "- Times are equal by plan only (see Training), and equal time is not equal convergence:\n"
        "  a slower model made fewer steps. With more time the order may change (Figure 2, right)."
    )


def _rebuild(findings: Findings) -> str:
    task = findings.main
    own = [name for name in findings.models(task) if name in findings.study.models]
    trained = [name for name in own if "iterations" in findings.runs(task.name, name)[0].info]
    best = findings.best(task, trained)
    if best is None:
        return ""
    title, command = findings.study.model_title(best), rebuild_command(findings, task, best)
    return (
        f"## The best model, again\n\n{title} as it was trained here, first seed. "
        f"`model_final.pth` and `results.json` appear in `OUTPUT_DIR`:\n\n```\n{command}\n```"
    )

"""The three figures of a study, as SVG that is the same byte for byte on every run."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from nuclei_d2.evaluation.matching import IOU_THRESHOLDS
from nuclei_d2.evaluation.scores import SIZE_NAMES
from nuclei_d2.study.findings import Findings, pareto_front
from nuclei_d2.study.statistics import Estimate, estimate
from nuclei_d2.study.tables import TOUCHING_NAMES
from nuclei_d2.utils.files import atomic_path

# Okabe and Ito's colours, which the colour-blind can tell apart, and two more.
_COLOURS = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00"),
    *("#56B4E9", "#000000", "#999999", "#8C564B", "#B0A000"),
)
_MARKERS = "osD^vP"
_STYLE = {
    "svg.hashsalt": "nuclei_d2",  # else ids are random
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": 8,
}


def draw_figures(findings: Findings, folder: Path) -> list[Path]:
    """Write ``answer.svg``, ``cost.svg`` and ``where.svg``."""
    panels = {
        "answer": (_draw_differences, _draw_accuracy_by_iou),
        "cost": (_draw_pareto, _draw_curves),
        "where": (_draw_sizes, _draw_touching, *_ladders(findings)),
    }
    return [_draw(findings, folder / f"{name}.svg", parts) for name, parts in panels.items()]


def _draw(
    findings: Findings, path: Path, panels: Sequence[Callable[[Axes, Findings], None]]
) -> Path:
    with rc_context(_STYLE):
        figure = Figure(figsize=(4.4 * len(panels), 4.6), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for ax, panel in zip(axes, panels, strict=True):
            panel(ax, findings)
        # One legend for all panels: a model looks the same in each.
        handles = {
            label: handle
            for ax in axes
            for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)
        }
        if handles:
            figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3)
        with atomic_path(path) as temporary:
            figure.savefig(temporary, format="svg", metadata={"Date": None})
    return path


def _look(findings: Findings, model: str) -> dict[str, str]:
    names = [*findings.study.models, *findings.study.others]
    k = names.index(model)
    return {
        "color": _COLOURS[k % len(_COLOURS)],
        "marker": _MARKERS[k % len(_MARKERS)],
        "label": findings.study.model_title(model),
    }


def _errors(estimates: Sequence[Estimate]) -> np.ndarray:
    """(2, N) distances to the ends of the intervals, as matplotlib wants them."""
    rows = [(max(e.value - e.low, 0), max(e.high - e.value, 0)) for e in estimates]
    return np.array(rows).reshape(-1, 2).T


# --------------------------------------------------------------------------------- answer


def _draw_differences(ax: Axes, findings: Findings) -> None:
    """Boundary AP of every pair that is compared, with its interval; a small dot for each seed."""
    study = findings.study
    # AP ranks by scores, which what is compared by accuracy does not learn alike.
    asked = [c for c in study.comparisons.values() if c.metric != "accuracy"]
    pairs = {(c.first, c.second): c for c in asked}
    known = [(c, findings.change(c, "boundary_ap")) for c in pairs.values()]
    known = [(c, change) for c, change in known if change.is_known][::-1]
    for row, (comparison, change) in enumerate(known):
        colour = _look(findings, comparison.second)["color"]
        ax.errorbar(
            change.value, row, xerr=_errors([change]), fmt="o", color=colour, capsize=3, zorder=3
        )
        ax.plot(change.seeds, [row - 0.18] * len(change.seeds), ".", color=colour, alpha=0.6)
    ax.axvline(0, color="0.6", linewidth=0.8)
    pairs = [(study.model_title(c.first), study.model_title(c.second)) for c, _ in known]
    firsts = {first for first, _ in pairs}
    if len(firsts) == 1:
        ax.set_title(_wrapped(f"{firsts.pop()} minus", 40), fontsize=9)
        names = [second for _, second in pairs]
    else:
        names = [f"{first} minus {second}" for first, second in pairs]
    ax.set_yticks(range(len(known)), map(_wrapped, names))
    ax.set_ylim(-0.6, max(len(known), 1) - 0.4)
    ax.set_xlabel("difference of boundary AP, points")


def _wrapped(text: str, width: int = 22) -> str:
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + len(word) >= width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)


def _draw_accuracy_by_iou(ax: Axes, findings: Findings) -> None:
    task = findings.main
    for model in findings.models(task):
        sample = findings.sample(task, task.test[0], model)
        if sample is None:
            continue
        paths = [("pooled", "accuracy", f"{t:.2f}") for t in IOU_THRESHOLDS]
        found = [estimate(sample, lambda s, p=path: s.at(p)) for path in paths]
        ax.plot(IOU_THRESHOLDS, [e.value for e in found], markersize=3, **_look(findings, model))
    ax.set_xlabel("IoU at which a nucleus counts as found")
    ax.set_ylabel("TP / (TP + FP + FN)")
    ax.set_ylim(0, 1)


# ----------------------------------------------------------------------------------- cost


def _draw_pareto(ax: Axes, findings: Findings) -> None:
    """Accuracy against time; the line joins what nothing else beats in both."""
    task, points = findings.main, {}
    for model in findings.models(task):
        seconds = findings.seconds_per_megapixel(task, model)
        found = findings.estimate(task, task.test[0], model, "accuracy")
        if seconds is None or not found.is_known:
            continue
        points[model] = seconds, found.value
        ax.errorbar(
            seconds, found.value, yerr=_errors([found]), linestyle="", **_look(findings, model)
        )
    front = [points[name] for name in pareto_front(points)]
    if front:
        ax.step(*zip(*front, strict=True), where="post", color="0.6", linewidth=0.8)
        ax.set_xscale("log")
        ax.xaxis.set_major_formatter("{x:g}")
        ax.xaxis.set_minor_locator(LogLocator(subs=(2, 5)))  # more would overlap
        ax.xaxis.set_minor_formatter("{x:.2g}")
    ax.set_xlabel("seconds per megapixel (network and post-processing)")
    ax.set_ylabel("TP / (TP + FP + FN), mean over IoU 0.5-0.9")


def _draw_curves(ax: Axes, findings: Findings) -> None:
    for model in findings.models(findings.main):
        curve = findings.curve(findings.main, model)
        if curve:
            ax.plot(*zip(*curve, strict=True), markersize=3, **_look(findings, model))
    ax.set_xlabel("minutes of training")
    ax.set_ylabel("mask AP on validation images, %")


# ---------------------------------------------------------------------------------- where


def _draw_sizes(ax: Axes, findings: Findings) -> None:
    for model in findings.models(findings.main):
        found = findings.by_size(findings.main, model)
        ax.plot(range(len(found)), [e.value for e in found], **_look(findings, model))
    ax.set_xticks(range(len(SIZE_NAMES)), [name.replace("-inf", " or more") for name in SIZE_NAMES])
    ax.set_xlabel("area of the nucleus, px²")
    ax.set_ylabel("share of nuclei found at IoU 0.5")


def _draw_touching(ax: Axes, findings: Findings) -> None:
    for model in findings.models(findings.main):
        look = _look(findings, model)
        merges, splits = (
            [e.value for e in findings.by_touching(findings.main, model, metric)]
            for metric in ("merges", "splits")
        )
        ax.plot(range(len(merges)), merges, **look)
        ax.plot(range(len(splits)), splits, ":", **{**look, "label": None, "markersize": 3})
    ax.set_xticks(range(len(TOUCHING_NAMES)), TOUCHING_NAMES)
    ax.set_xlabel("nuclei of the image that touch another one")
    ax.set_ylabel("merges (lines), splits (dots), per 100 nuclei")


def _ladders(findings: Findings) -> list[Callable[[Axes, Findings], None]]:
    """A panel for each task whose tests are steps and were measured."""
    tasks = [t for t in findings.study.tasks.values() if t.ladder and findings.models(t)]
    return [partial(_draw_ladder, name=task.name) for task in tasks]


def _draw_ladder(ax: Axes, findings: Findings, name: str) -> None:
    task = findings.study.tasks[name]
    steps = findings.steps(task)
    shares = [100 * share for share in steps.values()]
    for model in findings.models(task):
        found = [findings.estimate(task, test, model, "not_found") for test in steps]
        ax.plot(shares, [e.value for e in found], **_look(findings, model))
    ax.set_xlabel("touching nuclei, %, generated images")
    ax.set_ylabel("not found at IoU 0.5, per 100 nuclei")

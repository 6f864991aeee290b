"""Small SVG charts for a page: text stays text, colours and dashes come from the page's CSS.

A chart is drawn for a phone's width, so that its text is readable there, and grows with the page.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple
from xml.etree.ElementTree import Element, SubElement, tostring

import numpy as np
from markupsafe import Markup

STYLES = 6  # the page's CSS has so many: .series-0 .. .series-5
# Around (0, 0): circle, square, triangle, diamond.
MARKERS = (
    "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0Z",
    "M-4-4h8v8h-8Z",
    "M0-5L5 4H-5Z",
    "M0-6L5 0L0 6L-5 0Z",
)
_WIDTH, _HEIGHT = 340, 250
_LEFT, _TOP, _RIGHT, _BOTTOM = 46, 10, 326, 206  # the plot in it
_MOST_MARKERS = 20
_BAR, _GROUP_GAP, _GROUP_LABEL, _VALUE_LABEL = 15, 12, 78, 44


class Axis(NamedTuple):
    """A linear axis from ``low`` to ``high``."""

    label: str
    low: float
    high: float
    ticks: Sequence[float]


Line = tuple[np.ndarray, np.ndarray]  # (K,) x and y; NaN is left out


def style(series: int) -> str:
    """CSS class of a series: its colour and dashes."""
    return f"series-{series % STYLES}"


def marker(series: int) -> str:
    """SVG path data of a series' marker around (0, 0)."""
    return MARKERS[series % len(MARKERS)]


def line_chart(
    description: str, x: Axis, y: Axis, lines: Sequence[Line], diagonal: bool = False
) -> Markup:
    """Lines over a grid; short ones with markers.

    Args:
        description: what a screen reader says instead.
        x: horizontal axis.
        y: vertical axis.
        lines: one per series; an empty one keeps its style free.
        diagonal: draw the line y = x behind them.
    """
    svg = _svg(_HEIGHT, description)
    _draw_axes(svg, x, y)
    if diagonal:
        _add_path(svg, "diagonal", _to_plot(x, y, ([x.low, x.high], [x.low, x.high])))
    for series, line in enumerate(lines):
        points = _to_plot(x, y, line)
        group = SubElement(svg, "g", {"class": style(series)})
        if points:
            _add_path(group, "line", points)
        if len(points) <= _MOST_MARKERS:
            for left, top in points:
                place = f"translate({left:.1f} {top:.1f})"
                SubElement(group, "path", {"class": "dot", "d": marker(series), "transform": place})
    return _markup(svg)


def bar_chart(description: str, groups: Sequence[str], series: Sequence[Sequence[int]]) -> Markup:
    """Horizontal bars with their counts, grouped, in the order of the series.

    Args:
        description: what a screen reader says instead.
        groups: a label for each group of bars.
        series: counts of each series, one for each group.
    """
    step = len(series) * _BAR + _GROUP_GAP
    svg = _svg(len(groups) * step, description)
    highest = max((count for counts in series for count in counts), default=0)
    scale = (_WIDTH - _GROUP_LABEL - _VALUE_LABEL) / max(highest, 1)
    for g, label in enumerate(groups):
        top = g * step + _GROUP_GAP / 2
        middle = top + len(series) * _BAR / 2
        _add_text(svg, label, _GROUP_LABEL - 6, middle, "end")
        for s, counts in enumerate(series):
            bar = SubElement(svg, "g", {"class": style(s)})
            width = max(counts[g] > 0, counts[g] * scale)
            box = {"x": _GROUP_LABEL, "y": top + s * _BAR + 1, "width": width, "height": _BAR - 2}
            SubElement(bar, "rect", {key: f"{value:g}" for key, value in box.items()})
            end = _GROUP_LABEL + width + 5
            _add_text(svg, f"{counts[g]:,}", end, top + (s + 0.5) * _BAR, "start")
    return _markup(svg)


def _svg(height: float, description: str) -> Element:
    box = f"0 0 {_WIDTH} {height:g}"
    return Element(
        "svg", {"viewBox": box, "class": "chart", "role": "img", "aria-label": description}
    )


def _markup(svg: Element) -> Markup:
    return Markup(tostring(svg, encoding="unicode"))


def _draw_axes(svg: Element, x: Axis, y: Axis) -> None:
    for tick in x.ticks:
        [(left, _)] = _to_plot(x, y, ([tick], [y.low]))
        _add_path(svg, "grid", [(left, _TOP), (left, _BOTTOM)])
        _add_text(svg, f"{tick:g}", left, _BOTTOM + 13, "middle")
    for tick in y.ticks:
        [(_, top)] = _to_plot(x, y, ([x.low], [tick]))
        _add_path(svg, "grid", [(_LEFT, top), (_RIGHT, top)])
        _add_text(svg, f"{tick:g}", _LEFT - 6, top, "end")
    _add_text(svg, x.label, (_LEFT + _RIGHT) / 2, _HEIGHT - 10, "middle")
    label = _add_text(svg, y.label, 0, 0, "middle")
    label.set("transform", f"translate(11 {(_TOP + _BOTTOM) / 2:g}) rotate(-90)")


def _to_plot(x: Axis, y: Axis, line: Line) -> list[tuple[float, float]]:
    """The line's finite points in the drawing."""
    values = np.column_stack(line).astype(float)
    values = values[np.isfinite(values).all(axis=1)]
    share = (values - [x.low, y.low]) / [x.high - x.low, y.high - y.low]
    return [(_LEFT + a * (_RIGHT - _LEFT), _BOTTOM - b * (_BOTTOM - _TOP)) for a, b in share]


def _add_path(parent: Element, kind: str, points: Iterable[tuple[float, float]]) -> None:
    path = "M" + "L".join(f"{left:.1f} {top:.1f}" for left, top in points)
    SubElement(parent, "path", {"class": kind, "d": path})


def _add_text(parent: Element, words: str, left: float, middle: float, anchor: str) -> Element:
    place = {"x": f"{left:g}", "y": f"{middle:g}", "dy": "0.35em", "text-anchor": anchor}
    text = SubElement(parent, "text", place)
    text.text = words
    return text

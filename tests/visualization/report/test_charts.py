import re

import numpy as np
import pytest

from nuclei_d2.visualization.report.charts import Axis, bar_chart, line_chart

AXES = Axis("IoU", 0.5, 1.0, (0.5, 1)), Axis("F1", 0, 1, (0, 1))


def paths(svg, kind):
    found = re.findall(rf'<path class="{kind}" d="M([^"]*)"', svg)
    return [[tuple(map(float, p.split())) for p in path.split("L")] for path in found]


def test_lines_lie_on_the_grid_and_skip_what_is_undefined():
    lines = [(np.array([0.5, 0.75, 1]), np.array([0, np.nan, 1])), (np.zeros(0), np.zeros(0))]
    svg = line_chart("about <&>", *AXES, lines, diagonal=False)
    vertical, horizontal = paths(svg, "grid")[:2], paths(svg, "grid")[2:]
    [line] = paths(svg, "line")
    assert line == [
        (vertical[0][0][0], horizontal[0][0][1]),
        (vertical[1][0][0], horizontal[1][0][1]),
    ]
    assert svg.count('class="dot"') == 2
    assert 'aria-label="about &lt;&amp;&gt;"' in svg


def test_long_lines_have_no_markers():
    x = np.linspace(0.5, 1, 50)
    svg = line_chart("", *AXES, [(x, x)], diagonal=True)
    assert 'class="dot"' not in svg
    [[start, end]] = paths(svg, "diagonal")
    assert start[0] < end[0]
    assert start[1] > end[1]


def test_bars_are_as_long_as_counts():
    svg = bar_chart("", ["small", "<large>"], [[10, 0], [2, 1000]])
    widths = [float(width) for width in re.findall(r'<rect [^>]*width="([\d.]+)"', svg)]
    # Groups from the top, in each the series in turn; a count above 0 is at least 1 px.
    assert widths == pytest.approx([widths[3] / 100, 1, 0, widths[3]], abs=0.01)
    assert re.findall(r">([^<>]+)</text>", svg) == [
        "small",
        "10",
        "2",
        "&lt;large&gt;",
        "0",
        "1,000",
    ]

"""benchmark_metrics.py, with stand-ins for the programs that it compares with."""

import json
import sys
from types import ModuleType

import pytest
from tiny import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "tools" / "benchmarks"))  # as for a script that lies there
import benchmark_metrics as tool

from nuclei_d2.utils.errors import NucleiError


def stand_in(monkeypatch, package, module, **functions):
    for name in (package, f"{package}.{module}"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    vars(sys.modules[f"{package}.{module}"]).update(functions)


def test_it_measures_and_says_what_was_asked(monkeypatch, tmp_path, capsys):
    calls = []
    stand_in(monkeypatch, "stardist", "matching", matching=lambda *_, thresh: calls.append(thresh))
    stand_in(monkeypatch, "cellpose", "metrics", average_precision=lambda *_: calls.append("all"))
    monkeypatch.setattr(tool, "COCO_NUCLEI", 40)
    monkeypatch.setattr(tool, "MAX_DETS", 20)
    output = tmp_path / "benchmark.json"
    small = ["--images", "2", "--size", "96", "--nuclei", "12", "--output", str(output)]
    monkeypatch.setattr("sys.argv", ["benchmark_metrics.py", *small])
    tool.main()
    content = json.loads(output.read_text())
    rows = content["cpu_seconds"]
    assert calls.count("all") == 2
    assert sum(isinstance(thresh, float) for thresh in calls) == 2 * 10
    measured = [goal["measured"] for goal in content["promises"]]
    assert measured[0] == pytest.approx(rows[tool.PYCOCOTOOLS] / rows[tool.COCO_AP])
    assert measured[2] == content["peak_mb"]
    assert "pycocotools" in capsys.readouterr().out


def test_promises_are_ratios_of_what_they_name():
    rows = {tool.OURS: 2.0, tool.STARDIST_CALLS: 12.0, tool.CELLPOSE: 6.0}
    rows |= {tool.COCO_AP: 0.5, tool.PYCOCOTOOLS: 10.0}
    goals = tool.promises(rows, 1000.0)
    assert [goal["measured"] for goal in goals] == [20, 9, 1000]
    assert [goal["kept"] for goal in goals] == [True, False, False]


def test_packages_that_are_not_there(monkeypatch):
    monkeypatch.setitem(sys.modules, "cellpose", None)
    monkeypatch.setattr("sys.argv", ["benchmark_metrics.py"])
    with pytest.raises(NucleiError, match="--help"):
        tool.main()

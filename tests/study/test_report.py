"""Papers, tables, figures and blocks from fabricated results: bytes, words, empty cells."""

import csv
import json
import shutil
from functools import partial

import pytest
from tiny import CONFIGS

from nuclei_d2.evaluation.bootstrap import bootstrap_weights
from nuclei_d2.study import statistics
from nuclei_d2.study.collect import load_results
from nuclei_d2.study.findings import Findings, pareto_front, touching_share
from nuclei_d2.study.plan import load_study
from nuclei_d2.study.report import write_report
from nuclei_d2.study.statistics import Estimate
from nuclei_d2.study.tables import with_interval
from nuclei_d2.study.words import verdict
from nuclei_d2.study.zoo import replace_block
from nuclei_d2.utils.errors import NucleiError

BOUNDARIES = {
    "ask": "Does learning boundaries help?",
    "first": "mask_rcnn",
    "second": "unet",
}


@pytest.fixture(autouse=True)
def _fewer_draws(monkeypatch):
    monkeypatch.setattr(statistics, "bootstrap_weights", partial(bootstrap_weights, resamples=60))


@pytest.fixture
def make_study(study_file, tmp_path):
    def make(**changes):
        changes = {
            "comparisons": {"boundaries": BOUNDARIES},
            "report": str(tmp_path / "docs" / "study.md"),
            "title": "Made up for a test",
            "seeds": [0, 1, 2],
            **changes,
        }
        return load_study(study_file(**changes))

    return make


def page_of(study):
    write_report(study, "study.yaml")
    return study.report_file.read_text()


def all_bytes(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_same_results_give_the_same_bytes(make_study, fabricate, tmp_path):
    study = make_study(model_zoo=str(tmp_path / "docs" / "MODEL_ZOO.md"))
    fabricate(study, {"classical": 3.0, "unet": 2.0, "mask_rcnn": 1.0})
    written = write_report(study, "study.yaml")
    docs, tables = all_bytes(tmp_path / "docs"), all_bytes(study.results_dir / "tables")
    assert set(written) == {*docs, *tables}
    assert [path.name for path in docs if path.suffix == ".svg"] == [
        "answer.svg",
        "cost.svg",
        "where.svg",
    ]
    write_report(make_study(model_zoo=study.model_zoo), "study.yaml")
    assert all_bytes(tmp_path / "docs") == docs
    assert all_bytes(study.results_dir / "tables") == tables
    for content in (*docs.values(), *tables.values()):
        assert b"nan" not in content.lower().replace(b"nano", b"")


@pytest.mark.parametrize(
    ("errors", "opening"),
    [
        ({"mask_rcnn": 0.7, "unet": 2.2}, "**Yes, here.**"),
        ({"mask_rcnn": 2.2, "unet": 0.7}, "**No, the reverse.**"),
        ({"mask_rcnn": 1.0, "unet": 1.0}, "**Not that we can tell.**"),
        ({"mask_rcnn": 1.0}, "**Not measured yet.**"),
    ],
)
def test_the_answer_follows_the_interval(make_study, fabricate, errors, opening):
    study = make_study()
    fabricate(study, errors)
    page = page_of(study)
    assert page.startswith("# Does learning boundaries help?\n")
    assert opening in page


@pytest.mark.parametrize("seeds", [[0], [0, 1]])
def test_one_or_two_seeds_are_no_claim(make_study, fabricate, seeds):
    study = make_study(seeds=seeds)
    fabricate(study, {"mask_rcnn": 0.7, "unet": 2.2})
    page = page_of(study)
    assert "**Too few seeds: no claim.**" in page
    assert "too few seeds, no claim" in page
    assert "Yes" not in page


def test_an_answer_is_corrected_for_the_number_of_questions(make_study, fabricate, monkeypatch):
    study = make_study()
    fabricate(study, {"mask_rcnn": 0.7, "unet": 2.2, "classical": 2.5})
    assert "So it stays" not in page_of(study)  # one question
    floor = {"ask": "More than a floor?", "first": "mask_rcnn", "second": "unet"}
    study = make_study(comparisons={"boundaries": BOUNDARIES, "floor": floor})
    page = page_of(study)
    assert page.count("corrected for the 2 questions that this page can answer (Holm, p = 0.0") == 2
    monkeypatch.setattr("nuclei_d2.study.findings.holm", lambda p: [0.12] * len(p))
    page = page_of(study)
    assert "**More than a floor?** **Perhaps.** In boundary AP" in page
    assert "answers 2 questions; corrected for that, it may be chance (Holm, p = 0.120)." in page
    monkeypatch.setattr("nuclei_d2.study.findings.holm", lambda p: [1e-5] * len(p))
    assert "(Holm, p < 0.001)." in page_of(study)


def test_what_is_taken_back_below_is_not_claimed_above(
    make_study, fabricate, monkeypatch, tmp_path
):
    asked = {
        "separation": {**BOUNDARIES, "metric": "merges_and_splits"},
        "outlines": {**BOUNDARIES, "ask": "Better outlines?"},
    }
    readme = tmp_path / "README.md"
    readme.write_text("<!-- results --><!-- /results -->")
    study = make_study(comparisons=asked, readme=str(readme))
    fabricate(study, {"mask_rcnn": 0.7, "unet": 2.2})
    (line,) = [x for x in page_of(study).splitlines() if x.startswith("- boundary AP")]
    assert line.endswith(" points, better")
    monkeypatch.setattr("nuclei_d2.study.findings.holm", lambda p: [0.12] * len(p))
    (line,) = [x for x in page_of(study).splitlines() if x.startswith("- boundary AP")]
    assert line.endswith(" points, perhaps better, see below")
    assert "corrected for 2 questions, p = 0.120." in readme.read_text()


def test_unequal_times_are_told_where_they_were_to_be_equal(make_study, fabricate):
    study = make_study(budget=3)
    fabricate(study, {"mask_rcnn": 0.7, "unet": 2.2})
    assert "They were trained for" not in page_of(study)
    for path in (study.results_dir / "a" / "unet").glob("*/run.json"):
        content = json.loads(path.read_text())
        path.write_text(json.dumps({**content, "training": {"seconds": 240.0}}))
    assert "They were trained for 3.0 and 4.0 minutes." in page_of(study)
    assert "They were trained for" not in page_of(make_study())


def test_the_page_tells_what_models_are_and_what_limits_the_study(make_study, fabricate):
    models = {
        "unet": {"config": str(CONFIGS / "cpu" / "unet_boundary.yaml"), "about": "looks at pixels"},
        "mask_rcnn": {"config": str(CONFIGS / "cpu" / "mask_rcnn.yaml")},
    }
    study = make_study(models=models, caveats=["One eye was closed."])
    fabricate(study, {"mask_rcnn": 0.7, "unet": 2.2})
    path = study.results_dir / "a" / "unet" / "seed0" / "run.json"
    content = json.loads(path.read_text())
    content["training"]["precision"] = "bfloat16"
    path.write_text(json.dumps(content))
    page = page_of(study)
    assert "- **unet** looks at pixels: `" in page
    assert "- **mask_rcnn**: `" in page
    assert "\n- One eye was closed.\n" in page
    assert "\n- Test CPU, 2 CPU threads, PyTorch 0.0 (a)\n" in page
    assert "\n- Test CPU, 2 CPU threads, PyTorch 0.0, bfloat16 (a)\n" in page
    with (study.results_dir / "tables" / "runs.csv").open() as file:
        assert [row["precision"] for row in csv.DictReader(file)].count("bfloat16") == 1


@pytest.mark.parametrize(
    ("low", "high", "seeds", "expected"),
    [
        (0.1, 0.5, (0.2, 0.4, 0.3), "better"),
        (-0.5, -0.1, (-0.2, -0.4, -0.3), "worse"),
        (0.1, 0.5, (0.7, -0.1, 0.3), "unsure"),
        (-0.1, 0.5, (0.2, 0.4, 0.3), "none"),
        (0.1, 0.5, (0.3, 0.3), "few seeds"),
        (float("nan"), float("nan"), (0.3, 0.2), "one image"),
    ],
)
def test_verdicts(low, high, seeds, expected):
    change = Estimate(sum(seeds) / len(seeds), low, high, seeds)
    assert verdict(change) == expected
    mirrored = {"better": "worse", "worse": "better"}.get(expected, expected)
    assert verdict(change, higher_is_better=False) == mirrored


def test_one_test_image_is_no_claim(make_study, fabricate):
    study = make_study()
    fabricate(study, {"mask_rcnn": 0.7, "unet": 2.2}, images=1)
    page = page_of(study)
    assert "**One image: no claim.**" in page
    assert "**Mind: only one image" in page
    assert "interval  to" not in page
    assert "[, ]" not in page


def test_times_are_those_that_other_programs_disturbed_least(make_study, fabricate):
    study = make_study(seeds=[0, 1])
    fabricate(study, {"unet": 1.0})
    findings = Findings(study, load_results(study))
    assert findings.training_minutes(findings.main, "unet") == 3.0  # 180 and 181 s
    assert findings.step_seconds(findings.main, "unet") == pytest.approx(1.8)  # 100 steps
    (study.results_dir / "a/unet/calibration.json").write_text('{"seconds_per_iteration": 1.5}')
    assert findings.step_seconds(findings.main, "unet") == 1.5
    assert findings.step_seconds(findings.main, "mask_rcnn") is None
    assert findings.speed(findings.main, "unet", "images") == pytest.approx(10.2)  # 10, 10.2
    assert findings.speed(findings.main, "mask_rcnn", "images") is None


def test_the_report_tells_how_many_steps_were_measured(make_study, fabricate):
    study = make_study(budget=5)
    fabricate(study, {"unet": 1.0, "mask_rcnn": 1.0})
    assert "at the end of a training of steps, and" in " ".join(page_of(study).split())
    for model, steps in ("unet", 100), ("mask_rcnn", 400):
        path = study.results_dir / f"a/{model}/calibration.json"
        path.write_text(json.dumps({"seconds_per_iteration": 1.5, "iterations": steps}))
    page = " ".join(page_of(study).split())
    assert "at the end of a training of 100 steps (400 for mask_rcnn), and" in page


def test_every_pair_is_drawn_once_and_every_question_asked(make_study, fabricate):
    asked = {
        "separation": {**BOUNDARIES, "metric": "merges_and_splits"},
        "outlines": {**BOUNDARIES, "ask": "Better outlines?"},
    }
    study = make_study(comparisons=asked)
    fabricate(study, {"mask_rcnn": 0.7, "unet": 2.2})
    page = page_of(study)
    assert "In merges and splits, mask_rcnn reaches" in page
    assert "**Better outlines?** **Yes, here.** In boundary AP" in page
    assert "- boundary AP (mean of 1, 2 and 3 px): +" in page
    figure = (study.report_file.parent / "study" / "answer.svg").read_text()
    assert figure.count("<!-- U-Net -->") == 2  # a row on the left, and the legend
    assert "<!-- mask_rcnn minus -->" in figure


def test_a_drawn_difference_names_both_where_the_first_is_not_always_the_same(
    make_study, fabricate
):
    floor = {"ask": "More than the floor?", "first": "unet", "second": "classical"}
    study = make_study(comparisons={"boundaries": BOUNDARIES, "floor": floor})
    fabricate(study, {"mask_rcnn": 0.7, "unet": 2.2, "classical": 2.5})
    page_of(study)
    figure = (study.report_file.parent / "study" / "answer.svg").read_text()
    assert "<!-- mask_rcnn minus U-Net -->" in figure
    assert "<!-- U-Net minus classical -->" in figure


def test_the_best_model_is_chosen_on_validation_images(make_study, fabricate):
    study = make_study()
    fabricate(study, {"mask_rcnn": 0.7, "unet": 2.2})
    (path,) = study.results_dir.glob("a/unet/seed0/tiny_test.json")
    content = json.loads(path.read_text())
    threshold = f"{content['score_threshold']:.2f}"
    path.write_text(json.dumps({**content, "validation": {threshold: 5.0}}))
    findings = Findings(study, load_results(study))
    assert findings.best(findings.main, ["mask_rcnn", "unet"]) == "unet"
    assert findings.best(findings.main, []) is None
    shutil.rmtree(study.results_dir / "a" / "unet" / "seed1")
    findings = Findings(study, load_results(study))
    assert findings.best(findings.main, ["mask_rcnn", "unet"]) == "mask_rcnn"  # it has more seeds


def test_programs_without_validation_images_are_said_not_to_be_chosen_from(make_study, fabricate):
    study = make_study(others={"stardist": {"task": "a", "title": "StarDist", "predictions": "x"}})
    fabricate(study, {"mask_rcnn": 0.7, "unet": 2.2})
    assert "could not be chosen" not in page_of(study)
    folder = study.results_dir / "a" / "stardist" / "seed0"
    shutil.copytree(study.results_dir / "a" / "unet" / "seed0", folder)
    content = json.loads((folder / "tiny_test.json").read_text())
    (folder / "tiny_test.json").write_text(json.dumps({**content, "validation": {}}))
    assert "Without results on these, StarDist could not be chosen." in page_of(study)


def test_numbers_in_the_page_are_those_of_the_table(make_study, fabricate):
    study = make_study()
    fabricate(study, {"mask_rcnn": 0.7, "unet": 2.2})
    page = page_of(study)
    with (study.results_dir / "tables" / "differences.csv").open() as file:
        rows = {row["metric"]: row for row in csv.DictReader(file)}
    change = rows["boundary_ap"]
    assert f"{float(change['value']):+.1f} points" in page
    assert f"{float(change['low']):+.1f} to {float(change['high']):+.1f}" in page
    assert change["seeds"] == "3"
    assert float(change["p"]) < 0.05
    findings = Findings(study, load_results(study))
    first, second = (
        findings.estimate(findings.main, "tiny_test", name, "boundary_ap").value
        for name in ("mask_rcnn", "unet")
    )
    assert float(change["value"]) == pytest.approx(first - second, abs=1e-4)
    pixels, divided = findings.contested(findings.main, "mask_rcnn")
    accuracy = findings.estimate(findings.main, "tiny_test", "mask_rcnn", "accuracy").value
    assert f"finds, {100 * pixels:.1f} % lie in more" in page
    assert f"would be {divided:.3f} instead of {accuracy:.3f}:" in page


def test_what_was_not_measured_stays_empty(make_study, fabricate):
    study = make_study()
    fabricate(study, {"mask_rcnn": 1.0}, seeds=[0])
    page = page_of(study)
    assert "**So far 1 of 7 runs are done.**" in page
    (row,) = [line for line in page.splitlines() if line.startswith("| mask_rcnn |")]
    assert "nan" not in row
    assert "None" not in page
    with (study.results_dir / "tables" / "a" / "tiny_test.csv").open() as file:
        assert {row["model"] for row in csv.DictReader(file)} == {"mask_rcnn"}


def test_no_results_are_an_error(make_study):
    with pytest.raises(NucleiError, match="no results of test to report yet"):
        write_report(make_study(), "study.yaml")


def test_other_test_sets_get_a_table_and_ladders_a_panel(make_study, fabricate):
    tasks = {
        "a": {"train": "x", "val": "y", "test": ["t", "u"]},
        "steps": {"train": "x", "val": "y", "test": ["v", "w"], "ladder": True, "seeds": [0]},
    }
    study = make_study(datasets=tasks)
    fabricate(study, {"mask_rcnn": 1.0})
    page = page_of(study)
    assert "## Other data" in page
    assert "| trained on | tested on | images | seeds | mask_rcnn |" in page
    assert "| a | `u` | 6 | 3 | 0." in page
    assert "| steps | `v` | 6 | 1 | 0." in page
    assert "mask_rcnn minus U-Net:" not in page  # one of them was not run
    assert "`w`" not in page
    assert "Right: nuclei not found in generated images, more and more crowded" in page
    assert "steps: nuclei not found at IoU 0.5 per 100 nuclei" in page
    ladder = page.partition("steps: merges and splits per 100 nuclei")[2]
    runs = load_results(study)
    (measured,) = (run.tests["w"] for run in runs if run.task == "steps")
    assert f"| model | seeds | {100 * touching_share(measured):.0f} % touch |" in ladder
    task = study.tasks["steps"]
    errors = Findings(study, runs).estimate(task, "w", "mask_rcnn", "merges_and_splits")
    assert errors.value == 0
    assert "| mask_rcnn | 1 | 0.0 |" in ladder


def test_the_first_question_is_asked_of_other_test_sets_too(make_study, fabricate):
    study = make_study(datasets={"a": {"train": "x", "val": "y", "test": ["t", "u"]}})
    fabricate(study, {"mask_rcnn": 0.7, "unet": 2.2})
    table = page_of(study).partition("mask_rcnn minus U-Net:\n\n")[2]
    findings = Findings(study, load_results(study))
    comparison = study.comparisons["boundaries"]
    change = findings.change(comparison, "boundary_ap", (findings.main, "u"))
    told = f"{change.value:+.1f} [{change.low:+.1f}, {change.high:+.1f}]"
    assert f"| a | `u` | 6 | 3 | {told} | +0." in table
    (row,) = [line for line in table.splitlines() if line.startswith("| a | `u` |")]
    runs = findings.runs("a", "mask_rcnn"), findings.runs("a", "unet")
    least = [sum(run.tests["u"].score_threshold for run in part) / 3 for part in runs]
    assert row.endswith(f" | {least[0]:.2f}, {least[1]:.2f} |")
    of_each = [
        findings.estimate(findings.main, "u", name, "boundary_ap").value
        for name in ("mask_rcnn", "unet")
    ]
    assert change.value == pytest.approx(of_each[0] - of_each[1])


def test_the_first_question_is_asked_of_every_step_of_a_ladder(make_study, fabricate):
    asked = {**BOUNDARIES, "first": "unet", "second": "mask_rcnn"}
    tasks = {
        "a": {"train": "x", "val": "y", "test": ["t"]},
        "steps": {"train": "x", "val": "y", "test": ["v", "w"], "ladder": True, "once": ["unet"]},
    }
    study = make_study(datasets=tasks, comparisons={"boundaries": asked})
    fabricate(study, {"mask_rcnn": 0.7, "unet": 4.0})
    page = page_of(study)
    ladder = page.partition("steps: nuclei not found at IoU 0.5 per 100 nuclei")[2]
    findings = Findings(study, load_results(study))
    place = study.tasks["steps"], "w"
    change = findings.change(study.comparisons["boundaries"], "not_found", place)
    of_each = [findings.estimate(*place, name, "not_found").value for name in ("unet", "mask_rcnn")]
    assert change.value == pytest.approx(of_each[0] - of_each[1])
    assert change.value > 1
    told = f"{change.value:+.1f} [{change.low:+.1f}, {change.high:+.1f}]"
    assert f"\n| U-Net minus mask_rcnn | 1 | {told} |\n" in ladder
    (line,) = [line for line in page.splitlines() if line.startswith("- where ")]
    assert "(steps; seeds: 1), no claim: merges and splits " in line
    told = f"{change.value:+.2f} [{change.low:+.2f}, {change.high:+.2f}]"
    assert f"; nuclei not found at IoU 0.5 {told}; " in line
    assert line.endswith(" per 100 nuclei")


def test_the_command_makes_the_best_model_again(make_study, fabricate):
    study = make_study(options={"SOLVER.MAX_ITER": 77})
    fabricate(study, {"classical": 0.5, "unet": 1.0, "mask_rcnn": 2.0})
    command = page_of(study).partition("## The best model, again")[2]
    # The best of those with weights; what its config says already is left out.
    assert f"--config-file {CONFIGS / 'cpu' / 'unet_boundary.yaml'}" in command
    assert "SOLVER.MAX_ITER 77" in command
    assert "MODEL.UNET.DECODER.THRESHOLD 0.4" in command
    assert "DATASETS.TEST '('\"'\"'tiny_test'\"'\"',)'" in command
    assert "SEED" not in command


def test_the_model_zoo_keeps_other_studies(make_study, fabricate, tmp_path):
    zoo = tmp_path / "MODEL_ZOO.md"
    study = make_study(model_zoo=str(zoo))
    fabricate(study, {"mask_rcnn": 1.0})
    write_report(study, "study.yaml")
    first = zoo.read_text()
    assert "| mask_rcnn |" in first
    zoo.write_text(first + "\n<!-- study: gpu -->\nkept\n<!-- /study: gpu -->\n")
    fabricate(study, {"unet": 1.0})
    write_report(study, "study.yaml")
    second = zoo.read_text()
    assert "| U-Net |" in second
    assert "<!-- study: gpu -->\nkept\n<!-- /study: gpu -->" in second
    assert second.count("<!-- study: test -->") == 1


def test_the_readme_gets_its_block(make_study, fabricate, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- results -->\nold\n<!-- /results -->\nafter\n")
    study = make_study(readme=str(readme))
    fabricate(study, {"mask_rcnn": 1.0, "unet": 2.0, "classical": 3.0})
    path = study.results_dir / "a" / "classical" / "seed0" / "run.json"
    path.write_text(path.read_text().replace("Test CPU", "CPU of a model that is not in the block"))
    write_report(study, "study.yaml")
    text = readme.read_text()
    start = (
        "before\n<!-- results -->\nTrained from scratch on `tiny_train` (Test CPU, 2 CPU threads, "
    )
    assert text.startswith(f"{start}PyTorch 0.0), means of 3 seeds;\n")
    assert text.endswith("<!-- /results -->\nafter\n")
    assert "(6 images, 72 nuclei)" in text
    assert (
        "\nDoes learning boundaries help? **Yes, here.** Boundary AP (mean of 1, 2 and 3 px): +"
        in text
    )
    assert "old" not in text
    readme.write_text("no marks")
    with pytest.raises(NucleiError, match="have to be there"):
        write_report(study, "study.yaml")


def test_a_block_needs_both_marks_in_order():
    for text in ("<!-- a -->", "<!-- /a --><!-- a -->", "<!-- a --><!-- a --><!-- /a -->"):
        with pytest.raises(NucleiError, match="in this order"):
            replace_block(text, "a", "x")
    assert replace_block("<!-- a -->\\1<!-- /a -->", "a", "\\2") == "<!-- a -->\n\\2\n<!-- /a -->"


def test_an_interval_is_shown_where_something_varied():
    assert with_interval(Estimate(1.04, 0.96, 1.12, (1.04,)), 1, sign=True) == "+1.0 [+1.0, +1.1]"
    assert with_interval(Estimate(0.0, 0.0, 0.0, (0.0,)), 1, sign=True) == "0.0"
    assert with_interval(Estimate(0.5, float("nan"), float("nan"), ()), 1) == "0.5"
    assert with_interval(Estimate(float("nan"), 0.0, 1.0, ()), 1) == ""


def test_the_front_is_what_nothing_beats_in_both():
    points = {"slow": (3.0, 0.5), "fast": (1.0, 0.2), "good": (2.0, 0.6), "tied": (1.0, 0.1)}
    assert pareto_front(points) == ["fast", "good"]

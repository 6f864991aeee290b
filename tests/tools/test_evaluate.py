import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image
from skimage.draw import disk

from nuclei_d2.data.datasets.coco import mask_to_annotation, write_coco_json
from nuclei_d2.structures.cropped_mask import label_image_to_masks
from nuclei_d2.utils.errors import run_tool

TOOL = Path(__file__).parents[2] / "tools" / "evaluate.py"
SIZE = (60, 70)
NAN = float("nan")


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("evaluate_tool", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def evaluate(tool, monkeypatch, tmp_path):
    """Run the tool; returns its JSON."""

    def run(*arguments):
        output = tmp_path / "out" / "metrics.json"
        words = ["evaluate.py", *map(str, arguments), "--output", str(output)]
        monkeypatch.setattr("sys.argv", words)
        tool.main()
        return json.loads(output.read_text())

    return run


@pytest.fixture
def fails(tool, monkeypatch, capsys, tmp_path):
    """Run the tool as a program that must fail; returns its one line."""

    def run(*arguments):
        output = tmp_path / "must_not_exist"
        files = ["--output", str(output / "m.json"), "--per-image", str(output / "t.csv")]
        monkeypatch.setattr("sys.argv", ["evaluate.py", *map(str, arguments), *files])
        with pytest.raises(SystemExit) as stopped:
            run_tool(tool.main)
        assert stopped.value.code == 2
        assert not output.exists()
        lines = capsys.readouterr().err.strip().splitlines()
        errors = [line for line in lines if line.startswith("error: ")]
        assert lines[-1:] == errors
        return errors[0]

    return run


@pytest.fixture
def images():
    """Labels of four images: 5, 8, 0 and 3 touching nuclei."""
    rng = np.random.default_rng(3)
    found = {}
    for name, count in {"a": 5, "b": 8, "c": 0, "d": 3}.items():
        labels = np.zeros(SIZE, np.uint16)
        for k in range(1, count + 1):
            labels[disk(rng.integers(5, 55, 2), rng.integers(4, 9), shape=SIZE)] = k
        found[name] = labels
    return found


def shift(images, step=1):
    return {name: np.roll(labels, step, axis=1) for name, labels in images.items()}


def write_labels(folder, images, suffix=".png"):
    folder.mkdir(parents=True)
    for name, labels in images.items():
        if suffix == ".png":
            Image.fromarray(labels).save(folder / f"{name}.png")
        else:
            tifffile.imwrite(folder / f"{name}{suffix}", labels)
    return folder


def write_dsb(folder, images):
    for name, labels in images.items():
        (folder / name / "masks").mkdir(parents=True)
        (folder / name / "images").mkdir()
        Image.fromarray((labels > 0).astype(np.uint8)).save(
            folder / name / "images" / f"{name}.png"
        )
        for value, _ in label_image_to_masks(labels):
            mask = ((labels == value) * 255).astype(np.uint8)
            Image.fromarray(mask).save(folder / name / "masks" / f"{value}.png")
    return folder


def write_coco(path, images):
    entries = []
    for key, (name, labels) in enumerate(images.items(), start=11):
        entries.append(
            {
                **{"id": key, "file_name": f"images/{name}.png"},
                **{"height": SIZE[0], "width": SIZE[1]},
                "annotations": [
                    mask_to_annotation(m, SIZE) for _, m in label_image_to_masks(labels)
                ],
            }
        )
    write_coco_json(path, entries)
    return path


def write_results(path, images, ids, score=lambda k: 0.9 - k / 100):
    results = []
    for name, labels in images.items():
        for k, (_, mask) in enumerate(label_image_to_masks(labels)):
            result = mask_to_annotation(mask, SIZE)
            results.append({**result, "image_id": ids[name], "score": score(k)})
    path.write_text(json.dumps(results))
    return path


def numbers(content):
    """The label-based numbers alone."""
    keys = ("n_images", "n_images_empty", "n_gt", "n_pred")
    keys += ("pooled", "image_mean", "errors", "boundary")
    return {key: content[key] for key in keys}


def test_every_format_gives_the_same_numbers(evaluate, images, tmp_path):
    found = shift(images)
    truths = [
        write_labels(tmp_path / "gt", images),
        write_labels(tmp_path / "gt_tif", images, ".tif"),
        write_dsb(tmp_path / "gt_dsb", images),
        write_coco(tmp_path / "gt.json", images),
    ]
    predictions = [
        write_labels(tmp_path / "pred", found, "_cp_masks.tif"),
        write_dsb(tmp_path / "pred_dsb", found),
        write_coco(tmp_path / "pred.json", found),
    ]
    ids = dict(zip(images, range(11, 15), strict=True))
    first = None
    for truth in truths:
        by_id = truth.suffix == ".json"
        results = write_results(
            tmp_path / "results.json", found, ids if by_id else {n: n for n in found}
        )
        for prediction in [*predictions, results]:
            content = evaluate("--ground-truth", truth, "--predictions", prediction)
            first = first or numbers(content)
            assert numbers(content) == first, (truth, prediction)
            assert ("coco" in content) == (prediction == results)


def test_json_has_the_promised_keys_and_values(evaluate, images, tmp_path, capsys):
    gt = write_coco(tmp_path / "gt.json", images)
    results = write_results(
        tmp_path / "r.json", images, dict(zip(images, range(11, 15), strict=True))
    )
    table = tmp_path / "t.csv"
    content = evaluate("--ground-truth", gt, "--predictions", results, "--per-image", table)
    thresholds = [f"{t:.2f}" for t in np.arange(0.5, 1, 0.05)]
    for part in ("pooled", "image_mean"):
        for rate in ("f1", "precision", "recall", "accuracy"):
            assert content[part][rate] == dict.fromkeys([*thresholds, "mean"], 1.0)
    for name in ("aji", "aji_plus", "pq", "sq", "dq", "dice"):
        assert content["image_mean"][name] == 1
    assert content["n_images"] == 4
    assert content["n_images_empty"] == 1
    assert content["n_gt"] == content["n_pred"]
    assert {"merges", "splits", "missed", "spurious"} <= content["errors"].keys()
    assert content["coco"]["segm"]["AP"] == pytest.approx(100)
    assert content["coco"]["bbox"]["AP50"] == pytest.approx(100)
    assert content["coco"]["boundary"]["1px"]["AP"] == pytest.approx(100)
    assert content["intervals"]["pooled"]["f1"]["mean"] == [1, 1]
    assert content["settings"]["score_threshold"] == 0.5
    assert len(table.read_text().splitlines()) == 5
    printed = capsys.readouterr().out
    assert "pooled f1 0.50" in printed
    assert "1.000 [1.000, 1.000]" in printed
    assert "percent" in printed


def test_several_sets_are_compared_in_pairs(evaluate, images, tmp_path, capsys):
    gt = write_labels(tmp_path / "gt", images)
    good = write_labels(tmp_path / "good", shift(images))
    bad = write_labels(tmp_path / "bad", shift(images, 3))
    per_image = tmp_path / "t_NAME.csv"
    content = evaluate(
        "--ground-truth", gt, "--predictions", good, bad, "--per-image", per_image
    )  # fmt: skip
    assert set(content["predictions"]) == {"good", "bad"}
    change = content["differences"]["bad - good"]["pooled"]["f1"]["mean"]
    parts = [content["predictions"][k]["pooled"]["f1"]["mean"] for k in ("good", "bad")]
    assert change["difference"] == pytest.approx(parts[1] - parts[0])
    assert change["low"] <= change["difference"] <= change["high"] < 0
    assert (tmp_path / "t_good.csv").is_file()
    assert (tmp_path / "t_bad.csv").is_file()
    assert "bad - good" in capsys.readouterr().out


def test_one_image_gives_no_interval_and_no_star(evaluate, images, tmp_path, capsys):
    one = {"b": images["b"]}
    gt = write_labels(tmp_path / "gt", one)
    good = write_labels(tmp_path / "good", shift(one))
    bad = write_labels(tmp_path / "bad", shift(one, 3))
    report = tmp_path / "report.html"
    content = evaluate("--ground-truth", gt, "--predictions", good, bad, "--report", report)
    printed = capsys.readouterr()
    assert "[" not in printed.out.split("Fractions of 1")[0]
    assert " *" not in printed.out
    assert "nan" not in printed.out
    assert "warning: only one image" in printed.err
    assert content["predictions"]["good"]["intervals"]["pooled"]["pq"] == [None, None]
    page = report.read_text()
    assert "One image cannot tell" in page
    assert "It may be chance." in page
    for word in ("clear, for", "interval excludes 0", "bootstrap samples", "()"):
        assert word not in page


def test_unsure_predictions_count_for_ap_only(evaluate, images, tmp_path):
    gt = write_coco(tmp_path / "gt.json", images)
    ids = dict(zip(images, range(11, 15), strict=True))
    results = write_results(tmp_path / "r.json", images, ids, score=lambda k: 0.9 if k else 0.4)
    content = evaluate("--ground-truth", gt, "--predictions", results)
    assert content["n_pred"] == content["n_gt"] - 3
    assert content["coco"]["segm"]["AP"] == pytest.approx(100)
    content = evaluate(
        "--ground-truth", gt, "--predictions", results, "--score-threshold", 0.3, "--max-dets", 2
    )
    assert content["n_pred"] == content["n_gt"]
    assert content["coco"]["max_dets"] == 2
    assert content["coco"]["segm"]["AP"] < 60
    assert any("binds" in warning for warning in content["warnings"])


def test_warnings_that_save_a_study(evaluate, images, tmp_path, capsys):
    empty = {name: np.zeros(SIZE, np.uint16) for name in images}
    gt = write_labels(tmp_path / "gt", empty)
    results = write_results(
        tmp_path / "r.json", images, {name: name for name in images}, score=lambda k: 0.7
    )
    content = evaluate("--ground-truth", gt, "--predictions", results)
    assert content["pooled"]["f1"]["mean"] == 0
    assert content["coco"]["segm"]["AP"] is None
    error = capsys.readouterr().err
    assert "no nuclei at all" in error
    assert "all scores are 0.7" in error


def test_names_that_do_not_match(fails, images, tmp_path):
    gt = write_labels(tmp_path / "gt", images)
    few = write_labels(tmp_path / "few", {k: images[k] for k in "abd"})
    assert f"{few} lacks 1 of the images in {gt}: c" in fails(
        "--ground-truth", gt, "--predictions", few
    )
    assert f"{few} lacks 1 of the images in {gt}: c" in fails(
        "--ground-truth", few, "--predictions", gt
    )


def test_sizes_that_do_not_match(fails, images, tmp_path):
    gt = write_labels(tmp_path / "gt", images)
    halves = {name: labels[::2, ::2] for name, labels in images.items()}
    half = write_labels(tmp_path / "half", halves)
    message = fails("--ground-truth", gt, "--predictions", half)
    assert f"{half / 'a.png'} is 30 x 35 pixels, 0.5 times as large" in message


def test_float_labels(fails, images, tmp_path):
    gt = write_labels(tmp_path / "gt", images)
    pred = write_labels(tmp_path / "pred", images)
    (pred / "b.png").unlink()
    tifffile.imwrite(pred / "b.tif", images["b"] * np.float32(0.5))
    message = fails("--ground-truth", gt, "--predictions", pred)
    assert str(pred / "b.tif") in message


def test_an_unreadable_file_in_the_middle(fails, images, tmp_path):
    gt = write_labels(tmp_path / "gt", images)
    pred = write_labels(tmp_path / "pred", images)
    (pred / "b.png").write_bytes((pred / "b.png").read_bytes()[:60])
    assert str(pred / "b.png") in fails("--ground-truth", gt, "--predictions", pred)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"category_id": 7}, "result 0 has category_id 7; .* has 1"),
        ({"image_id": 99}, "result 0 is of image 99"),
        ({"score": None}, "result 0 has score None"),
        ({"segmentation": None}, "result 0: an annotation has no segmentation"),
    ],
)
def test_wrong_results(fails, images, tmp_path, change, message):
    gt = write_coco(tmp_path / "gt.json", images)
    path = write_results(tmp_path / "r.json", images, dict(zip(images, range(11, 15), strict=True)))
    results = json.loads(path.read_text())
    results[0].update(change)
    path.write_text(json.dumps(results))
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(fails("--ground-truth", gt, "--predictions", path))


def test_what_is_no_ground_truth(fails, images, tmp_path):
    gt = write_labels(tmp_path / "gt", images)
    assert "no file or folder" in fails("--ground-truth", tmp_path / "nowhere", "--predictions", gt)
    (tmp_path / "void").mkdir()
    assert "neither label images" in fails("--ground-truth", tmp_path / "void", "--predictions", gt)
    (tmp_path / "broken.json").write_text("{")
    assert "broken JSON" in fails("--ground-truth", gt, "--predictions", tmp_path / "broken.json")


def test_arguments_that_contradict_each_other(fails, images, tmp_path):
    gt = write_labels(tmp_path / "gt", images)
    common = ("--ground-truth", gt, "--predictions", gt, gt)
    assert "need different names" in fails(*common)
    assert "put NAME into it" in fails(*common, "--names", "one", "two")
    assert "1 names for 2" in fails(*common, "--names", "one")


def test_a_seed_that_is_none(fails, images, tmp_path):
    gt = write_labels(tmp_path / "gt", images)
    assert "--seed is -1" in fails("--ground-truth", gt, "--predictions", gt, "--seed", -1)


def test_a_report_that_cannot_be_written_leaves_no_other_file(fails, images, tmp_path):
    gt = write_labels(tmp_path / "gt", images)
    report = gt / "a.png" / "report.html"
    message = fails("--ground-truth", gt, "--predictions", gt, "--report", report)
    assert message == f"error: cannot write {report}: {gt / 'a.png'} is no folder"


def test_files_are_written_before_anything_is_printed(tool, monkeypatch, images, tmp_path):
    gt, output = write_labels(tmp_path / "gt", images), tmp_path / "m.json"
    words = ["--ground-truth", str(gt), "--predictions", str(gt), "--output", str(output)]
    monkeypatch.setattr("sys.argv", ["evaluate.py", *words])
    monkeypatch.setattr("builtins.print", closed_pipe)
    with pytest.raises(BrokenPipeError):
        tool.main()
    assert json.loads(output.read_text())["n_images"] == 4


def closed_pipe(*_, **__):
    raise BrokenPipeError


@pytest.mark.parametrize(
    ("low", "high", "star"),
    [(0.1, 0.2, True), (-0.2, -0.1, True), (-0.1, 0.1, False), (0, 0, False), (NAN, NAN, False)],
)
def test_a_star_marks_a_clear_difference(tool, low, high, star):
    names = ["pooled", "f1", "0.50"]
    part = {"pooled": {"f1": {"0.50": {"difference": low, "low": low, "high": high}}}}
    assert tool._difference(part, names, enough=True).endswith("*") == star
    assert not tool._difference(part, names, enough=False).endswith("*")


def test_report(evaluate, images, tmp_path):
    gt = write_labels(tmp_path / "gt", images)
    raw = write_labels(tmp_path / "raw", images, ".tif")
    results = write_results(tmp_path / "scored.json", images, {name: name for name in images})
    shifted = write_labels(tmp_path / "shifted", shift(images, 4))
    costs = []
    for name, parameters in {"a": 111222, "b": 333444}.items():
        costs.append(tmp_path / f"{name}.json")
        content = {"efficiency": {"model": {"parameters": parameters}}}
        costs[-1].write_text(json.dumps(content))
    report = tmp_path / "new" / "report.html"
    content = evaluate(
        *("--ground-truth", gt, "--predictions", results, shifted, "--report", report),
        *("--images", raw, "--results", *costs),
    )
    page = report.read_text()
    assert page.startswith("<!DOCTYPE html>")
    assert "No scores, so no curve: shifted." in page
    assert page.index("111,222") < page.index("333,444")
    assert "were not at hand" not in page
    for part in content["predictions"].values():
        assert f"<td>{part['pooled']['f1']['mean']:.3f}<" in page
    assert [path.name for path in report.parent.iterdir()] == ["report.html"]


def test_report_without_images_and_scores(evaluate, images, tmp_path):
    """And without any nuclei at all, and with names that are no Unicode."""
    odd = "im\udcffage"  # a byte 0xff in a file name
    gt = write_labels(tmp_path / "gt", {odd: np.zeros(SIZE, np.uint16)})
    report = tmp_path / "report.html"
    evaluate("--ground-truth", gt, "--predictions", gt, "--report", report)
    page = report.read_text()
    assert "Nothing to measure" in page
    assert "label images have no scores" in page
    assert "--score-threshold" not in page
    assert not re.search(r"\bnan\b", page.lower())
    gt = write_labels(tmp_path / "gt2", {odd: images["a"]})
    evaluate("--ground-truth", gt, "--predictions", gt, "--report", report)
    page = report.read_text()
    assert r"im\udcffage" in page
    assert "<code>--images FOLDER</code>" in page


def test_reports_that_cannot_be(fails, images, tmp_path):
    gt = write_labels(tmp_path / "gt", images)
    few = write_labels(tmp_path / "few", {k: images[k] for k in "abd"})
    small = write_labels(tmp_path / "small", {k: v[:20] for k, v in images.items()})
    common = ("--ground-truth", gt, "--predictions", gt)
    report = ("--report", tmp_path / "must_not_exist" / "report.html")
    assert fails(*common, *report, "--images", few).endswith(f"{few} lacks an image called c")
    assert "small/" in fails(*common, *report, "--images", small)
    assert "add --report" in fails(*common, "--images", gt)
    assert "2 files for 1" in fails(*common, *report, "--results", gt, gt)
    assert "cannot read" in fails(*common, *report, "--results", tmp_path / "none.json")
    (tmp_path / "list.json").write_text("[1]")
    assert "no results.json" in fails(*common, *report, "--results", tmp_path / "list.json")

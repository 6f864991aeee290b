"""A small comparison of two programs, and the report about it."""

import json

import numpy as np
import pytest
from PIL import Image

from nuclei_d2.data.datasets.coco import mask_to_annotation, write_coco_json
from nuclei_d2.evaluation.bootstrap import bootstrap_weights
from nuclei_d2.evaluation.comparison import evaluate_files
from nuclei_d2.evaluation.inputs import open_ground_truth, open_predictions
from nuclei_d2.structures.cropped_mask import label_image_to_masks
from nuclei_d2.visualization.report import find_raw_images, render_report

SIZE = (40, 60)
HOSTILE = "<script>alert('x')</script>&\"'<img src=x>"


@pytest.fixture(scope="session")
def report(tmp_path_factory):
    """Of twelve images, see :func:`compare`."""
    return compare(tmp_path_factory.mktemp("report"), 12)


@pytest.fixture(scope="session")
def few_images(tmp_path_factory):
    """The same of nine images."""
    return compare(tmp_path_factory.mktemp("few"), 9)


def compare(folder, n_images):
    """Function that renders the report of a comparison: ``report(names, results) -> html``.

    Images of four nuclei. "careful" finds them all, its scores rise with the image. Of the last
    five images, "hasty" joins the upper two nuclei into one. One image has a hostile name.
    """
    (folder / "images").mkdir()
    (folder / "annotations").mkdir()
    entries, found = [], {"careful": [], "hasty": []}
    for k in range(n_images):
        name = f"image_{k}" if k else HOSTILE.replace("/", "\\")
        truth = draw((4, 4), (4, 18), (22, 4), (22, 30))
        hasty = draw((4, 4, 28), (22, 4), (22, 30)) if k >= n_images - 5 else truth
        picture = np.where(truth > 0, 150, 20) + np.arange(SIZE[1])
        Image.fromarray(picture.astype(np.uint8)).save(folder / "images" / f"image_{k}.png")
        record = {"id": k, "file_name": f"images/{name}.png"}
        record.update(height=SIZE[0], width=SIZE[1], annotations=annotations(truth))
        entries.append(record)
        for labels, results in ((truth, found["careful"]), (hasty, found["hasty"])):
            results += [{**a, "image_id": k, "score": 0.6 + k / 30} for a in annotations(labels)]
    (folder / "images" / "image_0.png").rename(folder / entries[0]["file_name"])
    write_coco_json(folder / "annotations" / "test.json", entries)
    truth = open_ground_truth(folder / "annotations" / "test.json")
    predictions = []
    for name, results in found.items():
        (folder / f"{name}.json").write_text(json.dumps(results))
        predictions.append(open_predictions(folder / f"{name}.json", truth))
    evaluations = evaluate_files(truth, predictions)
    weights = bootstrap_weights(len(truth.images))
    settings = {"ground_truth": "test.json", "score_threshold": 0.5, "bootstrap_seed": 0}
    raw_images = find_raw_images(truth)
    assert len(raw_images) == n_images

    def render(names=("careful", "hasty"), results=()):
        part = evaluations[: len(names)]
        return render_report(names, truth, part, weights, settings, raw_images, results)

    return render


def draw(*boxes) -> np.ndarray:
    """Label image of rectangles (top, left[, width]), 14 x 14 pixels unless told."""
    labels = np.zeros(SIZE, np.uint16)
    for label, (top, left, *width) in enumerate(boxes, start=1):
        labels[top : top + 14, left : left + (*width, 14)[0]] = label
    return labels


def annotations(labels):
    return [mask_to_annotation(mask, SIZE) for _, mask in label_image_to_masks(labels)]

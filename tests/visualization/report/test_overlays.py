import re

import numpy as np
import pytest
from PIL import Image

from nuclei_d2.evaluation.inputs import ImageSource, ScoredMasks, open_ground_truth
from nuclei_d2.evaluation.instances import layers_from_label_image, layers_from_masks
from nuclei_d2.structures.cropped_mask import crop_mask
from nuclei_d2.utils.errors import NucleiError
from nuclei_d2.visualization.report import find_raw_images
from nuclei_d2.visualization.report.overlays import draw_overlay, pick_images

NAN = float("nan")


def source(labels):
    return ImageSource("somewhere", lambda: layers_from_label_image(labels))


def points(path):
    """(K, 2) x, y of SVG path data."""
    return np.array(re.findall(r"[ML]([\d.-]+) ([\d.-]+)", path), float)


def test_every_kind_of_error():
    truth, found = np.zeros((2, 60, 80), int)
    truth[5:15, 5:15], truth[5:15, 15:25] = 1, 2  # joined
    truth[30:40, 5:25] = 3  # cut
    truth[5:15, 40:50] = 4  # found
    truth[30:40, 40:50] = 5  # half found
    truth[50:58, 70:78] = 6  # not found
    found[5:15, 5:25] = 1
    found[30:40, 5:15], found[30:40, 15:25] = 2, 3
    found[6:15, 40:50] = 4
    found[30:35, 40:50] = 5
    overlay = draw_overlay(source(truth), source(found), 0.5, None)
    assert (overlay.width, overlay.height) == (80, 60)
    # Joined nuclei are missed as well, and the parts of the cut one spurious.
    assert overlay.counts == {"merged": 1, "split": 1, "matched": 1, "spurious": 3, "missed": 4}
    assert {kind: path.count("Z") for kind, path in overlay.paths.items()} == overlay.counts
    # Lines run inside the pixels' edges by 0.3 px, as the level is 0.8; corners are cut.
    x, y = points(overlay.paths["merged"]).T
    np.testing.assert_allclose(
        [x.min(), x.max(), y.min(), y.max()], [5.3, 24.7, 5.3, 14.7], atol=0.25
    )
    x, y = points(overlay.paths["matched"]).T
    np.testing.assert_allclose(
        [x.min(), x.max(), y.min(), y.max()], [40.3, 49.7, 6.3, 14.7], atol=0.25
    )


def test_tiny_and_empty_nuclei():
    truth = np.zeros((20, 300), int)
    truth[0, 0] = 1
    nothing = np.zeros_like(truth)
    overlay = draw_overlay(source(truth), source(nothing), 0.5, None)
    assert overlay.counts["missed"] == 1
    assert len(points(overlay.paths["missed"])) == 4
    overlay = draw_overlay(source(nothing), source(nothing), 0.5, None)
    assert sum(overlay.counts.values()) == 0
    assert overlay.line == pytest.approx(1)  # 1 / 300 of the width


def test_scores_below_the_threshold_are_left_out():
    labels = np.zeros((20, 20), int)
    labels[2:10, 2:10] = 1
    masks = [crop_mask(labels)]
    scored = ImageSource("", lambda: ScoredMasks(masks, np.array([0.4]), (20, 20), []))
    assert draw_overlay(source(labels), scored, 0.4, None).counts["matched"] == 1
    assert draw_overlay(source(labels), scored, 0.5, None).counts["matched"] == 0


def test_nuclei_that_overlap_are_drawn_as_they_are_counted():
    full = np.zeros((2, 20, 20), bool)
    full[0, 2:12, 2:12] = full[1, 8:18, 8:18] = True
    masks = [crop_mask(mask) for mask in full]
    truth = ImageSource("", lambda: layers_from_masks(masks, (20, 20)))
    scored = ImageSource("", lambda: ScoredMasks(masks, np.array([0.9, 0.8]), (20, 20), []))
    counts = draw_overlay(truth, scored, 0.5, None).counts
    assert {kind for kind, count in counts.items() if count} == {"matched"}
    assert counts["matched"] == 2


def test_an_image_of_another_size(tmp_path):
    labels = np.zeros((20, 20), np.uint8)
    (tmp_path / "gt").mkdir()
    Image.fromarray(labels).save(tmp_path / "gt" / "a.png")
    (tmp_path / "raw").mkdir()
    Image.fromarray(labels[:10]).save(tmp_path / "raw" / "a.png")
    truth = open_ground_truth(tmp_path / "gt")
    raw = find_raw_images(truth, tmp_path / "raw")["a"]
    with pytest.raises(
        NucleiError, match=r"raw/a.png is 10 x 20 pixels, its ground truth .* 20 x 20"
    ):
        draw_overlay(truth.images["a"], source(labels), 0.5, raw)


@pytest.mark.parametrize(
    ("scores", "worst", "median"),
    [
        # Ranks 0 1 2 3 are taken; of what is left, 4 and 3 .. lie nearest the middle, 4.
        ([[0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]], [0, 1, 2, 3], [4, 5]),
        ([[0.3, 0.2, NAN, 0.1]], [3, 1, 0], []),  # undefined ones are never shown
        # In turn: 0 of the first, 5 of the second, 1, 4; both middles are between 2 and 3.
        ([[0.0, 0.1, 0.2, 0.3, 0.4, 0.5], [0.9, 0.8, 0.7, 0.6, 0.1, 0.05]], [0, 5, 1, 4], [2, 3]),
        ([[NAN, NAN]], [], []),
    ],
)
def test_worst_and_median_images(scores, worst, median):
    found = pick_images(np.array(scores))
    assert found[0] == sorted(worst, key=lambda k: np.nanmin(np.array(scores)[:, k]))
    assert found[1] == sorted(median, key=lambda k: np.nanmin(np.array(scores)[:, k]))


@pytest.fixture
def save(tmp_path):
    def write(name):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((4, 4), np.uint8)).save(path)

    return write


@pytest.mark.parametrize(
    ("root", "nuclei", "image"),
    [
        ("labels", "labels/a.png", "images/a.tif"),  # a prepared data set
        ("cellpose", "cellpose/a_masks.png", "cellpose/a.png"),
        ("dsb", "dsb/a/masks/1.png", "dsb/a/images/a.png"),
    ],
)
def test_images_beside_the_ground_truth(save, tmp_path, root, nuclei, image):
    save(nuclei)
    if root != "dsb":  # otherwise nothing tells the size
        assert find_raw_images(open_ground_truth(tmp_path / root)) == {}
    save(image)
    truth = open_ground_truth(tmp_path / root)
    [(name, file)] = find_raw_images(truth).items()
    assert (name, str(file)) == ("a", str(tmp_path / image))


def test_the_image_beside_one_mask_of_cellpose(save, tmp_path):
    save("a_masks.png")
    save("a.png")
    truth = open_ground_truth(tmp_path / "a_masks.png")
    assert {name: str(f) for name, f in find_raw_images(truth).items()} == {
        "a": str(tmp_path / "a.png")
    }


def test_images_in_a_folder(save, tmp_path):
    for name in ("labels/a.png", "labels/b.png", "raw/a.tif", "raw/deep/b.png", "raw/other.png"):
        save(name)
    truth = open_ground_truth(tmp_path / "labels")
    found = find_raw_images(truth, tmp_path / "raw")
    assert {name: file.name for name, file in found.items()} == {"a": "a.tif", "b": "deep/b.png"}
    save("raw/deep/a.png")
    with pytest.raises(NucleiError, match=r"two images called a: .*raw/a.tif, .*raw/deep/a.png"):
        find_raw_images(truth, tmp_path / "raw")
    save("few/a.png")
    with pytest.raises(NucleiError, match=r"few lacks an image called b$"):
        find_raw_images(truth, tmp_path / "few")

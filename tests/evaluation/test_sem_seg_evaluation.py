import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from tiny import TINY_DATA_OPTS, in_two_processes

from nuclei_d2.config import load_config
from nuclei_d2.data.datasets.builtin import register_from_config
from nuclei_d2.data.image_io import read_label
from nuclei_d2.data.targets import inner_boundary_target, two_class_target
from nuclei_d2.evaluation import NucleiSemSegEvaluator
from nuclei_d2.evaluation.sem_seg_evaluation import build_sem_seg_evaluators, sem_seg_scores


def test_scores_by_hand():
    confusion = [[50, 4, 6], [2, 20, 3], [5, 0, 10]]
    scores = sem_seg_scores(np.array(confusion), ("background", "interior", "boundary"))
    ious = [50 / 67, 20 / 29, 10 / 24]
    assert scores["mIoU"] == pytest.approx(100 * np.mean(ious))
    assert scores["IoU-interior"] == pytest.approx(100 * ious[1])
    assert scores["Dice-boundary"] == pytest.approx(100 * 2 * 10 / (15 + 19))
    # Interior and boundary together: 33 right, 10 spurious, 7 missed.
    assert scores["IoU-foreground"] == pytest.approx(100 * 33 / 50)
    assert scores["Dice-foreground"] == pytest.approx(100 * 66 / 83)
    assert scores["pACC"] == pytest.approx(80)


def test_a_class_that_is_not_there_is_undefined_and_in_no_mean():
    scores = sem_seg_scores(np.array([[7, 0], [0, 0]]), ("background", "nucleus"))
    assert scores["mIoU"] == scores["IoU-background"] == scores["pACC"] == 100
    assert np.isnan(scores["IoU-nucleus"])
    assert np.isnan(scores["Dice-foreground"])
    assert np.isnan(sem_seg_scores(np.zeros((2, 2)), ("background", "nucleus"))["mIoU"])


@pytest.mark.parametrize("overlaps", [False, True])
def test_perfect_and_inverted_predictions(tiny_data, overlaps):
    register_from_config(load_config("", TINY_DATA_OPTS))
    records = DatasetCatalog.get("tiny_test")
    evaluator = NucleiSemSegEvaluator(
        "tiny_test",
        class_names=("background", "interior", "boundary"),
        target=inner_boundary_target,
    )
    # From annotations where masks overlap, else from the label image: the same.
    evaluator._records = {r["image_id"]: {**r, "overlaps": overlaps} for r in records}
    for turn, expected in ((0, 100), (1, 0)):
        evaluator.reset()
        for record in records:
            classes = inner_boundary_target(read_label(record["label_file_name"]))
            one_hot = torch.from_numpy((classes + turn) % 3 == np.arange(3)[:, None, None])
            evaluator.process([record], [{"sem_seg": one_hot.float()}])
        scores = evaluator.evaluate()["sem_seg"]
        assert scores["mIoU"] == expected
        assert scores["Dice-interior"] == expected
        assert scores["pACC"] == expected


def test_only_models_with_sem_seg_have_it_scored():
    def build(*opts):
        return build_sem_seg_evaluators(load_config("", opts), "x")

    assert build() == []
    (unet,) = build("MODEL.META_ARCHITECTURE", "UNet", "MODEL.UNET.TARGET", "distance")
    assert unet.class_names == ("background", "nucleus")
    (classical,) = build("MODEL.META_ARCHITECTURE", "Classical", "MODEL.UNET.TARGET", "boundary")
    assert classical._target is two_class_target


def test_two_processes_give_exactly_the_numbers_of_one(tiny_data, tmp_path):
    register_from_config(load_config("", TINY_DATA_OPTS))
    records = DatasetCatalog.get("tiny_train")
    names = ("background", "nucleus")
    noise = np.random.default_rng(0).random((len(records), 2, 64, 80), np.float32)
    outputs = [{"sem_seg": torch.from_numpy(x)} for x in noise]

    def evaluate(part):
        evaluator = NucleiSemSegEvaluator("tiny_train", class_names=names, target=two_class_target)
        evaluator.process(records[part], outputs[part])
        return evaluator.evaluate()

    # As unevenly as Detectron2's sampler.
    parts = (slice(0, 1), slice(1, None))
    first, second = in_two_processes(lambda rank: evaluate(parts[rank]), tmp_path)
    assert first == evaluate(slice(None))
    assert 40 < first["sem_seg"]["pACC"] < 60
    assert second is None

import numpy as np
import torch
from detectron2.structures import Instances

from nuclei_d2.modeling.label_instances import predictions_from_labels
from nuclei_d2.structures import LabelMasks

LABELS = np.zeros((6, 8), np.int32)
LABELS[1:3, 1:4] = 1
LABELS[1:5, 4:7] = 2
LABELS[5, 0] = 3
SCORES = np.array([0.3, 0.9, 0.6], np.float32)


def test_best_first_with_tight_boxes():
    found = predictions_from_labels(LABELS, SCORES, (6, 8))
    assert found.image_size == (6, 8)
    assert found.scores.tolist() == SCORES[[1, 2, 0]].tolist()
    assert found.pred_boxes.tensor.tolist() == [[4, 1, 7, 5], [0, 5, 1, 6], [1, 1, 4, 3]]
    assert found.pred_classes.tolist() == [0, 0, 0]
    assert (found.pred_masks.numpy() == (np.array([2, 3, 1])[:, None, None] == LABELS)).all()


def test_scaled_to_the_size_of_the_file():
    found = predictions_from_labels(LABELS, SCORES, (12, 16))
    assert found.pred_boxes.tensor.tolist()[0] == [8, 2, 14, 10]
    assert found.pred_masks.area().tolist() == [48, 4, 24]
    # One pixel of four is left; nucleus 3 is not hit.
    small = predictions_from_labels(LABELS, SCORES, (3, 4))
    assert small.scores.tolist() == SCORES[[1, 0]].tolist()
    assert small.pred_masks.nonempty().all()


def test_threshold_and_cap():
    found = predictions_from_labels(LABELS, SCORES, (6, 8), score_threshold=0.5)
    assert found.scores.tolist() == SCORES[[1, 2]].tolist()
    found = predictions_from_labels(LABELS, SCORES, (6, 8), max_instances=1)
    assert found.scores.tolist() == [SCORES[1]]


def test_no_nuclei():
    found = predictions_from_labels(np.zeros((6, 8), np.int32), np.zeros(0, np.float32), (3, 4))
    assert len(found) == 0
    assert found.pred_boxes.tensor.shape == (0, 4)
    assert found.pred_masks.shape == (0, 3, 4)


def test_they_can_be_indexed_and_moved_like_any_instances():
    found = predictions_from_labels(LABELS, SCORES, (6, 8))
    chosen = found[found.scores > 0.5].to("cpu")
    assert isinstance(chosen, Instances)
    assert isinstance(chosen.pred_masks, LabelMasks)
    assert torch.equal(chosen.pred_masks[0].tensor[0], torch.from_numpy(LABELS == 2))
    assert np.asarray(chosen.pred_masks).shape == (2, 6, 8)
    assert np.asarray(chosen.pred_masks).dtype == bool

"""Every YAML in configs/ builds, trains one step and predicts, on an empty and a full image."""

import numpy as np
import pytest
import torch
from conftest import CONFIGS
from detectron2.utils.events import EventStorage

from nuclei_d2.config import load_config
from nuclei_d2.data.dataset_mapper import labels_to_instances
from nuclei_d2.engine.trainer import NucleiTrainer

LEAVES = sorted(p for p in CONFIGS.rglob("*.yaml") if not p.name.startswith("Base"))
SIDE = 160
# Fewer proposals than the real configs, for speed alone.
FEW_OPTS = (
    *("MODEL.DEVICE", "cpu", "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "32"),
    *("MODEL.RPN.PRE_NMS_TOPK_TEST", "50", "MODEL.RPN.POST_NMS_TOPK_TEST", "50"),
    *("TEST.DETECTIONS_PER_IMAGE", "30"),
)


def inputs(labels):
    image = torch.from_numpy(np.repeat(200.0 * (labels > 0)[None], 3, axis=0)).float()
    instances = labels_to_instances(labels)
    return {"image": image, "height": SIDE, "width": SIDE, "instances": instances}


@pytest.fixture(scope="module")
def batch():
    """An image without nuclei and one with 1,000."""
    full = np.zeros((SIDE, SIDE), np.int32)
    for k in range(1000):
        y, x = 5 * (k // 32), 5 * (k % 32)
        full[y : y + 4, x : x + 4] = k + 1
    return [inputs(np.zeros_like(full)), inputs(full)]


@pytest.mark.parametrize("path", LEAVES, ids=lambda p: str(p.relative_to(CONFIGS)))
def test_config_trains_and_predicts(path, batch):
    cfg = load_config(str(path), FEW_OPTS)
    torch.manual_seed(0)
    model = NucleiTrainer.build_model(cfg).train()
    assert len(batch[1]["instances"]) == 1000
    with EventStorage(), torch.autocast("cpu", torch.bfloat16, enabled=cfg.SOLVER.AMP.ENABLED):
        losses = model(batch)
        total = sum(losses.values())
    assert torch.isfinite(total)
    total.backward()
    missing = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing
    with torch.no_grad():
        outputs = model.eval()(batch)
    for output in outputs:
        instances = output["instances"]
        assert instances.image_size == (SIDE, SIDE)
        assert instances.pred_masks.shape == (len(instances), SIDE, SIDE)
        assert len(instances) <= cfg.TEST.DETECTIONS_PER_IMAGE


def test_mask_rcnn_and_mask_boundary_rcnn_differ_by_the_head_alone():
    for folder in (CONFIGS, CONFIGS / "cpu"):
        baseline = load_config(str(folder / "mask_rcnn.yaml"))
        ours = load_config(str(folder / "mask_boundary_rcnn.yaml"))
        control = load_config(str(folder / "mask_boundary_rcnn_control.yaml"))
        for cfg in (ours, control):
            cfg.MODEL.ROI_MASK_HEAD = baseline.MODEL.ROI_MASK_HEAD
            cfg.OUTPUT_DIR = baseline.OUTPUT_DIR
            assert cfg == baseline

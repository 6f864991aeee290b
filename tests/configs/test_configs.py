"""Every YAML in configs/ builds, trains one step and predicts, on an empty and a full image."""

import re

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from tiny import CONFIGS, REPOSITORY

from nuclei_d2.config import load_config
from nuclei_d2.data.dataset_mapper import labels_to_instances
from nuclei_d2.data.targets import build_target
from nuclei_d2.engine.trainer import NucleiTrainer

# Studies list configs; they are none.
LEAVES = sorted(
    p
    for p in CONFIGS.rglob("*.yaml")
    if not p.name.startswith("Base") and p.parent.name != "studies"
)
SIDE = 160
# Fewer proposals than the real configs, for speed alone.
FEW_OPTS = (
    *("MODEL.DEVICE", "cpu", "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "32"),
    *("MODEL.RPN.PRE_NMS_TOPK_TEST", "50", "MODEL.RPN.POST_NMS_TOPK_TEST", "50"),
    *("TEST.DETECTIONS_PER_IMAGE", "30"),
)


def inputs(labels):
    """What the mapper gives to the model, but for the targets of the UNet."""
    image = torch.from_numpy(np.repeat(200.0 * (labels > 0)[None], 3, axis=0)).float()
    instances = labels_to_instances(labels)
    return {"image": image, "height": SIDE, "width": SIDE, "instances": instances}


def train_one_step(cfg, model, batch, labels):
    target = build_target(cfg)
    if target:
        batch = [{**x, **target(y)} for x, y in zip(batch, labels, strict=True)]
    with EventStorage(), torch.autocast("cpu", torch.bfloat16, enabled=cfg.SOLVER.AMP.ENABLED):
        losses = model(batch)
        total = sum(losses.values())
    assert torch.isfinite(total)
    total.backward()
    missing = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing


@pytest.fixture(scope="module")
def labels():
    """An image without nuclei and one with 1,000."""
    full = np.zeros((SIDE, SIDE), np.int32)
    for k in range(1000):
        y, x = 5 * (k // 32), 5 * (k % 32)
        full[y : y + 4, x : x + 4] = k + 1
    return [np.zeros_like(full), full]


@pytest.mark.parametrize("path", LEAVES, ids=lambda p: str(p.relative_to(CONFIGS)))
def test_config_trains_and_predicts(path, labels):
    cfg = load_config(str(path), FEW_OPTS)
    batch = [inputs(image) for image in labels]
    assert len(batch[1]["instances"]) == 1000
    torch.manual_seed(0)
    model = NucleiTrainer.build_model(cfg).train()
    if list(model.parameters()):  # the classical baseline has none
        train_one_step(cfg, model, batch, labels)
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


def test_the_unets_differ_by_target_and_losses_alone():
    for folder in (CONFIGS, CONFIGS / "cpu"):
        two_class = load_config(str(folder / "unet.yaml"))
        for name in ("unet_boundary", "unet_boundary_caicedo", "unet_distance"):
            cfg = load_config(str(folder / f"{name}.yaml"))
            for key in ("TARGET", "BOUNDARY", "CLASS_WEIGHTS", "DICE_WEIGHT", "DECODER"):
                cfg.MODEL.UNET[key] = two_class.MODEL.UNET[key]
            cfg.OUTPUT_DIR = two_class.OUTPUT_DIR
            assert cfg == two_class


# Detectron2's configs/Base-RCNN-FPN.yaml, as its COCO models were trained.
COCO_MODEL = {
    "BACKBONE": {"NAME": "build_resnet_fpn_backbone"},
    "RESNETS": {"OUT_FEATURES": ["res2", "res3", "res4", "res5"]},
    "FPN": {"IN_FEATURES": ["res2", "res3", "res4", "res5"]},
    "ANCHOR_GENERATOR": {"SIZES": [[32], [64], [128], [256], [512]]},
    "RPN": {"IN_FEATURES": ["p2", "p3", "p4", "p5", "p6"]},
    "ROI_HEADS": {"NAME": "StandardROIHeads", "IN_FEATURES": ["p2", "p3", "p4", "p5"]},
    "ROI_BOX_HEAD": {"NAME": "FastRCNNConvFCHead", "NUM_FC": 2, "POOLER_RESOLUTION": 7},
    "ROI_MASK_HEAD": {"NAME": "MaskRCNNConvUpsampleHead", "NUM_CONV": 4},
}


def test_the_documented_recipe_takes_all_of_coco_but_the_last_layers(tmp_path):
    docs = (REPOSITORY / "docs/models.md").read_text()
    (recipe,) = (b for b in re.findall("```yaml\n(.*?)```", docs, re.S) if "COCO-Instance" in b)
    (tmp_path / "recipe.yaml").write_text(recipe.replace("_BASE_: ", f"_BASE_: {REPOSITORY}/"))
    ours = load_config(str(tmp_path / "recipe.yaml"), ["MODEL.DEVICE", "cpu"])
    coco = get_cfg()
    coco.MODEL.DEVICE, coco.MODEL.MASK_ON = "cpu", True
    for part, values in COCO_MODEL.items():
        coco.MODEL[part].update(values)
    shapes = [{k: v.shape for k, v in build_model(c).state_dict().items()} for c in (ours, coco)]
    differ = {name for name in shapes[0] if shapes[0][name] != shapes[1].get(name)}
    parts = {".".join(name.split(".")[1:3]) for name in differ}
    assert parts == {"box_predictor.cls_score", "box_predictor.bbox_pred", "mask_head.predictor"}

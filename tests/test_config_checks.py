import pytest

from nuclei_d2 import config_checks
from nuclei_d2.config import load_config
from nuclei_d2.utils.errors import NucleiError


@pytest.mark.parametrize(
    ("opts", "expected"),
    [
        (["INPUT.FORMAT", "HSV"], "valid: RGB, BGR"),
        (["MODEL.ROI_MASK_HEAD.BOUNDARY.TARGET", "thick"], "valid: exact, paper"),
        (["INPUT.RANDOM_FLIP", "sideways"], "valid: none, horizontal, vertical, both"),
        (["MODEL.RESNETS.NORM", "BNN"], "valid: , BN, SyncBN"),
        (["MODEL.ROI_BOX_HEAD.NAME", "Foo"], "valid: FastRCNNConvFCHead"),
        (["MODEL.RPN.HEAD_NAME", "Foo"], "valid: StandardRPNHead"),
        (["MODEL.ANCHOR_GENERATOR.NAME", "Foo"], "valid: DefaultAnchorGenerator"),
        (["SOLVER.LR_SCHEDULER_NAME", "Foo"], "valid: WarmupMultiStepLR"),
        (["INPUT.SCALE", "big"], "INPUT.SCALE"),
        (["INPUT.SCALE"], "KEY VALUE pairs"),
        (["TEST.DETECTIONS_PER_IMAGE", "-1"], "TEST.DETECTIONS_PER_IMAGE is -1; .* from 1"),
        (["TEST.DETECTIONS_PER_IMAGE", "0"], "TEST.DETECTIONS_PER_IMAGE is 0"),
        (["INPUT.TRAINING_RANGES.FOCUS", "[0.5]"], r"FOCUS is \[0\.5\]; .*\[lowest, highest\]"),
        (["INPUT.TRAINING_RANGES.NOISE", "[0.5, 0.1]"], r"lowest, highest"),
        (["INPUT.TRAINING_RANGES.NOISE", "['a', 'b']"], r"lowest, highest"),
        (["INPUT.SCALE", "0"], r"INPUT\.SCALE is 0\.0; .* above 0"),
        (["INPUT.SCALE", "-2"], r"INPUT\.SCALE is -2\.0"),
        (["INPUT.CROP.SIZE", "[256]"], r"INPUT\.CROP\.SIZE is \[256\]; .*\[height, width\]"),
        (["INPUT.CROP.SIZE", "[0, 256]"], r"INPUT\.CROP\.SIZE is \[0, 256\]"),
        (["MODEL.PIXEL_MEAN", "[127.5]"], r"MODEL\.PIXEL_MEAN is \[127\.5\]; .*three"),
        (["MODEL.PIXEL_STD", "[1.0, 1.0]"], r"MODEL\.PIXEL_STD is \[1\.0, 1\.0\]"),
        (["MODEL.MASK_ON", "False"], r"MODEL\.MASK_ON is False"),
        (["DATASETS.CUSTOM", "[['a', 'b']]"], r"\[name, annotation JSON, image folder\]"),
        (["DATASETS.CUSTOM", "[5]"], r"\[name, annotation JSON, image folder\], got 5"),
        (["INPUT.NOISE", "(0.03,)"], r"NOISE is \[0\.03\]; give \[lowest, highest\], from 0 to 1"),
        (["INPUT.SCALE_JITTER", "(0.0, 1.0)"], r"SCALE_JITTER is \(0\.0, 1\.0\); .* above 0"),
        (["INPUT.GAMMA", "(0.5, 1.0, 2.0)"], r"GAMMA .*\[lowest, highest\], above 0"),
        (["INPUT.PERCENTILES", "(1.0, 101.0)"], "PERCENTILES .* from 0 to 100"),
        (["INPUT.PERCENTILES", "(True, 99.0)"], r"PERCENTILES .*\[lowest, highest\]"),
        (["INPUT.CROP.NUCLEUS_PROB", "90"], "NUCLEUS_PROB is 90.0; give a number from 0 to 1"),
        (["TEST.SCORE_THRESH_LABELS", "50"], "SCORE_THRESH_LABELS is 50.0; .* from 0 to 1"),
        (["TEST.SCORE_THRESH_LABELS", "1e999"], "SCORE_THRESH_LABELS is inf; .* from 0 to 1"),
        (["MODEL.CLASSICAL.LOCAL_SIZE", "0"], "LOCAL_SIZE is 0; give a number from 1"),
        (["MODEL.RESNETS.DEPTH", "20"], "DEPTH is 20; valid: 18, 34, 50"),
        (["INPUT.SCALE", "1e999"], "SCALE is inf; give a number above 0"),
        (["INPUT.GAMMA", "None"], "INPUT.GAMMA is empty; give it a value, or leave it out"),
        (["DATASETS.CUSTOM", "None"], "DATASETS.CUSTOM is empty"),
        (["INPUT.TRAINING_RANGES.FOCUS", "None"], "TRAINING_RANGES.FOCUS is empty"),
        (["MODEL.UNET.DEPTH", "0"], "DEPTH is 0; give a number from 1"),
    ],
)
def test_wrong_values_say_what_is_valid(opts, expected):
    with pytest.raises(NucleiError, match=expected) as error:
        load_config("", opts)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("key", config_checks._RANGES)
def test_every_default_lies_within_its_range(key):
    span, value = config_checks._RANGES[key], config_checks.value_at(load_config(), key)
    assert isinstance(value, tuple) == span.pair


@pytest.mark.parametrize(
    ("key", "value", "instead"),
    [
        ("INPUT.MIN_SIZE_TRAIN", "(640, 800)", "INPUT.SCALE"),
        ("INPUT.MAX_SIZE_TEST", "2000", "INPUT.SCALE"),
        ("TEST.AUG.ENABLED", "True", "predict.py --tta"),
        ("TEST.PRECISE_BN.ENABLED", "True", "MODEL.RESNETS.NORM GN"),
        ("MODEL.LOAD_PROPOSALS", "True", "MODEL.PROPOSAL_GENERATOR"),
    ],
)
def test_a_key_of_detectron2_that_would_do_nothing_names_what_does(key, value, instead):
    with pytest.raises(NucleiError, match=rf"{key} is .* does not use it: .*{instead}"):
        load_config("", [key, value])

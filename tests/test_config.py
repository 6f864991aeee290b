import pytest
import torch

from nuclei_d2.config import check_device, load_config
from nuclei_d2.utils.errors import NucleiError


def write(path, text):
    path.write_text(text)
    return str(path)


def test_values_come_from_the_default_the_file_and_the_options_in_this_order(tmp_path):
    write(tmp_path / "base.yaml", "INPUT: {SCALE: 2.0, NOISE_FLOOR: 5.0}\nSEED: 3\n")
    leaf = write(tmp_path / "leaf.yaml", "_BASE_: base.yaml\nINPUT: {NOISE_FLOOR: 6.0}\n")
    cfg = load_config(leaf, ["SEED", "4"])
    assert (cfg.INPUT.SCALE, cfg.INPUT.NOISE_FLOOR, cfg.SEED) == (2.0, 6.0, 4)
    assert cfg.INPUT.MIN_LEVELS == load_config().INPUT.MIN_LEVELS


@pytest.mark.parametrize("opts", [["MODEL.ROI_MASK_HEAD.BOUNDRY.TARGET", "exact"], ["SED", "1"]])
def test_unknown_key_names_itself_the_nearest_and_the_valid_ones(tmp_path, opts):
    with pytest.raises(NucleiError, match="did you mean") as error:
        load_config("", opts)
    assert opts[0] in str(error.value)
    assert "Keys under" in str(error.value)
    assert "\n" not in str(error.value)


def test_unknown_key_in_a_file_names_the_file(tmp_path):
    path = write(tmp_path / "bad.yaml", "INPUT: {SCAL: 2.0}\n")
    with pytest.raises(NucleiError, match=r"bad\.yaml.*INPUT\.SCAL.*did you mean INPUT\.SCALE"):
        load_config(path)


@pytest.mark.parametrize(
    ("opts", "expected"),
    [
        (["INPUT.FORMAT", "HSV"], "valid: RGB, BGR"),
        (["MODEL.ROI_MASK_HEAD.BOUNDARY.TARGET", "thick"], "valid: exact, paper"),
        (["INPUT.RANDOM_FLIP", "sideways"], "valid: none, horizontal, vertical, both"),
        (["MODEL.RESNETS.NORM", "BNN"], "valid: , BN, SyncBN"),
        (["MODEL.ROI_BOX_HEAD.NAME", "Foo"], "valid: FastRCNNConvFCHead"),
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
    ],
)
def test_wrong_values_say_what_is_valid(opts, expected):
    with pytest.raises(NucleiError, match=expected):
        load_config("", opts)


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


def test_a_dumped_config_is_a_config(tmp_path):
    cfg = load_config()
    assert load_config(write(tmp_path / "config.yaml", cfg.dump())).INPUT == cfg.INPUT


def test_a_whole_number_is_a_float_where_one_is_asked_for():
    assert load_config("", ["INPUT.SCALE", "2"]).INPUT.SCALE == 2.0
    assert load_config("", ["SEED", "2"]).SEED == 2


def test_a_config_cannot_run_code(tmp_path):
    marker = tmp_path / "ran"
    path = write(tmp_path / "evil.yaml", f"SEED: !!python/object/apply:os.mkdir ['{marker}']\n")
    with pytest.raises(NucleiError, match=r"evil\.yaml: not a plain YAML"):
        load_config(path)
    assert not marker.exists()


@pytest.mark.parametrize(
    "text",
    [
        *("", "a: [1", "- 1\n- 2\n", "PK\x03\x04", "_BASE_: 3\n"),
        *("_BASE_: missing.yaml\n", "_BASE_: broken.yaml\n", "_BASE_: [.]\n"),
        *("_BASE_: scale.yaml\nINPUT: {SCALE: {X: 1}}\n", "_BASE_: empty.yaml\n"),
    ],
)
def test_broken_files_are_one_line_with_the_name(tmp_path, text):
    write(tmp_path / "scale.yaml", "INPUT: {SCALE: 2.0}\n")
    write(tmp_path / "empty.yaml", "")
    path = write(tmp_path / "broken.yaml", text)
    with pytest.raises(NucleiError, match=r"broken\.yaml") as error:
        load_config(path)
    assert "\n" not in str(error.value)


def test_a_checkpoint_is_no_config(tmp_path):
    path = tmp_path / "model.pth"
    path.write_bytes(b"PK\x03\x04\x00\x80\xff")
    with pytest.raises(NucleiError, match=r"model\.pth: not a plain YAML config"):
        load_config(str(path))


def test_missing_file_is_named():
    with pytest.raises(NucleiError, match=r"no config file nowhere\.yaml"):
        load_config("nowhere.yaml")


def test_a_gpu_with_a_number_becomes_the_current_one(monkeypatch):
    chosen = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.set_device", chosen.append)
    for device in ("cuda", "cuda:1", "cuda:0"):
        check_device(load_config("", ["MODEL.DEVICE", device]))
    assert chosen == [torch.device("cuda:1"), torch.device("cuda:0")]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU that can be used")
def test_a_gpu_whose_driver_is_too_old_is_one_line(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)  # it is seen, but not available
    with pytest.raises(NucleiError, match=r"MODEL\.DEVICE is 'cuda'.*add MODEL\.DEVICE cpu"):
        check_device(load_config("", ["MODEL.DEVICE", "cuda"]))


def test_a_device_that_is_not_there_is_one_line():
    check_device(load_config("", ["MODEL.DEVICE", "cpu"]))
    with pytest.raises(NucleiError, match=r"MODEL\.DEVICE is 'cuda:77'.*MODEL\.DEVICE cpu"):
        check_device(load_config("", ["MODEL.DEVICE", "cuda:77"]))

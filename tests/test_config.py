import pytest

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
        (["DATASETS.CUSTOM", "[['a', 'b']]"], r"\[name, annotation JSON, image folder\]"),
    ],
)
def test_wrong_values_say_what_is_valid(opts, expected):
    with pytest.raises(NucleiError, match=expected):
        load_config("", opts)


def test_a_whole_number_is_a_float_where_one_is_asked_for():
    assert load_config("", ["INPUT.SCALE", "2"]).INPUT.SCALE == 2.0
    assert load_config("", ["SEED", "2"]).SEED == 2


def test_a_config_cannot_run_code(tmp_path):
    marker = tmp_path / "ran"
    path = write(tmp_path / "evil.yaml", f"SEED: !!python/object/apply:os.mkdir ['{marker}']\n")
    with pytest.raises(NucleiError, match=r"evil\.yaml: not a plain YAML"):
        load_config(path)
    assert not marker.exists()


@pytest.mark.parametrize("text", ["a: [1", "- 1\n- 2\n", "_BASE_: missing.yaml\n"])
def test_broken_files_are_one_line_with_the_name(tmp_path, text):
    path = write(tmp_path / "broken.yaml", text)
    with pytest.raises(NucleiError, match=r"broken\.yaml") as error:
        load_config(path)
    assert "\n" not in str(error.value)


def test_missing_file_is_named():
    with pytest.raises(NucleiError, match=r"no config file nowhere\.yaml"):
        load_config("nowhere.yaml")


def test_a_device_that_is_not_there_is_one_line():
    check_device(load_config("", ["MODEL.DEVICE", "cpu"]))
    with pytest.raises(NucleiError, match=r"MODEL\.DEVICE is 'cuda:77'.*MODEL\.DEVICE cpu"):
        check_device(load_config("", ["MODEL.DEVICE", "cuda:77"]))

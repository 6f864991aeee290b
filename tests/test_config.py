import pytest

from nuclei_d2.config import load_config
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


def test_a_dumped_config_is_a_config(tmp_path):
    cfg = load_config()
    assert load_config(write(tmp_path / "config.yaml", cfg.dump())).INPUT == cfg.INPUT


def test_a_whole_number_is_a_float_where_one_is_asked_for():
    assert load_config("", ["INPUT.SCALE", "2"]).INPUT.SCALE == 2.0
    assert load_config("", ["SEED", "2"]).SEED == 2


def test_a_whole_number_in_a_file_is_a_float_too(tmp_path):
    file = tmp_path / "whole.yaml"
    file.write_text("INPUT: {SCALE: 2}\nMODEL: {UNET: {DECODER: {THRESHOLD: 1}}}\n")
    cfg = load_config(str(file))
    assert (cfg.INPUT.SCALE, cfg.MODEL.UNET.DECODER.THRESHOLD) == (2.0, 1.0)
    assert isinstance(cfg.INPUT.SCALE, float)


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

import json
import sys
import types

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

import nuclei_d2.data.datasets  # noqa: F401, registers
from nuclei_d2.config import load_config
from nuclei_d2.data.datasets.builtin import (
    check_available,
    register_builtin,
    register_from_config,
)
from nuclei_d2.utils.errors import NucleiError


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "root"))
    return tmp_path / "root"


@pytest.fixture
def registered():
    """Forget what a test registers."""
    before = set(DatasetCatalog.list())
    yield
    for name in set(DatasetCatalog.list()) - before:
        DatasetCatalog.pop(name)
        MetadataCatalog.pop(name)


def prepared(folder, name, images=1):
    path = folder / "annotations" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    entries = [
        {"id": k + 1, "file_name": f"images/{k}.png", "height": 4, "width": 4}
        for k in range(images)
    ]
    categories = [{"id": 1, "name": "nucleus"}]
    content = {"images": entries, "annotations": [], "categories": categories}
    path.write_text(json.dumps(content))
    return path


def config(**datasets):
    cfg = load_config()
    for key, value in datasets.items():
        cfg.DATASETS[key] = value
    return cfg


def test_known_names_are_registered_without_any_data():
    names = [f"dsb2018_{split}" for split in ("train", "val", "test", "stage1_test")]
    for modality in ("fluorescence", "histology", "brightfield"):
        names += [f"dsb2018_{modality}_{split}" for split in ("train", "val", "test")]
    for dataset in ("bbbc039", "s_bsst265", "nuinsseg", "synthetic"):
        names += [f"{dataset}_{split}" for split in ("train", "val", "test")]
    assert set(names) <= set(DatasetCatalog.list())
    register_builtin()  # again: nothing happens
    metadata = MetadataCatalog.get("bbbc039_val")
    assert metadata.thing_classes == ["nucleus"]
    assert metadata.evaluator_type == "nuclei"


@pytest.mark.parametrize("name", ["dsb2018_train", "bbbc039_test", "nuinsseg_val"])
def test_missing_data_say_what_to_run(root, name):
    with pytest.raises(NucleiError) as caught:
        DatasetCatalog.get(name)
    dataset = name.split("_")[0]
    assert str(caught.value) == (
        f"{name}: no {root}/{dataset}/annotations/{name}.json; run "
        f"`python datasets/prepare_{dataset}.py SOURCE` or set DETECTRON2_DATASETS"
    )


def test_a_modality_without_images_in_a_split_is_one_line(root):
    prepared(root / "dsb2018", "dsb2018_val")
    with pytest.raises(NucleiError, match="none of the images prepared there belongs") as caught:
        DatasetCatalog.get("dsb2018_histology_val")
    assert "\n" not in str(caught.value)


def test_root_is_looked_up_when_data_are_read(root, tmp_path, monkeypatch):
    prepared(root / "dsb2018", "dsb2018_val", images=2)
    other = prepared(tmp_path / "other/dsb2018", "dsb2018_val", images=3)
    assert len(DatasetCatalog.get("dsb2018_val")) == 2
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "other"))
    records = DatasetCatalog.get("dsb2018_val")
    assert len(records) == 3
    assert records[0]["file_name"] == str(tmp_path / "other/dsb2018/images/0.png")
    metadata = MetadataCatalog.get("dsb2018_val")
    assert metadata.json_file == str(other)
    assert metadata.image_root == str(tmp_path / "other/dsb2018")
    assert metadata.thing_dataset_id_to_contiguous_id == {1: 0}


def test_config_moves_known_sets_to_the_root(root):
    register_from_config(config(TRAIN=("bbbc039_train",)))
    assert MetadataCatalog.get("bbbc039_train").image_root == str(root / "bbbc039")


def test_synthetic_is_made_on_demand(root, monkeypatch):
    fake = types.SimpleNamespace(load_synthetic=lambda split: [split])
    monkeypatch.setitem(sys.modules, "nuclei_d2.data.datasets.synthetic", fake)
    assert DatasetCatalog.get("synthetic_val") == ["val"]
    assert MetadataCatalog.get("synthetic_val").image_root == str(root / "synthetic")


@pytest.mark.usefixtures("registered")
def test_custom_sets(root, tmp_path):
    path = prepared(tmp_path / "mine", "any")
    entry = ["my_custom", str(path), str(tmp_path / "mine")]
    cfg = config(CUSTOM=[entry], TRAIN=("my_custom",))
    register_from_config(cfg)
    register_from_config(cfg)  # the same once more is fine
    assert len(DatasetCatalog.get("my_custom")) == 1
    assert MetadataCatalog.get("my_custom").evaluator_type == "nuclei"
    other = [["my_custom", str(path), str(tmp_path)]]
    with pytest.raises(NucleiError, match=r"DATASETS\.CUSTOM: the name my_custom is taken"):
        register_from_config(config(CUSTOM=other))
    with pytest.raises(NucleiError, match="the name dsb2018_train is taken"):
        register_from_config(config(CUSTOM=[["dsb2018_train", *entry[1:]]]))


@pytest.mark.usefixtures("registered")
def test_custom_set_with_nothing_behind_it(root, tmp_path):
    register_from_config(config(CUSTOM=[["gone", str(tmp_path / "x.json"), str(tmp_path)]]))
    with pytest.raises(NucleiError, match=r"cannot read .*x\.json"):
        DatasetCatalog.get("gone")
    with pytest.raises(NucleiError, match=r"gone: no .*x\.json; mend DATASETS\.CUSTOM"):
        check_available(["gone"])
    path = prepared(tmp_path / "mine", "any")
    register_from_config(config(CUSTOM=[["no_images", str(path), str(tmp_path / "none")]]))
    with pytest.raises(NucleiError, match=r"no_images: no image folder .*none"):
        DatasetCatalog.get("no_images")


@pytest.mark.usefixtures("registered")
def test_prepared_sets_are_found_by_name(root):
    prepared(root / "my_set", "my_set_train", images=2)
    register_from_config(config(TRAIN=("my_set_train",), VAL=(), TEST=("synthetic_test",)))
    records = DatasetCatalog.get("my_set_train")
    assert [r["file_name"] for r in records] == [
        str(root / "my_set/images/0.png"),
        str(root / "my_set/images/1.png"),
    ]


def test_a_name_in_two_folders(root):
    prepared(root / "a", "twice_train")
    prepared(root / "b", "twice_train")
    with pytest.raises(NucleiError, match=r"twice_train is in .*a/ann.* and in .*b/ann"):
        register_from_config(config(TRAIN=("twice_train",)))


@pytest.mark.parametrize("key", ["TRAIN", "VAL", "TEST"])
def test_unknown_name_lists_the_known_ones(root, key):
    with pytest.raises(NucleiError) as caught:
        register_from_config(config(**{key: ("dsb2018_trian",)}))
    message = str(caught.value)
    assert "no data set dsb2018_trian" in message
    assert str(root) in message
    assert "did you mean dsb2018_train?" in message
    assert "bbbc039_val" in message
    assert "coco_2017" not in message  # Detectron2's own sets are no nuclei
    assert "\n" not in message


@pytest.mark.parametrize("name", ["../secret", "*", "x/../../secret"])
def test_names_do_not_leave_the_annotations_folder(root, name):
    prepared(root / "a", "b")
    (root / "a/secret.json").write_text("{}")
    with pytest.raises(NucleiError, match="no data set"):
        register_from_config(config(TRAIN=(name,)))


def test_availability_is_checked_without_reading(root):
    register_from_config(config(TRAIN=("dsb2018_train",), TEST=("dsb2018_test",)))
    (prepared(root / "dsb2018", "dsb2018_train")).write_text("not read")
    check_available(["dsb2018_train", "synthetic_test"])
    with pytest.raises(NucleiError, match=r"dsb2018_test: no .* run `python datasets/prepare_"):
        check_available(["dsb2018_train", "dsb2018_test"])

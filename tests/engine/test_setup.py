import logging

import numpy as np
import pytest
from detectron2.data import DatasetCatalog
from pycocotools import mask as mask_util
from tiny import tiny_args, write_split

from nuclei_d2.config import load_config
from nuclei_d2.engine.setup import checked_config, setup
from nuclei_d2.engine.trainer import NucleiTrainer
from nuclei_d2.utils.errors import NucleiError


def tiny_setup(tmp_path, *opts, **arguments):
    return setup(tiny_args(tmp_path / "out", *opts, **arguments))


def test_training_writes_down_how_large_its_nuclei_are(tiny_data, tmp_path):
    tiny_setup(tmp_path, "INPUT.NUCLEUS_DIAMETER", "99")
    areas = [
        mask_util.decode(annotation["segmentation"]).sum()
        for record in DatasetCatalog.get("tiny_train")
        for annotation in record["annotations"]
    ]
    cfg = load_config(str(tmp_path / "out" / "config.yaml"))
    expected = 2 * np.sqrt(np.median(areas) / np.pi)
    assert pytest.approx(expected, abs=0.01) == cfg.INPUT.NUCLEUS_DIAMETER


@pytest.mark.parametrize("sign", ["metrics.json", "model_best.pth"])
def test_an_evaluation_leaves_the_files_of_a_training_alone(tiny_data, tmp_path, sign):
    out = tmp_path / "out"
    out.mkdir()
    files = [out / name for name in (sign, "config.yaml", "results.json", "log.txt")]
    for path in files:
        path.write_text("of the training")
    cfg = tiny_setup(tmp_path, config="classical.yaml", eval_only=True)
    NucleiTrainer.evaluate_and_save(cfg, NucleiTrainer.build_model(cfg))
    assert all(path.read_text() == "of the training" for path in files)
    for name in ("config.yaml", "results.json", "inference/tiny_test"):
        assert (out / "evaluation" / name).exists(), name
    assert f"goes to {out / 'evaluation'}" in (out / "evaluation" / "log.txt").read_text()


def test_an_evaluation_elsewhere_repeats_in_its_own_folder(tiny_data, tmp_path):
    for _ in range(2):
        cfg = tiny_setup(tmp_path, config="classical.yaml", eval_only=True)
        NucleiTrainer.evaluate_and_save(cfg, NucleiTrainer.build_model(cfg))
    assert str(tmp_path / "out") == cfg.OUTPUT_DIR
    assert not (tmp_path / "out" / "evaluation").exists()


def test_validation_data_are_needed_only_where_they_are_used(tiny_data, tmp_path):
    (tiny_data / "tiny" / "annotations" / "tiny_val.json").rename(tmp_path / "gone.json")
    with pytest.raises(NucleiError, match="no data set tiny_val"):
        tiny_setup(tmp_path)
    tiny_setup(tmp_path, "TEST.EVAL_PERIOD", "0", "DATASETS.VAL", "('dsb2018_val',)")


@pytest.mark.parametrize("device", ["cpu", "cuda:0", "cuda:1"])
def test_several_gpus_need_a_device_without_a_number(tiny_data, tmp_path, device, monkeypatch):
    monkeypatch.setattr("nuclei_d2.engine.setup.use_device", lambda _: None)
    with pytest.raises(NucleiError, match=rf"--num-gpus is 2 but MODEL\.DEVICE is '{device}'"):
        tiny_setup(tmp_path, "MODEL.DEVICE", device, num_gpus=2)


@pytest.mark.parametrize("reference", ["0", "2"])
def test_every_gpu_needs_as_many_images(tiny_data, tmp_path, monkeypatch, reference):
    monkeypatch.setattr("nuclei_d2.engine.setup.use_device", lambda _: None)
    opts = ("MODEL.DEVICE", "cuda", "SOLVER.REFERENCE_WORLD_SIZE", reference)
    with pytest.raises(NucleiError, match=r"IMS_PER_BATCH is 3, for 2 GPUs; make it a multiple"):
        tiny_setup(tmp_path, *opts, "SOLVER.IMS_PER_BATCH", "3", num_gpus=2)
    words = [*opts, "SOLVER.IMS_PER_BATCH", "3", "MODEL.WEIGHTS", "model.pth"]
    args = tiny_args(tmp_path / "out", *words, num_gpus=2, eval_only=True)
    assert checked_config(args).SOLVER.IMS_PER_BATCH == 3  # an evaluation has no batch


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["DATASETS.TRAIN", "()"], r"DATASETS\.TRAIN is empty"),
        (["TEST.BEST_METRIC", "AP"], r"TEST\.BEST_METRIC is 'AP'; valid: .*segm/AP"),
        (["TEST.BEST_METRIC", "segm/ap"], r"TEST\.BEST_METRIC"),
        (["TEST.BEST_METRIC", "sem_seg/mIoU"], r"TEST\.BEST_METRIC"),
        (["DATASETS.VAL", "('tiny_val', 'tiny_test')"], "valid: .*tiny_val/segm/AP"),
    ],
)
def test_what_cannot_be_trained_is_found_out_before(tiny_data, tmp_path, opts, message):
    with pytest.raises(NucleiError, match=message) as error:
        tiny_setup(tmp_path, *opts)
    assert "\n" not in str(error.value)


def test_an_evaluation_needs_a_set_and_no_best_metric(tiny_data, tmp_path):
    opts = ("TEST.BEST_METRIC", "AP", "DATASETS.TRAIN", "()")
    tiny_setup(tmp_path, *opts, eval_only=True)
    with pytest.raises(NucleiError, match=r"DATASETS\.TEST is empty"):
        tiny_setup(tmp_path, *opts, "DATASETS.TEST", "()", eval_only=True)


def test_a_set_without_nuclei_is_reported_before_the_run(tiny_data, tmp_path, caplog):
    write_split(tiny_data / "tiny", "tiny_test", [0, 0], seed=0)
    with caplog.at_level(logging.WARNING):
        tiny_setup(tmp_path)
    message = "tiny_test has no nuclei at all"
    assert message in caplog.text
    assert message in (tmp_path / "out" / "log.txt").read_text()


def test_missing_data_are_found_out_before_training(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "nothing"))
    with pytest.raises(NucleiError, match="no data set tiny_train"):
        tiny_setup(tmp_path)
    with pytest.raises(NucleiError, match=r"prepare_dsb2018\.py"):
        tiny_setup(
            tmp_path,
            "DATASETS.TRAIN",
            "('dsb2018_train',)",
            "DATASETS.VAL",
            "()",
            "DATASETS.TEST",
            "()",
        )

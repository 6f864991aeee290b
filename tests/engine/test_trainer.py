import itertools
import json

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import DatasetEvaluator, DatasetEvaluators, inference_on_dataset
from detectron2.structures import BoxMode
from tiny import in_two_processes, tiny_args
from torch.utils.data import DataLoader

from nuclei_d2.engine.checks import best_metrics
from nuclei_d2.engine.setup import setup
from nuclei_d2.engine.trainer import NucleiTrainer, build_checkpointer
from nuclei_d2.evaluation.scores import ERRORS
from nuclei_d2.utils.errors import NucleiError


def tiny_setup(tmp_path, *opts, **arguments):
    return setup(tiny_args(tmp_path / "out", *opts, **arguments))


def train(tmp_path, *opts, resume=False):
    cfg = tiny_setup(tmp_path, *opts)
    trainer = NucleiTrainer(cfg)
    trainer.resume_or_load(resume=resume)
    return trainer, trainer.train()


def read_results(tmp_path):
    """Scores of the sets, which are reproducible, and ``efficiency``, which is not."""
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    return written, written.pop("efficiency")


def test_a_run_leaves_checkpoints_metrics_and_results(tiny_data, tmp_path):
    _, results = train(tmp_path, "TEST.BEST_METRIC", "segm/AR")
    out = tmp_path / "out"
    written, efficiency = read_results(tmp_path)
    assert set(efficiency) == {"hardware", "model", "training", "evaluation"}
    assert set(written) == {"tiny_test"}
    assert set(written["tiny_test"]) == {"bbox", "segm", "nuclei", "boundary"}
    assert written["tiny_test"]["segm"]["AP"] == results["tiny_test"]["segm"]["AP"]
    lines = [json.loads(line) for line in (out / "metrics.json").read_text().splitlines()]
    keys = set().union(*lines)
    assert {"val/total_loss", "segm/AP", "loss_boundary", "loss_boundary_dice", "lr"} <= keys
    assert {"data_time", "forward_time", "backward_time", "step_time"} <= keys
    assert {"images_per_second", "host_memory_mb"} <= keys
    for name in ("model_0000003.pth", "model_final.pth", "model_best.pth", "config.yaml"):
        assert (out / name).is_file(), name


class _Counter(DatasetEvaluator):
    def __init__(self):
        self.images = 0

    def process(self, inputs, outputs):
        self.images += len(inputs)

    def evaluate(self):
        return {"own": {"images": self.images}}


class _OwnTrainer(NucleiTrainer):
    loaded = []

    @classmethod
    def build_evaluator(cls, cfg, dataset_name):
        return DatasetEvaluators([super().build_evaluator(cfg, dataset_name), _Counter()])

    @classmethod
    def build_test_loader(cls, cfg, dataset_name):
        cls.loaded.append(dataset_name)
        return super().build_test_loader(cfg, dataset_name)


def test_a_subclass_evaluates_in_its_own_way(tiny_data, tmp_path):
    cfg = tiny_setup(tmp_path, "SOLVER.MAX_ITER", "1", "TEST.EVAL_PERIOD", "1")
    results = _OwnTrainer(cfg).train()
    assert results["tiny_test"]["own"] == read_results(tmp_path)[0]["tiny_test"]["own"]
    assert results["tiny_test"]["own"] == {"images": 2}
    assert set(_OwnTrainer.loaded) == {"tiny_val", "tiny_test"}
    lines = (tmp_path / "out" / "metrics.json").read_text().splitlines()
    assert {json.loads(line).get("own/images") for line in lines} - {None} == {1}


@pytest.fixture
def polygon_data(tiny_data):
    """The tiny sets as a user registers them: polygons, no label images, one without nuclei."""
    for split in ("train", "val", "test"):
        content = json.loads(
            (tiny_data / "tiny" / "annotations" / f"tiny_{split}.json").read_text()
        )
        records = [
            {
                "file_name": str(tiny_data / "tiny" / image["file_name"]),
                "image_id": image["id"],
                "height": image["height"],
                "width": image["width"],
                "annotations": [
                    {
                        "bbox": a["bbox"],
                        "bbox_mode": BoxMode.XYWH_ABS,
                        "category_id": 0,
                        "segmentation": [_rectangle(*a["bbox"])],
                    }
                    for a in content["annotations"]
                    if a["image_id"] == image["id"]
                ],
            }
            for image in content["images"]
        ]
        del records[0]["annotations"]
        DatasetCatalog.register(f"polygons_{split}", lambda records=records: records)
        MetadataCatalog.get(f"polygons_{split}").thing_classes = ["nucleus"]
    yield
    for split in ("train", "val", "test"):
        DatasetCatalog.remove(f"polygons_{split}")
        MetadataCatalog.remove(f"polygons_{split}")


def _rectangle(x, y, w, h):
    return [x, y, x + w, y, x + w, y + h, x, y + h]


def test_sets_that_users_register_are_trained_on_and_evaluated(polygon_data, tmp_path):
    sets = {split: f"('polygons_{split}',)" for split in ("train", "val", "test")}
    options = [w for split, name in sets.items() for w in (f"DATASETS.{split.upper()}", name)]
    _, results = train(tmp_path, *options, "DATALOADER.FILTER_EMPTY_ANNOTATIONS", "False")
    assert set(results["polygons_test"]) == {"bbox", "segm", "nuclei", "boundary"}
    assert results["polygons_test"]["nuclei"]["errors_missed"] > 0


def test_the_last_two_checkpoints_are_kept(tiny_data, tmp_path):
    train(tmp_path, "SOLVER.CHECKPOINT_PERIOD", "1", "TEST.EVAL_PERIOD", "0")
    kept = sorted(p.name for p in (tmp_path / "out").glob("model_*.pth"))
    assert kept == ["model_0000002.pth", "model_0000003.pth", "model_final.pth"]


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_broken_image_is_one_line_from_a_worker_too(tiny_data, tmp_path, split, workers):
    cfg = tiny_setup(tmp_path, "DATALOADER.NUM_WORKERS", workers)
    for path in (tiny_data / "tiny" / "images").glob(f"tiny_{split}_*.png"):
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(NucleiError, match=rf"tiny_{split}_\d\.png: truncated") as error:
        NucleiTrainer(cfg).train()
    assert "\n" not in str(error.value)
    log = (tmp_path / "out" / "log.txt").read_text()
    assert str(error.value) in log
    assert "Traceback" not in log


def test_checkpoints_hold_nothing_that_ties_them_to_a_device(tiny_data, tmp_path):
    train(tmp_path, "SOLVER.AMP.ENABLED", "True", "TEST.EVAL_PERIOD", "0")
    state = torch.load(tmp_path / "out" / "model_final.pth", weights_only=True)
    assert "grad_scaler" not in state["trainer"]["_trainer"]


@pytest.mark.parametrize("config", ["mask_rcnn.yaml", "unet_distance.yaml"])
def test_what_is_measured_can_choose_the_best_checkpoint(tiny_data, tmp_path, config):
    cfg = tiny_setup(tmp_path, "MODEL.UNET.WIDTH", "4", config=config)
    results, _ = NucleiTrainer.evaluate(cfg, NucleiTrainer.build_model(cfg), ["tiny_val"])
    measured = {f"{task}/{name}" for task, values in results["tiny_val"].items() for name in values}
    less_is_better = {f"nuclei/errors_{name}" for name in ERRORS} | {"nuclei/boundary_hd95"}
    assert less_is_better < measured
    assert measured - less_is_better == set(best_metrics(cfg))


def test_two_runs_with_one_seed_are_identical(tiny_data, tmp_path):
    first, results = train(tmp_path / "a")
    second, again = train(tmp_path / "b")
    assert results == again or str(results) == str(again)  # NaN is not equal to itself
    ours, theirs = first.model.state_dict(), second.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    other, _ = train(tmp_path / "c", "SEED", "1")
    assert not all(torch.equal(ours[name], other.model.state_dict()[name]) for name in ours)


def test_a_run_resumed_from_its_last_checkpoint_ends_at_the_same_iteration(tiny_data, tmp_path):
    cfg = tiny_setup(tmp_path)
    trainer = NucleiTrainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.max_iter = 3  # as if killed after iteration 2, with the checkpoint of iteration 1
    trainer.train()
    out = tmp_path / "out"
    (out / "model_final.pth").unlink(missing_ok=True)
    (out / "last_checkpoint").write_text("model_0000001.pth")
    resumed, _ = train(tmp_path, resume=True)
    assert resumed.start_iter == 2
    assert resumed.iter == 4
    state = torch.load(out / "model_final.pth", weights_only=True)
    assert state["iteration"] == 3


def test_a_resumed_run_sees_other_crops_than_at_its_start(tiny_data, tmp_path, monkeypatch):
    opts = ("DATASETS.VAL", "()", "DATASETS.TEST", "()", "DATALOADER.NUM_WORKERS", "1")
    seen = []

    def forward(trainer, batch):
        seen.append([float(record["image"].sum()) for record in batch])
        return {"loss": sum(p.sum() for p in trainer.model.parameters())}

    monkeypatch.setattr(NucleiTrainer, "_forward", forward)
    train(tmp_path, *opts)
    train(tmp_path, *opts, "SOLVER.MAX_ITER", "8", resume=True)
    train(tmp_path / "again", *opts)
    train(tmp_path / "again", *opts, "SOLVER.MAX_ITER", "8", resume=True)
    assert len(seen) == 16
    assert seen[:8] == seen[8:]
    assert all(a != b for a, b in itertools.combinations(seen[:8], 2))


def test_a_resumed_run_goes_on_tidying_its_checkpoints(tiny_data, tmp_path):
    opts = ("DATASETS.VAL", "()", "DATASETS.TEST", "()", "SOLVER.CHECKPOINT_PERIOD", "1")
    train(tmp_path, *opts)
    stranger = tmp_path / "out" / "model_0000099.pth"  # later than this run has come
    stranger.touch()
    train(tmp_path, *opts, "SOLVER.MAX_ITER", "7", resume=True)
    kept = sorted(path.name for path in (tmp_path / "out").glob("model_0*.pth"))
    assert kept == ["model_0000005.pth", "model_0000006.pth", stranger.name]


def test_a_run_that_is_stopped_while_it_validates_does_it_again(tiny_data, tmp_path, monkeypatch):
    def stop(*_):
        raise NucleiError("stopped while validating")

    with monkeypatch.context() as patch:
        patch.setattr("nuclei_d2.engine.trainer.measured_inference", stop)
        with pytest.raises(NucleiError, match="while validating"):
            train(tmp_path)
    train(tmp_path, resume=True)
    rows = (tmp_path / "out" / "metrics.json").read_text().splitlines()
    assert [row["iteration"] for row in map(json.loads, rows) if "segm/AP" in row] == [1, 4]


@pytest.mark.parametrize("resume", [False, True])
def test_only_a_resumed_run_goes_on_from_an_earlier_one(tiny_data, tmp_path, monkeypatch, resume):
    def stop():
        raise NucleiError("stopped before the first checkpoint")

    opts = ("DATASETS.VAL", "()", "DATASETS.TEST", "()")
    train(tmp_path, *opts, "SOLVER.MAX_ITER", "1")
    out = tmp_path / "out"
    (out / "model_best.pth").write_text("of the earlier run")
    trainer = NucleiTrainer(tiny_setup(tmp_path, *opts))
    trainer.resume_or_load(resume=resume)
    monkeypatch.setattr(trainer, "run_step", stop)
    with pytest.raises(NucleiError, match="before the first checkpoint"):
        trainer.train()
    for name in ("last_checkpoint", "model_best.pth"):
        assert (out / name).exists() == resume, name
    assert (out / "model_best_earlier.pth").exists() != resume


def test_evaluating_a_checkpoint_reproduces_the_run(tiny_data, tmp_path):
    train(tmp_path, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0")
    written, _ = read_results(tmp_path)
    cfg = tiny_setup(tmp_path, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0")
    model = NucleiTrainer.build_model(cfg)
    build_checkpointer(cfg, model).load_exactly(str(tmp_path / "out" / "model_final.pth"))
    NucleiTrainer.evaluate_and_save(cfg, model)
    again, efficiency = read_results(tmp_path)
    assert again == written
    assert efficiency["training"] is None
    assert efficiency["model"]["flops"] > 1e7
    assert efficiency["evaluation"]["tiny_test"]["network_s_per_image"] > 0


def test_what_a_run_cost(tiny_data, tmp_path):
    trainer, _ = train(tmp_path, "SOLVER.MAX_ITER", "8", "TEST.EVAL_PERIOD", "0")
    _, efficiency = read_results(tmp_path)
    training = efficiency["training"]
    assert (training["iterations"], training["warmup_iterations"]) == (3, 5)
    assert training["precision"] in ("bfloat16", "float32")
    stages = [training[f"{k}_s_per_iteration"] for k in ("data", "forward", "backward", "step")]
    assert all(seconds > 0 for seconds in stages)
    # The rest is the logging of losses.
    assert 0.8 * training["total_s_per_iteration"] < sum(stages) < training["total_s_per_iteration"]
    expected = 2 / training["total_s_per_iteration"]
    assert training["images_per_second"] == pytest.approx(expected)
    times = trainer.storage.history("time").values()[-3:]
    assert training["total_s_per_iteration"] <= sum(t for t, _ in times) / 3
    cost = efficiency["evaluation"]["tiny_test"]
    assert (cost["images"], cost["warmup_images"]) == (1, 1)
    assert cost["megapixels"] == pytest.approx(64 * 80 / 1e6)
    stages = ("load", "network", "postprocess", "evaluation")
    assert all(cost[f"{k}_s_per_image"] > 0 for k in stages)
    assert cost["peak_host_memory_mb"] >= training["peak_host_memory_mb"]
    parameters = [p.numel() for p in trainer.model.parameters()]
    assert efficiency["model"]["parameters"] == sum(parameters)
    assert efficiency["model"]["flops_image_size"] == [64, 80]
    log = (tmp_path / "out" / "log.txt").read_text()
    assert "forward_s_per_iteration" in log
    assert "segm AP in percent, at most 20 instances" in log


def test_measuring_changes_no_number(tiny_data, tmp_path):
    cfg = tiny_setup(tmp_path, config="classical.yaml")
    model = NucleiTrainer.build_model(cfg)
    measured = NucleiTrainer.evaluate(cfg, model, ["tiny_train"])[0]["tiny_train"]
    plain = inference_on_dataset(
        model,
        NucleiTrainer.build_test_loader(cfg, "tiny_train"),
        NucleiTrainer.build_evaluator(cfg, "tiny_train"),
    )
    assert str(measured) == str(plain)  # NaN is not equal to itself


def test_two_processes_give_exactly_the_numbers_of_one(tiny_data, tmp_path):
    cfg = tiny_setup(tmp_path, config="classical.yaml")
    model = NucleiTrainer.build_model(cfg)

    def work(rank):
        results, costs = NucleiTrainer.evaluate(cfg, model, ["tiny_train", "tiny_test"])
        return str(results), costs

    (results, costs), (nothing, same_costs) = in_two_processes(work, tmp_path)
    alone, _ = NucleiTrainer.evaluate(cfg, model, ["tiny_train", "tiny_test"])
    assert results == str(alone)
    assert set(alone["tiny_train"]) == {"bbox", "segm", "nuclei", "boundary", "sem_seg"}
    assert nothing == "OrderedDict([('tiny_train', {}), ('tiny_test', {})])"
    assert costs == same_costs
    assert (costs["tiny_train"]["images"], costs["tiny_train"]["warmup_images"]) == (2, 2)


def test_the_model_that_is_evaluated_is_the_main_process_one(tiny_data, tmp_path):
    cfg = tiny_setup(tmp_path, "MODEL.UNET.WIDTH", "4", config="unet_boundary.yaml")
    model = NucleiTrainer.build_model(cfg)

    def work(rank):
        for buffer in model.buffers():
            buffer.fill_(rank + 1)  # as each process learns the statistics of its own images
        NucleiTrainer.evaluate(cfg, model, ["tiny_test"])
        return [float(buffer.float().mean()) for buffer in model.buffers()]

    main, other = in_two_processes(work, tmp_path)
    assert main == other
    assert 1.0 in main
    assert 2.0 not in main


@pytest.mark.parametrize(("optimizer", "factor"), [("SGD", 2), ("AdamW", 2**0.5)])
def test_the_rate_grows_with_the_processes(tiny_data, tmp_path, monkeypatch, optimizer, factor):
    # It names a GPU for each process.
    monkeypatch.setattr("detectron2.engine.defaults.create_ddp_model", lambda model, **_: model)
    opts = ("SOLVER.OPTIMIZER", optimizer, "SOLVER.BASE_LR", "0.001")

    def rates(rank):
        cfg = tiny_setup(tmp_path / str(rank), *opts)
        as_it_is = cfg.clone()
        as_it_is.defrost()
        as_it_is.SOLVER.REFERENCE_WORLD_SIZE = 0
        return [NucleiTrainer(given).cfg.SOLVER.BASE_LR for given in (cfg, as_it_is)]

    for rate, given in in_two_processes(rates, tmp_path):
        assert rate == pytest.approx(0.001 * factor)
        assert given == 0.001


def test_a_loss_that_is_not_finite_stops_with_iteration_and_images(tiny_data, tmp_path):
    cfg = tiny_setup(tmp_path)
    trainer = NucleiTrainer(cfg)
    with torch.no_grad():
        next(trainer.model.backbone.parameters()).fill_(float("nan"))
    with pytest.raises(NucleiError, match=r"iteration 0 .*tiny_train_\d\.png") as error:
        trainer.train()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("workers", "images", "grouped", "prefetched"),
    [(4, 16, True, 8), (8, 2, True, 2), (0, 2, True, None), (4, 16, False, 2)],
)
def test_workers_load_two_batches_ahead(
    tiny_data, tmp_path, monkeypatch, workers, images, grouped, prefetched
):
    made = []
    init = DataLoader.__init__
    monkeypatch.setattr(
        DataLoader, "__init__", lambda s, *a, **k: made.append(s) or init(s, *a, **k)
    )
    opts = ("DATALOADER.NUM_WORKERS", workers, "SOLVER.IMS_PER_BATCH", images)
    opts += ("DATALOADER.ASPECT_RATIO_GROUPING", grouped)
    NucleiTrainer.build_train_loader(tiny_setup(tmp_path, *map(str, opts)))
    assert [loader.prefetch_factor for loader in made] == [prefetched]


def test_a_unet_trains_and_is_evaluated_by_the_same_commands(tiny_data, tmp_path):
    opts = ("MODEL.UNET.WIDTH", "4", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0")
    cfg = tiny_setup(tmp_path, *opts, config="unet_distance.yaml")
    trainer = NucleiTrainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    written, _ = read_results(tmp_path)
    scores = written["tiny_test"]
    assert {"bbox", "segm", "nuclei", "sem_seg"} <= set(scores)
    assert scores["sem_seg"]["IoU-foreground"] is not None
    model = NucleiTrainer.build_model(cfg)
    build_checkpointer(cfg, model).load_exactly(str(tmp_path / "out" / "model_final.pth"))
    NucleiTrainer.evaluate_and_save(cfg, model)
    assert read_results(tmp_path)[0] == written


def test_the_classical_baseline_is_evaluated_without_weights(tiny_data, tmp_path):
    cfg = tiny_setup(tmp_path, config="classical.yaml")
    model = NucleiTrainer.build_model(cfg)
    build_checkpointer(cfg, model).load_exactly(cfg.MODEL.WEIGHTS)
    scores = NucleiTrainer.evaluate_and_save(cfg, model)["tiny_test"]
    assert scores["segm"]["AP50"] > 20
    assert scores["sem_seg"]["Dice-foreground"] > 90

"""Reading a study file, and the runs it stands for."""

import json

import pytest
from tiny import CONFIGS, REPOSITORY

from nuclei_d2.study.plan import changed_setting, load_run_config, load_study, settings
from nuclei_d2.utils.errors import NucleiError

UNET = str(CONFIGS / "cpu" / "unet_boundary.yaml")


def test_runs_are_every_model_with_every_seed_and_what_is_not_trained_once(study_file):
    study = load_study(study_file())
    assert [run.key for run in study.runs()] == [
        "a/classical/seed0",
        "a/unet/seed0",
        "a/mask_rcnn/seed0",
        "a/unet/seed1",
        "a/mask_rcnn/seed1",
    ]
    kinds = {run.model.name: (run.is_trained, run.has_decoder) for run in study.runs()}
    assert kinds == {
        "classical": (False, False),
        "unet": (True, True),
        "mask_rcnn": (True, False),
    }
    assert study.model_title("unet") == "U-Net"
    assert study.model_title("mask_rcnn") == "mask_rcnn"


def test_a_task_can_have_models_and_seeds_of_its_own(study_file):
    task = {"train": "x", "val": "y", "test": ["z", "w"], "models": ["unet"], "seeds": 5}
    study = load_study(study_file(datasets={"b": task}))
    (run,) = study.runs()
    assert run.key == "b/unet/seed5"
    assert run.task.test == ("z", "w")
    assert run.cfg.SEED == 5
    assert run.cfg.DATASETS.TRAIN == ("x",)
    assert run.cfg.DATASETS.VAL == ("y",)
    assert run.cfg.DATASETS.TEST == ()  # looked at when everything is chosen


def test_a_task_can_have_models_with_the_first_seed_alone(study_file):
    task = {"train": "x", "val": "y", "test": "z", "seeds": [4, 5], "once": "unet"}
    study = load_study(study_file(datasets={"b": task}))
    assert [run.key for run in study.runs()] == [
        "b/classical/seed4",
        "b/unet/seed4",
        "b/mask_rcnn/seed4",
        "b/mask_rcnn/seed5",
    ]


def test_the_model_has_the_last_word_on_options(study_file):
    models = {"m": {"config": str(CONFIGS / "cpu" / "mask_rcnn.yaml"), "options": {"SEED": 7}}}
    models["m"]["options"] = {"INPUT.SCALE": 3}
    options = {"INPUT.SCALE": 2, "SOLVER.BASE_LR": 0.5}
    study = load_study(study_file(models=models, options=options))
    cfg = study.runs()[0].cfg
    assert (cfg.INPUT.SCALE, cfg.SOLVER.BASE_LR) == (3.0, 0.5)


def test_a_changed_setting_is_found_and_a_new_key_is_none(study_file):
    run = load_study(study_file()).runs()[1]
    before = settings(run.cfg)
    assert before["TEST.DETECTIONS_PER_IMAGE"] == 600
    assert before["DATASETS.TRAIN"] == ["tiny_train"]  # as JSON has it
    assert json.loads(json.dumps(before)) == before
    moved = settings(load_run_config(run, ("OUTPUT_DIR", "elsewhere")))
    assert changed_setting(before, moved) is None
    changed = settings(load_run_config(run, ("TEST.DETECTIONS_PER_IMAGE", "7")))
    assert changed_setting(before, changed) == "TEST.DETECTIONS_PER_IMAGE"
    del before["TEST.DETECTIONS_PER_IMAGE"]  # of a version that did not have it
    assert changed_setting(before, changed) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modles": {}}, "unknown key 'modles'; did you mean models?"),
        (
            {"models": {"m": {"conifg": "x"}}},
            "models.m: unknown key 'conifg'; did you mean config?",
        ),
        ({"models": {"m": {"title": "x"}}}, "models.m: config is missing"),
        ({"models": {"m": {"config": "no.yaml"}}}, "models.m: no config no.yaml"),
        ({"models": ["m"]}, "models: give a mapping of names"),
        ({"models": {"../m": {"config": "x"}}}, "letters, digits"),
        (
            {"comparisons": {"q": {"ask": "?", "first": "unet", "second": "stardist"}}},
            "comparisons.q: no 'stardist'; there are classical, unet",
        ),
        (
            {"datasets": {"b": {"train": "x", "val": "y", "test": "z", "once": ["u"]}}},
            "datasets.b.once: no 'u'; there are classical, unet",
        ),
        ({"comparisons": {"q": {"ask": "?", "first": "unet"}}}, "comparisons.q: second is missing"),
        (
            {"models": {"m": {"config": UNET, "steps_of": "n"}}},
            "models.m.steps_of: no 'n'; there are m",
        ),
        (
            {"models": {"m": {"config": UNET, "steps_of": "m"}}},
            "models.m.steps_of: m has no number of steps of its own",
        ),
        ({"budget": 0}, "budget is 0"),
        ({"seeds": []}, "seeds are integers"),
        ({"seeds": ["x"]}, "seeds are integers"),
        ({"options": {"INPUT.SCAL": 1}}, "did you mean INPUT.SCALE?"),
        ({"name": ""}, "name is missing"),
    ],
)
def test_mistakes_are_one_line(study_file, changes, message):
    path = study_file(**changes)
    with pytest.raises(NucleiError) as error:
        load_study(path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_broken_and_unsafe_files_are_refused(tmp_path):
    path = tmp_path / "study.yaml"
    for text in ("a: [", "!!python/object/apply:os.system ['true']", "- 1"):
        path.write_text(text)
        with pytest.raises(NucleiError, match=r"study\.yaml"):
            load_study(path)
    with pytest.raises(NucleiError, match="cannot read"):
        load_study(tmp_path / "none.yaml")


@pytest.mark.parametrize("path", sorted((CONFIGS / "studies").glob("*.yaml")), ids=lambda p: p.stem)
def test_our_studies_are_valid(path, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    study = load_study(path)
    assert study.name == path.stem
    assert study.runs()

"""What a study consists of: reads its YAML and lists the runs."""

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from detectron2.config import CfgNode

from nuclei_d2.config import load_config
from nuclei_d2.study.statistics import METRICS
from nuclei_d2.utils.errors import NucleiError
from nuclei_d2.utils.files import jsonable


@dataclass(frozen=True)
class Model:
    """A config with options: what is trained and compared."""

    name: str
    config: str  # path of a config file
    title: str = ""  # for tables; the name unless given
    about: str = ""  # what it is or does, for readers who do not know it: goes on after the title
    options: dict[str, Any] = field(default_factory=dict)  # config keys and values
    # A model of the same network: a budget gives both the same number of steps, not two numbers
    # that differ by how fast the computer was when each was calibrated.
    steps_of: str = ""

    @property
    def calibrated(self) -> str:
        """The model whose calibration counts."""
        return self.steps_of or self.name


@dataclass(frozen=True)
class Task:
    """Data to train on, and the sets that the trained models are tested on."""

    name: str
    train: tuple[str, ...]
    val: str
    test: tuple[str, ...]  # the first one is what the models are trained for
    title: str = ""
    models: tuple[str, ...] = ()  # names; all of the study unless given
    seeds: tuple[int, ...] = ()  # those of the study unless given
    once: tuple[str, ...] = ()  # models that get the first seed alone, as context for the others
    options: dict[str, Any] = field(default_factory=dict)
    # The tests are steps of growing difficulty, to be drawn as a curve.
    ladder: bool = False


@dataclass(frozen=True)
class Other:
    """What another program found in the first test set of a task; nothing is run."""

    name: str
    task: str
    predictions: tuple[str, ...]  # one for each seed: anything that tools/evaluate.py takes
    title: str = ""
    about: str = ""  # as that of a model


@dataclass(frozen=True)
class Comparison:
    """A question of the study: what ``first`` reaches, minus what ``second`` reaches."""

    name: str
    ask: str  # the question, as the report puts it
    first: str  # models or other programs
    second: str
    metric: str = "boundary_ap"  # that answers it: a key of nuclei_d2.study.statistics.METRICS


@dataclass(frozen=True)
class Run:
    """One model, trained on one task with one seed."""

    task: Task
    model: Model
    seed: int
    options: tuple[str, ...]  # KEY VALUE ..., all but schedule and OUTPUT_DIR

    @property
    def key(self) -> str:
        """Names it, and its folder."""
        return f"{self.task.name}/{self.model.name}/seed{self.seed}"

    @cached_property
    def cfg(self) -> CfgNode:
        """The config as :attr:`options` make it."""
        return load_config(self.model.config, self.options)

    @property
    def is_trained(self) -> bool:
        """False for the classical baseline, which has nothing to train."""
        return self.cfg.MODEL.META_ARCHITECTURE != "Classical"

    @property
    def has_seeds(self) -> bool:
        """False for what is not trained, or trained with the first seed alone."""
        return self.is_trained and self.model.name not in self.task.once

    @property
    def has_decoder(self) -> bool:
        """Whether tools/tune_decoder.py can fit it."""
        return self.cfg.MODEL.META_ARCHITECTURE == "UNet"


@dataclass(frozen=True)
class Study:
    """A study file, checked. Paths start at the working folder."""

    name: str
    models: dict[str, Model]
    tasks: dict[str, Task]  # "datasets" in the file
    title: str = ""
    output: str = ""  # checkpoints and logs; output/studies/<name> unless given
    results: str = ""  # small files that the report is made from; results/<name> unless given
    report: str = ""  # the paper; <results>/study.md unless given
    model_zoo: str = ""  # a file to write; none unless given
    readme: str = ""  # a file whose block of results is rewritten; none unless given
    seeds: tuple[int, ...] = (0,)
    budget: float | None = None  # minutes of training of every model; None: as configured
    validations: int | None = None  # evaluations on VAL during a training; None: as configured
    options: dict[str, Any] = field(default_factory=dict)  # of every run
    # The first one is the question of the study.
    comparisons: dict[str, Comparison] = field(default_factory=dict)
    others: dict[str, Other] = field(default_factory=dict)
    caveats: tuple[str, ...] = ()  # what limits this study, beside what limits every one
    prepare: tuple[dict[str, Any], ...] = ()  # see nuclei_d2.study.datasets

    @property
    def output_dir(self) -> Path:
        return Path(self.output or f"output/studies/{self.name}")

    @property
    def results_dir(self) -> Path:
        return Path(self.results or f"results/{self.name}")

    @property
    def report_file(self) -> Path:
        return Path(self.report or self.results_dir / "study.md")

    def runs(self) -> list[Run]:
        """All runs: task by task, and in each every model with the first seed, then the next."""
        runs = []
        for task in self.tasks.values():
            seeds = task.seeds or self.seeds
            for seed in seeds:
                names = task.models or tuple(self.models)
                of_seed = [self.run(task, self.models[name], seed) for name in names]
                runs += [run for run in of_seed if run.has_seeds or seed == seeds[0]]
        return runs

    def run(self, task: Task, model: Model, seed: int) -> Run:
        """One of :meth:`runs`, whether it is among them or not."""
        options = {
            **self.options,
            **task.options,
            **model.options,
            "DATASETS.TRAIN": task.train,
            "DATASETS.VAL": (task.val,),
            "DATASETS.TEST": (),
            "SEED": seed,
        }
        return Run(task, model, seed, option_words(options))

    def model_title(self, name: str) -> str:
        """What tables call the model or program."""
        named = self.models.get(name) or self.others[name]
        return named.title or name


def option_words(options: Mapping[str, Any]) -> tuple[str, ...]:
    """``{"A.B": 1}`` -> ``("A.B", "1")``, as on a command line."""
    return tuple(word for key, value in options.items() for word in (key, str(value)))


def load_run_config(run: Run, schedule: tuple[str, ...]) -> CfgNode:
    """The whole config of a run."""
    return load_config(run.model.config, (*run.options, *schedule))


def settings(cfg: CfgNode) -> dict[str, Any]:
    """Every key of a config, as in ``SOLVER.BASE_LR``, with its value; but for OUTPUT_DIR."""
    flat = dict(_flatten(cfg))
    del flat["OUTPUT_DIR"]
    return jsonable(flat)


def _flatten(cfg: CfgNode, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key in sorted(cfg):
        if isinstance(cfg[key], CfgNode):
            yield from _flatten(cfg[key], f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", cfg[key]


def changed_setting(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """The first key that has another value now; keys that only one has are those of a version."""
    return next((key for key in now if key in before and before[key] != now[key]), None)


# ------------------------------------------------------------------------------ reading


# Parts of the file that map names to settings, and the settings without a default.
_PARTS: dict[str, tuple[type, tuple[str, ...]]] = {
    "models": (Model, ("config",)),
    "tasks": (Task, ("train", "val", "test")),
    "others": (Other, ("task", "predictions")),
    "comparisons": (Comparison, ("ask", "first", "second")),
}


def load_study(path: str | Path, **overrides: Any) -> Study:
    """Read a study file, safely: it is untrusted input.

    Args:
        path: YAML; the keys are the fields of :class:`Study`, with ``datasets`` for ``tasks``.
        overrides: fields to replace; None leaves the file's.

    Raises:
        NucleiError: no such file, broken YAML, an unknown key, model, data set or config key.
    """
    content = _read_yaml(Path(path))
    content |= {key: value for key, value in overrides.items() if value is not None}
    fields = {**Study.__dataclass_fields__, "datasets": None}
    del fields["tasks"]
    _check_keys(path, "", content, fields, ("name", "models", "datasets"))
    content["tasks"] = content.pop("datasets")
    named = {
        key: _named(path, "datasets" if key == "tasks" else key, content.get(key) or {}, *kind)
        for key, kind in _PARTS.items()
    }
    try:
        study = Study(**{**content, **named, **_shapes(content)})
    except (TypeError, ValueError) as error:
        raise NucleiError(f"{path}: {error}") from error
    _check_names(path, study)
    for run in study.runs():
        _ = run.cfg  # wrong keys should show now
    return study


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise NucleiError(f"cannot read {path}: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise NucleiError(
            f"{path}: not a plain YAML file: {' '.join(str(error).split())}"
        ) from error
    if not isinstance(content, dict):
        raise NucleiError(f"{path}: a study is a YAML mapping; see configs/studies")
    return content


def _check_keys(path, place: str, content: Any, known: Iterable[str], required) -> None:
    where = f"{path}: {place}" if place else f"{path}"
    if not isinstance(content, dict):
        raise NucleiError(f"{where}: give a mapping of keys to values")
    known = sorted(set(known) - {"name"}) if place else sorted(known)
    for key in content:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f"; did you mean {close[0]}?" if close else ";"
            raise NucleiError(f"{where}: unknown key {key!r}{hint} valid: {', '.join(known)}")
    for key in required:
        if not content.get(key):
            raise NucleiError(f"{where}: {key} is missing")


def _named(path, part: str, entries: Any, kind: type, required: Sequence[str]) -> dict[str, Any]:
    """``{name: kind(name, ...)}`` of one part of the file."""
    if not isinstance(entries, dict):
        raise NucleiError(f"{path}: {part}: give a mapping of names to settings")
    result = {}
    for name, entry in entries.items():
        place = f"{part}.{name}"
        if not str(name).replace("_", "").replace("-", "").isalnum():
            raise NucleiError(f"{path}: {place}: a name has letters, digits, - and _ only")
        _check_keys(path, place, entry, kind.__dataclass_fields__, required)
        result[name] = kind(name=name, **{**entry, **_shapes(entry)})
    return result


def _shapes(content: Mapping[str, Any]) -> dict[str, Any]:
    """Lists as tuples, a single name for a list of one, and an empty mapping for nothing."""
    shapes = {"options": {}} if content.get("options", {}) is None else {}
    for key in ("train", "test", "models", "seeds", "once", "predictions", "caveats", "prepare"):
        if key in content and not isinstance(content[key], dict):
            value = content[key]
            value = value if isinstance(value, list) else [value]
            shapes[key] = tuple(tuple(v) if isinstance(v, list) else v for v in value)
    return shapes


def _check_names(path, study: Study) -> None:
    for model in study.models.values():
        if not Path(model.config).is_file():
            raise NucleiError(f"{path}: models.{model.name}: no config {model.config}")
        same = study.models.get(model.steps_of)
        if same and same.steps_of:
            place = f"{path}: models.{model.name}.steps_of"
            raise NucleiError(f"{place}: {same.name} has no number of steps of its own")
    programs = (*study.models, *study.others)
    uses = [(f"datasets.{t.name}.models", t.models, study.models) for t in study.tasks.values()]
    uses += [
        (f"datasets.{t.name}.once", t.once, t.models or study.models) for t in study.tasks.values()
    ]
    uses += [
        (f"comparisons.{c.name}", (c.first, c.second), programs) for c in study.comparisons.values()
    ]
    uses += [
        (f"comparisons.{c.name}.metric", (c.metric,), METRICS) for c in study.comparisons.values()
    ]
    uses += [
        (f"models.{m.name}.steps_of", (m.calibrated,), study.models) for m in study.models.values()
    ]
    uses += [(f"others.{o.name}.task", (o.task,), study.tasks) for o in study.others.values()]
    for place, names, known in uses:
        for name in names:
            if name not in known:
                raise NucleiError(f"{path}: {place}: no {name!r}; there are {', '.join(known)}")
    budget = study.budget
    if budget is not None and not (isinstance(budget, (int, float)) and budget > 0):
        raise NucleiError(f"{path}: budget is {study.budget}; it is minutes, above 0")
    seeds = [seed for part in (study, *study.tasks.values()) for seed in part.seeds]
    if not study.seeds or not all(isinstance(seed, int) and seed >= 0 for seed in seeds):
        raise NucleiError(f"{path}: seeds are integers from 0, such as [0, 1, 2]; found {seeds}")

"""Does the runs of a study, each in processes of its own; what is done is never done again.

A run is a chain of stages, each finished when its file exists, and each file is written
atomically: whenever a study is stopped, the next call goes on with the stage that is missing,
and training with its last checkpoint.
"""

import fcntl
import itertools
import math
import os
import subprocess
import sys
import threading
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from nuclei_d2.study.collect import calibration_file, collect_run, read_calibration, read_json
from nuclei_d2.study.datasets import annotation_file
from nuclei_d2.study.plan import Run, Study, changed_setting, load_run_config, settings
from nuclei_d2.study.schedule import (
    CALIBRATION_ITERATIONS,
    calibration_options,
    read_metrics,
    schedule_options,
    seconds_per_iteration,
)
from nuclei_d2.utils.errors import NucleiError
from nuclei_d2.utils.files import write_json
from nuclei_d2.utils.hardware import cpu_name, usable_cores, usable_gpus


@dataclass(frozen=True)
class Commands:
    """First words of the commands that the stages call."""

    train: tuple[str, ...]
    tune: tuple[str, ...]
    measure: tuple[str, ...] = (sys.executable, "-m", "nuclei_d2.study.measure")

    @classmethod
    def in_folder(cls, tools: Path) -> "Commands":
        """The scripts of this repository's ``tools/``."""
        scripts = ("train_net.py", "tune_decoder.py")
        return cls(*((sys.executable, str(tools / script)) for script in scripts))


class _Stopped(Exception):
    """The study is being stopped; the run goes on next time."""


class Runner:
    """Runs, one after another or several at a time."""

    def __init__(self, study: Study, commands: Commands, jobs: int = 1):
        """
        Args:
            study: its ``output_dir`` takes checkpoints and logs, its ``results_dir`` what is
                reported.
            commands: what the stages call.
            jobs: runs at a time; each gets its share of the cores, and one of the GPUs in turn.
        """
        self.study = study
        self._commands = commands
        self._jobs = jobs
        threads = str(max(1, usable_cores() // jobs))
        self._environment = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        self._gpus = _gpu_numbers()
        self._thread = threading.local()  # of the pool; ``number`` from 0
        self._calibrating = defaultdict(threading.Lock)
        self._processes: set[subprocess.Popen] = set()
        self._say: Callable[[str], None] = tqdm.write
        self._stopped = False

    def folder(self, run: Run) -> Path:
        """Checkpoints and logs of a run."""
        return self.study.output_dir / run.key

    def results_folder(self, run: Run) -> Path:
        """What is reported of a run."""
        return self.study.results_dir / run.key

    def state(self, run: Run) -> str:
        """ "done", "begun" or "waiting".

        Raises:
            NucleiError: it was done or begun with other settings.
        """
        schedule = self._known_schedule(run)
        done = self.results_folder(run) / "run.json"
        begun = self.folder(run) / "plan.json"
        is_done = done.is_file() and not self._unmeasured(run)
        if done.is_file() and schedule is not None:  # by whichever computer
            _check_settings(done, run, schedule, free=("MODEL.DEVICE",))
        if begun.is_file() and schedule is not None and not is_done:
            _check_settings(begun, run, schedule)
        if is_done:
            return "done"
        return "begun" if begun.is_file() else "waiting"

    def run_all(self, runs: Sequence[Run], say: Callable[[str], None] = tqdm.write) -> list[Run]:
        """Do what is not done.

        Args:
            runs: in this order.
            say: takes a line about each run that ends, or of warning.

        Returns:
            The runs that failed; the others went on.
        """
        todo = [run for run in runs if self.state(run) != "done"]
        done = len(runs) - len(todo)
        failed = []
        self._stopped, self._say = False, say
        futures: dict[Future, Run] = {}
        pool = ThreadPoolExecutor(self._jobs, "run", self._number_thread, (itertools.count(),))
        with pool:
            try:
                futures |= {pool.submit(self._execute, run): run for run in todo}
                with tqdm(total=len(runs), initial=done, desc=self.study.name, unit="run") as bar:
                    for future in as_completed(futures):
                        if not _report(futures[future], future, say):
                            failed.append(futures[future])
                        bar.update()
            finally:  # Ctrl-C and the like
                self._stop(futures)
        return failed

    def _stop(self, futures: Iterable[Future]) -> None:
        self._stopped = True
        for future in futures:
            future.cancel()
        for process in list(self._processes):
            process.terminate()

    # ------------------------------------------------------------------------------ stages

    def _execute(self, run: Run) -> None:
        folder = self.folder(run)
        with _locked(folder, run.key) as lock:
            schedule = self._schedule(run, lock)
            self._record_plan(run, schedule)
            if run.is_trained:
                self._train(run, schedule, lock)
            if run.has_decoder:
                self._tune(run, lock)
            self._evaluate(run, lock)
            self._measure(run, lock)
            collect_run(run, schedule, folder, self.results_folder(run))
        for checkpoint in (*folder.glob("model_0*.pth"), folder / "model_best.pth"):
            checkpoint.unlink(missing_ok=True)  # what --resume needed

    def _record_plan(self, run: Run, schedule: tuple[str, ...]) -> None:
        path = self.folder(run) / "plan.json"
        if path.is_file():
            _check_settings(path, run, schedule)
        else:
            now = settings(load_run_config(run, schedule))
            write_json(path, {"options": [*run.options, *schedule], "settings": now})

    def _train(self, run: Run, schedule: tuple[str, ...], lock: int) -> None:
        folder = self.folder(run)
        if (folder / "results.json").is_file():
            return
        resume = ["--resume"] if (folder / "last_checkpoint").is_file() else []
        options = [*run.options, *schedule, "OUTPUT_DIR", str(folder)]
        words = [*self._commands.train, "--config-file", run.model.config, *resume, *options]
        self._call(words, folder, "train", lock)

    def _tune(self, run: Run, lock: int) -> None:
        folder = self.folder(run)
        outputs = {"--json": folder / "tuning.json", "--output": folder / "tuned.yaml"}
        if all(path.is_file() for path in outputs.values()):
            return
        words = [*self._commands.tune, "--config-file", str(folder / "config.yaml")]
        words += [str(word) for pair in outputs.items() for word in pair]
        words += ["MODEL.WEIGHTS", str(folder / "model_final.pth")]
        self._call(words, folder, "tune", lock)

    def _evaluate(self, run: Run, lock: int) -> None:
        folder = self.folder(run)
        sets = (*run.task.test, run.task.val)
        if (
            all(_predictions(folder, name).is_file() for name in sets)
            and (folder / "evaluation" / "results.json").is_file()
        ):
            return
        words = [*self._commands.train, "--config-file", self._trained_config(run), "--eval-only"]
        if run.is_trained:
            words += ["MODEL.WEIGHTS", str(folder / "model_final.pth")]
        else:
            words += run.options
        words += ["DATASETS.TEST", str(sets), "OUTPUT_DIR", str(folder / "evaluation")]
        self._call(words, folder, "evaluate", lock)

    def _trained_config(self, run: Run) -> str:
        if run.has_decoder:
            return str(self.folder(run) / "tuned.yaml")
        return str(self.folder(run) / "config.yaml") if run.is_trained else run.model.config

    def _measure(self, run: Run, lock: int) -> None:
        missing = self._unmeasured(run)
        if not missing:
            return
        folder = self.folder(run)
        sources = {
            name: (str(annotation_file(name, run.cfg)), str(_predictions(folder, name)))
            for name in (run.task.val, *missing)
        }
        request = {
            "val": sources[run.task.val],
            "tests": {name: sources[name] for name in missing},
            "output": str(self.results_folder(run)),
            "max_dets": run.cfg.TEST.DETECTIONS_PER_IMAGE,
        }
        write_json(folder / "measure.json", request)
        self._call([*self._commands.measure, str(folder / "measure.json")], folder, "measure", lock)

    def _unmeasured(self, run: Run) -> list[str]:
        folder = self.results_folder(run)
        return [name for name in run.task.test if not (folder / f"{name}.json").is_file()]

    def _call(self, words: Sequence[str], folder: Path, stage: str, *locks: int) -> None:
        """Run one command to its end, with its output in a log.

        It inherits the locks, which therefore end with the last process of the run, even if this
        one is killed.
        """
        if self._stopped:
            raise _Stopped
        folder.mkdir(parents=True, exist_ok=True)
        log = folder / f"{stage}.log"
        with log.open("ab") as file:
            process = subprocess.Popen(
                [str(word) for word in words],
                stdout=file,
                stderr=subprocess.STDOUT,
                env=self._environment | self._gpu(),
                pass_fds=locks,
            )
            self._processes.add(process)
            if self._stopped:  # in this very moment
                process.terminate()
            code = process.wait()
            self._processes.discard(process)
        if self._stopped:
            raise _Stopped
        if code:
            lines = log.read_text(errors="replace").strip().splitlines() or ["no output"]
            raise NucleiError(f"{stage} failed ({lines[-1].strip()[:300]}); see {log}")

    def _number_thread(self, numbers: Iterator[int]) -> None:
        self._thread.number = next(numbers)

    def _gpu(self) -> dict[str, str]:
        """Environment that gives this thread's process one of several GPUs."""
        if self._jobs == 1 or len(self._gpus) < 2:
            return {}
        return {"CUDA_VISIBLE_DEVICES": self._gpus[self._thread.number % len(self._gpus)]}

    # ---------------------------------------------------------------------------- schedule

    def _calibration(self, run: Run) -> Path:
        return calibration_file(self.study, run.task.name, run.model.name)

    def _known_schedule(self, run: Run) -> tuple[str, ...] | None:
        """The run's schedule; None if its model has still to be calibrated."""
        study = self.study
        if not run.is_trained:
            return ()
        if study.budget is None:
            return schedule_options(run.cfg, validations=study.validations)
        calibration = read_calibration(study, run.task.name, run.model.name)
        if calibration is None:
            return None
        seconds = calibration["seconds_per_iteration"]
        return schedule_options(run.cfg, seconds, study.budget, study.validations)

    def _schedule(self, run: Run, lock: int) -> tuple[str, ...]:
        path = self._calibration(run)
        folder = self.study.output_dir / run.task.name / run.model.calibrated / "calibration"
        with self._calibrating[path], _locked(folder, run.key, wait=True) as calibrating:
            schedule = self._known_schedule(run)
            if schedule is None:
                self._calibrate(run, path, folder, (lock, calibrating))
                schedule = self._known_schedule(run)
        if path.is_file():
            self._check_hardware(path, run)
        return schedule

    def _hardware(self, run: Run) -> dict[str, Any]:
        """What the time of a step depends on and the user can choose."""
        threads = int(self._environment["OMP_NUM_THREADS"])
        device = torch.device(run.cfg.MODEL.DEVICE).type
        if device != "cuda":
            return {"threads": threads, "device": device}
        sharing = math.ceil(self._jobs / max(1, len(self._gpus)))
        return {"threads": threads, "device": device, "jobs_per_gpu": sharing}

    def _check_hardware(self, path: Path, run: Run) -> None:
        then = read_json(path)
        for key, now in self._hardware(run).items():
            if then[key] != now:
                raise NucleiError(
                    f"{path}: measured with {key} {then[key]}, now it is {now}; go on with the "
                    "device, --jobs, cores and GPUs of then, or use other --output and --results"
                )
        here = cpu_name()  # a cluster may hand out another each time
        if then.get("processor", here) != here:
            self._say(
                f"{run.key}: gets as many steps as fit the time on {then['processor']}; on {here} "
                "they may take longer, or shorter, and have another precision"
            )

    def _calibrate(self, run: Run, path: Path, folder: Path, locks: Sequence[int]) -> None:
        (folder / "metrics.json").unlink(missing_ok=True)
        run = self.study.run(run.task, self.study.models[run.model.calibrated], run.seed)
        options = [*run.options, *calibration_options(run.seed)]
        options += ["OUTPUT_DIR", str(folder)]
        words = [*self._commands.train, "--config-file", run.model.config, *options]
        self._call(words, folder, "calibrate", *locks)
        content = {
            "seconds_per_iteration": seconds_per_iteration(read_metrics(folder / "metrics.json")),
            "iterations": CALIBRATION_ITERATIONS,
            "jobs": self._jobs,
            "processor": cpu_name(),
            **self._hardware(run),
        }
        for checkpoint in folder.glob("*.pth"):
            checkpoint.unlink()
        write_json(path, content)


def _gpu_numbers() -> list[str]:
    """Those that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    count, named = usable_gpus(), os.environ.get("CUDA_VISIBLE_DEVICES")
    return (named.split(",") if named else [str(k) for k in range(count)])[:count]


def _report(run: Run, future: Future, say: Callable[[str], None]) -> bool:
    """Tell how a run ended; False if badly."""
    error = future.exception()
    if error is None:
        say(f"{run.key}: done")
        return True
    if not isinstance(error, NucleiError):
        say("".join(traceback.format_exception(error)))
    say(f"{run.key}: {error or type(error).__name__}")
    return False


def _predictions(folder: Path, name: str) -> Path:
    return folder / "evaluation" / "inference" / name / "coco_instances_results.json"


def _check_settings(
    path: Path, run: Run, schedule: tuple[str, ...], free: Sequence[str] = ()
) -> None:
    before, now = read_json(path)["settings"], settings(load_run_config(run, schedule))
    key = changed_setting(before, {key: now[key] for key in now if key not in free})
    if key is not None:
        raise NucleiError(
            f"{path}: made with {key} {before[key]}, now it is {now[key]}; undo the change, remove "
            "that folder, or use other --output and --results"
        )


@contextmanager
def _locked(folder: Path, name: str, wait: bool = False) -> Iterator[int]:
    """Let nobody else work in ``folder``; gives the file descriptor that holds the lock.

    Raises:
        NucleiError: somebody works there, and ``wait`` is not set.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:
            raise NucleiError(
                f"{name} is being done by another process; wait for it, or stop it"
            ) from error
        yield file.fileno()

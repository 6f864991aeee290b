"""Training hooks that Detectron2 does not have."""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from detectron2.engine import HookBase, hooks
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from fvcore.common.checkpoint import Checkpointer
from fvcore.nn.precise_bn import get_bn_modules
from torch import nn

from nuclei_d2.evaluation.efficiency import (
    WARMUP,
    device_memory_mb,
    host_memory_mb,
    reset_peak_memory,
)
from nuclei_d2.utils.errors import NucleiError


class TrainingSpeed(HookBase):
    """Time of every stage of an iteration, images per second and peak memory.

    The trainer switches its ``clock`` (a ``StageClock``) between "data", "forward", "backward",
    "step" and "logging", and counts in ``images_seen``. Every ``period`` iterations their means
    become the scalars forward_time, backward_time, step_time (seconds; Detectron2 adds data_time
    and time), images_per_second, max_memory_mb (CUDA only) and host_memory_mb; :meth:`summary`
    covers the whole run. The first iterations, other hooks and evaluations are not measured. Put
    this hook before those that evaluate, and before the writer.
    """

    def __init__(self, device: torch.device, period: int = 20):
        """
        Args:
            device: where the model runs.
            period: iterations between two writings; that of the PeriodicWriter.
        """
        self._device = device
        self._period = period
        self._seconds = Counter()
        self._iterations = self._images = 0
        self._device_mb = None

    def before_train(self):
        remaining = self.trainer.max_iter - self.trainer.start_iter
        self._warmup = max(0, min(WARMUP, remaining - 1))
        self._pending = 0
        self._images_before = self.trainer.images_seen
        reset_peak_memory(self._device)

    def after_step(self):
        # An evaluation resets the device's peak.
        if self._device.type == "cuda":
            self._device_mb = max(self._device_mb or 0, device_memory_mb(self._device))
        self._pending += 1
        done = self.trainer.iter + 1
        if done - self.trainer.start_iter <= self._warmup:
            self.trainer.clock.reset()
            self._pending, self._images_before = 0, self.trainer.images_seen
        elif done % self._period == 0 or done == self.trainer.max_iter:
            self._write()

    def _write(self):
        seconds, iterations = self.trainer.clock.take(), self._pending
        images = (self.trainer.images_seen - self._images_before) * comm.get_world_size()
        self._pending, self._images_before = 0, self.trainer.images_seen
        self._seconds.update(seconds)
        self._iterations += iterations
        self._images += images
        scalars = {
            **{f"{k}_time": seconds[k] / iterations for k in ("forward", "backward", "step")},
            "images_per_second": images / sum(seconds.values()),
            "max_memory_mb": self._device_mb,
            "host_memory_mb": host_memory_mb(),
        }
        known = {name: value for name, value in scalars.items() if value is not None}
        self.trainer.storage.put_scalars(**known, smoothing_hint=False)

    def summary(self) -> dict[str, Any] | None:
        """Means over the measured iterations of this process; None if there were none.

        Returns:
            iterations, warmup_iterations: measured and not;
            data_s_per_iteration: waiting for the data loader;
            forward_, backward_ and step_s_per_iteration;
            total_s_per_iteration: these and the logging of losses;
            images_per_second: of all processes together;
            peak_device_memory_mb (None on a CPU) and peak_host_memory_mb: of this process.
        """
        if not self._iterations:
            return None
        stages = {k: self._seconds[k] for k in ("data", "forward", "backward", "step")}
        stages["total"] = sum(self._seconds.values())
        return {
            "iterations": self._iterations,
            "warmup_iterations": self._warmup,
            **{f"{k}_s_per_iteration": v / self._iterations for k, v in stages.items()},
            "images_per_second": self._images / stages["total"],
            "peak_device_memory_mb": self._device_mb,
            "peak_host_memory_mb": host_memory_mb(),
        }


class ValidationLoss(HookBase):
    """Loss on held-out data, as ``val/total_loss`` and one ``val/...`` scalar per loss.

    Normalisation layers use their running statistics, and the sampling of proposals is seeded
    anew each time: the number depends on the weights alone, and the training's random numbers
    are left as they were.
    """

    def __init__(self, period: int, model: nn.Module, data_loader: Iterable):
        """
        Args:
            period: iterations between two measurements; 0 switches the hook off.
            model: a Detectron2 model; in training mode it returns a dict of losses.
            data_loader: batches with ground truth, without augmentation.
        """
        self._period = period
        self._model = model
        self._data_loader = data_loader

    def after_step(self):
        if self._period > 0 and (self.trainer.iter + 1) % self._period == 0:
            for name, value in self.measure().items():
                self.trainer.storage.put_scalar(f"val/{name}", value, smoothing_hint=False)

    def measure(self) -> dict[str, float]:
        """Mean of each loss over the batches of all processes, and their ``total_loss``."""
        share_buffers(self._model)
        sums, count = defaultdict(float), 0
        device = next(self._model.parameters()).device
        with (
            # Without a list it is the generators of all GPUs, other processes' ones, too.
            torch.random.fork_rng([device], device_type=device.type)
            if device.type != "cpu"
            else torch.random.fork_rng([]),
            torch.no_grad(),
            _frozen_norms(self._model),
            EventStorage(),  # what the model logs on the way is not training
        ):
            torch.manual_seed(0)
            for batch in self._data_loader:
                for name, value in self._model(batch).items():
                    sums[name] += float(value)
                count += 1
        parts = [part for part in comm.all_gather((dict(sums), count)) if part[1]]
        total = sum(n for _, n in parts)
        means = {name: sum(s[name] for s, _ in parts) / total for name in parts[0][0]}
        return {**means, "total_loss": sum(means.values())}


def share_buffers(model: nn.Module) -> None:
    """Give every process the buffers of the main one, whose model is the one that is saved.

    In training each has running statistics of its own images (batch norm).
    """
    if comm.get_world_size() > 1:
        for buffer in model.buffers():
            torch.distributed.broadcast(buffer, 0)


@contextmanager
def _frozen_norms(model: nn.Module) -> Iterator[None]:
    """Training mode, in which a Detectron2 model returns losses, without updating batch norms."""
    norms = get_bn_modules(model)
    for norm in norms:
        norm.eval()
    try:
        yield
    finally:
        for norm in norms:
            norm.train()


class PeriodicCheckpointer(hooks.PeriodicCheckpointer):
    """Detectron2's; of its files it keeps the last two, enough to resume from.

    Those that the run wrote before ``--resume`` count as well.
    """

    def __init__(self, checkpointer: Checkpointer, period: int):
        """
        Args:
            checkpointer: writes the files, named after the iteration.
            period: iterations between two of them.
        """
        super().__init__(checkpointer, period, max_to_keep=2)

    def before_train(self):
        super().before_train()
        folder = Path(self.checkpointer.save_dir)
        written = sorted(folder.glob(f"{self.file_prefix}_{'[0-9]' * 7}.pth"))
        before = [p for p in written if int(p.stem[-7:]) < self.trainer.start_iter]
        self.recent_checkpoints = [str(path) for path in before[-self.max_to_keep :]]


class BestCheckpointer(HookBase):
    """Save ``model_best.pth`` whenever the metric is higher than ever before.

    Unlike Detectron2's hook it remembers the best score across ``--resume``: the score is part of
    the trainer's state, and set before the checkpoint that holds it is written.
    """

    def __init__(self, period: int, checkpointer: Checkpointer, metric: str):
        """
        Args:
            period: iterations between two evaluations; put this hook after the EvalHook.
            checkpointer: writes the file.
            metric: name of a scalar in the event storage, such as "segm/AP".
        """
        self._period = period
        self._checkpointer = checkpointer
        self._metric = metric
        self.best: float | None = None

    def after_step(self):
        done = self.trainer.iter + 1
        # The EvalHook leaves the last iteration to after_train.
        if self._period > 0 and done % self._period == 0 and done != self.trainer.max_iter:
            self._save_if_best()

    def after_train(self):
        if self.trainer.iter + 1 >= self.trainer.max_iter:
            self._save_if_best()

    def _save_if_best(self):
        value, iteration = self.trainer.storage.latest().get(self._metric, (None, -1))
        if value is None:
            names = sorted(n for n in self.trainer.storage.latest() if n.endswith("/AP"))
            raise NucleiError(
                f"TEST.BEST_METRIC {self._metric} is not measured; there are: {', '.join(names)}"
            )
        if math.isfinite(value) and (self.best is None or value > self.best):
            self.best = value
            self._checkpointer.save("model_best", iteration=iteration)

    def state_dict(self) -> dict:
        return {"best": self.best}

    def load_state_dict(self, state: dict) -> None:
        self.best = state["best"]

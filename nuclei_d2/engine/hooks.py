"""Training hooks that Detectron2 does not have."""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from detectron2.engine import HookBase
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from fvcore.common.checkpoint import Checkpointer
from fvcore.nn.precise_bn import get_bn_modules
from torch import nn

from nuclei_d2.utils.errors import NucleiError


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
        sums, count = defaultdict(float), 0
        with (
            torch.random.fork_rng(),
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

"""Training hooks that Detectron2 does not have."""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from detectron2.engine import HookBase, hooks
from detectron2.utils import comm
from fvcore.nn.precise_bn import get_bn_modules
from torch import nn


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
        with torch.random.fork_rng(), torch.no_grad(), _frozen_norms(self._model):
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
    yield
    for norm in norms:
        norm.train()


class BestCheckpointer(hooks.BestCheckpointer):
    """Detectron2's hook that also remembers the best score across ``--resume``."""

    def state_dict(self) -> dict:
        return {"best_metric": self.best_metric, "best_iter": self.best_iter}

    def load_state_dict(self, state: dict) -> None:
        self.best_metric = state["best_metric"]
        self.best_iter = state["best_iter"]

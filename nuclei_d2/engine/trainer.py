"""Training and evaluation on Detectron2's DefaultTrainer."""

import logging
import math
import time
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader, build_detection_train_loader
from detectron2.engine import DefaultTrainer, SimpleTrainer, TrainerBase, hooks
from detectron2.solver import get_default_optimizer_params
from detectron2.solver.build import maybe_add_gradient_clipping
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from torch import nn
from torch.utils.data import DataLoader

from nuclei_d2.data.augmentation import CenterCrop, build_augmentation
from nuclei_d2.data.dataset_mapper import NucleiDatasetMapper
from nuclei_d2.engine.checkpoint import NucleiCheckpointer
from nuclei_d2.engine.hooks import (
    BestCheckpointer,
    PeriodicCheckpointer,
    TrainingSpeed,
    ValidationLoss,
    share_buffers,
)
from nuclei_d2.evaluation import build_evaluator
from nuclei_d2.evaluation.efficiency import (
    efficiency_table,
    hardware,
    measured_inference,
    model_cost,
)
from nuclei_d2.modeling import build_model
from nuclei_d2.utils.errors import NucleiError
from nuclei_d2.utils.files import write_json
from nuclei_d2.utils.precision import has_bfloat16
from nuclei_d2.utils.timing import StageClock

_logger = logging.getLogger(__name__)

_WRITER_PERIOD = 20  # iterations, as in Detectron2


class NucleiTrainer(DefaultTrainer):
    """Detectron2's trainer for nuclei.

    What differs: our mapper and evaluators; bfloat16 autocast on any device; atomic checkpoints;
    ``DATASETS.VAL`` is evaluated during training and chooses ``model_best.pth``, while
    ``DATASETS.TEST`` is evaluated once, after the last iteration, into ``results.json``.
    """

    def __init__(self, cfg: CfgNode):
        # Detectron2's own mixed precision is for CUDA alone; its unused gradient scaler would
        # end in the checkpoints and tie them to one kind of device.
        plain = cfg.clone()
        plain.defrost()
        plain.SOLVER.AMP.ENABLED = False
        plain.SOLVER.BASE_LR = _rate_before_scaling(cfg, comm.get_world_size())
        super().__init__(plain)
        self._device = torch.device(cfg.MODEL.DEVICE)
        self._amp = cfg.SOLVER.AMP.ENABLED and has_bfloat16(self._device, "SOLVER.AMP.ENABLED")
        self._batches = None
        self.clock = StageClock(self._device)  # of the stages of an iteration
        self.images_seen = 0  # by this process

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        return build_model(cfg)

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        """SGD as Detectron2 builds it, or AdamW with the same parameter groups and clipping.

        Raises:
            NucleiError: the model has no parameters.
        """
        if not any(p.requires_grad for p in model.parameters()):
            raise NucleiError(
                f"MODEL.META_ARCHITECTURE {cfg.MODEL.META_ARCHITECTURE} has nothing to train; "
                "evaluate it with --eval-only"
            )
        if cfg.SOLVER.OPTIMIZER == "SGD":
            return super().build_optimizer(cfg, model)
        params = get_default_optimizer_params(
            model,
            base_lr=cfg.SOLVER.BASE_LR,
            weight_decay=cfg.SOLVER.WEIGHT_DECAY,
            weight_decay_norm=cfg.SOLVER.WEIGHT_DECAY_NORM,
            weight_decay_bias=cfg.SOLVER.WEIGHT_DECAY_BIAS,
            bias_lr_factor=cfg.SOLVER.BIAS_LR_FACTOR,
        )
        return maybe_add_gradient_clipping(cfg, torch.optim.AdamW)(params, lr=cfg.SOLVER.BASE_LR)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode):
        return build_detection_train_loader(
            cfg, mapper=NucleiDatasetMapper(cfg, True), prefetch_factor=_prefetched(cfg)
        )

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> DataLoader:
        return build_detection_test_loader(
            cfg, dataset_name, mapper=NucleiDatasetMapper(cfg, False)
        )

    @classmethod
    def build_validation_loss_loader(cls, cfg: CfgNode) -> DataLoader:
        """Images of ``DATASETS.VAL`` with ground truth, without random augmentation.

        Their centres, as large as a training crop: matching anchors with nuclei takes memory in
        proportion to both, which a whole image may not leave.
        """
        augmentations = [*build_augmentation(cfg, False), CenterCrop(cfg.INPUT.CROP.SIZE)]
        mapper = NucleiDatasetMapper(cfg, True, augmentations=augmentations)
        return build_detection_test_loader(cfg, cfg.DATASETS.VAL, mapper=mapper)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str):
        output_dir = str(Path(cfg.OUTPUT_DIR) / "inference" / dataset_name)
        return build_evaluator(cfg, dataset_name, output_dir)

    def build_hooks(self) -> list[hooks.HookBase]:
        """Detectron2's hooks with validation, best checkpoint and validation loss.

        ``DefaultTrainer.__init__`` calls this last, after making a checkpointer that does not
        write atomically: ours takes its place here, before any hook holds it.
        """
        cfg = self.cfg
        self.checkpointer = build_checkpointer(cfg, self.model, trainer=weakref.proxy(self))
        period = cfg.TEST.EVAL_PERIOD
        self._speed = TrainingSpeed(torch.device(cfg.MODEL.DEVICE), _WRITER_PERIOD)
        built = [hooks.IterationTimer(), hooks.LRScheduler(), self._speed]
        if cfg.DATASETS.VAL and period > 0:
            loader = self.build_validation_loss_loader(cfg)
            built.append(ValidationLoss(period, self.model, loader))
            validate = lambda: by_task(self.evaluate(cfg, self.model, cfg.DATASETS.VAL)[0])  # noqa: E731
            built.append(hooks.EvalHook(period, validate))
            if comm.is_main_process():
                built.append(BestCheckpointer(period, self.checkpointer, cfg.TEST.BEST_METRIC))
        if comm.is_main_process():
            # After validation: a run that is stopped while it validates does that again.
            built.append(PeriodicCheckpointer(self.checkpointer, cfg.SOLVER.CHECKPOINT_PERIOD))
            built.append(hooks.PeriodicWriter(self.build_writers(), period=_WRITER_PERIOD))
        return built

    def train(self) -> OrderedDict:
        """Train to ``SOLVER.MAX_ITER``, then evaluate on ``DATASETS.TEST``.

        A run that begins anew sets ``last_checkpoint`` and ``model_best.pth`` of an earlier one in
        ``OUTPUT_DIR`` aside, which would pass for its own.

        Returns:
            ``{dataset: {"bbox": {...}, "segm": {...}}}``, as in ``results.json``.
        """
        if self.start_iter == 0:
            comm.synchronize()  # until every process has loaded MODEL.WEIGHTS
            if comm.is_main_process():
                _set_earlier_run_aside(Path(self.cfg.OUTPUT_DIR))
        else:
            self._draw_anew()
        TrainerBase.train(self, self.start_iter, self.max_iter)
        return self.evaluate_and_save(self.cfg, self.model, self.training_cost())

    def _draw_anew(self) -> None:
        """Other images and crops than at the start of the run, which a seed would bring again."""
        if self.cfg.SEED >= 0:
            entropy = (self.cfg.SEED, comm.get_rank(), self.start_iter)
            seed_all_rng(int(np.random.SeedSequence(entropy).generate_state(1)[0]))
        self.data_loader = self.build_train_loader(self.cfg)

    @classmethod
    def evaluate(
        cls, cfg: CfgNode, model: nn.Module, dataset_names: Iterable[str]
    ) -> tuple[OrderedDict, dict[str, dict[str, Any]]]:
        """Evaluate ``model`` on registered sets.

        Returns:
            ``{dataset: {task: {metric: value}}}``, the inner part empty but on the main process;
            and ``{dataset: ...}`` of what it cost, see :func:`measured_inference`.
        """
        results, costs = OrderedDict(), {}
        share_buffers(model)
        for name in dataset_names:
            evaluator = cls.build_evaluator(cfg, name)
            loader = cls.build_test_loader(cfg, name)
            with one_line_errors():
                results[name], costs[name] = measured_inference(
                    model, loader, evaluator, torch.device(cfg.MODEL.DEVICE)
                )
        return results, costs

    @classmethod
    def evaluate_and_save(
        cls, cfg: CfgNode, model: nn.Module, training_cost: dict[str, Any] | None = None
    ) -> OrderedDict:
        """Evaluate on ``DATASETS.TEST`` and write ``OUTPUT_DIR/results.json``.

        Args:
            cfg: of the run.
            model: to evaluate.
            training_cost: written beside what the evaluation cost; None: nothing was trained.

        Returns:
            The first part of :meth:`evaluate`; the file has ``efficiency`` beside the data sets.
        """
        results, costs = cls.evaluate(cfg, model, cfg.DATASETS.TEST)
        if comm.is_main_process():
            efficiency = {
                "hardware": hardware(torch.device(cfg.MODEL.DEVICE)),
                "model": model_cost(model, cls._first_image(cfg)),
                "training": training_cost,
                "evaluation": costs,
            }
            _logger.info(f"Efficiency:\n{efficiency_table(efficiency)}")
            path = Path(cfg.OUTPUT_DIR) / "results.json"
            write_json(path, {**results, "efficiency": efficiency})
            _logger.info(f"results written to {path}")
        return results

    @classmethod
    def _first_image(cls, cfg: CfgNode) -> dict[str, Any] | None:
        """The first of ``DATASETS.TEST`` as the model gets it; None if there is no set."""
        if not cfg.DATASETS.TEST:
            return None
        return cls.build_test_loader(cfg, cfg.DATASETS.TEST[0]).dataset[0]

    def training_cost(self) -> dict[str, Any] | None:
        """What the iterations of this process cost, see :meth:`TrainingSpeed.summary`."""
        summary = self._speed.summary()
        return summary and {"precision": "bfloat16" if self._amp else "float32", **summary}

    def run_step(self) -> None:
        """One iteration: load, forward (autocast), backward, step.

        Raises:
            NucleiError: the loss is not finite; names the iteration and the images.
        """
        start = time.perf_counter()
        self.clock.switch("data")
        if self._batches is None:
            self._batches = iter(self.data_loader)
        with one_line_errors():
            batch = next(self._batches)
        self.images_seen += len(batch)
        data_time = time.perf_counter() - start

        self.clock.switch("forward")
        losses = self._forward(batch)
        values = self._finite_values(losses, batch)
        self.clock.switch("backward")
        total = sum(losses.values())
        self.optimizer.zero_grad()
        total.backward()
        self.clock.switch("step")
        self.optimizer.step()
        self.clock.switch("logging")
        SimpleTrainer.write_metrics(values, data_time, self.iter)
        self.clock.switch(None)

    def after_step(self) -> None:
        with one_line_errors():  # the hooks validate
            super().after_step()

    def _forward(self, batch: list[dict]) -> dict[str, torch.Tensor]:
        try:
            with torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=self._amp):
                return self.model(batch)
        except FloatingPointError as error:  # Detectron2's own for broken proposals
            raise self._not_finite(error, batch) from error

    def _finite_values(
        self, losses: dict[str, torch.Tensor], batch: list[dict]
    ) -> dict[str, torch.Tensor]:
        """The losses on the CPU. Waits for the GPU, once an iteration: what is not finite must not
        reach the weights, and what follows is queued while the next batch is loaded.
        """
        on_cpu = torch.stack([loss.detach().float() for loss in losses.values()]).cpu()
        values = dict(zip(losses, on_cpu, strict=True))
        if not on_cpu.sum().isfinite():
            raise self._not_finite({name: float(loss) for name, loss in values.items()}, batch)
        return values

    def _not_finite(self, reason: object, batch: list[dict]) -> NucleiError:
        names = ", ".join(record["file_name"] for record in batch)
        return NucleiError(
            f"loss is not finite at iteration {self.iter} ({reason}) on the images {names}; "
            "lower SOLVER.BASE_LR, or look at these images"
        )


def _prefetched(cfg: CfgNode) -> int | None:
    """Items that each worker loads ahead, None without workers: two batches in all, or more.

    To group images by their shape, Detectron2 loads them one by one, so that PyTorch's 2 for each
    worker may be less than a batch; else an item is a batch.
    """
    workers = cfg.DATALOADER.NUM_WORKERS
    if not workers:
        return None
    if not cfg.DATALOADER.ASPECT_RATIO_GROUPING:
        return 2
    images = cfg.SOLVER.IMS_PER_BATCH / comm.get_world_size()
    return max(2, math.ceil(2 * images / workers))


def _rate_before_scaling(cfg: CfgNode, world_size: int) -> float:
    """The rate that Detectron2 multiplies by the number of GPUs, a rule for SGD.

    AdamW's rate is to grow with the square root of the batch (Malladi et al., On the SDEs and
    scaling rules for adaptive gradient algorithms, NeurIPS 2022, section 5).
    """
    reference = cfg.SOLVER.REFERENCE_WORLD_SIZE
    if cfg.SOLVER.OPTIMIZER != "AdamW" or not reference:
        return cfg.SOLVER.BASE_LR
    return cfg.SOLVER.BASE_LR / math.sqrt(world_size / reference)


def _set_earlier_run_aside(folder: Path) -> None:
    (folder / "last_checkpoint").unlink(missing_ok=True)  # only a name: the checkpoints stay
    best = folder / "model_best.pth"
    if best.exists():
        aside = best.replace(folder / "model_best_earlier.pth")
        _logger.info(f"{best} of an earlier run is now {aside}")


def build_checkpointer(cfg: CfgNode, model: nn.Module, **checkpointables) -> NucleiCheckpointer:
    """The checkpointer of a run, with the config's decision about pickles."""
    return NucleiCheckpointer(
        model, cfg.OUTPUT_DIR, allow_pickle=cfg.MODEL.ALLOW_PICKLE, **checkpointables
    )


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Reduce a data loader worker's error, which comes with its traceback, to its message."""
    try:
        yield
    except NucleiError as error:
        raise NucleiError(str(error).strip().splitlines()[-1].split("NucleiError: ")[-1]) from error


def by_task(results: OrderedDict) -> dict:
    """Drop the data set's name where there is one only, as Detectron2 does for its scalars."""
    return next(iter(results.values())) if len(results) == 1 else results

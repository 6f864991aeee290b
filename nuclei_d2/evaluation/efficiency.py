"""What a model costs: time of every stage, memory, parameters, multiply-adds, and on what."""

import logging
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from detectron2.evaluation import DatasetEvaluator, inference_on_dataset
from detectron2.modeling import GeneralizedRCNN
from detectron2.utils import comm
from detectron2.utils.analysis import FlopCountAnalysis
from tabulate import tabulate
from torch import nn

from nuclei_d2.utils.hardware import cpu_name, usable_cores
from nuclei_d2.utils.timing import StageClock

try:
    import resource
except ImportError:  # Windows
    resource = None

_logger = logging.getLogger(__name__)

# The first batches and iterations are slow: memory is allocated, kernels are chosen.
WARMUP = 5
_STAGES = ("load", "network", "postprocess", "evaluation")
_MB = 2**20


def reset_peak_memory(device: torch.device) -> None:
    """Begin a new measurement of the device's peak memory. The host's cannot be reset."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def device_memory_mb(device: torch.device) -> float | None:
    """Most memory that tensors held since :func:`reset_peak_memory`, MB of 2^20 bytes.

    None for a device other than CUDA's.
    """
    return torch.cuda.max_memory_allocated(device) / _MB if device.type == "cuda" else None


def host_memory_mb() -> float | None:
    """Most memory this process ever held, its data loader's workers not counted, MB of 2^20 bytes.

    None where the system does not tell (Windows).
    """
    if resource is None:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / _MB if sys.platform == "darwin" else peak / 1024  # Linux counts kB


def hardware(device: torch.device) -> dict[str, Any]:
    """Names of the device and the CPU, cores and threads of this process, number of processes."""
    cpu = cpu_name()
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu,
        "cpu": cpu,
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "processes": comm.get_world_size(),
        "torch": torch.__version__,
    }


def model_cost(model: nn.Module, inputs: Mapping[str, Any] | None) -> dict[str, Any]:
    """Parameters of ``model``, and multiply-adds for one image.

    The multiply-adds are counted by fvcore, one for a multiplication with its addition, in
    convolutions, matrix products, normalisation and interpolation; pooling of RoIs, non-maximum
    suppression, pasting and decoding are left out. A detector's depend on what it finds in the
    image. The model is left as it was.

    Args:
        model: in any mode.
        inputs: one image as the data loader gives it, with its file's height and width; None:
            count parameters only.

    Returns:
        parameters, trainable_parameters; with an image, flops, None for a model without parameters
        or one that cannot be traced (a warning says why); flops_image_size (H, W) of the file and
        flops_network_size (H, W) of what the network sees.
    """
    model = getattr(model, "module", model)  # out of DistributedDataParallel
    parameters = list(model.parameters())
    cost = {
        "parameters": sum(p.numel() for p in parameters),
        "trainable_parameters": sum(p.numel() for p in parameters if p.requires_grad),
    }
    if inputs is not None:
        cost["flops"] = count_flops(model, inputs) if parameters else None
        cost["flops_image_size"] = [inputs["height"], inputs["width"]]
        cost["flops_network_size"] = list(inputs["image"].shape[-2:])
    return cost


def count_flops(model: nn.Module, inputs: Mapping[str, Any]) -> int | None:
    """Multiply-adds, see :func:`model_cost`."""
    training = model.training
    model.eval()
    try:
        analysis = FlopCountAnalysis(_Network(model), [inputs])
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        return int(analysis.tracer_warnings("none").total())
    except Exception as error:  # tracing a model of any kind fails in any way
        _logger.warning(
            f"the model's FLOPs cannot be counted: {' '.join(str(error).split())[:200]}"
        )
        return None
    finally:
        model.train(training)


class _Network(nn.Module):
    """The part of a model that multiplies, with tensors as its output.

    Tracing forgets what no tensor of the output depends on, and a detector pastes its masks into
    something else.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, batch: list[dict]) -> Any:
        if isinstance(self.model, GeneralizedRCNN):
            return self.model.inference(batch, do_postprocess=False)
        return self.model(batch)


def measured_inference(
    model: nn.Module,
    data_loader: Iterable,
    evaluator: DatasetEvaluator,
    device: torch.device,
    clock: StageClock | None = None,
) -> tuple[dict, dict[str, Any]]:
    """Detectron2's ``inference_on_dataset``, and what it cost.

    The first :data:`WARMUP` batches (fewer of a small set) are not measured.

    Args:
        model, data_loader, evaluator: as for ``inference_on_dataset``.
        device: where the model runs.
        clock: measures the stages; a new one unless given.

    Returns:
        The evaluator's results, {} but on the main process; and, on every process, of all of them:
            images, warmup_images: measured and not;
            megapixels: of the measured files;
            load_s_per_image: waiting for the data loader;
            network_s_per_image, postprocess_s_per_image: the model; post-processing is what its
                ``stage("postprocess")`` encloses;
            evaluation_s_per_image: metrics;
            images_per_second, megapixels_per_second: by the model, network and post-processing,
                of all processes together;
            peak_device_memory_mb (None on a CPU), peak_host_memory_mb: the largest of a process.
    """
    reset_peak_memory(device)
    clock = clock or StageClock(device)
    loader = _MeasuredLoader(data_loader, clock)
    callbacks = {
        "before_inference": lambda: clock.switch("network"),
        "after_inference": lambda: clock.switch("evaluation"),
    }
    with clock.active():
        results = inference_on_dataset(model, loader, evaluator, callbacks) or {}
    clock.switch(None)
    own = {
        "counts": loader.counts,
        "seconds": clock.take(),
        "device": device_memory_mb(device),
        "host": host_memory_mb(),
    }
    reset_peak_memory(device)  # what comes next is measured anew
    return results, _summarise(comm.all_gather(own))


class _MeasuredLoader:
    """A data loader whose images are counted, and whose caller's time is measured."""

    def __init__(self, data_loader: Iterable, clock: StageClock):
        self._data_loader = data_loader
        self._clock = clock
        self.counts = Counter(images=0, warmup_images=0, megapixels=0.0)

    def __len__(self) -> int:
        return len(self._data_loader)

    def __iter__(self) -> Iterator[list[dict]]:
        warmup = min(WARMUP, len(self) - 1)
        self._clock.switch("load")
        for index, batch in enumerate(self._data_loader, start=1):
            self._count(batch, index <= warmup)
            yield batch
            if index == warmup:
                self._clock.reset()
            self._clock.switch("load")
        self._clock.switch("summary")  # evaluator.evaluate()

    def _count(self, batch: list[dict], is_warmup: bool) -> None:
        if is_warmup:
            self.counts["warmup_images"] += len(batch)
            return
        self.counts["images"] += len(batch)
        self.counts["megapixels"] += sum(x["height"] * x["width"] for x in batch) / 1e6


def _summarise(parts: list[dict]) -> dict[str, Any]:
    """What :func:`measured_inference` returns, from the measurements of every process."""
    counts, seconds = Counter(), Counter()
    for part in parts:
        counts.update(part["counts"])
        seconds.update(part["seconds"])
    images = counts["images"]
    per_image = {name: seconds[name] / images for name in _STAGES} if images else {}
    if images:
        # Every image takes part in the summary, those of the warm-up as well.
        per_image["evaluation"] += seconds["summary"] / (images + counts["warmup_images"])
    model = seconds["network"] + seconds["postprocess"]
    speed = len(parts) / model if model else float("nan")
    return {
        **counts,
        **{f"{name}_s_per_image": value for name, value in per_image.items()},
        "images_per_second": images * speed,
        "megapixels_per_second": counts["megapixels"] * speed,
        "peak_device_memory_mb": _largest(part["device"] for part in parts),
        "peak_host_memory_mb": _largest(part["host"] for part in parts),
    }


def _largest(values: Iterable[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)


def efficiency_table(efficiency: Mapping[str, Any]) -> str:
    """``efficiency`` of ``results.json``, for people."""
    parts = {
        **{name: efficiency[name] for name in ("hardware", "model", "training")},
        **efficiency["evaluation"],
    }
    rows = [
        (part, name, f"{value:,.4g}" if isinstance(value, float) else value)
        for part, values in parts.items()
        for name, value in (values or {}).items()
    ]
    return tabulate(rows, disable_numparse=True, missingval="-")

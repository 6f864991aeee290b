"""What happens before a run: config, data sets, log files and seeds."""

import logging
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.engine import TrainerBase, default_setup
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from nuclei_d2.config import load_config
from nuclei_d2.data.datasets.builtin import check_available, register_from_config
from nuclei_d2.data.datasets.statistics import median_diameter
from nuclei_d2.data.image_measures import training_ranges
from nuclei_d2.engine.checks import check_run, data_warnings
from nuclei_d2.utils.errors import NucleiError
from nuclei_d2.utils.hardware import use_device

_logger = logging.getLogger(__name__)


def setup(args) -> CfgNode:
    """Config, data sets, log files and seeds of a run from Detectron2's command line.

    Args:
        args: what ``detectron2.engine.default_argument_parser()`` parsed.

    Returns:
        The frozen config, written to ``OUTPUT_DIR/config.yaml`` as well. For training it says how
        large the nuclei are that the model learns from, and what the images are like, as
        prediction needs to know. ``--eval-only`` in the folder of a training has ``evaluation``
        in that folder for its ``OUTPUT_DIR``: the training's files stay as they are.

    Raises:
        NucleiError: see :func:`checked_config`.
    """
    cfg = checked_config(args)
    training_dir = Path(cfg.OUTPUT_DIR)
    beside_training = args.eval_only and _holds_training(training_dir)
    if beside_training:
        cfg.OUTPUT_DIR = str(training_dir / "evaluation")
    if not args.eval_only:
        records = [record for name in cfg.DATASETS.TRAIN for record in DatasetCatalog.get(name)]
        cfg.INPUT.NUCLEUS_DIAMETER = round(median_diameter(records), 2)
        cfg.INPUT.TRAINING_RANGES.update(training_ranges(records, cfg))
    cfg.freeze()
    default_setup(cfg, args)
    _setup_log(cfg)
    if beside_training:
        _logger.info(f"{training_dir} holds a training: the evaluation goes to {cfg.OUTPUT_DIR}")
    if comm.is_main_process():
        for warning in data_warnings(cfg, *_used_sets(cfg, args)):
            _logger.warning(warning)
    return cfg


def _holds_training(folder: Path) -> bool:
    """Whether a training has begun there, or left a model; no evaluation writes these files."""
    return (folder / "metrics.json").is_file() or any(folder.glob("*.pth"))


def _setup_log(cfg: CfgNode) -> None:
    """Let our own log lines go where Detectron2's go, to the screen and ``log.txt``."""
    log = setup_logger(
        cfg.OUTPUT_DIR,
        distributed_rank=comm.get_rank(),
        name=__name__.split(".")[0],
        enable_propagation=True,
    )
    log.setLevel(logging.INFO)
    logging.getLogger(TrainerBase.__module__).addFilter(_without_traceback)


def _without_traceback(record: logging.LogRecord) -> bool:
    """A filter of log records: Detectron2 logs what stops a training with its traceback."""
    error = record.exc_info and record.exc_info[1]
    if isinstance(error, NucleiError):
        record.msg, record.args, record.exc_info = f"Training stopped: {error}", (), None
    return True


def checked_config(args) -> CfgNode:
    """The config of a run, after everything that can be wrong before it starts was looked at.

    Raises:
        NucleiError: a wrong config, a device or a data set that is not there.
    """
    cfg = load_config(args.config_file, args.opts)
    use_device(cfg.MODEL.DEVICE)
    register_from_config(cfg)
    if args.num_gpus > 1 and cfg.MODEL.DEVICE != "cuda":  # each process has a number of its own
        raise NucleiError(
            f"--num-gpus is {args.num_gpus} but MODEL.DEVICE is {cfg.MODEL.DEVICE!r}; "
            "leave the option out, or add MODEL.DEVICE cuda"
        )
    sharing = cfg.SOLVER.REFERENCE_WORLD_SIZE or args.num_gpus * args.num_machines
    if not args.eval_only and cfg.SOLVER.IMS_PER_BATCH % max(sharing, 1):
        raise NucleiError(
            f"SOLVER.IMS_PER_BATCH is {cfg.SOLVER.IMS_PER_BATCH}, for {sharing} GPUs; make it a "
            "multiple of their number"
        )
    evaluated, trained = _used_sets(cfg, args)
    check_available((*evaluated, *trained))
    check_run(cfg, args.eval_only)
    return cfg


def _used_sets(cfg: CfgNode, args) -> tuple[list[str], list[str]]:
    """Names of the sets that a run evaluates on, and of those it trains on."""
    if args.eval_only:
        return list(cfg.DATASETS.TEST), []
    validated = cfg.DATASETS.VAL if cfg.TEST.EVAL_PERIOD > 0 else ()
    return [*cfg.DATASETS.TEST, *validated], list(cfg.DATASETS.TRAIN)

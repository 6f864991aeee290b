"""Checkpoints that survive a crash and cannot run code."""

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from torch import nn

from nuclei_d2.utils.errors import NucleiError
from nuclei_d2.utils.files import atomic_path

# What torch.load raises for a truncated file, a text file, a pickle with code in it.
_HEURISTICS = "?matching_heuristics="  # at the end of a path, for Detectron2's checkpointer
_LOAD_ERRORS = (RuntimeError, pickle.UnpicklingError, EOFError, zipfile.BadZipFile, ValueError)


class NucleiCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer with atomic writes and without silent code execution.

    Files are read by ``torch.load(weights_only=True)`` (the default since torch 2.6). A ``.pkl``
    file is a Python pickle and can run code; it is refused unless ``allow_pickle``.
    """

    def __init__(
        self, model: nn.Module, save_dir: str = "", *, allow_pickle: bool = False, **checkpointables
    ):
        """
        Args:
            model: the model whose weights are saved and loaded.
            save_dir: folder for the checkpoints.
            allow_pickle: whether ``.pkl`` files (Detectron2's model zoo) are trusted.
            checkpointables: further objects with a ``state_dict``, as in Detectron2.
        """
        super().__init__(model, save_dir, **checkpointables)
        self.allow_pickle = allow_pickle

    def save(self, name: str, **kwargs: Any) -> None:
        """Write ``<save_dir>/<name>.pth``, then the name of it as the last checkpoint.

        Both replace the old file in one step, so that a full disk, a killed process or a power cut
        leaves the last good state.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        data = {"model": self.model.state_dict()}
        data.update({key: obj.state_dict() for key, obj in self.checkpointables.items()})
        data.update(kwargs)
        path = Path(self.save_dir) / f"{name}.pth"
        self.logger.info(f"Saving checkpoint to {path}")
        with atomic_path(path, durable=True) as temporary:
            _save_or_os_error(data, temporary)
        self.tag_last_checkpoint(path.name)

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Record, atomically, the file that ``--resume`` continues from."""
        with atomic_path(Path(self.save_dir) / "last_checkpoint", durable=True) as temporary:
            temporary.write_text(last_filename_basename)

    def load(self, path: str, checkpointables: list[str] | None = None) -> dict[str, Any]:
        """Load weights, and the other checkpointables, as Detectron2's checkpointer does.

        Raises:
            NucleiError: no such file, not a checkpoint, a refused pickle, or a checkpoint
                without a single tensor of this model.
        """
        if not path:
            return super().load(path, checkpointables)
        local = self._local_path(path)
        if not _is_pickle(local) and _HEURISTICS not in path:
            self._check_any_match(path, read_weights(local))
        try:
            return super().load(path, checkpointables)
        except _LOAD_ERRORS as error:
            raise NucleiError(f"cannot read the checkpoint {path}: {_first_line(error)}") from error

    def load_exactly(self, path: str) -> None:
        """Load the weights at ``path`` for inference: every tensor must fit.

        A model without any tensors, such as the classical baseline, needs no ``path``.

        Raises:
            NucleiError: as :meth:`load`, or tensors are missing or of another shape (the config
                is not the one the model was trained with).
        """
        if not path and not self.model.state_dict():
            return
        if not path:
            raise NucleiError("MODEL.WEIGHTS is empty: name the checkpoint to use")
        if _HEURISTICS in path:
            raise NucleiError(
                f"{path}: names are matched for training only; leave out what follows ?"
            )
        local = self._local_path(path)
        if not _is_pickle(local):
            self._check_all_match(path, read_weights(local))
        self.load(path, checkpointables=[])

    def _local_path(self, path: str) -> str:
        """Fetch a remote checkpoint, and refuse a pickle, before or after its address tells.

        A path may end in "?matching_heuristics=True", which Detectron2's checkpointer reads.
        """
        address = path.partition("?")[0]
        self._check_pickle(path, address)
        here = [name for name in (path, address) if Path(name).is_file()]
        try:
            local = here[0] if here else self.path_manager.get_local_path(path)
        except (OSError, ValueError) as error:
            raise NucleiError(f"cannot fetch the checkpoint {path}: {error}") from error
        if not Path(local).is_file():
            raise NucleiError(f"no checkpoint {path}; check MODEL.WEIGHTS")
        self._check_pickle(path, local)
        return local

    def _check_pickle(self, path: str, name: str) -> None:
        if _is_pickle(name) and not self.allow_pickle:
            raise NucleiError(
                f"{path} is a pickle, which can run code when loaded; if you trust its source, "
                "set MODEL.ALLOW_PICKLE True"
            )

    def _check_any_match(self, path: str, weights: Mapping[str, Any]) -> None:
        ours = self.model.state_dict()
        names = {name.removeprefix("module.") for name in weights}
        if not names & set(ours):
            raise NucleiError(
                f"{path} holds no tensor of this model (it has {next(iter(names), 'nothing')} ...);"
                " check MODEL.WEIGHTS and --config-file"
            )

    def _check_all_match(self, path: str, weights: Mapping[str, Any]) -> None:
        ours = {name: tuple(value.shape) for name, value in self.model.state_dict().items()}
        theirs = {
            name.removeprefix("module."): tuple(value.shape) for name, value in weights.items()
        }
        wrong = sorted(name for name in ours if theirs.get(name) != ours[name])
        unknown = sorted(set(theirs) - set(ours))
        if wrong or unknown:
            name = (wrong or unknown)[0]
            raise NucleiError(
                f"{path} does not fit this config: {len(wrong)} tensors missing or of another "
                f"shape, {len(unknown)} unknown (first: {name}, {theirs.get(name)} in the file, "
                f"{ours.get(name)} in the model); use the config.yaml of its training"
            )


def _is_pickle(name: str) -> bool:
    return name.endswith(".pkl")


def read_weights(path: str) -> Mapping[str, torch.Tensor]:
    """The model's state dict in the ``.pth`` file ``path``, memory-mapped, without running code.

    Raises:
        NucleiError: not a readable checkpoint.
    """
    try:
        data = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except _LOAD_ERRORS as error:
        raise NucleiError(f"cannot read the checkpoint {path}: {_first_line(error)}") from error
    weights = data.get("model", data) if isinstance(data, Mapping) else data
    if not _is_state_dict(weights):
        raise NucleiError(
            f'cannot read the checkpoint {path}: it is no state dict, nor has it one under "model"'
        )
    return weights


def _is_state_dict(weights: Any) -> bool:
    return isinstance(weights, Mapping) and all(map(torch.is_tensor, weights.values()))


def _save_or_os_error(data: dict[str, Any], path: Path) -> None:
    """``torch.save`` that reports a full disk as the OSError it is."""
    try:
        torch.save(data, path)
    except RuntimeError as error:
        raise OSError(_first_line(error)) from error


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__

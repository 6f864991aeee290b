"""Many processes, on one machine or several, share the items of one folder.

Nothing but the file system they have in common is needed. An item is done when its record lies in
the folder; whoever works on it holds a claim, a file that is touched every few seconds. The claim
of a process that was lost stops being touched, and another process takes the item over.
"""

import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from detectron2.utils import comm

from nuclei_d2.utils.errors import NucleiError
from nuclei_d2.utils.files import write_json

HEARTBEAT = 10.0  # seconds between two touches of a claim
LOST_AFTER = 180.0  # seconds without one after which the owner counts as lost
_ENVIRONMENT = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}


class SharedWork:
    """The state of every item of one folder.

    ``records/<name>.json`` says that an item is done, ``failures/<name>.json`` that it cannot be,
    ``claims/<name>.<n>`` that a process works on it. Claim n + 1 can be made, by one process only,
    once the owner of claim n is lost. An owner that was only away, and comes back, knows its claim
    by a token, and leaves alone one of the same name that another process has made since.
    """

    def __init__(self, folder: str | os.PathLike, lost_after: float = LOST_AFTER):
        """
        Args:
            folder: is made if it is not there.
            lost_after: seconds; a process of this machine that has ended is lost at once.

        Raises:
            NucleiError: the folder cannot be made.
        """
        self.folder = Path(folder)
        self.lost_after = lost_after
        self.started = time.time()
        try:
            for kind in ("records", "failures", "claims"):
                (self.folder / kind).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise NucleiError(f"cannot write {folder}: {error.strerror or error}") from error

    def record_path(self, name: str) -> Path:
        """Of an item that is done; it exists from then on."""
        return self.folder / "records" / f"{name}.json"

    def failure_path(self, name: str) -> Path:
        """Of an item that failed."""
        return self.folder / "failures" / f"{name}.json"

    def finished(self) -> set[str]:
        """Names of all items with a record, or with a failure of this run."""
        return self._names("records") | {
            name for name in self._names("failures") if self._has_failed(name)
        }

    def _names(self, kind: str) -> set[str]:
        with os.scandir(self.folder / kind) as entries:
            return {e.name[:-5] for e in entries if e.name.endswith(".json") and e.name[0] != "."}

    def is_finished(self, name: str) -> bool:
        """Whether the item is done, or has failed since this process started."""
        return self.record_path(name).exists() or self._has_failed(name)

    def _has_failed(self, name: str) -> bool:
        """An older failure does not count: the cause may be gone."""
        try:
            return self.failure_path(name).stat().st_mtime >= self.started
        except FileNotFoundError:
            return False

    def record(self, name: str, content: dict[str, Any]) -> None:
        """Say that the item is done."""
        write_json(self.record_path(name), content, durable=True)
        with suppress(FileNotFoundError):
            self.failure_path(name).unlink()

    def fail(self, name: str, content: dict[str, Any]) -> None:
        """Say why the item cannot be done."""
        write_json(self.failure_path(name), content)

    def todo(self, names: Sequence[str], first: int = 0) -> Iterator[str]:
        """Claim one item after the other until all are finished, by this process or by others.

        The claim is held while the caller works on the item, that is until it asks for the next
        one; by then the item must have a record or a failure. At the end this waits for the items
        of other processes, and takes over those of lost ones.

        Args:
            names: of all items.
            first: index at which this process begins; processes that begin at different places
                rarely ask for the same item.
        """
        done = self.finished()
        waiting = [n for n in (*names[first:], *names[:first]) if n not in done]
        while waiting:
            busy = []
            for name in waiting:
                if self.is_finished(name):
                    continue
                with self.claim(name) as ours:
                    if ours and not self.is_finished(name):
                        yield name
                    elif not ours:
                        busy.append(name)
            if len(busy) == len(waiting):
                time.sleep(min(1.0, self.lost_after / 10))
            waiting = busy
        self._sweep()

    def _sweep(self) -> None:
        """Remove what processes that were lost have left of items that are finished."""
        for claim in (self.folder / "claims").iterdir():
            if self.is_finished(claim.name.rpartition(".")[0]):
                claim.unlink(missing_ok=True)
        for half in (self.folder / "records").glob(".*.tmp.json"):  # as atomic_path calls it
            if self.is_finished(half.name[1:].rsplit(".", 3)[0]):
                half.unlink(missing_ok=True)

    @contextmanager
    def claim(self, name: str) -> Iterator[bool]:
        """Hold the item's claim for the length of the block; False if another process does."""
        numbers = self._claims(name)
        latest = max(numbers, default=-1)
        path = self._claim_path(name, latest + 1)
        owner = f"{_machine()} {os.getpid()} {secrets.token_hex(8)}"
        is_free = not numbers or self._is_lost(self._claim_path(name, latest))
        if not is_free or not _create(path, owner):
            yield False
            return
        stop = threading.Event()
        heart = threading.Thread(target=_beat, args=(path, owner, stop), daemon=True)
        heart.start()
        try:
            yield True
        finally:
            stop.set()
            heart.join()
            if _is_owner(path, owner):
                for number in (*sorted(numbers), latest + 1):  # ours last: it guards the others
                    self._claim_path(name, number).unlink(missing_ok=True)

    def _claim_path(self, name: str, number: int) -> Path:
        return self.folder / "claims" / f"{name}.{number}"

    def _claims(self, name: str) -> list[int]:
        parts = (path.name.rpartition(".") for path in (self.folder / "claims").iterdir())
        return [int(number) for owner, _, number in parts if owner == name]

    def _is_lost(self, claim: Path) -> bool:
        try:
            silence = time.time() - claim.stat().st_mtime
            machine, pid, _ = claim.read_text().split()
        except FileNotFoundError:  # just released
            return False
        except ValueError:  # just created
            return silence > self.lost_after
        has_ended = machine == _machine() and not _is_running(int(pid))
        return has_ended or silence > self.lost_after


def _create(path: Path, owner: str) -> bool:
    """Make a claim; False if it exists. Exclusive creation is atomic, on NFS too."""
    try:
        with path.open("x") as file:
            file.write(owner)
    except FileExistsError:
        return False
    except OSError as error:
        raise NucleiError(f"cannot write {path}: {error.strerror or error}") from error
    return True


def _is_owner(path: Path, owner: str) -> bool:
    """Whether a claim is there, and this owner's."""
    try:
        return path.read_text() == owner
    except FileNotFoundError:
        return False


def _beat(path: Path, owner: str, stop: threading.Event) -> None:
    while not stop.wait(HEARTBEAT):
        with suppress(OSError):  # a network drive may be away for a while
            if _is_owner(path, owner):
                os.utime(path)


def _machine() -> str:
    """Where a process number means the same: containers may share a host name."""
    try:
        namespace = Path("/proc/self/ns/pid").stat().st_ino
    except OSError:  # not Linux
        namespace = 0
    return f"{'_'.join(socket.gethostname().split())}:{namespace}"


def _is_running(pid: int) -> bool:
    if os.name != "posix":  # there, signal 0 is no mere question
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


def worker_place() -> tuple[int, int, int]:
    """Rank, world size and rank on this machine; 0, 1, 0 for a process of its own.

    torchrun tells them in the environment, Detectron2's ``launch`` in a process group.
    """
    if "RANK" not in os.environ and comm.get_world_size() > 1:
        return comm.get_rank(), comm.get_world_size(), comm.get_local_rank()
    values = (os.environ.get(name, default) for name, default in _ENVIRONMENT.items())
    return tuple(map(int, values))

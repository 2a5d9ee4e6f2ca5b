"""The state of a run in one file: arrays of model, optimiser and metrics, and the position of the run."""

import contextlib
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..checks import first_line
from ..weights.formats import safetensors
from .run import TrainingError

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None

FILE = "checkpoint.safetensors"
LOCK = ".lock"


def write(folder: str | os.PathLike[str], arrays: dict[str, np.ndarray], state: dict[str, Any]) -> None:
    """Write a checkpoint next to the previous one, then rename it into place.

    Raises:
        TrainingError: It cannot be written; the previous one is kept.
    """
    path = Path(folder) / FILE
    try:
        safetensors.write(str(path), arrays, {"state": json.dumps(state)})
    except OSError as error:
        kept = "the previous one is kept" if path.exists() else "there was none before"
        raise TrainingError(
            f"the checkpoint at step {state['step']} could not be written to {folder} ({error.strerror or error}); {kept}. "
            "Make room and give the same command again"
        ) from error


def read(folder: str | os.PathLike[str]) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
    """Return `(arrays, state)` of the checkpoint in a folder, or None.

    Raises:
        TrainingError: The file is damaged.
    """
    path = Path(folder) / FILE
    if not path.exists():
        return None
    try:
        arrays, metadata = safetensors.read(str(path))
        return arrays, json.loads(metadata["state"])
    except Exception as error:
        raise TrainingError(
            f"{path} cannot be read ({first_line(error)}); remove it to restart, or choose another --out"
        ) from error


def check_folder(folder: str | os.PathLike[str], needed: int) -> None:
    """Make sure that a run can write its results, before it starts.

    Args:
        folder: Made if missing.
        needed: Size of a checkpoint, in bytes.

    Raises:
        TrainingError: Not writable, or too little room for two checkpoints.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable-{os.getpid()}"
        try:
            probe.write_bytes(b"\0")
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        raise TrainingError(f"{folder} cannot be written ({error.strerror or error}); choose another --out") from error
    state = os.statvfs(folder)
    free = state.f_bavail * state.f_frsize
    if free < 2 * needed:
        raise TrainingError(
            f"{folder} has {free / 2**20:.0f} MiB free, two checkpoints take {2 * needed / 2**20:.0f}; "
            "make room, or choose another --out"
        )


@contextlib.contextmanager
def lock(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Lock a folder for one run while the block lasts. The lock is released when its process ends, however that happens.

    Its file stays: were it removed, another process could hold the old one while a third makes and locks a new one.

    Args:
        folder: Folder of the results.

    Raises:
        TrainingError: Another run has it.
    """
    try:
        file = (Path(folder) / LOCK).open("a+b", buffering=0)
    except OSError as error:
        raise TrainingError(f"{Path(folder) / LOCK} cannot be opened ({error.strerror}); choose another --out") from error
    with file:
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            holder = file.read().decode() or "another process"
            raise TrainingError(f"{folder} is in use by a run in progress ({holder}); end it, or choose another --out") from error
        except OSError:
            # Some network file systems keep no locks; a run must be possible there too.
            pass
        # Only for the message above, so a full disk does not matter here.
        with contextlib.suppress(OSError):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield

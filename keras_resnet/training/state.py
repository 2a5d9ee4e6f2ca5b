"""The position of a run, and the folder that keeps it: checkpoint, logs, results."""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import keras
import numpy as np

from . import checkpoint
from .callbacks import Callbacks
from .faults import Diverged
from .learner import Learner
from .logs import TensorBoardLog, curves, replace, write_csv
from .run import Run, TrainingError


@dataclass
class RunState:
    """The position of a run: what a checkpoint holds in addition to arrays.

    Attributes:
        step: Training steps done.
        segment_start: First epoch of the segment that the arrays belong to.
        rows: A dict per epoch that is done.
        seconds: Time spent in training steps and validation.
        ended: Whether a callback has ended the run.
        pending: Row of an epoch whose validation was broken off; it is validated when the run resumes.
        scales: Measured scales of the blocks that have grown, by name.
    """

    step: int = 0
    segment_start: int = 0
    rows: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    ended: bool = False
    pending: dict[str, Any] | None = None
    scales: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Saved:
    """A checkpoint that a run resumes from.

    Args:
        arrays: See `Learner.arrays` and `Callbacks.state`.
        state: Position of the run.
        callbacks: What callbacks remembered; None where they restart.
    """

    arrays: dict[str, np.ndarray]
    state: RunState
    callbacks: dict[str, Any] | None


class Folder:
    """The folder of a run's results; only the chief process writes, and without a path nothing is kept.

    Args:
        path: The folder, or None.
        run: The run.
        fingerprint: Structure of the model and a sample of the data; a checkpoint of another run differs in it.
        chief: Whether this process writes.
    """

    def __init__(self, path: Path | None, run: Run, fingerprint: dict[str, Any], chief: bool) -> None:
        self.path, self.run, self.chief = path, run, chief
        self.identity = json.loads(json.dumps({**run.essence(), **fingerprint}))
        self._board: TensorBoardLog | None = None

    @contextlib.contextmanager
    def lock(self, parameters: int) -> Iterator[None]:
        """Keep the folder for this run while the block lasts.

        Args:
            parameters: Parameters of the model, to check that there is room for checkpoints.
        """
        if self.path is None or not self.chief:
            yield
            return
        checkpoint.check_folder(self.path, 4 * 4 * parameters)
        with checkpoint.lock(self.path):
            yield

    def read(self) -> Saved | None:
        """Return the checkpoint of this run, or None.

        Raises:
            TrainingError: The folder holds another run.
        """
        saved = checkpoint.read(self.path) if self.path is not None else None
        if saved is None:
            return None
        arrays, found = saved
        if "segment_start" not in found:
            raise TrainingError(f"{self.path} holds a checkpoint of version 0.1; choose another --out, or remove it to restart")
        # A run that was saved before an option existed had its default.
        theirs, ours = {**Run().essence(), **found["run"]}, dict(self.identity)
        state = RunState(**{name: found[name] for name in asdict(RunState()) if name in found})
        more_epochs = ours["epochs"] != theirs.get("epochs")
        if more_epochs and ours["epochs"] * found["steps_per_epoch"] >= state.step:
            # The schedule and its epochs follow the new length; what was learned stays.
            for key in ("epochs", "warmup_epochs", "milestones"):
                ours.pop(key, None), theirs.pop(key, None)
        if differ := sorted(key for key in ours if theirs.get(key) != ours[key]):
            what = ", ".join(f"{key} {theirs.get(key)!r} there, {ours[key]!r} here" for key in differ[:3])
            raise TrainingError(f"{self.path} holds another run ({what}); choose another --out, or remove it")
        if more_epochs:
            # An epoch that a callback broke off is not completed.
            state.step = -(-state.step // found["steps_per_epoch"]) * found["steps_per_epoch"]
            state.ended = False
        return Saved(arrays, state, None if more_epochs else found["callbacks"])

    def open(self, state: RunState) -> None:
        """Write the description of the run, and the logs of what is done."""
        if self.path is None or not self.chief:
            return
        try:
            self.run.save(self.path / "run.yaml")
        except OSError as error:
            raise TrainingError(f"{self.path} cannot be written ({error.strerror or error}); choose another --out") from error
        write_csv(state.rows, self.path / "log.csv")
        if self.run.tensorboard:
            self._board = TensorBoardLog(self.path / "tensorboard", state.rows)

    def save(self, state: RunState, learner: Learner, callbacks: Callbacks, steps_per_epoch: int) -> None:
        """Write the checkpoint; every process must call it, the chief writes.

        Raises:
            Diverged: Weights are not finite; the previous checkpoint is kept.
            TrainingError: It cannot be written; the previous one is kept.
        """
        if self.path is None:
            return
        learner.average_statistics()
        arrays = learner.arrays()
        if not all(np.isfinite(a).all() for name, a in arrays.items() if name.startswith("model/") and a.dtype.kind == "f"):
            raise Diverged(f"weights are not finite at step {state.step}; {self.last_good()}")
        if self.chief:
            remembered, more = callbacks.state()
            told = {**asdict(state), "run": self.identity, "callbacks": remembered, "steps_per_epoch": steps_per_epoch}
            checkpoint.write(self.path, arrays | more, told)

    def last_good(self) -> str:
        """Return what to say about the last checkpoint when a run has diverged."""
        saved = checkpoint.read(self.path) if self.path is not None else None
        kept = f"the weights of step {saved[1]['step']} are kept in {self.path}" if saved else "no checkpoint was written yet"
        return f"{kept}; lower the learning rate or clip the gradient (clip_norm)"

    def add_epoch(self, rows: list[dict[str, Any]]) -> None:
        """Write the logs after an epoch, whose row is the last."""
        if self.path is None or not self.chief:
            return
        write_csv(rows, self.path / "log.csv")
        if self._board:
            self._board.add(rows[-1])

    def finished(self, saved: Saved | None, total: int) -> tuple[keras.Model, dict[str, Any]] | None:
        """Return the model and the summary that this run has written, if it is over; they are never measured or written twice.

        Args:
            saved: The checkpoint.
            total: Steps of the whole run.
        """
        if saved is None or saved.state.pending or not (saved.state.ended or saved.state.step == total):
            return None
        try:
            summary = json.loads((self.path / "summary.json").read_text())
            if summary["steps"] == saved.state.step:
                return keras.saving.load_model(self.path / "model.keras", compile=False), summary
        except Exception:  # Whatever is missing or cannot be read is made again from the checkpoint.
            return None
        return None

    def write_results(self, model: keras.Model, rows: list[dict[str, Any]], summary: dict[str, Any]) -> None:
        """Write the trained model, its figures and their picture."""
        if self.path is None or not self.chief:
            return
        replace(self.path / "model.keras", lambda path: model.save(path))
        replace(self.path / "summary.json", lambda path: path.write_text(json.dumps(summary) + "\n"))
        with contextlib.suppress(ImportError):
            title = f"{model.name} on {Path(summary['data']).name}"
            replace(self.path / "curves.png", lambda path: curves(rows, path, title))

"""What can end a run, as messages: a signal, a loss that is not finite, a lost worker, a damaged image."""

import contextlib
import os
import re
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import tensorflow as tf

from .. import data as datasets
from . import checkpoint
from .run import TrainingError


class Interrupted(TrainingError):
    """The run was asked to stop (SIGTERM), has saved and can be resumed."""

    exit_code = 143


class Diverged(TrainingError):
    """The loss is not a finite number any more."""

    exit_code = 1


class WorkerLost(TrainingError):
    """Another process of the run is gone."""

    exit_code = 1


class StopRequest:
    """Whether this process was asked to stop by SIGTERM: the step in progress ends, and the run saves and stops.

    Attributes:
        asked: Whether it was.
    """

    def __init__(self) -> None:
        self.asked = False

    @contextlib.contextmanager
    def listening(self) -> Iterator["StopRequest"]:
        """Listen for SIGTERM while the block lasts, where Python allows handlers (in the main thread)."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return

        def ask(*_: object) -> None:
            self.asked = True

        former = signal.signal(signal.SIGTERM, ask)
        try:
            yield self
        finally:
            signal.signal(signal.SIGTERM, former)


# What collective operations end with when a peer does not answer any more.
LOST = (
    tf.errors.UnavailableError,
    tf.errors.AbortedError,
    tf.errors.DeadlineExceededError,
    tf.errors.CancelledError,
    tf.errors.InternalError,
)


@contextlib.contextmanager
def errors_of(out: str | os.PathLike[str] | None, multi_worker: bool, source: datasets.Source | None = None) -> Iterator[None]:
    """Turn TensorFlow's errors into messages: a lost worker, images that cannot be read.

    Args:
        out: Folder of the run, or None.
        multi_worker: Whether there are other processes.
        source: Data set, to look for the damaged image in.
    """
    try:
        yield
    except LOST as error:
        if not multi_worker:
            raise
        saved = checkpoint.read(out) if out is not None else None
        where = f"the checkpoint of step {saved[1]['step']} is in {out}" if saved else "there is no checkpoint yet"
        raise WorkerLost(f"another worker is gone; {where}. Start the same command on all workers again") from error
    except (tf.errors.InvalidArgumentError, tf.errors.DataLossError, tf.errors.NotFoundError) as error:
        raise _data_error(source, error) from error


# What TensorFlow and Keras put around the reason of an error.
NOISE = re.compile(
    r"\{\{[^}]*\}\}|\[Op:[^\]]*\]|\[\[.*?\]\]|Exception encountered when calling [^\n]*\n|Graph execution error:"
    r"|Detected at node [^\n]*\n?|<stack traces unavailable>|\d+ root error\(s\) found\.|\n\s*\(1\) [\s\S]*|\(0\) [A-Z_]+:"
    r"|(?m:^\s*File \"[^\"\n]*\", line \d+, in [^\n]*$)"  # Where a node of the graph was made.
    r"|Arguments received by [\s\S]*|\bDefined at \(most recent call last\):[\s\S]*|\x1b\[[0-9;]*m"
)
LONGEST = 400


def step_error(error: Exception) -> Exception:
    """Return what an error inside a training step means for the user; errors of image pipelines pass, see `errors_of`.

    Args:
        error: As TensorFlow or Keras raised it.
    """
    if isinstance(error, tf.errors.OpError) and "Decode" in str(error):
        return TrainingError(brief(error))
    return TrainingError(f"the model, its loss or its metrics do not take a batch of the data: {brief(error)}")


def brief(error: Exception) -> str:
    """Return the reason in an error of TensorFlow or Keras, in a line of bounded length."""
    text = " ".join(NOISE.sub("", str(error)).split()).rstrip(".") or type(error).__name__
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} …"


def _data_error(source: datasets.Source | None, error: Exception) -> TrainingError:
    """The damaged image that made an error of the input pipeline, if there is one, else the error."""
    from ..data.corrupt import reason_against
    from ..data.sources import shard_names
    from ..data.tfrecord import damaged_records

    for name in ("train", "validation", "test"):
        split = getattr(source, name, None)
        if isinstance(split, datasets.Encoded):
            for path in split.paths:
                if reason := reason_against(path, split.channels):
                    return TrainingError(
                        f"{path} cannot be decoded any more ({reason}); repair or remove it, and give the same command again"
                    )
        if isinstance(split, datasets.Records) and (folder := Path(source.name)).is_dir():
            for _, shard, reason in damaged_records(folder, shard_names(folder).get(name, name)):
                return TrainingError(f"{shard} is damaged ({reason}); write the shards again")
    return TrainingError(brief(error))

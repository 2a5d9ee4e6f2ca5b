"""The training loop: from the first segment of a run to its results, top to bottom."""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from .callbacks import Callbacks
from .faults import Diverged, Interrupted, StopRequest, step_error
from .feeds import Evaluation, Feed
from .learner import Learner
from .logs import Progress
from .optimizers import last_learning_rate
from .run import Run, TrainingError
from .segments import Segment, segments
from .state import Folder, RunState, Saved
from .steps import Steps
from .strategies import Placement


@dataclass(frozen=True, eq=False)
class Result:
    """What a training returns.

    Args:
        model: The trained model, uncompiled.
        history: A dict per epoch (the columns of `log.csv`).
        summary: Figures of the whole run.
    """

    model: keras.Model
    history: list[dict[str, Any]]
    summary: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"history": self.history, "summary": self.summary}


@dataclass(eq=False)
class Session:
    """One run in progress: what takes part in it.

    Args:
        run: The run.
        placement: Where its replicas are.
        learner: The model with its optimiser.
        feed: The data.
        callbacks: The user's callbacks.
        folder: Where results go.
        progress: What a person sees.
        stop: Whether the process was asked to stop.
        state: Position of the run.
    """

    run: Run
    placement: Placement
    learner: Learner
    feed: Feed
    callbacks: Callbacks
    folder: Folder
    progress: Progress
    stop: StopRequest
    state: RunState

    @property
    def total(self) -> int:
        """Steps of the whole run."""
        return self.run.epochs * self.feed.steps

    def save(self) -> None:
        """Write the checkpoint."""
        self.folder.save(self.state, self.learner, self.callbacks, self.feed.steps)


def train(session: Session, saved: Saved | None) -> Result:
    """Train from the position of the run to its end.

    Args:
        session: The run.
        saved: The checkpoint that it resumes from, or None.
    """
    state, learner, callbacks = session.state, session.learner, session.callbacks
    begun, logs = False, None
    for segment in segments(session.run):
        # What the checkpoint's model grew by was measured then.
        sample = None if saved else session.feed.sample
        if saved and segment.end <= state.segment_start:
            learner.grow(segment, sample)
            continue
        if begun and state.ended:
            break
        previous = learner.model if begun else None
        for line in learner.enter(segment, sample):
            session.progress.line(line)
        _build(session)
        session.feed.check(learner.model, segment)
        state.segment_start = segment.start
        if saved:
            learner.restore(saved.arrays)
        if not begun:
            for line in callbacks.begin(learner.model, saved.callbacks if saved else None, saved.arrays if saved else None):
                session.progress.line(line)
            begun = True
        callbacks.enter(segment, learner.model, previous)
        logs = _segment(session, segment, saved) or logs
        callbacks.leave(logs)
        saved = None
    return _finish(session, logs)


def _segment(session: Session, segment: Segment, saved: Saved | None) -> dict[str, Any] | None:
    """Train the epochs of a segment that are left; a validation that was broken off comes first."""
    state, logs = session.state, None
    if state.pending is not None:
        logs = _validate_pending(session)
    while state.step < segment.end * session.feed.steps and not state.ended:
        logs = _epoch(session, segment, saved)
        saved = None
    return logs


def _epoch(session: Session, segment: Segment, saved: Saved | None) -> dict[str, Any]:
    """Train one epoch, or what is left of it, and validate."""
    state, learner, callbacks, feed = session.state, session.learner, session.callbacks, session.feed
    epoch, done = divmod(state.step, feed.steps)
    clock, spent_before, first = time.perf_counter(), state.seconds, state.step
    learner.steps.reset()
    if saved and done:
        learner.restore_metrics(saved.arrays)
    callbacks.notify("on_epoch_begin", epoch)
    iterator = feed.iterator(state.step, segment)
    watch = _StepWatch(session, first, clock)
    for batch in range(done, feed.steps, learner.steps.per_call):
        callbacks.notify("on_train_batch_begin", batch)
        logs = _next(session, iterator)
        state.step += learner.steps.per_call
        state.seconds = spent_before + time.perf_counter() - clock
        callbacks.notify("on_train_batch_end", batch + learner.steps.per_call - 1, _shown(logs))
        watch.after_step(logs)
        if learner.model.stop_training:
            break
    feed.end_epoch()
    logs = learner.steps.metrics()
    learner.average_statistics()
    with learner.averages():
        is_due = feed.validation is not None and feed.validation.is_due(epoch + 1)
        validation = _validate(session, feed.validation if is_due else None, callbacks)
        if validation:
            logs |= {f"val_{name}": value for name, value in validation.items()}
        elapsed = time.perf_counter() - clock
        state.seconds = spent_before + elapsed
        row = _row(session, epoch, state.step - first, elapsed, logs)
        if validation is BROKEN:
            state.pending = row
        else:
            callbacks.notify("on_epoch_end", epoch, dict(logs))
    if validation is BROKEN:
        session.save()
        raise _interrupted(session)
    _end_epoch(session, row)
    return logs


def _end_epoch(session: Session, row: dict[str, Any]) -> None:
    """An epoch is done: keep its row, save, write the logs, and stop where somebody wants to."""
    state = session.state
    state.rows.append(row)
    state.pending = None
    state.ended = bool(session.learner.model.stop_training)
    session.save()
    session.folder.add_epoch(state.rows)
    session.progress.epoch(row, session.run.epochs)
    asked = session.placement.any(session.stop.asked)
    if asked and not state.ended and state.step < session.total:
        raise _interrupted(session)


def _build(session: Session) -> None:
    """Create the state of losses and metrics, which shows whether model, loss and data fit together."""
    try:
        session.learner.steps.build(session.feed.spec)
    except (ValueError, TypeError, RuntimeError) as error:
        raise step_error(error) from error


def _next(session: Session, iterator: Iterator) -> dict:
    """The logs of the next training steps."""
    try:
        return session.learner.steps.train(iterator)
    except (ValueError, TypeError) as error:
        raise step_error(error) from error
    except (StopIteration, tf.errors.OutOfRangeError) as error:
        step = session.state.step
        raise TrainingError(
            f"the data ended early, at step {step} of {session.total}; are images or records missing, or is `steps_per_epoch` "
            "too large?"
        ) from error


class _StepWatch:
    """Looks after the steps of an epoch: faults, progress, checkpoints, the wish to stop."""

    def __init__(self, session: Session, first: int, clock: float) -> None:
        self.session, self.first, self.clock, self.since_save = session, first, clock, first
        # Reading the loss waits for the device; on a CPU nothing is gained by not waiting.
        self.check_every = 1 if not tf.config.list_physical_devices("GPU") else 20

    def after_step(self, logs: dict) -> None:
        """Raises `Diverged` or `Interrupted` where the run cannot or shall not continue."""
        session, state = self.session, self.session.state
        steps = session.feed.steps
        if state.step // session.learner.steps.per_call % self.check_every == 0 or state.step % steps == 0:
            loss = float(logs["loss"])
            if not math.isfinite(loss):
                finite = session.learner.steps.finite_steps()
                step = (state.step - 1) // steps * steps + finite + 1
                raise Diverged(f"the loss is not finite at step {step}; {session.folder.last_good()}")
            if session.progress.due():
                speed = (state.step - self.first) * session.feed.batch / max(time.perf_counter() - self.clock, 1e-9)
                session.progress.step(state.step, _shown(logs), last_learning_rate(session.learner.optimizer), speed)
        if state.step % steps == 0:
            return
        asked = _asked(session, logs)
        if session.feed.resumes_anywhere and (asked or state.step - self.since_save >= session.run.save_every):
            session.save()
            self.since_save = state.step
        if asked:
            raise _interrupted(session)


# ------------------------------------------------------------ validation

BROKEN: dict[str, Any] = {}


def _validate(
    session: Session, evaluation: Evaluation | None, callbacks: Callbacks, steps: Steps | None = None
) -> dict[str, Any] | None:
    """Loss and metrics of an evaluation; `BROKEN` if the run was asked to stop meanwhile, None if there is nothing to measure."""
    if evaluation is None:
        return None
    steps = steps or session.learner.steps
    steps.reset()
    callbacks.notify("on_test_begin")
    broken = False
    for batch, iterator in evaluation.batches():
        callbacks.notify("on_test_batch_begin", batch)
        try:
            logs = steps.evaluate(iterator)
        except (ValueError, TypeError) as error:
            raise step_error(error) from error
        except (StopIteration, tf.errors.OutOfRangeError):
            break
        callbacks.notify("on_test_batch_end", batch, _shown(logs))
        if _asked(session, logs):
            broken = True
            break
    found = steps.metrics()
    callbacks.notify("on_test_end", found)
    return BROKEN if broken else found


def _validate_pending(session: Session) -> dict[str, Any]:
    """Measure what a broken validation left out, and end its epoch for the callbacks too."""
    state, learner = session.state, session.learner
    row = state.pending
    figures = [name for name in row if name not in NOT_FIGURES]
    logs = {name: row[name] for name in figures}
    with learner.averages():
        validation = _validate(session, session.feed.validation, session.callbacks)
        if validation is BROKEN:
            session.save()
        else:
            logs |= {f"val_{name}": value for name, value in validation.items()}
            session.callbacks.notify("on_epoch_end", row["epoch"] - 1, dict(logs))
    if validation is BROKEN:
        raise _interrupted(session)
    _end_epoch(session, row | _rounded(logs))
    return logs


# ------------------------------------------------------------ results


def _finish(session: Session, logs: dict[str, Any] | None) -> Result:
    """Make the averages the weights, end the callbacks, and measure and write the result."""
    state, learner, run, rows = session.state, session.learner, session.run, session.state.rows
    learner.swap_averages()
    learner.finalize()
    session.callbacks.end(logs)
    summary = {
        "model": learner.model.name, "data": session.feed.name, "recipe": run.recipe, "seed": run.seed,
        "epochs": len(rows), "steps": state.step, "parameters": learner.model.count_params(), "loss": rows[-1]["loss"],
        **({"train_accuracy": rows[-1]["accuracy"]} if "accuracy" in rows[-1] else {}),
        "seconds": round(state.seconds, 1), **session.feed.facts,
    }  # fmt: skip
    for name, evaluation in session.feed.final.items():
        found = _validate(session, evaluation, Callbacks([], {}))
        if found is BROKEN:
            raise _interrupted(session)
        summary |= {f"{name}_{key}": value for key, value in sorted(_rounded(found).items())}
        if run.tta != "none":
            found = _validate(session, evaluation, Callbacks([], {}), learner.steps_on_views(run.tta))
            if found is BROKEN:
                raise _interrupted(session)
            summary |= {f"{name}_{key}_tta": value for key, value in sorted(_rounded(found).items())}
    model = session.feed.label(learner.finished())
    session.folder.write_results(model, rows, summary)
    return Result(model, rows, summary)


# ------------------------------------------------------------ small parts

# Columns of a row that are neither losses nor metrics.
NOT_FIGURES = ("epoch", "step", "learning_rate", "images_per_second", "seconds")


def _row(session: Session, epoch: int, seen: int, elapsed: float, logs: dict[str, Any]) -> dict[str, Any]:
    """The row of an epoch in the log."""
    return {
        "epoch": epoch + 1, "step": session.state.step, **_rounded(logs),
        "learning_rate": float(f"{last_learning_rate(session.learner.optimizer):.6g}"),
        "images_per_second": round(seen * session.feed.batch / elapsed, 1),
        "seconds": round(elapsed, 2),
    }  # fmt: skip


def _rounded(logs: dict[str, Any]) -> dict[str, float]:
    """Figures for the log: a metric with several values, such as F1 per class, becomes several."""
    found = {}
    for name, value in logs.items():
        values = np.ravel(value)
        names = [name] if values.size == 1 else [f"{name}_{i}" for i in range(values.size)]
        found |= {key: round(float(number), 6) for key, number in zip(names, values, strict=True)}
    return found


def _shown(logs: dict) -> dict:
    """Logs as callbacks see them."""
    return {name: value for name, value in logs.items() if name != "stop"}


def _asked(session: Session, logs: dict) -> bool:
    """Whether any process was asked to stop before the step that gave `logs`; the same answer in all of them."""
    if not session.placement.multi_worker:
        return session.stop.asked
    if session.stop.asked:
        session.learner.steps.ask_to_stop()
    return float(logs["stop"]) > 0


def _interrupted(session: Session) -> Interrupted:
    state, steps = session.state, session.feed.steps
    where = f" in {session.folder.path}; the same command resumes from there" if session.folder.path is not None else ""
    if state.step % steps and not session.feed.resumes_anywhere:
        return Interrupted(f"stopped as asked in epoch {state.step // steps + 1}; the epochs before it are saved{where}")
    return Interrupted(f"stopped as asked, saved at step {state.step} of {session.total}{where}")

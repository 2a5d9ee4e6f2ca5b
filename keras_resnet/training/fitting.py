"""`fit`: train any model with its data, as Keras' `fit` does, and more: growth, resuming, several machines."""

import dataclasses
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from .. import data as datasets
from ..graphs import graph_of
from ..growth import grow
from .callbacks import CallbackLike, Callbacks, check_callbacks
from .faults import StopRequest, errors_of
from .feeds import Feed, ImageFeed
from .learner import Learner
from .logs import Progress
from .loop import Result, Session, train
from .run import Run, TrainingError
from .schedules import make_schedule, scaled_rate
from .state import Folder, RunState, Saved
from .strategies import Placement, place
from .tasks import Task, classification

# Options of a run that `train` needs to make or load its model; `fit` is given one.
MADE_BY_TRAIN = {"model", "model_options", "weights", "data", "image_size", "drop_path", "precision"}


def fit(
    model: keras.Model,
    data: Any,
    *,
    run: Run | None = None,
    out: str | os.PathLike[str] | None = None,
    callbacks: Iterable[CallbackLike] = (),
    placement: Placement | None = None,
    quiet: bool = False,
    **options: Any,
) -> Result:
    """Train a model; differs from `Model.fit` by growing, unfreezing, resuming after a kill, and running on several machines.

    Args:
        model: Functional or Sequential model: images 0–255 in, logits out. It is not changed; the result has a trained copy.
        data: see `keras_resnet.data.load`; or a tuple `(images, labels)` of arrays, or `((x, y), (x_test, y_test))`.
        run: `Run`; its `model` is ignored. None: made of `options`.
        out: folder for checkpoint, logs and model; a run that was broken off there resumes. None keeps nothing.
        callbacks: Keras callbacks, or functions `callback(segment, model)` that return one (or None) when a segment begins.
        placement: `Placement`; None places the run by its options.
        quiet: print nothing.
        **options: fields of `Run`, e.g. `epochs=3, recipe="finetune-grown", growth=[(2, "stage*", 1)]`.

    Returns:
        `Result`.

    Raises:
        TrainingError: see its subclasses; the message says what to do.
    """
    if theirs := sorted(set(options) & MADE_BY_TRAIN):
        raise TrainingError(f"`{theirs[0]}` decides how `train` makes a model; build the model so, and leave it out here")
    run = Run.of(**options) if run is None else dataclasses.replace(run, **options)
    placement = placement or place(run, quiet)
    source = _checked(as_source, data, run)
    run = dataclasses.replace(run, model=model.name, data=source.name)
    return run_training(model, source, run, placement, out, callbacks, quiet)


def run_training(
    model: keras.Model,
    source: datasets.Source,
    run: Run,
    placement: Placement,
    out: str | os.PathLike[str] | None = None,
    callbacks: Iterable[CallbackLike] = (),
    quiet: bool = False,
) -> Result:
    """What `fit` and `train` share, once model, data and placement are there."""
    _check_graph(model)
    _seed(run)
    with errors_of(out, placement.multi_worker, source):
        feed = ImageFeed(source, model, run, placement)
        task = classification(model, len(source.classes), run.loss)
        return start(model, feed, task, run, placement, out, list(callbacks), quiet)


def start(
    model: keras.Model,
    feed: Feed,
    task: Task,
    run: Run,
    placement: Placement,
    out: str | os.PathLike[str] | None,
    callbacks: list[CallbackLike],
    quiet: bool,
    optimizer: keras.optimizers.Optimizer | None = None,
) -> Result:
    """Check everything, look for a checkpoint, then train."""
    schedule = make_schedule(run, feed.steps)
    check_callbacks(callbacks, not isinstance(schedule, float), run.schedule, bool(run.ema))
    _check_growth(model, run)
    folder = Folder(None if out is None else Path(out), run, {**structure(model), **feed.fingerprint}, placement.chief)
    with StopRequest().listening() as stop, folder.lock(model.count_params()):
        saved = folder.read()
        if finished := folder.finished(saved, run.epochs * feed.steps):
            return Result(finished[0], saved.state.rows, finished[1])
        state = saved.state if saved else RunState()
        _check_shared_folder(folder, placement, state)
        folder.open(state)
        per_call = _steps_per_call(run, feed.steps, state.step)
        learner = Learner(model, run, placement, task, schedule, optimizer=optimizer, per_call=per_call)
        progress = Progress(run.epochs * feed.steps, feed.steps, feed.batch, quiet or not placement.chief)
        told = Callbacks(callbacks, {"epochs": run.epochs, "steps": feed.steps, "verbose": 0})
        session = Session(run, placement, learner, feed, told, folder, progress, stop, state)
        with progress:
            for line in _announcement(session, task, saved, optimizer):
                progress.line(line)
            return train(session, saved)


def as_source(data: Any, run: Run) -> datasets.Source:
    """The data set that `data` of `fit` stands for."""
    if isinstance(data, tuple):
        if len(data) != 2:
            raise TrainingError("`data` as a tuple is (images, labels) or ((images, labels), (test images, test labels))")
        pairs = data if isinstance(data[0], tuple) else (data, None)
        train, test = (None if pair is None else datasets.Images(np.asarray(pair[0]), np.asarray(pair[1])) for pair in pairs)
        classes = tuple(map(str, range(1 + int(max(split.labels.max() for split in (train, test) if split)))))
        return datasets.Source("arrays", train, test, classes, train.images.shape[1:3], {"mean": 0.5, "std": 0.25})
    return datasets.load(data, run.data_path, corrupt=run.corrupt, cache=run.cache)


def structure(model: keras.Model) -> dict[str, Any]:
    """What a run's model must agree on with its checkpoint: its layout, not the values that the checkpoint replaces."""
    shapes = [(variable.path.rsplit("/", 1)[-1], tuple(variable.shape), str(variable.dtype)) for variable in model.weights]
    import zlib

    return {"parameters": model.count_params(), "layout": zlib.crc32(repr(shapes).encode())}


def _announcement(session: Session, task: Task, saved: Saved | None, optimizer: keras.optimizers.Optimizer | None) -> list[str]:
    run, placement, feed, learner = session.run, session.placement, session.feed, session.learner
    per_replica = feed.batch // placement.replicas
    rate = f"learning rate {run.learning_rate:g} × {run.batch_size}/{run.base_batch} = {scaled_rate(run):g}, {run.schedule}"
    lines = [
        f"{learner.model.name}: {learner.model.count_params():,} parameters" + (f"; {task.note}" if task.note else ""),
        *feed.describe(),
        f"{placement.describe()}; global batch {feed.batch}, {per_replica} per replica"
        + (", synchronised batch norm" if learner.synchronised else ""),
        f"{run.epochs} epochs of {feed.steps} steps; "
        + (f"{run.optimizer}, {rate}" if optimizer is None else type(optimizer).__name__),
    ]
    if placement.replicas > 1 and feed.resumes_anywhere:
        lines.append("each process reads its own part of every global batch (auto-shard off)")
    if learner.steps_per_call != run.steps_per_execution:
        lines.append(f"steps per execution {learner.steps_per_call}: a divisor of the {feed.steps} steps of an epoch")
    if saved:
        lines.append(f"resuming from step {session.state.step} of {session.total}")
    return lines


def _check_graph(model: keras.Model) -> None:
    if graph_of(model) is None:
        raise TrainingError(f"model {model.name!r} has no graph that can be read; give a Functional or a built Sequential model")


def _seed(run: Run) -> None:
    if run.deterministic:
        keras.utils.set_random_seed(run.seed)
        tf.config.experimental.enable_op_determinism()


def _check_shared_folder(folder: Folder, placement: Placement, state: RunState) -> None:
    """All workers must see the same checkpoint."""
    if folder.path is not None and placement.multi_worker and placement.sum(float(state.step)) != state.step * placement.replicas:
        raise TrainingError(f"{folder.path} is not the same folder for all workers; --out must be one that all of them see")


def _check_growth(model: keras.Model, run: Run) -> None:
    """Grow a copy as the run will, so that a missing insertion point is found before the first epoch."""
    for _, after, blocks in sorted(run.growth, key=lambda event: event[0]):
        model = _checked(grow, model, after, blocks=blocks, block=run.growth_block, gate=run.growth_gate)


def _steps_per_call(run: Run, steps: int, done: int) -> int:
    """The largest number of steps per call, up to the one asked for, that divides an epoch and what is left of a broken one."""
    left = steps - done % steps
    return next(d for d in range(min(steps, run.steps_per_execution), 0, -1) if steps % d == 0 and left % d == 0)


def _checked(function: Any, *args: Any, **kwargs: Any) -> Any:
    """Call a function whose ValueErrors are messages for the user."""
    try:
        return function(*args, **kwargs)
    except ValueError as error:
        raise TrainingError(str(error)) from error

"""`fit`: train any model with its data, as Keras' `fit` does, and more: growth, resuming, several machines."""

import dataclasses
import os
import zlib
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from .. import data as datasets
from ..graphs import graph_of
from ..growth import check_backward, grow
from ..growth.scale import MATCH
from ..modelcard import card, check_labels
from .callbacks import CallbackLike, Callbacks, check_callbacks
from .faults import StopRequest, errors_of
from .feeds import (
    AdapterFeed,
    ArrayFeed,
    Feed,
    ImageFeed,
    as_arrays,
    evaluation_of,
    labels_fit,
    split_arrays,
    takes_any_size,
    weighted_by_class,
)
from .learner import Learner
from .logs import Progress
from .loop import Result, Session, train
from .optimizers import inner_of
from .recipes import RECIPES
from .run import CHOICES, FINE_TUNING, Run, TrainingError
from .schedules import make_schedule, scaled_rate
from .state import Folder, RunState, Saved
from .strategies import Placement, place
from .tasks import Loss, Task, classification, task_of_labels, task_of_spec

# Options of a run that `train` needs to make or load its model; `fit` is given one.
MADE_BY_TRAIN = {"model", "model_options", "weights", "data", "image_size", "drop_path", "precision"}


# Options that change images or labels of a training set; they need images whose range and labels are known.
CHANGES_IMAGES = (
    "crop_padding", "random_area", "flip", "randaugment", "erasing", "mixup", "cutmix", "label_smoothing", "holdout",
    "small_epochs",
)  # fmt: skip


def fit(
    model: keras.Model,
    data: Any,
    y: Any = None,
    *,
    run: Run | None = None,
    out: str | os.PathLike[str] | None = None,
    validation_data: Any = None,
    validation_split: float = 0.0,
    validation_steps: int | None = None,
    validation_batch_size: int | None = None,
    validation_freq: int | Collection[int] = 1,
    steps_per_epoch: int | None = None,
    sample_weight: Any = None,
    class_weight: dict[int, float] | None = None,
    loss: Loss | None = None,
    loss_weights: Any = None,
    metrics: Any = None,
    weighted_metrics: Any = None,
    optimizer: str | keras.optimizers.Optimizer | None = None,
    labels: Sequence[str] | None = None,
    callbacks: CallbackLike | Iterable[CallbackLike] = (),
    placement: Placement | None = None,
    quiet: bool = False,
    **options: Any,
) -> Result:
    """Train a model; differs from `Model.fit` by growing, unfreezing, resuming after a kill, and running on several machines.

    Args:
        model: Functional or Sequential model. It is not changed; the result has a trained copy.
        data: What `Model.fit` takes as `x`: arrays (nested as the model's inputs are), a `tf.data.Dataset`, a
            `keras.utils.PyDataset`, a generator, or a PyTorch `DataLoader`. Or the name or path of a data set of images, see
            `keras_resnet.data.load`. Or a tuple `(images, labels)` or `((x, y), (x_test, y_test))` of arrays.
        y: Labels, where `data` is arrays.
        run: Description of the run; its `model` and `data` are ignored. None makes it of `options`.
        out: Folder for checkpoint, logs and model; a run that was interrupted there resumes. None keeps nothing.
        validation_data: What `Model.fit` takes: arrays `(x, y)` or `(x, y, sample_weight)`, or any other kind of `data`.
        validation_split: Share of the arrays, taken from their end, to validate on instead.
        validation_steps: Batches of a validation; None for all.
        validation_batch_size: Examples per batch of validation arrays; None for as many as in training.
        validation_freq: Number of epochs from one validation to the next, or the epochs to validate after, counted from 1.
        steps_per_epoch: Steps per epoch; None for all examples. Needed where the data do not say how many they are.
        sample_weight: Weight of every example in the loss, where `data` is arrays.
        class_weight: Weight of each class number in the loss; classes that are missing have weight 1.
        loss: As `Model.compile` takes it; or `"softmax"`, `"sigmoid"` or `"auto"`, see `Run`. None is `"auto"`: it is chosen by
            what the model returns and what the labels are.
        loss_weights: As `Model.compile` takes them.
        metrics: As `Model.compile` takes them. None measures the accuracy where `loss` is chosen here.
        weighted_metrics: As `Model.compile` takes them.
        optimizer: A Keras optimiser, of which a copy is used; or a name, see `Run`.
        labels: Class names for the model's card, where `data` does not have them.
        callbacks: Keras callbacks, called as `Model.fit` does; or functions `callback(segment, model)` that return one (or None)
            when a segment of the run begins.
        placement: Where to train; None decides it by the run's options.
        quiet: Print nothing.
        **options: Options of `Run`, e.g. `epochs=3, batch_size=64, growth=[(2, "stage*", 1)]`. Where they say nothing about
            optimiser, learning rate and schedule, a model that was trained before gets the recipe `"finetune"`.

    Returns:
        `Result`.

    Raises:
        TrainingError: See its subclasses; the message says what to do.

    Example:
        >>> training.fit(model, x, y, epochs=5, validation_split=0.1, callbacks=[keras.callbacks.EarlyStopping("val_accuracy")])
    """
    _check_graph(model)
    if theirs := sorted(set(options) & MADE_BY_TRAIN - ({"image_size"} if takes_any_size(model) else set())):
        raise TrainingError(f"`{theirs[0]}` is an option of `train`, which builds the model; build yours with it, leave it out")
    options |= {name: value for name, value in (("loss", loss), ("optimizer", optimizer)) if _is_option(name, value)}
    labels = None if labels is None else _checked(check_labels, labels)
    own_loss = None if "loss" in options else loss
    own_optimizer = None if "optimizer" in options else optimizer
    _check_optimizer(own_optimizer, options)
    if run is None:
        run = Run.of(**_for_trained(options, model, data, own_optimizer))
    else:
        run = run.replace(**options)
    placement = placement or place(run, quiet)
    split = validation_split or None
    given = Given(
        data, y, sample_weight, class_weight, validation_data, split, validation_steps, validation_batch_size, steps_per_epoch
    )
    source = _source_of(given, run, own_loss is not None)
    with errors_of(out, placement.multi_worker, source):
        feed, arrays = _feed_of(given, source, model, run, placement, labels)
        _check_class_order(model, labels or (source.classes if source is not None and source.name != "arrays" else None))
        if feed.validation is not None:
            feed.validation.every = _checked_freq(validation_freq)
        run = run.replace(model=model.name, data=feed.name)
        if own_loss is not None:
            task = Task(own_loss, loss_weights, metrics, weighted_metrics)
        else:
            task = _default_task(model, feed, arrays, run)
            measured = task.metrics if metrics is None and weighted_metrics is None else metrics
            task = dataclasses.replace(task, metrics=measured, weighted_metrics=weighted_metrics)
        _seed(run)
        return start(model, feed, task, run, placement, out, keras.tree.flatten(callbacks), quiet, own_optimizer)


def _for_trained(options: dict[str, Any], model: keras.Model, data: Any, optimizer: Any) -> dict[str, Any]:
    """The options of a run; a model that was trained before is fine-tuned where they leave open how to train it."""
    decided = {"recipe", "optimizer", "learning_rate", "schedule", "base_batch"} & set(options)
    if decided or optimizer is not None or not is_trained(model):
        return options
    named = isinstance(data, (str, os.PathLike, datasets.Source))
    # Images are augmented where they are known to be photographs of one class each.
    return {"recipe": FINE_TUNING, **({} if named else {"flip": False}), **options}


def is_trained(model: keras.Model) -> bool:
    """Return whether a model was trained before: biases and moving means are zero in a new one."""
    moved = [v for v in model.weights if v.name in ("bias", "beta", "moving_mean")]
    return any(bool(np.any(keras.ops.convert_to_numpy(variable))) for variable in moved)


@dataclasses.dataclass(frozen=True, eq=False)
class Given:
    """The data arguments of `fit`."""

    data: Any
    y: Any = None
    sample_weight: Any = None
    class_weight: dict[int, float] | None = None
    validation_data: Any = None
    validation_split: float | None = None
    validation_steps: int | None = None
    validation_batch_size: int | None = None
    steps_per_epoch: int | None = None


def run_training(
    model: keras.Model,
    source: datasets.Source,
    run: Run,
    placement: Placement,
    out: str | os.PathLike[str] | None = None,
    callbacks: CallbackLike | Iterable[CallbackLike] = (),
    quiet: bool = False,
) -> Result:
    """Train a model on images of a known data set."""
    _check_graph(model)
    _seed(run)
    with errors_of(out, placement.multi_worker, source):
        feed = ImageFeed(source, model, run, placement)
        task = classification(model, len(source.classes), run.loss)
        return start(model, feed, task, run, placement, out, keras.tree.flatten(callbacks), quiet)


def _source_of(given: Given, run: Run, has_loss: bool) -> datasets.Source | None:
    """The data set of images that data stand for; None where they are batches or arrays as Keras takes them."""
    data = given.data
    if isinstance(data, (str, os.PathLike, datasets.Source)):
        return _checked(datasets.load, data, run.data_path, corrupt=run.corrupt, cache=run.cache)
    changed = [name for name in CHANGES_IMAGES if getattr(run, name)]
    tuples = isinstance(data, tuple) and given.y is None
    if tuples and len(data) != 2:
        raise TrainingError("`data` as a tuple is (images, labels) or ((images, labels), (test images, test labels))")
    if tuples and isinstance(data[0], tuple):
        return _checked(_source_of_arrays, data[0], data[1])
    if not changed:
        return None
    pair = data if tuples else (data, given.y)
    if getattr(pair[0], "dtype", None) != np.uint8 or has_loss or given.sample_weight is not None:
        raise TrainingError(
            f"`{changed[0]}` changes training images; it needs images as a uint8 array (n, height, width, channels) with one "
            "class number each, and a loss that is chosen here"
        )
    return _checked(_source_of_arrays, pair, None)


def _source_of_arrays(train: tuple, test: tuple | None) -> datasets.Source:
    images, more = (None if pair is None else datasets.Images(np.asarray(pair[0]), np.asarray(pair[1])) for pair in (train, test))
    classes = tuple(map(str, range(1 + int(max(split.labels.max() for split in (images, more) if split)))))
    return datasets.Source("arrays", images, more, classes, images.images.shape[1:3], {"mean": 0.5, "std": 0.25})


def _feed_of(
    given: Given,
    source: datasets.Source | None,
    model: keras.Model,
    run: Run,
    placement: Placement,
    labels: Sequence[str] | None,
) -> tuple[Feed, tuple | None]:
    """The feed of a run, and its training arrays where it has some."""
    arrays, validation = None, given.validation_data
    if source is not None:
        feed = ImageFeed(source, model, run, placement, given.class_weight)
    elif _is_arrays(given.data):
        x, y = given.data if isinstance(given.data, tuple) and given.y is None else (given.data, given.y)
        arrays = as_arrays(x, y, given.sample_weight)
        if given.validation_split:
            arrays, validation = split_arrays(arrays, given.validation_split)
        feed = ArrayFeed(
            arrays if given.class_weight is None else weighted_by_class(arrays, given.class_weight),
            run, placement, given.steps_per_epoch,
        )  # fmt: skip
    else:
        for name in ("y", "sample_weight", "validation_split"):
            if getattr(given, name) is not Given.__dataclass_fields__[name].default:
                raise TrainingError(f"`{name}` is for arrays; a {type(given.data).__name__} has it in its batches")
        feed = AdapterFeed(given.data, model, run, placement, given.steps_per_epoch, given.class_weight)
    if validation is not None:
        feed.validation = evaluation_of(validation, run, placement, given.validation_steps, given.validation_batch_size)
        feed.final = {**feed.final, **({} if feed.validation.once else {"val": feed.validation})}
    if labels is not None:
        if not labels_fit(model, labels):
            units = " or ".join(str(tensor.shape[-1]) for tensor in model.outputs)
            raise TrainingError(f"`labels` must have one name per value of the model's output ({units}), got {len(labels)}")
        feed.labels, feed.facts = list(labels), {**feed.facts, "classes": list(labels)}
    return feed, arrays


def _check_class_order(model: keras.Model, labels: Sequence[str] | None) -> None:
    """Refuse data with the model's own classes in another order, which would train every output for another class."""
    known = card(model)
    if labels is None or known is None or not known.labels:
        return
    given = list(map(str, labels))
    if given != known.labels and sorted(given) == sorted(known.labels):
        index = next(i for i, pair in enumerate(zip(given, known.labels, strict=True)) if pair[0] != pair[1])
        raise TrainingError(
            f"the data have the classes of {model.name} in another order: class {index} is {given[index]!r} in the data and "
            f"{known.labels[index]!r} in the model. `kr.replace_head(model, {len(given)}, labels=…)` with the names as the "
            "data have them sorts its outputs and keeps what they have learned"
        )


def _checked_freq(freq: int | Collection[int]) -> int | Collection[int]:
    if isinstance(freq, Collection) and not isinstance(freq, str) and all(isinstance(epoch, int) for epoch in freq):
        return freq
    if isinstance(freq, int) and freq >= 1:
        return freq
    raise TrainingError(f"`validation_freq` must be a whole number of at least 1, or a collection of epochs, got {freq!r}")


def _is_arrays(data: Any) -> bool:
    return all(hasattr(part, "shape") or isinstance(part, (int, float, bool)) for part in keras.tree.flatten(data))


def _default_task(model: keras.Model, feed: Feed, arrays: tuple | None, run: Run) -> Task:
    if isinstance(feed, ImageFeed):
        return classification(model, len(feed.source.classes), run.loss)
    if arrays is None:
        return task_of_spec(model, feed.spec)
    if len(arrays) < 2:
        raise TrainingError("give labels `y`, or a `loss` that needs none")
    return task_of_labels(model, arrays[1], run.loss)


def _is_option(name: str, value: Any) -> bool:
    """Whether a loss or an optimiser is one of the names that a `Run` has."""
    return isinstance(value, str) and value in CHOICES[name]


# What an optimiser decides by itself.
OF_OPTIMIZER = (
    "learning_rate", "base_batch", "momentum", "nesterov", "schedule", "milestones", "factor", "warmup_epochs", "warmup_to_batch",
    "weight_decay", "clip_norm", "ema", "accumulate", "gate_lr_multiplier", "backbone_lr_multiplier", "new_lr_multiplier",
    "new_decay_multiplier", "beta_lr_multiplier", "beta_decay_multiplier", "muon_rate", "muon_momentum",
)  # fmt: skip


def _check_optimizer(optimizer: Any, options: dict[str, Any]) -> None:
    if optimizer is None:
        return
    if not isinstance(optimizer, keras.optimizers.Optimizer):
        raise TrainingError(
            f"`optimizer` must be a Keras optimizer, or one of {', '.join(map(repr, CHOICES['optimizer']))}, "
            f"got {optimizer!r:.80}"
        )
    if twice := [name for name in OF_OPTIMIZER if name in options]:
        raise TrainingError(f"`{twice[0]}` is decided by the {type(optimizer).__name__} that you gave; leave one of them out")


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
    follows = not isinstance(schedule, float) if optimizer is None else not isinstance(optimizer._learning_rate, keras.Variable)
    check_callbacks(callbacks, follows, run.schedule, bool(run.ema) and optimizer is None)
    _check_growth(model, run)
    if run.growth and run.growth_scale == MATCH:
        feed.sample()
    if optimizer is not None and inner_of(optimizer).gradient_accumulation_steps and placement.replicas > 1:
        raise TrainingError(
            f"Keras' own optimizers accumulate gradients on one device only, and there are {placement.replicas} replicas; leave "
            "`gradient_accumulation_steps` out of the optimizer, or use the options `optimizer` (a name) and `accumulate`"
        )
    folder = Folder(None if out is None else Path(out), run, {**structure(model), **feed.fingerprint}, placement.chief)
    with StopRequest().listening() as stop, folder.lock(model.count_params()):
        saved = folder.read()
        state = saved.state if saved else RunState(step=run.initial_epoch * feed.steps)
        _check_shared_folder(folder, placement, state)
        if finished := folder.finished(saved, run.epochs * feed.steps):
            return Result(finished[0], state.rows, finished[1])
        folder.open(state)
        per_call = _steps_per_call(run, feed.steps, state.step)
        learner = Learner(model, run, placement, task, schedule, optimizer=optimizer, per_call=per_call, scales=state.scales)
        progress = Progress(run.epochs * feed.steps, feed.steps, feed.batch, quiet or not placement.chief)
        told = Callbacks(callbacks, {"epochs": run.epochs, "steps": feed.steps, "verbose": 0})
        session = Session(run, placement, learner, feed, told, folder, progress, stop, state)
        with progress:
            for line in _announcement(session, task, saved, optimizer):
                progress.line(line)
            return train(session, saved)


def structure(model: keras.Model) -> dict[str, Any]:
    """Return what a run's model must agree on with its checkpoint: its layout, not the values that the checkpoint replaces."""
    shapes = [(variable.path.rsplit("/", 1)[-1], tuple(variable.shape), str(variable.dtype)) for variable in model.weights]
    return {"parameters": model.count_params(), "layout": zlib.crc32(repr(shapes).encode())}


def _announcement(session: Session, task: Task, saved: Saved | None, optimizer: keras.optimizers.Optimizer | None) -> list[str]:
    run, placement, feed, learner = session.run, session.placement, session.feed, session.learner
    per_replica = feed.batch // placement.replicas
    rate = f"learning rate {run.learning_rate:g} × {run.batch_size}/{run.base_batch} = {scaled_rate(run):g}, {run.schedule}"
    recipe = [] if run.recipe is None or optimizer is not None else [f"recipe {run.recipe}: {RECIPES[run.recipe]['source']}"]
    lines = [
        *recipe,
        f"{learner.model.name}: {learner.model.count_params():,} parameters" + (f"; {task.note}" if task.note else ""),
        *feed.describe(),
        f"{placement.describe()}; global batch {feed.batch}, {per_replica} per replica"
        + (", synchronised batch norm" if learner.synchronised else ""),
        f"epochs: {run.epochs}, of {feed.steps} steps each"
        + (f", starting at epoch {run.initial_epoch + 1}; " if run.initial_epoch else "; ")
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
    """Grow a copy as the run will: a missing insertion point or a layer that crashes is found before the first epoch."""
    for _, after, blocks in sorted(run.growth, key=lambda event: event[0]):
        model = _checked(grow, model, after, blocks=blocks, block=run.growth_block, gate=run.growth_gate)
    _checked(check_backward, model)


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

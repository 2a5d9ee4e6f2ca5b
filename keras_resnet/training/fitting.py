"""A training run: segments of Keras' `fit`, between which the model may grow or thaw, with a state that survives anything."""

import contextlib
import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
from keras import ops

from .. import data as datasets
from ..graphs import graph_of, walk
from ..growth import grow
from ..growth.surgery import copy_model
from . import checkpoint
from .faults import Diverged, errors_of, on_termination
from .groups import new_layers, parameter_groups
from .logs import Progress, TensorBoardLog, curves, replace, write_csv
from .optimizers import carry_slots, make_optimizer
from .run import Run, TrainingError
from .schedules import make_schedule, scaled_rate
from .stepped import Stepped
from .strategies import place
from .watch import Stop, UnlessAsked, Watch, stop

SMALL_BATCH = 16
# Area that a random crop of a photograph takes at least, where a run does not say.
PHOTO_AREA = 0.25
# Fields of a run that `train` needs to make or load its model; `fit` is given one.
MADE_BY_TRAIN = {"model", "model_options", "weights", "data", "image_size", "drop_path", "precision"}


@dataclass(frozen=True, eq=False)
class Result:
    """What a training gives back.

    Args:
        model: the trained model, uncompiled.
        history: a dict per epoch (columns of the CSV).
        summary: figures of the whole run.
    """

    model: keras.Model
    history: list
    summary: dict

    def to_json(self):
        """Plain JSON values."""
        return {"history": self.history, "summary": self.summary}


@dataclass(frozen=True)
class Segment:
    """Epochs of a run in which model, optimiser and image size stay as they are."""

    start: int
    end: int
    growth: tuple
    frozen: bool
    small: bool


def segments(run):
    """The segments of a `Run`, in order."""
    small_end = round(run.epochs * run.small_epochs) if run.small_crops < 1 else 0
    edges = {0, run.epochs, run.frozen_epochs, small_end, *(event[0] for event in run.growth)}
    edges = sorted(edge for edge in edges if edge <= run.epochs)
    return [
        Segment(a, b, tuple(e for e in run.growth if e[0] == a), a < run.frozen_epochs, a < small_end)
        for a, b in zip(edges, edges[1:], strict=False)
    ]


def fit(model, data, *, run=None, out=None, callbacks=(), placement=None, quiet=False, **options):
    """Train a model; differs from `Model.fit` by growing, thawing, going on after a kill, and holding on several machines.

    Args:
        model: Functional or Sequential model: images 0–255 in, logits out. It is not changed; the result has a trained copy.
        data: see `keras_resnet.data.load`; or a tuple `(images, labels)` of arrays, or `((x, y), (x_test, y_test))`.
        run: `Run`; its `model` is ignored. None: made of `options`.
        out: folder for checkpoint, logs and model; a run that was broken off there goes on. None keeps nothing.
        callbacks: Keras callbacks, or functions `callback(segment, model)` that return one (or None) when a segment begins.
            Where a run goes on, and in every segment, they begin anew (`on_train_begin`): EarlyStopping forgets its best.
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
    source = _or_sentence(as_source, data, run)
    run = dataclasses.replace(run, model=model.name, data=source.name)
    return run_training(model, source, run, placement, out, callbacks, quiet)


def run_training(model, source, run, placement, out=None, callbacks=(), quiet=False):
    """What `fit` and `train` share, once model, data and placement are there."""
    if graph_of(model) is None:
        raise TrainingError(f"model {model.name!r} has no graph that can be read; give a Functional or a built Sequential model")
    if run.deterministic:
        keras.utils.set_random_seed(run.seed)
        tf.config.experimental.enable_op_determinism()
    with errors_of(out, placement.multi_worker, source):
        training = _Training(model, source, run, placement, out, callbacks, quiet)
        with on_termination(training), training.folder():
            return training.go()


def as_source(data, run):
    """What `data` of `fit` stands for."""
    if isinstance(data, tuple):
        if len(data) != 2:
            raise TrainingError("`data` as a tuple is (images, labels) or ((images, labels), (test images, test labels))")
        pairs = data if isinstance(data[0], tuple) else (data, None)
        train, test = (None if pair is None else datasets.Images(np.asarray(pair[0]), np.asarray(pair[1])) for pair in pairs)
        classes = tuple(map(str, range(1 + int(max(split.labels.max() for split in (train, test) if split)))))
        return datasets.Source("arrays", train, test, classes, train.images.shape[1:3], {"mean": 0.5, "std": 0.25})
    return datasets.load(data, run.data_path, corrupt=run.corrupt, cache=run.cache)


class _Training:
    """One run in progress."""

    def __init__(self, model, source, run, placement, out, callbacks, quiet):
        _check_growth(model, run)
        self.run, self.source, self.placement, self.callbacks = run, source, placement, callbacks
        self.out = None if out is None else Path(out)
        self.train, self.held_out = source.train, None
        if run.holdout:
            self.train, self.held_out = _or_sentence(datasets.hold_out, source.train, run.holdout)
        self.share = placement.share(run.batch_size)
        if run.batch_size > self.train.size:
            raise TrainingError(
                f"`batch_size` must be at most the number of training images ({self.train.size}), got {run.batch_size}"
            )
        self.steps = self.train.size // run.batch_size
        self.total = self.steps * run.epochs
        self.per_call = _divisor(self.steps, run.steps_per_execution)
        self.schedule = make_schedule(run, self.steps)
        self.segments = segments(run)
        self.rows, self.step, self.spent = [], 0, 0.0
        # Row of an epoch whose validation was broken off; it is measured when the run goes on.
        self.pending = None
        self.stop_asked = False
        self.progress = Progress(self.total, self.steps, run.batch_size, quiet or not placement.chief)
        self.stepped = self.board = None
        self.sum_over_workers = tf.function(
            lambda value: placement.strategy.reduce("SUM", placement.strategy.run(lambda: value), axis=None)
        )
        with placement.strategy.scope():
            self.model = _or_sentence(copy_model, model)
        self.size, self.classes = _shape_of(self.model, source)
        self.learnable = {path: layer.trainable for path, layer in self._layers()}
        self.essence = {**run.essence(), **_fingerprint(self.model, self.train), "data": source.name}
        self.ended = False

    # ------------------------------------------------------------ the run

    @contextlib.contextmanager
    def folder(self):
        """The folder of the results, writable and this run's alone while it goes on; one process of a run sees to that."""
        if self.out is None or not self.placement.chief:
            yield
            return
        checkpoint.check_folder(self.out, 4 * 4 * self.model.count_params())
        with checkpoint.lock(self.out):
            yield

    def go(self):
        saved = self._open()
        with self.progress:
            self._announce(saved)
            for number, segment in enumerate(self.segments):
                if saved and saved[1]["segment"] > number:
                    self._grow(segment)
                    continue
                self._enter(segment, carry=saved is None)
                if saved:
                    checkpoint.restore(self.stepped, saved[0])
                self._train(number, segment, saved and saved[0])
                saved = None
                if self.ended:
                    break
            return self._finish()

    def _open(self):
        """The saved state of this run, if there is one; folder, logs and description are ready afterwards."""
        if self.out is None:
            return None
        saved = checkpoint.read(self.out)
        if saved:
            state = saved[1]
            theirs, ours = state["run"], json.loads(json.dumps(self.essence))
            if differ := sorted(key for key in ours if theirs.get(key) != ours[key]):
                what = ", ".join(f"{key} {theirs.get(key)!r} there, {ours[key]!r} here" for key in differ[:3])
                raise TrainingError(f"{self.out} holds another run ({what}); choose another --out, or remove it")
            self.rows, self.step, self.spent = state["rows"], state["step"], state["seconds"]
            self.ended, self.pending = state["ended"], state.get("pending")
        if self.placement.multi_worker:
            everywhere = float(self.sum_over_workers(tf.constant(float(self.step))))
            if everywhere != self.step * self.placement.replicas:
                raise TrainingError(f"{self.out} is not the same folder for all workers; --out must be one that all of them see")
        if self.placement.chief:
            try:
                self.run.save(self.out / "run.yaml")
            except OSError as error:
                raise TrainingError(f"{self.out} cannot be written ({error.strerror or error}); choose another --out") from error
            write_csv(self.rows, self.out / "log.csv")
            if self.run.tensorboard:
                self.board = TensorBoardLog(self.out / "tensorboard", self.rows)
        return saved

    def _announce(self, saved):
        run, placement = self.run, self.placement
        per_replica = run.batch_size // placement.replicas
        lines = [
            f"{self.model.name}: {self.model.count_params():,} parameters; "
            f"{self.source.name}: {self.train.size:,} training images"
            + (f", {self.held_out.size:,} held out" if self.held_out else ""),
            f"{placement.describe()}; global batch {run.batch_size}, {per_replica} per replica"
            + (", synchronised batch norm" if self._sync() else ""),
            f"{run.epochs} epochs of {self.steps} steps; {run.optimizer}, "
            f"rate {run.learning_rate:g} × {run.batch_size}/{run.base_batch} = {scaled_rate(run):g}, {run.schedule}",
        ]
        if placement.replicas > 1:
            lines.append("each process reads its own part of every global batch (auto-shard off)")
        if self.per_call != run.steps_per_execution:
            lines.append(f"steps per execution {self.per_call}: a divisor of the {self.steps} steps of an epoch")
        if saved:
            lines.append(f"going on from step {self.step} of {self.total}")
        for line in lines:
            self.progress.line(line)

    def _finish(self):
        self.swap_averages()
        for layer in self._norms():
            layer.synchronized = False
        for path, layer in self._layers():
            layer.trainable = self.learnable.get(path, True)
        # Evaluation needs no optimiser state, but the same placement, so that every process takes part.
        summary = {
            "model": self.model.name, "data": self.source.name, "recipe": self.run.recipe, "seed": self.run.seed,
            "epochs": len(self.rows), "steps": self.step, "parameters": self.model.count_params(),
            "loss": self.rows[-1]["loss"], "train_accuracy": self.rows[-1]["accuracy"],
            "seconds": round(self.spent, 1),
        }  # fmt: skip
        for name, split in (("holdout", self.held_out), ("test", self.source.test)):
            if split is not None:
                logs = self._evaluate(split)
                summary |= {f"{name}_accuracy": round(float(logs["accuracy"]), 6), f"{name}_loss": round(float(logs["loss"]), 6)}
        model = copy_model(self.model) if self.placement.replicas > 1 else self.model
        if self.out is not None and self.placement.chief:
            replace(self.out / "model.keras", lambda path: model.save(path))
            replace(self.out / "summary.json", lambda path: path.write_text(json.dumps(summary) + "\n"))
            with contextlib.suppress(ImportError):
                title = f"{self.model.name} on {Path(self.source.name).name}"
                replace(self.out / "curves.png", lambda path: curves(self.rows, path, title))
        return Result(model, self.rows, summary)

    # ------------------------------------------------------------ segments

    def _enter(self, segment, carry):
        """Make model, optimiser and step of a segment; momentum and averages come along from the one before."""
        before, former = self._variables(), self.stepped.optimizer if self.stepped is not None else None
        self._grow(segment)
        self._set_trainable(segment)
        with self.placement.strategy.scope():
            optimizer = self._optimizer(segment)
            self.stepped = Stepped(self.model.inputs, self.model.outputs[0])
            self.stepped.configure(
                optimizer,
                self._criterion(),
                smoothing=self.run.label_smoothing,
                multi_worker=self.placement.multi_worker,
                jit=self.run.jit,
                steps_per_execution=self.per_call,
            )
            inner = self.inner
            self.stepped.optimizer.build(self.stepped.trainable_variables)
            if former is not None and carry:
                after = self._variables()
                pairs = [(a, b) for path in before.keys() & after.keys() for a, b in zip(before[path], after[path], strict=True)]
                old_inner = getattr(former, "inner_optimizer", former)
                carry_slots(old_inner, inner, pairs)
                if former is not old_inner:
                    for name in ("dynamic_scale", "step_counter"):
                        getattr(self.stepped.optimizer, name).assign(ops.convert_to_numpy(getattr(former, name)))
            elif self.run.ema:
                carry_slots(inner, inner, [])

    @property
    def inner(self):
        """The optimiser itself, behind loss scaling where there is some."""
        return getattr(self.stepped.optimizer, "inner_optimizer", self.stepped.optimizer)

    def _variables(self):
        """Variables of every layer by the layer's path in the model's tree (Keras' paths repeat between nested models)."""
        return {path: list(layer.variables) for path, layer in self._layers()}

    def _grow(self, segment):
        if not segment.growth:
            return
        with self.placement.strategy.scope():
            for _, places, blocks in segment.growth:
                seed = self.run.seed + 1 + segment.start
                grown = grow(self.model, places, blocks=blocks, block=self.run.growth_block, gate=self.run.growth_gate, seed=seed)
                self.progress.line(f"grown before epoch {segment.start + 1}: {blocks} block(s) behind {places}")
                self.model = grown

    def _set_trainable(self, segment):
        if not self.run.frozen_epochs:
            return
        grown, head = new_layers(self.model)
        fresh = {id(layer) for layer in [*grown, *head]}
        for path, layer in self._layers():
            layer.trainable = self.learnable.get(path, True) and (not segment.frozen or id(layer) in fresh)

    def _layers(self):
        """`(path, layer)` of the layers with weights, nested models left out."""
        found = [(path, node.operation) for path, _, node in walk(self.model) if isinstance(node.operation, keras.layers.Layer)]
        return [(path, layer) for path, layer in found if layer.weights and not isinstance(layer, keras.Model)]

    def _optimizer(self, segment):
        trunk = 1.0 if segment.frozen else self.run.trunk_lr_multiplier
        groups = parameter_groups(self.model, gate_lr_multiplier=self.run.gate_lr_multiplier, trunk_lr_multiplier=trunk)
        for layer in self._norms():
            layer.synchronized = self._sync()
        optimizer = make_optimizer(self.run, self.schedule, groups)
        half = any(layer.dtype_policy.name == "mixed_float16" for layer in self.model._flatten_layers(include_self=False))
        return keras.optimizers.LossScaleOptimizer(optimizer) if half else optimizer

    def _norms(self):
        return [layer for layer in self.model._flatten_layers() if isinstance(layer, keras.layers.BatchNormalization)]

    def _sync(self):
        if self.placement.replicas == 1 or not self._norms():
            return False
        small = self.run.batch_size // self.placement.replicas < SMALL_BATCH
        return small if self.run.sync_batch_norm is None else self.run.sync_batch_norm

    def _criterion(self):
        losses = keras.losses
        kind = losses.CategoricalCrossentropy if self.run.loss == "softmax" else losses.BinaryCrossentropy
        return kind(from_logits=True)

    def _train(self, number, segment, arrays):
        """Steps of a segment from where the run stands: the rest of a broken epoch first."""
        if self.ended:
            return
        extra = [c(segment, self.model) if not isinstance(c, keras.callbacks.Callback) else c for c in self.callbacks]
        extra = [callback for callback in extra if callback is not None]
        if self.pending is not None:
            self._complete(number, extra)
            if self._end_if_wanted(number):
                return
        if segment.small:
            try:
                self.stepped(tf.zeros((1, *self._crop(segment), self.source.train.channels)))
            except (ValueError, tf.errors.OpError) as error:
                crop = "×".join(map(str, self._crop(segment)))
                raise TrainingError(f"{self.model.name!r} does not take images of {crop}; set `small_crops` to 1") from error
        watch = Watch(self, number)
        end = segment.end * self.steps
        watch.interrupted = arrays if self.step % self.steps else None
        while self.step < end:
            epoch, done = divmod(self.step, self.steps)
            upto = epoch + 1 if done else segment.end
            self.stepped.fit(
                self.placement.distribute(self._batches(segment, self.step, upto * self.steps)),
                initial_epoch=epoch,
                epochs=upto,
                steps_per_epoch=self.steps - done,
                shuffle=False,
                callbacks=[watch, *extra, Stop(watch)],
                validation_data=self._validation(),
                validation_steps=self._validation_steps(),
                verbose=0,
            )
            if self._end_if_wanted(number):
                return

    def _end_if_wanted(self, number):
        """End the run where a callback wants it (EarlyStopping); the same call then finds a run that is over."""
        if self.stepped.stop_training:
            self.ended = True
            self.save(number)
        return self.ended

    def _batches(self, segment, first, last):
        run = self.run
        size = self._crop(segment)
        area = run.random_area or (PHOTO_AREA if self.source.crop else 0.0)
        augmentation = datasets.Augmentation(run.crop_padding, area, run.flip, run.randaugment, run.magnitude, run.erasing)
        return datasets.training_batches(
            self.train, batch=run.batch_size, size=size, num_classes=self.classes, augmentation=augmentation,
            fill=self.source.mean, seed=run.seed, first=first, last=last, share=self.share,
            replicas=self.placement.local_replicas, mixup=run.mixup, cutmix=run.cutmix,
        )  # fmt: skip

    def _crop(self, segment):
        """Side of the training images of a segment."""
        return tuple(max(8, round(self.run.small_crops * side)) for side in self.size) if segment.small else self.size

    # ------------------------------------------------------------ validation

    def _validation_split(self):
        if self.run.validate == "none":
            return None
        return self.source.test if self.run.validate == "test" or self.held_out is None else self.held_out

    def _validation(self):
        split = self._validation_split()
        return None if split is None else self.placement.distribute(self._evaluation(split))

    def _validation_steps(self):
        split = self._validation_split()
        return None if split is None else math.ceil(split.size / self.run.batch_size)

    def _evaluation(self, split):
        return datasets.evaluation_batches(
            split, batch=self.run.batch_size, size=self.size, num_classes=self.classes, share=self.share,
            replicas=self.placement.local_replicas, crop=self.source.crop,
        )  # fmt: skip

    def _evaluate(self, split):
        """Loss and accuracy on a split.

        Raises:
            Interrupted: the run was asked to stop meanwhile; all but this measurement was saved before.
        """
        unless = UnlessAsked(self)
        logs = self.stepped.evaluate(
            self.placement.distribute(self._evaluation(split)),
            steps=math.ceil(split.size / self.run.batch_size),
            callbacks=[unless],
            return_dict=True,
            verbose=0,
        )
        if unless.broken:
            stop(self)
        return logs

    def _complete(self, number, callbacks):
        """Measure what a broken validation left out, and end its epoch for the callbacks too."""
        self.swap_averages()
        logs = self._evaluate(self._validation_split())
        self.swap_averages()
        row = self.pending | {f"val_{name}": round(float(logs[name]), 6) for name in ("loss", "accuracy")}
        self.record(row, number)
        told = keras.callbacks.CallbackList(callbacks, model=self.stepped, verbose=0, epochs=self.run.epochs, steps=self.steps)
        logs = {name: row[name] for name in ("loss", "accuracy", "val_loss", "val_accuracy")}
        told.on_train_begin()
        told.on_epoch_end(row["epoch"] - 1, logs)
        told.on_train_end(logs)

    def swap_averages(self):
        """Exchange weights and their moving averages; a second call undoes it."""
        if self.run.ema:
            for variable in self.stepped.trainable_variables:
                average = self.inner.average_of(variable)
                value = ops.convert_to_numpy(variable)
                variable.assign(ops.convert_to_numpy(average))
                average.assign(value)

    # ------------------------------------------------------------ state

    def asked_to_stop(self, logs):
        """Whether any process was asked to stop before the step that gave `logs`; the same answer in all of them."""
        if not self.placement.multi_worker:
            return self.stop_asked
        if self.stop_asked:
            self.stepped.stop_asked.assign(1.0)
        return float(np.mean(logs["stop"])) > 0

    def record(self, row, number):
        """An epoch is done: keep its row, save, write the logs."""
        self.rows.append(row)
        self.pending = None
        self.save(number)
        if self.placement.chief and self.out is not None:
            write_csv(self.rows, self.out / "log.csv")
            if self.board:
                self.board.add(row)
        self.progress.epoch(row, self.run.epochs)

    def save(self, number):
        """Write the checkpoint; every process gathers, the chief writes."""
        if self.out is None:
            return
        arrays = checkpoint.arrays_of(self.stepped)
        if not all(np.isfinite(a).all() for name, a in arrays.items() if name.startswith("model/") and a.dtype.kind == "f"):
            raise Diverged(f"weights are not finite at step {self.step}; {self._last_good()}")
        if self.placement.chief:
            state = {
                "step": self.step,
                "segment": number,
                "rows": self.rows,
                "seconds": self.spent,
                "run": self.essence,
                "ended": self.ended,
                "pending": self.pending,
            }
            checkpoint.write(self.out, arrays, state)

    def _last_good(self):
        saved = checkpoint.read(self.out) if self.out is not None else None
        kept = f"the weights of step {saved[1]['step']} are kept in {self.out}" if saved else "no checkpoint was written yet"
        return f"{kept}; lower the learning rate or clip the gradient (clip_norm)"

    def diverged(self, finite_steps, epoch_start):
        """Stop with the number of the first step whose loss is not finite."""
        raise Diverged(f"the loss is not finite at step {epoch_start + int(round(finite_steps)) + 1}; {self._last_good()}")


def _shape_of(model, source):
    """`((height, width), classes)` of a model on images, checked against the data."""
    shape = model.inputs[0].shape
    if len(model.inputs) != 1 or len(shape) != 4 or shape[-1] != source.train.channels:
        takes = ", ".join(str(tensor.shape[1:]) for tensor in model.inputs)
        raise TrainingError(f"the model must take one image (height, width, {source.train.channels}), it takes {takes}")
    classes = model.outputs[0].shape[-1]
    if len(model.outputs) != 1 or len(model.outputs[0].shape) != 2 or classes < len(source.classes):
        raise TrainingError(
            f"the model must give one output of at least {len(source.classes)} logits, it gives "
            f"{', '.join(str(o.shape[1:]) for o in model.outputs)}"
        )
    size = tuple(shape[1:3])
    if None in size:
        if source.image_size is None:
            raise TrainingError("images differ in size and the model takes any; set `image_size`")
        size = tuple(source.image_size)
    return size, classes


def _divisor(number, most):
    """Largest divisor of `number` that is at most `most`."""
    return next(d for d in range(min(number, most), 0, -1) if number % d == 0)


def _fingerprint(model, split):
    """Figures by which a run is told from another: its initial weights, and its labels or files."""
    labels = getattr(split, "labels", np.zeros(1))
    return {
        "images": split.size,
        "labels": int(np.dot(labels.astype("int64"), np.arange(len(labels)) % 9973)),
        "parameters": model.count_params(),
        "weights": float(
            sum(np.abs(ops.convert_to_numpy(v), dtype="float64").sum() for v in model.weights if v.dtype != "bfloat16")
        ),
    }


def _or_sentence(function, *args, **kwargs):
    """Call a function whose ValueErrors are sentences for the user."""
    try:
        return function(*args, **kwargs)
    except ValueError as error:
        raise TrainingError(str(error)) from error


def _check_growth(model, run):
    """Grow a copy as the run will, so that a place that is not there is found before the first epoch."""
    for _, places, blocks in sorted(run.growth, key=lambda event: event[0]):
        model = _or_sentence(grow, model, places, blocks=blocks, block=run.growth_block, gate=run.growth_gate)

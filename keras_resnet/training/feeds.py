"""Where the batches of a run come from, for training and for validation."""

import math
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from .. import data as datasets
from ..graphs import graph_of, replay
from ..layers import Card
from ..modelcard import ModelCard, card_layer, check_labels, preprocessing_card, set_card
from .run import Run, TrainingError
from .segments import Segment
from .steps import PADDED
from .strategies import Placement

# The smallest share of a photograph's area that a random crop takes, where a run does not say.
PHOTO_AREA = 0.25
SAMPLED = 32  # Examples whose bytes are part of a fingerprint.


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Data that a model is measured on.

    Args:
        dataset: Dataset of batches, distributed where there are several replicas.
        steps: Number of batches; None where it ends by itself.
    """

    dataset: Any
    steps: int | None

    def batches(self) -> Iterator[tuple[int, Iterator]]:
        """`(number, iterator to take the batch from)` for every batch; without `steps` it goes on until the data ends."""
        iterator, number = iter(self.dataset), 0
        while self.steps is None or number < self.steps:
            yield number, iterator
            number += 1


class Feed:
    """The data of a run.

    Attributes:
        name: Name for the log.
        size: Training examples; None where that is not known.
        batch: Examples per step.
        steps: Steps per epoch.
        resumes_anywhere: Whether a run can resume within an epoch: the order of the examples is a function of seed and epoch.
        validation: What is measured after every epoch; None for nothing.
        final: What is measured at the end, by the prefix of its figures.
        facts: Further entries of the summary.
        spec: One batch, or its `element_spec`.
        fingerprint: Figures by which the data of a run are told from other data.
    """

    name: str = "data"
    size: int | None = None
    batch: int
    steps: int
    resumes_anywhere = True
    validation: Evaluation | None = None
    final: dict[str, Evaluation] = {}
    facts: dict[str, Any] = {}
    spec: Any
    fingerprint: dict[str, Any]

    def iterator(self, step: int, segment: Segment) -> Iterator:
        """The batches of the run from a step on, at least to the end of its epoch."""
        raise NotImplementedError

    def check(self, model: keras.Model, segment: Segment) -> None:
        """Refuse a segment whose images the model does not take."""

    def describe(self) -> list[str]:
        """Lines for the log."""
        size = "" if self.size is None else f": {self.size:,} training examples"
        return [f"{self.name}{size}"]

    def label(self, model: keras.Model) -> keras.Model:
        """Write class names into the trained model, where there are some."""
        return model


class ImageFeed(Feed):
    """Images of a `keras_resnet.data.Source`, augmented; the same on any number of replicas.

    Args:
        source: The data set.
        model: The model that is trained on it.
        run: The run.
        placement: Where its replicas are.
        class_weight: Weight of each class number in the loss; None for 1.
    """

    def __init__(
        self,
        source: datasets.Source,
        model: keras.Model,
        run: Run,
        placement: Placement,
        class_weight: dict[int, float] | None = None,
    ) -> None:
        self.source, self.run, self.placement = source, run, placement
        self.train, self.held_out = source.train, None
        if run.holdout:
            try:
                self.train, self.held_out = datasets.hold_out(source.train, run.holdout)
            except ValueError as error:
                raise TrainingError(str(error)) from error
        self.name, self.size, self.batch = source.name, self.train.size, run.batch_size
        self.share = placement.share(run.batch_size)
        if run.batch_size > self.train.size:
            raise TrainingError(
                f"`batch_size` must be at most the number of training images ({self.train.size}), got {run.batch_size}"
            )
        self.steps = self.train.size // run.batch_size
        self.image_size, self.units = _shape_of(model, source)
        self.class_weight = _class_weights(class_weight, max(self.units, len(source.classes)))
        self.facts = {"classes": list(map(str, source.classes))}
        self.fingerprint = {"data": source.name, "images": self.train.size, "content": _checksum(self.train)}
        split = self._validation_split()
        self.validation = None if split is None else self._evaluation(split)
        found = {"holdout": self.held_out, "test": source.test}
        self.final = {name: self._evaluation(split) for name, split in found.items() if split is not None}
        self._iterator, self._next, self._last = None, None, None

    @property
    def spec(self) -> Any:
        labels = tf.TensorSpec((None, self.units), tf.float32)
        images = tf.TensorSpec((None, *self.image_size, self.train.channels), tf.float32)
        weights = tf.TensorSpec((None,), tf.float32)
        return (images, labels) if self.class_weight is None else (images, labels, weights)

    def iterator(self, step: int, segment: Segment) -> Iterator:
        # One pipeline per segment: starting one for every epoch would wait for its first batches.
        last = segment.end * self.steps
        if step != self._next or last != self._last:
            self._iterator = iter(self.placement.distribute(self._batches(segment, step, last)))
        self._next, self._last = (step // self.steps + 1) * self.steps, last
        return self._iterator

    def check(self, model: keras.Model, segment: Segment) -> None:
        if not segment.small:
            return
        crop = self._crop(segment)
        try:
            model(tf.zeros((1, *crop, self.train.channels)))
        except (ValueError, tf.errors.OpError) as error:
            size = "×".join(map(str, crop))
            raise TrainingError(f"{model.name!r} does not take images of {size}; set `small_crops` to 1") from error

    def describe(self) -> list[str]:
        held_out = f", {self.held_out.size:,} held out" if self.held_out else ""
        return [f"{self.name}: {self.size:,} training images, {len(self.source.classes)} classes{held_out}"]

    def label(self, model: keras.Model) -> keras.Model:
        return with_labels(model, list(self.source.classes), self.image_size, self.source.crop)

    def _batches(self, segment: Segment, first: int, last: int) -> tf.data.Dataset:
        run = self.run
        area = run.random_area or (PHOTO_AREA if self.source.crop else 0.0)
        augmentation = datasets.Augmentation(run.crop_padding, area, run.flip, run.randaugment, run.magnitude, run.erasing)
        batches = datasets.training_batches(
            self.train, batch=run.batch_size, size=self._crop(segment), num_classes=self._classes, augmentation=augmentation,
            fill=self.source.mean, seed=run.seed, first=first, last=last, share=self.share,
            replicas=self.placement.local_replicas, mixup=run.mixup, cutmix=run.cutmix,
        )  # fmt: skip
        if not (run.label_smoothing or self.class_weight is not None or self.units == 1):
            return batches
        return batches.map(self._with_labels)

    def _with_labels(self, images: tf.Tensor, labels: tf.Tensor) -> tuple:
        """Smooth labels: all classes get the same share, also under binary cross-entropy, where Keras moves them to a half."""
        weights = None if self.class_weight is None else tf.linalg.matvec(labels, self.class_weight)
        share = self.run.label_smoothing
        labels = self._column(labels * (1 - share) + share / self._classes)
        return (images, labels) if weights is None else (images, labels, weights)

    @property
    def _classes(self) -> int:
        """Length of one-hot labels in the pipeline."""
        return max(2, self.units)

    def _column(self, labels: tf.Tensor) -> tf.Tensor:
        """One-hot labels as a model with one unit takes them: how far an image belongs to class 1."""
        return labels[:, 1:2] if self.units == 1 else labels

    def _crop(self, segment: Segment) -> tuple[int, ...]:
        """Size of the training images of a segment."""
        if not segment.small:
            return self.image_size
        return tuple(max(8, round(self.run.small_crops * side)) for side in self.image_size)

    def _validation_split(self) -> Any:
        if self.run.validate == "none":
            return None
        if self.held_out is not None and self.run.validate != "test":
            return self.held_out
        return self.source.test

    def _evaluation(self, split: Any) -> Evaluation:
        batches = datasets.evaluation_batches(
            split, batch=self.run.batch_size, size=self.image_size, num_classes=self._classes, share=self.share,
            replicas=self.placement.local_replicas, crop=self.source.crop,
        ).map(lambda images, labels, weights: {PADDED: weights, "data": (images, self._column(labels))})  # fmt: skip
        return Evaluation(self.placement.distribute(batches), math.ceil(split.size / self.run.batch_size))


def _shape_of(model: keras.Model, source: datasets.Source) -> tuple[tuple[int, int], int]:
    """`((height, width), units)` of a model on images, checked against the data."""
    shape, channels = model.inputs[0].shape, source.train.channels
    if len(model.inputs) != 1 or len(shape) != 4 or shape[-1] != channels:
        takes = ", ".join(str(tensor.shape[1:]) for tensor in model.inputs)
        raise TrainingError(f"the model must take one image (height, width, {channels}), it takes {takes}")
    units, classes = model.outputs[0].shape[-1], len(source.classes)
    fits = units >= classes or (units == 1 and classes == 2)
    if len(model.outputs) != 1 or len(model.outputs[0].shape) != 2 or not fits:
        gives = ", ".join(str(tensor.shape[1:]) for tensor in model.outputs)
        raise TrainingError(
            f"the model must give one output of at least {classes} logits, it gives {gives}; "
            f"kr.replace_head(model, {classes}) makes a new head"
        )
    size = tuple(shape[1:3])
    if None in size:
        if source.image_size is None:
            raise TrainingError("images differ in size and the model takes any; set `image_size`")
        size = tuple(source.image_size)
    return size, units


def _class_weights(weights: dict[int, float] | None, classes: int) -> np.ndarray | None:
    """Weights by class number, 1 where none is given.

    Raises:
        TrainingError: A key that is no class number, or a value that is no number of at least 0.
    """
    if weights is None:
        return None
    if not isinstance(weights, dict):
        raise TrainingError(f"`class_weight` must be a dict of class number and weight, got {type(weights).__name__}")
    values = np.ones(classes, "float32")
    for key, value in weights.items():
        if isinstance(key, bool) or not isinstance(key, (int, np.integer)) or not 0 <= key < classes:
            raise TrainingError(f"`class_weight` has the key {key!r}, which is no class number from 0 to {classes - 1}")
        if isinstance(value, bool) or not isinstance(value, (int, float, np.number)) or not 0 <= value < math.inf:
            raise TrainingError(f"`class_weight` of class {key} must be a number of at least 0, got {value!r}")
        values[key] = value
    return values


def _checksum(split: Any) -> int:
    """A checksum over labels and a sample of the images of a split."""
    found = np.asarray(getattr(split, "labels", np.zeros(1)), "int64").tobytes()
    if isinstance(split, datasets.Records):
        sample = split.in_order().take(SAMPLED)
    else:
        chosen = np.unique(np.linspace(0, split.size - 1, min(SAMPLED, split.size)).astype(int))
        sample = split.take(chosen).in_order()
    checksum = zlib.crc32(found)
    for _, _, image, label in sample:
        image = image.numpy()
        checksum = zlib.crc32(image if isinstance(image, bytes) else image.tobytes(), checksum)
        checksum = zlib.crc32(label.numpy().tobytes(), checksum)
    return checksum


def with_labels(
    model: keras.Model, labels: Iterable[str], size: tuple[int, int] | None = None, crop: bool = False
) -> keras.Model:
    """Write class names into a model's card; a model without one gets a card.

    Args:
        model: Trained model, not used elsewhere.
        labels: Class names in the order of the outputs.
        size: Size of the images that it was trained on.
        crop: Whether test images were resized and cropped in the middle.
    """
    labels = list(map(str, labels))
    try:
        if card_layer(model) is not None:
            set_card(model, labels=labels)
            return model
        units = model.outputs[0].shape[-1]
        labels = labels if units == 1 else check_labels(labels, units)
    except ValueError:  # More outputs than classes: the names of the others are not known.
        return model
    if len(model.inputs) != 1 or graph_of(model) is None:
        return model
    resize = round(min(size) * 8 / 7) if crop and size else None
    treatment = preprocessing_card("none", None if size is None else list(size), resize)
    card = ModelCard(model.name, preprocessing=treatment, labels=labels)
    graph = graph_of(model)
    given = keras.Input(batch_shape=graph.inputs[0].shape, dtype=graph.inputs[0].dtype, name=graph.inputs[0].name)
    outputs = replay(
        graph, [Card(card.to_dict(), name="card")(given)], lambda node, args, kwargs: node.operation(*args, **kwargs)
    )
    return keras.Model(given, outputs, name=model.name)

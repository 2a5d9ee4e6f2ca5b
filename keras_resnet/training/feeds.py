"""Where the batches of a run come from, for training and for validation."""

import itertools
import math
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from .. import data as datasets
from ..data.order import permuted
from ..data.pipeline import with_options
from ..modelcard import card as card_of
from ..modelcard import preprocessing_card
from ..models.transfer import with_card
from .run import Run, TrainingError
from .segments import Segment
from .steps import PADDED
from .strategies import Placement

# The smallest share of a photograph's area that a random crop takes, where a run does not say.
PHOTO_AREA = 0.25
SAMPLED = 32  # Examples whose bytes are part of a fingerprint, and examples per batch of a sample.
MEASURED = 256  # Examples that a model is measured on as it grows.
SMALL = 16  # Numbers per example up to which all examples are.


@dataclass(eq=False)
class Evaluation:
    """Data that a model is measured on.

    Args:
        dataset: Dataset of batches, distributed where there are several replicas.
        steps: Number of batches; None where it ends by itself.
        once: Whether the data can be read only once, as a generator: every measurement then takes up where the last one ended.
        every: Number of epochs between two measurements, or the epochs to measure after, counted from 1.
    """

    dataset: Any
    steps: int | None
    once: bool = False
    every: int | Collection[int] = 1
    _iterator: Any = None

    def is_due(self, epoch: int) -> bool:
        """Return whether it is measured after an epoch, counted from 1."""
        return epoch % self.every == 0 if isinstance(self.every, int) else epoch in self.every

    def batches(self) -> Iterator[tuple[int, Iterator]]:
        """Yield `(number, iterator to take the batch from)` for every batch; without `steps` it continues until the data end."""
        if self._iterator is None or not self.once:
            self._iterator = iter(self.dataset)
        number = 0
        while self.steps is None or number < self.steps:
            yield number, self._iterator
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
        labels: Class names for the trained model; None where they are not known.
        fingerprint: Figures that distinguish the data of a run from other data.
    """

    name: str = "data"
    size: int | None = None
    batch: int
    steps: int
    resumes_anywhere = True
    validation: Evaluation | None = None
    final: dict[str, Evaluation] = {}
    facts: dict[str, Any] = {}
    labels: list[str] | None = None
    spec: Any
    fingerprint: dict[str, Any]

    def iterator(self, step: int, segment: Segment) -> Iterator:
        """Return the batches of the run from a step on, at least to the end of its epoch."""
        raise NotImplementedError

    def check(self, model: keras.Model, segment: Segment) -> None:
        """Refuse a segment whose images the model does not take."""

    def end_epoch(self) -> None:
        """An epoch is done."""

    def sample(self) -> Iterable[tuple[Any, None]]:
        """Return batches `(inputs, None)` of some training examples to measure a model on, not augmented and in any order.

        Raises:
            TrainingError: The data can be read only once.
        """
        raise NotImplementedError

    def describe(self) -> list[str]:
        """Return lines for the log."""
        size = "" if self.size is None else f": {self.size:,} training examples"
        return [f"{self.name}{size}"]

    def label(self, model: keras.Model) -> keras.Model:
        """Return the trained model with class names in its card, where there are some."""
        return model if self.labels is None else with_labels(model, self.labels)


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
        source = _with_channels(source, model)
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
        self.image_size, self.units = _shape_of(model, source, run.image_size)
        self.class_weight = _class_weights(class_weight, max(self.units, len(source.classes)))
        self.facts = {"classes": list(map(str, source.classes))}
        self.fingerprint = {"data": source.name, "images": self.train.size, "content": _checksum(self.train)}
        split = self._validation_split()
        self.validation = None if split is None else self._evaluation(split)
        found = {"holdout": self.held_out, "val": source.validation, "test": source.test}
        self.final = {name: self._evaluation(split) for name, split in found.items() if split is not None}
        self._iterator: Iterator | None = None
        self._next: int | None = None
        self._last: int | None = None

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

    def sample(self) -> Iterable[tuple[Any, None]]:
        split = self.train
        if not isinstance(split, datasets.Records):
            split = split.take(_spread(split.size, MEASURED))
        batches = datasets.evaluation_batches(
            split, batch=SAMPLED, size=self.image_size, num_classes=self._classes, crop=self.source.crop
        )
        return ((images[weights > 0], None) for images, _, weights in batches.take(math.ceil(MEASURED / SAMPLED)))

    def describe(self) -> list[str]:
        held_out = f", {self.held_out.size:,} held out" if self.held_out else ""
        return [self.source.describe() + held_out]

    def label(self, model: keras.Model) -> keras.Model:
        if self.labels is None and self.source.name == "arrays":
            return model
        return with_labels(model, self.labels or list(self.source.classes), self.image_size, self.source.crop)

    def _batches(self, segment: Segment, first: int, last: int) -> tf.data.Dataset:
        run = self.run
        area = run.random_area or (PHOTO_AREA if self.source.crop else 0.0)
        augmentation = datasets.Augmentation(
            run.crop_padding, area, run.flip, run.randaugment, run.magnitude, run.erasing, run.crop_border, run.alternate_flips
        )
        batches = datasets.training_batches(
            self.train, batch=run.batch_size, size=self._crop(segment), num_classes=self._classes, augmentation=augmentation,
            fill=self.source.mean, seed=run.seed, first=first, last=last, share=self.share,
            replicas=self.placement.local_replicas, mixup=run.mixup, cutmix=run.cutmix, shuffle=run.shuffle,
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
        if self.run.validate == "test":
            return self.source.test
        return next((split for split in (self.held_out, self.source.validation) if split is not None), self.source.test)

    def _evaluation(self, split: Any) -> Evaluation:
        batches = datasets.evaluation_batches(
            split, batch=self.run.batch_size, size=self.image_size, num_classes=self._classes, share=self.share,
            replicas=self.placement.local_replicas, crop=self.source.crop,
        ).map(lambda images, labels, weights: {PADDED: weights, "data": (images, self._column(labels))})  # fmt: skip
        return Evaluation(self.placement.distribute(batches), math.ceil(split.size / self.run.batch_size))


def _with_channels(source: datasets.Source, model: keras.Model) -> datasets.Source:
    """The data set with as many channels as the model takes, where its images can be decoded so."""
    shape = model.inputs[0].shape
    if len(shape) != 4 or shape[-1] in (None, source.train.channels):
        return source
    try:
        return source.with_channels(shape[-1])
    except ValueError:  # Said with the model's shape, below.
        return source


def takes_any_size(model: keras.Model) -> bool:
    """Return whether a model takes images of any size."""
    shape = model.inputs[0].shape
    return len(shape) == 4 and None in shape[1:3]


def _shape_of(model: keras.Model, source: datasets.Source, side: int | None) -> tuple[tuple[int, int], int]:
    """`((height, width), units)` of a model on images, checked against the data; `side` is for a model of any size."""
    shape, channels = model.inputs[0].shape, source.train.channels
    if len(model.inputs) != 1 or len(shape) != 4 or shape[-1] != channels:
        takes = ", ".join(str(tensor.shape[1:]) for tensor in model.inputs)
        raise TrainingError(f"the model must take one image (height, width, {channels}), it takes {takes}")
    units, classes = model.outputs[0].shape[-1], len(source.classes)
    fits = units >= classes or (units == 1 and classes == 2)
    if len(model.outputs) != 1 or len(model.outputs[0].shape) != 2 or not fits:
        gives = ", ".join(str(tensor.shape[1:]) for tensor in model.outputs)
        raise TrainingError(
            f"the model must return one output of at least {classes} logits, it returns {gives}; "
            f"kr.replace_head(model, {classes}) makes a new classifier"
        )
    if not takes_any_size(model):
        return tuple(shape[1:3]), units
    if side is None and source.image_size is None:
        raise TrainingError("images differ in size and the model takes any; set `image_size` (--image-size)")
    return (side, side) if side else source.image_size, units


class ArrayFeed(Feed):
    """Arrays of any kind in a run's order: a function of seed and epoch, so that the run resumes anywhere.

    Differs from Keras in nothing but the order: the last batch of an epoch is smaller where the examples do not divide. With
    several replicas it loses the examples that cannot be shared evenly.

    Args:
        arrays: `(x,)`, `(x, y)` or `(x, y, sample_weight)`, nested as the model's inputs and outputs are.
        run: The run.
        placement: Where its replicas are.
        steps: Steps per epoch; None for all examples.
    """

    def __init__(self, arrays: tuple, run: Run, placement: Placement, steps: int | None = None) -> None:
        self.arrays, self.run, self.placement = arrays, run, placement
        self.name, self.batch = "arrays", run.batch_size
        self.size = number_of_examples(arrays)
        placement.share(run.batch_size)
        whole, rest = divmod(self.size, run.batch_size)
        available = whole + (rest >= placement.replicas)
        if not available:
            raise TrainingError(f"there are {self.size} training examples for {placement.replicas} replicas; give more")
        self.steps = available if steps is None else steps
        if self.steps > available:
            raise TrainingError(f"`steps_per_epoch` must be at most {available}, all batches of the data, got {self.steps}")
        self.fingerprint = {"data": self.name, "examples": self.size, "content": _checksum_of_arrays(arrays)}
        self._iterator: Iterator | None = None
        self._next: int | None = None
        self._last: int | None = None

    @property
    def spec(self) -> Any:
        return keras.tree.map_structure(lambda array: tf.TensorSpec((None, *array.shape[1:]), array.dtype), self.arrays)

    def iterator(self, step: int, segment: Segment) -> Iterator:
        last = segment.end * self.steps
        if step != self._next or last != self._last:
            self._iterator = iter(self.placement.distribute(self._batches(step, last)))
        self._next, self._last = (step // self.steps + 1) * self.steps, last
        return self._iterator

    def sample(self) -> Iterable[tuple[Any, None]]:
        for places in np.array_split(chosen := _spread(self.size, MEASURED), math.ceil(len(chosen) / SAMPLED)):
            yield keras.tree.map_structure(lambda array, places=places: array[places], self.arrays[0]), None

    def _batches(self, first: int, last: int) -> tf.data.Dataset:
        run, replicas, local = self.run, self.placement.replicas, self.placement.local_replicas
        get = _gathering(self.arrays)
        steps, batch, size, offset = self.steps, run.batch_size, self.size, self.placement.index * local

        def of_part(part: tf.Tensor) -> Any:
            step, replica = part // local, offset + part % local
            epoch, start = step // steps, (step % steps) * batch
            own = tf.minimum(tf.cast(batch, tf.int64), size - start) // replicas
            places = start + replica * own + tf.range(own)
            return get(permuted(places, run.seed, epoch, size) if run.shuffle else places)

        parts = tf.data.Dataset.range(first * local, last * local)
        return with_options(parts.map(of_part, num_parallel_calls=2, deterministic=True).prefetch(2))


class AdapterFeed(Feed):
    """Data whose order is not ours: `tf.data.Dataset`, `keras.utils.PyDataset`, generators, PyTorch `DataLoader`s.

    Args:
        data: The data, which yield `(x, y)` or `(x, y, sample_weight)`.
        model: The model that is trained on them.
        run: The run.
        placement: Where its replicas are.
        steps: Steps per epoch; None for all batches.
        class_weight: Weight of each class number; None for 1.
    """

    resumes_anywhere = False

    def __init__(
        self,
        data: Any,
        model: keras.Model,
        run: Run,
        placement: Placement,
        steps: int | None = None,
        class_weight: dict[int, float] | None = None,
    ) -> None:
        self.name, self._data = type(data).__name__, data
        if class_weight is not None:
            # Keras takes a missing class for an error, here and there.
            weights = _class_weights(class_weight, max(2, model.outputs[0].shape[-1]))
            class_weight = dict(enumerate(map(float, weights)))
        self._adapter = adapter_of(data, run.shuffle, class_weight)
        self._dataset = self._adapter.get_tf_dataset()
        self.spec = self._dataset.element_spec
        self._given_steps, self._length = steps, self._adapter.num_batches
        self.steps = steps or self._length or _counted(self._dataset, data, "steps_per_epoch")
        self.batch = self._adapter.batch_size or _batch_of(self.spec) or run.batch_size
        self.fingerprint = {"data": self.name, "content": self.steps}
        self._distributed = distribute_foreign(self._dataset, data, placement)
        self._iterator, self._seen = None, 0

    def iterator(self, step: int, segment: Segment) -> Iterator:
        self._adapter.on_epoch_begin()
        if self._iterator is None or self._given_steps is None or (self._length and self._seen + self.steps > self._length):
            self._iterator, self._seen = iter(self._distributed), 0
        self._seen += self.steps
        return self._iterator

    def end_epoch(self) -> None:
        self._adapter.on_epoch_end()

    def sample(self) -> Iterable[tuple[Any, None]]:
        if is_read_once(self._adapter):
            raise TrainingError('`growth_scale="match"` reads some data twice, which a generator does not allow; give a number')
        data = self._data
        batches = (data[i] for i in range(self._length)) if isinstance(data, keras.utils.PyDataset) else data
        count = math.ceil(MEASURED / self.batch)
        return ((b[0] if isinstance(b, (tuple, list)) else b, None) for b in itertools.islice(batches, count))

    def describe(self) -> list[str]:
        return [f"{self.name}: {self.steps} batches per epoch, in an order of its own; the run resumes after whole epochs"]


def adapter_of(data: Any, shuffle: bool = False, class_weight: dict[int, float] | None = None) -> Any:
    """Keras' own adapter for data that are not arrays. Private in Keras 3.15, where `fit` uses it.

    Raises:
        TrainingError: Keras does not take such data.
    """
    from keras.src.trainers import data_adapters

    if hasattr(data, "__next__"):
        # Keras knows generators of tuples only, not other iterators and not lists.
        data = (tuple(batch) if isinstance(batch, list) else batch for batch in data)
    try:
        is_py_dataset = isinstance(data, keras.utils.PyDataset)
        return data_adapters.get_data_adapter(data, shuffle=shuffle and is_py_dataset, class_weight=class_weight)
    except ValueError as error:
        if "Unrecognized data type" not in str(error):
            # What was received is a batch with all its numbers.
            raise TrainingError(str(error).partition(" Received: ")[0]) from error
        if hasattr(data, "__iter__") and class_weight is None:
            return _Batches(data)
        raise TrainingError(
            f"data of type {type(data).__name__} cannot be trained on; give arrays, a tf.data.Dataset, a keras.utils.PyDataset, "
            "a generator, a PyTorch DataLoader, or the name or path of a data set"
        ) from error


def is_read_once(adapter: Any) -> bool:
    """Return whether the data of an adapter are gone when they have been read, as those of a generator."""
    return type(adapter).__name__ == "GeneratorDataAdapter"


class _Batches:
    """The part of Keras' adapters that feeds need, for an object that yields batches each time it is iterated over.

    Args:
        data: Iterable of `(x, y)` or `(x, y, sample_weight)`; its length, if it has one, is the number of batches.
    """

    batch_size = None

    def __init__(self, data: Iterable) -> None:
        self._data = data
        self.num_batches = len(data) if isinstance(data, Sized) else None
        first = next(iter(data), None)
        if not isinstance(first, (tuple, list)) or len(first) not in (2, 3):
            kind = "nothing" if first is None else type(first).__name__
            raise TrainingError(f"{type(data).__name__} must yield batches (x, y) or (x, y, sample_weight), it yields {kind}")
        self._spec = keras.tree.map_structure(
            lambda array: tf.TensorSpec((None, *array.shape[1:]), array.dtype), as_arrays(*first)
        )

    def get_tf_dataset(self) -> tf.data.Dataset:
        """Return the batches as a data set."""
        return tf.data.Dataset.from_generator(lambda: (as_arrays(*batch) for batch in self._data), output_signature=self._spec)

    def on_epoch_begin(self) -> None:
        """Do nothing: a new epoch begins when the data are iterated over."""

    on_epoch_end = on_epoch_begin


def distribute_foreign(dataset: tf.data.Dataset, data: Any, placement: Placement) -> Any:
    """Share the batches of a data set that is not ours over the replicas; TensorFlow divides every batch.

    Raises:
        TrainingError: Several processes cannot share such data.
    """
    if placement.replicas == 1:
        return dataset
    if placement.multi_worker and not isinstance(data, tf.data.Dataset):
        raise TrainingError(f"several workers cannot share a {type(data).__name__}; give arrays, a tf.data.Dataset, or a folder")
    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.DATA
    return placement.strategy.experimental_distribute_dataset(dataset.with_options(options))


def evaluation_of(
    data: Any, run: Run, placement: Placement, steps: int | None = None, batch_size: int | None = None
) -> Evaluation:
    """Validation data as Keras' `fit` takes it.

    Args:
        data: `(x, y)` or `(x, y, sample_weight)` of arrays, or anything that `AdapterFeed` takes.
        run: The run.
        placement: Where its replicas are.
        steps: Batches to measure; None for all.
        batch_size: Examples per batch where `data` is arrays; None for as many as in training.
    """
    if not isinstance(data, (tuple, list)):
        if batch_size is not None:
            raise TrainingError(f"`validation_batch_size` is for arrays; a {type(data).__name__} has batches of its own")
        adapter = adapter_of(data)
        dataset, once = adapter.get_tf_dataset(), is_read_once(adapter)
        steps = steps or adapter.num_batches
        if once and steps is None:
            raise TrainingError("the length of a generator is not known; give `validation_steps`")
        return Evaluation(distribute_foreign(dataset, data, placement), steps, once)
    arrays = as_arrays(*data)
    size, replicas, local = number_of_examples(arrays), placement.replicas, placement.local_replicas
    batch_size = batch_size or run.batch_size
    placement.share(batch_size)
    own, offset, get = batch_size // replicas, placement.index * local, _gathering(arrays)

    def of_part(part: tf.Tensor) -> dict:
        step, replica = part // local, offset + part % local
        places = step * batch_size + replica * own + tf.range(tf.cast(own, tf.int64))
        return {PADDED: tf.cast(places < size, tf.float32), "data": get(tf.minimum(places, size - 1))}

    total = math.ceil(size / batch_size)
    parts = tf.data.Dataset.range(total * local).map(of_part, num_parallel_calls=2, deterministic=True)
    return Evaluation(placement.distribute(with_options(parts.prefetch(2))), min(total, steps or total))


def as_arrays(x: Any, y: Any = None, sample_weight: Any = None) -> tuple:
    """NumPy arrays of `fit`'s arguments, without what is missing at the end; floats in Keras' float type, as `fit` makes them.

    Raises:
        TrainingError: They differ in length, or are not arrays of numbers.
    """

    def convert(array: Any) -> np.ndarray:
        array = np.asarray(array)
        if array.dtype.kind not in "biuf" or array.ndim == 0:
            raise TrainingError(f"data must be arrays of numbers, got {array.dtype} of shape {array.shape}")
        return array.astype(keras.config.floatx()) if array.dtype.kind == "f" else array

    parts = [x, y, sample_weight]
    while parts[-1] is None:
        parts.pop()
    if any(part is None for part in parts):
        raise TrainingError("`sample_weight` needs labels `y`")
    # Lists and tuples are several arrays where their parts are arrays; lists of numbers are one.
    arrays = tuple(_converted(part, convert) for part in parts)
    lengths = {len(array) for array in keras.tree.flatten(arrays)}
    if len(lengths) > 1:
        raise TrainingError(f"arrays must have the same number of examples, got {', '.join(map(str, sorted(lengths)))}")
    return arrays


def split_arrays(arrays: tuple, share: float) -> tuple[tuple, tuple]:
    """Split off the last examples for validation, as Keras does.

    Args:
        arrays: See `as_arrays`.
        share: Share of the examples to validate on.

    Raises:
        TrainingError: One of the parts would be empty.
    """
    size = number_of_examples(arrays)
    at = math.floor(size * (1 - share)) if 0 < share < 1 else 0
    if not 0 < at < size:
        raise TrainingError(f"`validation_split` must be between 0 and 1 and leave examples on both sides, got {share} of {size}")
    return tuple(
        keras.tree.map_structure(lambda array, part=part: array[part], arrays) for part in (slice(0, at), slice(at, None))
    )


def _converted(part: Any, convert: Callable[[Any], np.ndarray]) -> Any:
    """Arrays of a structure; tuples stand for lists, which tf.data would take for one tensor."""
    if isinstance(part, dict):
        return {key: _converted(value, convert) for key, value in part.items()}
    if isinstance(part, (list, tuple)) and part and all(hasattr(value, "shape") for value in part):
        return tuple(convert(value) for value in part)
    return convert(part)


def number_of_examples(arrays: tuple) -> int:
    """Return examples of arrays of one length."""
    return len(keras.tree.flatten(arrays)[0])


def weighted_by_class(arrays: tuple, class_weight: dict[int, float]) -> tuple:
    """Return arrays with the weights of their classes as sample weights.

    Raises:
        TrainingError: The labels are not class numbers or one-hot vectors.
    """
    if len(arrays) < 2 or keras.tree.is_nested(arrays[1]):
        raise TrainingError("`class_weight` needs labels of one output; give `sample_weight` for several")
    x, y, *given = arrays
    numbers = y.reshape(len(y), -1)
    numbers = numbers.argmax(-1) if numbers.shape[1] > 1 else np.round(numbers[:, 0]).astype(int)
    weights = _class_weights(class_weight, int(max(numbers.max(initial=0), *map(_number_or_zero, class_weight), 0)) + 1)[numbers]
    return x, y, weights if not given else weights * given[0]


def _number_or_zero(key: Any) -> int:
    return int(key) if isinstance(key, (int, np.integer)) and not isinstance(key, bool) else 0


def _gathering(arrays: tuple) -> Any:
    """A function that takes examples out of arrays by their numbers; the arrays are captured, not copied into its graph."""
    with tf.device("CPU:0"):
        tensors = keras.tree.map_structure(tf.constant, arrays)
    return lambda places: keras.tree.map_structure(lambda tensor: tf.gather(tensor, places), tensors)


def _counted(dataset: tf.data.Dataset, data: Any, option: str) -> int:
    """The number of batches of a data set that does not say it; it is read once for that."""
    if not isinstance(data, tf.data.Dataset) or data.cardinality() == tf.data.INFINITE_CARDINALITY:
        raise TrainingError(f"the length of {type(data).__name__} is not known; give `{option}`")
    return sum(1 for _ in dataset)


def _batch_of(spec: Any) -> int | None:
    """Examples of a batch, where its shape says it."""
    shape = keras.tree.flatten(spec)[0].shape
    return shape[0] if shape.rank else None


def _class_weights(weights: dict[int, float] | None, classes: int) -> np.ndarray | None:
    """Weights by class number, 1 where none is given.

    Raises:
        TrainingError: A key that is not a class number, or a value that is not a number of at least 0.
    """
    if weights is None:
        return None
    if not isinstance(weights, dict):
        raise TrainingError(f"`class_weight` must be a dict of class number and weight, got {type(weights).__name__}")
    values = np.ones(classes, "float32")
    for key, value in weights.items():
        if isinstance(key, bool) or not isinstance(key, (int, np.integer)) or not 0 <= key < classes:
            raise TrainingError(f"`class_weight` has the key {key!r}, which is not a class number from 0 to {classes - 1}")
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
        sample = split.take(_spread(split.size, SAMPLED)).in_order()
    checksum = zlib.crc32(found)
    for _, _, image, label in sample:
        image = image.numpy()
        checksum = zlib.crc32(image if isinstance(image, bytes) else image.tobytes(), checksum)
        checksum = zlib.crc32(label.numpy().tobytes(), checksum)
    return checksum


def _checksum_of_arrays(arrays: tuple) -> int:
    """A checksum over labels and other small arrays, and over a sample of the examples of large ones."""
    size = number_of_examples(arrays)
    sample = _spread(size, SAMPLED)
    checksum = 0
    for array in keras.tree.flatten(arrays):
        is_small = array.size <= SMALL * size
        checksum = zlib.crc32(np.ascontiguousarray(array if is_small else array[sample]).tobytes(), checksum)
    return checksum


def _spread(size: int, count: int) -> np.ndarray:
    """The numbers of at most `count` of `size` examples, evenly spread over all of them."""
    return np.unique(np.linspace(0, size - 1, min(count, size)).astype(int))


def with_labels(
    model: keras.Model, labels: Iterable[str], size: tuple[int, int] | None = None, crop: bool = False
) -> keras.Model:
    """Return a copy of a model with class names in its card; a model without one gets a card.

    Args:
        model: Trained model.
        labels: Class names in the order of the outputs.
        size: Size of the images that it was trained on.
        crop: Whether test images were resized and cropped in the middle.
    """
    labels, known = list(map(str, labels)), card_of(model)
    if not labels_fit(model, labels):  # More outputs than classes: the names of the others are not known.
        return model
    fields = {}
    old = {} if known is None else known.preprocessing
    # How images were brought to the model's size in the evaluation, unless the card says it for this size.
    if size and (known is None or (crop and not (old.get("resize") and old.get("size") == list(size)))):
        resize = round(min(size) * 8 / 7) if crop else None
        fields["preprocessing"] = preprocessing_card("none", list(size), resize) if known is None else {
            **old, "size": list(size), "resize": resize
        }  # fmt: skip
    return with_card(model, labels=labels, **fields)


def labels_fit(model: keras.Model, labels: Sequence[str]) -> bool:
    """Return whether an output of a model has one value per class, or one for both of two classes."""
    units = [tensor.shape[-1] for tensor in model.outputs if len(tensor.shape)]
    return len(labels) in [2 if count == 1 else count for count in units]

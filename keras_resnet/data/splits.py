"""What a split of a data set can be: images in memory, encoded files, or records that are read one after the other.

Every split yields elements `(epoch, index, image, label)`; `image` is a uint8 array or the encoded bytes of one. `index` is
the image's number in its split, which seeds its augmentation.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow as tf

from .formats import to_plain
from .order import PARALLEL, permuted

if TYPE_CHECKING:
    from .order import Order


MOST_CLASSES = 1_000_000  # More are wrong labels.


@dataclass(frozen=True, eq=False)
class Images:
    """Images of one size in memory.

    Args:
        images: Uint8 array `(n, height, width, channels)`.
        labels: Whole numbers `(n,)`.
    """

    images: np.ndarray
    labels: np.ndarray
    encoded = False

    def __post_init__(self) -> None:
        if self.images.ndim != 4 or self.images.dtype != np.uint8:
            got = f"{self.images.dtype} {self.images.shape}"
            raise ValueError(f"images must be a uint8 array (n, height, width, channels), got {got}")
        labels = np.asarray(self.labels)
        labels = labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels
        if labels.shape != (len(self.images),):
            raise ValueError(
                f"{len(self.images)} images have labels of shape {labels.shape}; give one class number for each image"
            )
        if labels.dtype.kind == "O":
            labels = np.array(labels.tolist())
        if labels.dtype.kind not in "iufb":
            raise ValueError(f"labels must be whole numbers of at least 0, got {labels.dtype}")
        numbers = labels.astype("float64")
        wrong = ~((numbers >= 0) & (numbers < MOST_CLASSES) & (numbers == np.floor(numbers)))
        if wrong.any():
            raise ValueError(f"labels must be whole numbers from 0 to {MOST_CLASSES - 1:,}, got {labels[wrong][0]}")
        object.__setattr__(self, "labels", labels.astype("int64"))

    @property
    def size(self) -> int:
        return len(self.images)

    @property
    def channels(self) -> int:
        return self.images.shape[-1]

    def name_of(self, index: int) -> str:
        return f"image {index}"

    def read(self, order: Order) -> tf.data.Dataset:
        """Return elements in a training run's order."""
        get = self._reader()
        return order.places().map(lambda epoch, place: get(epoch, order.index(epoch, place)))

    def in_order(self) -> tf.data.Dataset:
        """Return elements from first to last."""
        get, epoch = self._reader(), tf.constant(0, tf.int64)
        return tf.data.Dataset.range(self.size).map(lambda index: get(epoch, index))

    def _reader(self):
        # Made outside of the mapped function, which captures the tensors; inside they would be copied into its graph.
        images, labels = tf.constant(self.images), tf.constant(self.labels, tf.int64)
        return lambda epoch, index: (epoch, index, tf.gather(images, index), tf.gather(labels, index))

    def take(self, indices: np.ndarray) -> Images:
        """Return the images at `indices`, as a split of their own."""
        return dataclasses.replace(self, images=self.images[indices], labels=self.labels[indices])


@dataclass(frozen=True, eq=False)
class Encoded:
    """Image files, read when needed or, with `cache`, held in memory as they are.

    Args:
        paths: File names.
        labels: Whole numbers.
        channels: Channels of the pixels, 1 or 3.
        cache: Whether every file is read once and its bytes are kept.
        needs_pillow: Whether each file is one that TensorFlow reads differently from Pillow, or not at all; such a file comes
            out as another one with the same pixels, see `formats`. None if no file is.
    """

    paths: np.ndarray
    labels: np.ndarray
    channels: int = 3
    cache: bool = False
    needs_pillow: np.ndarray | None = None
    encoded = True

    @property
    def size(self) -> int:
        return len(self.paths)

    def name_of(self, index: int) -> str:
        return str(self.paths[index])

    def read(self, order: Order) -> tf.data.Dataset:
        """Return elements in a training run's order."""
        get = self._reader()
        return order.places().map(lambda epoch, place: get(epoch, order.index(epoch, place)), num_parallel_calls=PARALLEL)

    def in_order(self) -> tf.data.Dataset:
        """Return elements from first to last."""
        get, epoch = self._reader(), tf.constant(0, tf.int64)
        return tf.data.Dataset.range(self.size).map(lambda index: get(epoch, index), num_parallel_calls=PARALLEL)

    def _reader(self):
        labels = tf.constant(self.labels, tf.int64)
        if self.cache:
            held = self._held
            return lambda epoch, index: (epoch, index, tf.gather(held, index), tf.gather(labels, index))
        paths = tf.constant([str(path) for path in self.paths])
        if self.needs_pillow is None or not self.needs_pillow.any():
            return lambda epoch, index: (epoch, index, tf.io.read_file(tf.gather(paths, index)), tf.gather(labels, index))
        unlike = tf.constant(self.needs_pillow)

        def get(epoch: tf.Tensor, index: tf.Tensor) -> Any:
            data = tf.io.read_file(tf.gather(paths, index))
            data = tf.cond(tf.gather(unlike, index), lambda: self._as_plain(data), lambda: data)
            return epoch, index, tf.ensure_shape(data, []), tf.gather(labels, index)

        return get

    def _as_plain(self, data):
        # The result depends on the bytes alone, so TensorFlow may run several at once also in deterministic mode.
        return tf.numpy_function(lambda content: to_plain(content, self.channels), [data], tf.string, stateful=False)

    @functools.cached_property
    def _held(self):
        # With the split, since a run reads it once per segment and validation.
        flags = np.zeros(self.size, bool) if self.needs_pillow is None else self.needs_pillow
        return tf.constant(
            [
                to_plain(_bytes(path), self.channels, compact=True) if flag else _bytes(path)
                for path, flag in zip(self.paths, flags, strict=True)
            ]
        )

    def take(self, indices: np.ndarray) -> Encoded:
        """Return the files at `indices`, as a split of their own."""
        flags = None if self.needs_pillow is None else self.needs_pillow[indices]
        return dataclasses.replace(self, paths=self.paths[indices], labels=self.labels[indices], needs_pillow=flags)


def _bytes(path):
    with open(path, "rb") as file:
        return file.read()


@dataclass(frozen=True, eq=False)
class Records:
    """Records that can only be read one after the other (TFRecord shards, TFDS), shuffled within windows of `buffer` records.

    Every worker reads all records and decodes its own: so the order does not depend on the number of workers.

    Args:
        stream: `stream(epoch) -> Dataset` of `(index, encoded bytes or image, label)`, in an order that is a function of
            `epoch` alone; `epoch` is an int64 tensor, or None for the order of the files.
        size: Number of records.
        channels: Number of channels of the images.
        encoded: Whether images are bytes.
        buffer: Records of a window.
    """

    stream: Callable[[Any], tf.data.Dataset]
    size: int
    channels: int = 3
    encoded: bool = True
    buffer: int = 10_000

    def name_of(self, index: int) -> str:
        return f"record {index}"

    def read(self, order: Order) -> tf.data.Dataset:
        """Return elements in a training run's order."""
        steps = order.steps_per_epoch

        def of_epoch(epoch: tf.Tensor) -> Any:
            records = self.stream(epoch if order.shuffle else None)
            if order.shuffle:
                # `Dataset.shuffle` depends on TensorFlow's global seed; this does not.
                records = records.batch(self.buffer).enumerate().map(shuffled(epoch)).unbatch()
            return records.take(steps * order.batch).enumerate(epoch * steps * order.batch).map(lambda at, r: (epoch, at, *r))

        def shuffled(epoch: tf.Tensor) -> Any:
            def permute(window: tf.Tensor, batch: tf.Tensor) -> Any:
                count = tf.shape(batch[0], tf.int64)[0]
                places = permuted(tf.range(count), order.seed + 7919 * (1 + window), epoch, count)
                return tuple(tf.gather(part, places) for part in batch)

            return permute

        def is_mine(epoch: tf.Tensor, at: tf.Tensor, index: tf.Tensor, image: tf.Tensor, label: tf.Tensor) -> Any:
            step, place = at // order.batch, at % order.batch - order.share.offset
            return (step >= order.first) & (step < order.last) & (place >= 0) & (place < order.share.count)

        epochs = tf.data.Dataset.range(order.first // steps, -(-order.last // steps))
        return epochs.flat_map(of_epoch).filter(is_mine).map(lambda epoch, at, index, image, label: (epoch, index, image, label))

    def in_order(self) -> tf.data.Dataset:
        """Return elements from first to last."""
        return self.stream(None).map(lambda index, image, label: (tf.constant(0, tf.int64), index, image, label))

    def take(self, indices: np.ndarray) -> Records:
        """Return the records at `indices`, as a split of their own."""
        wanted = np.zeros(self.size, bool)
        wanted[indices] = True

        def stream(epoch: tf.Tensor) -> Any:
            return self.stream(epoch).filter(lambda index, image, label: tf.gather(tf.constant(wanted), index))

        return dataclasses.replace(self, stream=stream, size=int(wanted.sum()))


def hold_out(split: Images | Encoded | Records, count: int, seed: int = 0) -> tuple[Any, Any]:
    """Take images out of a training split, to choose a recipe on them without looking at the test set.

    Args:
        split: Any split.
        count: Images to hold out.
        seed: Seed of the choice.

    Returns:
        `(the rest, the held out)`.

    Raises:
        ValueError: `count` is not between 1 and the number of images.
    """
    if not 0 < count < split.size:
        raise ValueError(f"`holdout` must be between 1 and the number of training images ({split.size}), got {count}")
    order = np.random.default_rng(seed).permutation(split.size)
    return split.take(np.sort(order[count:])), split.take(np.sort(order[:count]))

"""From a split to batches: augmented in a run's order for training, once from first to last for evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow as tf

from .augment import Augmentation, center_crop, decode, fit
from .mixing import mix
from .order import AHEAD, PARALLEL, Order, Share

if TYPE_CHECKING:
    from .splits import Encoded, Images, Records


def training_batches(
    split: Images | Encoded | Records,
    *,
    batch: int,
    size: Sequence[int],
    num_classes: int,
    augmentation: Augmentation | None = None,
    fill: float | Sequence[float] | np.ndarray = 0.0,
    seed: int = 0,
    first: int = 0,
    last: int | None = None,
    share: Share | None = None,
    replicas: int = 1,
    mixup: float = 0.0,
    cutmix: float = 0.0,
    shuffle: bool = True,
) -> tf.data.Dataset:
    """Return training batches without end: the same images, augmented alike, wherever the run starts and on any workers.

    Args:
        split: `Images`, `Encoded` or `Records`.
        batch: Images per global batch.
        size: `(height, width)` of the model's input.
        num_classes: Length of the one-hot labels.
        augmentation: `Augmentation`; None for none.
        fill: Colour around the images, 0–255, a number or one per channel.
        seed: Seed of the run.
        first: Step of the run that comes first.
        last: Step after the last; None for no end.
        share: `Share` of each global batch that this worker reads; None for all.
        replicas: Devices of this worker, each of which gets an equal part.
        mixup: α of MixUp, 0 for none.
        cutmix: α of CutMix; with both, each batch takes one of them by chance.
        shuffle: False keeps the split's order.

    Returns:
        `tf.data.Dataset` of `(images float32 0–255, one-hot labels)`, one element per replica and step.
    """
    augmentation = augmentation or Augmentation()
    share = share or Share(0, batch)
    last = np.iinfo(np.int64).max // max(1, batch) if last is None else last
    order = Order(split.size, batch, seed, first, last, share, shuffle)
    colour = tf.broadcast_to(tf.constant(fill, tf.float32), [split.channels])

    def prepare(epoch: tf.Tensor, index: tf.Tensor, image: tf.Tensor, label: tf.Tensor) -> Any:
        # 31 bits of each: the seeds of stateless operations are pairs.
        own = tf.stack([tf.cast(seed, tf.int64) * 100_003 + epoch, index])
        is_mirrored = augmentation.turn(seed, epoch, index)
        augmented = augmentation(image, split.encoded, size, split.channels, colour, own, is_mirrored)
        return augmented, tf.one_hot(label, num_classes)

    images = split.read(order).map(prepare, num_parallel_calls=PARALLEL, deterministic=True)
    batches = images.batch(share.count // replicas, drop_remainder=True)
    if mixup or cutmix:
        # Elements are numbered over all workers, so that no two replicas mix in the same way.
        numbers = tf.data.Dataset.range(first * replicas, np.iinfo(np.int64).max)
        batches = tf.data.Dataset.zip(numbers, batches).map(
            lambda number, pair: mix(
                pair[0], pair[1], mixup, cutmix, tf.stack([tf.cast(seed, tf.int64) * 7919 + share.offset, number])
            ),
            num_parallel_calls=PARALLEL,
            deterministic=True,
        )
    return with_options(batches.prefetch(AHEAD))


def evaluation_batches(
    split: Images | Encoded | Records,
    *,
    batch: int,
    size: Sequence[int],
    num_classes: int,
    share: Share | None = None,
    replicas: int = 1,
    crop: bool = False,
) -> tf.data.Dataset:
    """Return all images once, in order; the last batch is filled up with images of weight 0, so that every replica has its part.

    Args:
        split, batch, size, num_classes, share, replicas: As in `training_batches`.
        crop: Take the middle of images (7/8 of the shorter side) and resize it; without, images must have the model's
            size or are cropped in the middle where they are larger, else resized.

    Returns:
        `tf.data.Dataset` of `(images, one-hot labels, weights)`.
    """
    share = share or Share(0, batch)
    total = -(-split.size // batch) * batch
    shape = (*size, split.channels)

    def prepare(epoch: tf.Tensor, index: tf.Tensor, image: tf.Tensor, label: tf.Tensor) -> Any:
        if crop:
            image = center_crop(image, split.encoded, size, split.channels)
        else:
            image = fit(decode(image, split.channels) if split.encoded else image, size, 0, None, None)
        return tf.ensure_shape(tf.cast(image, tf.float32), shape), tf.one_hot(label, num_classes), 1.0

    filler = tf.data.Dataset.from_tensors((tf.zeros(shape), tf.zeros(num_classes), 0.0)).repeat(total - split.size)

    def is_mine(at: tf.Tensor, element: tf.Tensor) -> Any:
        place = at % batch - share.offset
        return (place >= 0) & (place < share.count)

    elements = split.in_order().map(prepare, num_parallel_calls=PARALLEL, deterministic=True).concatenate(filler)
    mine = elements if share.count == batch else elements.enumerate().filter(is_mine).map(lambda at, element: element)
    return with_options(mine.batch(share.count // replicas, drop_remainder=True).prefetch(AHEAD))


def with_options(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """Set the options under which the pipelines of a training run."""
    options = tf.data.Options()
    options.deterministic = True
    # The end of an autotuned pipeline can wait for the tuner's next turn, whose pause doubles from 10 ms to a minute: an
    # epoch of 10 s took 20 s in half of the measurements (TensorFlow 2.21).
    options.autotune.enabled = False
    # Each worker's pipeline already reads the worker's own share.
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.OFF
    return dataset.with_options(options)

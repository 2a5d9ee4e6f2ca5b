"""Which image is read when: a pure function of (seed, epoch, position), so a run can go on anywhere, on any number of workers."""

from __future__ import annotations

import os
from dataclasses import dataclass

import tensorflow as tf

# Calls in flight of each step of a pipeline, and batches ahead. Fixed, for tf.data's autotuner is switched off (pipeline.py).
PARALLEL, AHEAD = max(4, os.cpu_count() or 1), 2


@dataclass(frozen=True)
class Share:
    """The part of every global batch that one worker reads: `count` places from `offset`."""

    offset: int
    count: int


@dataclass(frozen=True)
class Order:
    """The order of a training run's images; step `s` of the run reads places `s·batch` to `(s+1)·batch`.

    Args:
        size: Images of the split.
        batch: Images per global batch.
        seed: Seed of the run.
        first: First step (counted over the whole run) that is read.
        last: Step after the last one.
        share: What this worker reads of each global batch.
        shuffle: False reads in order of the split.

    Raises:
        ValueError: Fewer images than a batch holds.
    """

    size: int
    batch: int
    seed: int
    first: int
    last: int
    share: Share
    shuffle: bool = True

    def __post_init__(self) -> None:
        if self.batch > self.size:
            raise ValueError(f"`batch_size` must be at most the number of training images ({self.size}), got {self.batch}")

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches per epoch; the rest of the images differs from epoch to epoch."""
        return self.size // self.batch

    def places(self) -> tf.data.Dataset:
        """Return `tf.data.Dataset` of `(epoch, place in the epoch)` that this worker reads."""
        steps, share = self.steps_per_epoch, self.share

        def of_step(step: tf.Tensor) -> tf.data.Dataset:
            start = (step % steps) * self.batch + share.offset
            places = tf.range(start, start + share.count)
            return tf.data.Dataset.from_tensor_slices((tf.fill([share.count], step // steps), places))

        return tf.data.Dataset.range(self.first, self.last).flat_map(of_step)

    def index(self, epoch: tf.Tensor, place: tf.Tensor) -> tf.Tensor:
        """Image at a place of an epoch's permutation."""
        if not self.shuffle:
            return place
        return permuted(place, self.seed, epoch, self.size)


def permuted(place: tf.Tensor, seed: int, epoch: tf.Tensor, size: int) -> tf.Tensor:
    """Permute `size` numbers by seed and epoch, and return the number at a position."""
    pair = tf.cast(tf.stack([tf.cast(seed, tf.int64), epoch]), tf.int32)
    return tf.random.experimental.index_shuffle(place, pair, tf.cast(size, tf.int64) - 1)

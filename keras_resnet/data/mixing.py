"""MixUp and CutMix of a batch with itself reversed."""

from __future__ import annotations

import tensorflow as tf


def mix(images: tf.Tensor, labels: tf.Tensor, mixup: float, cutmix: float, seed: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Mix a batch; which of the two, how much and where are functions of `seed`.

    Differs from the papers by one draw per batch and by the reversed batch as partner, as timm does it.

    Args:
        images: Float `(n, height, width, channels)`.
        labels: One-hot `(n, classes)`.
        mixup: α of MixUp, 0 for none.
        cutmix: α of CutMix, 0 for none.
        seed: Two whole numbers.

    Returns:
        Images and labels, mixed.

    Source: arXiv 1710.09412, arXiv 1905.04899.
    """
    if mixup and cutmix:
        cut = tf.random.stateless_uniform([], seed + [0, 1]) < 0.5
        return tf.cond(cut, lambda: _cutmix(images, labels, cutmix, seed), lambda: _mixup(images, labels, mixup, seed))
    return _mixup(images, labels, mixup, seed) if mixup else _cutmix(images, labels, cutmix, seed)


def _mixup(images, labels, alpha, seed):
    share = _beta(alpha, seed)
    blend = lambda x: share * x + (1 - share) * tf.reverse(x, [0])  # noqa: E731
    return blend(images), blend(labels)


def _cutmix(images, labels, alpha, seed):
    height, width = images.shape[1], images.shape[2]
    side = tf.sqrt(1 - _beta(alpha, seed))
    centre = tf.random.stateless_uniform([2], seed + [0, 2])
    rows, row = _interval(height, side, centre[0])
    columns, column = _interval(width, side, centre[1])
    inside = row[None, :, None, None] & column[None, None, :, None]
    share = 1 - tf.cast(rows * columns, tf.float32) / (height * width)
    return tf.where(inside, tf.reverse(images, [0]), images), share * labels + (1 - share) * tf.reverse(labels, [0])


def _interval(length, side, centre):
    """Number of places, and which, of an interval that is cut off at the border."""
    half = tf.cast(side * length, tf.int32) // 2
    middle = tf.cast(centre * length, tf.int32)
    low, high = tf.maximum(middle - half, 0), tf.minimum(middle + half, length)
    places = tf.range(length)
    return high - low, (places >= low) & (places < high)


def _beta(alpha, seed):
    """A draw from Beta(α, α), by two gamma draws."""
    gamma = tf.random.stateless_gamma([2], seed + [0, 3], alpha)
    return gamma[0] / tf.maximum(tf.reduce_sum(gamma), 1e-20)

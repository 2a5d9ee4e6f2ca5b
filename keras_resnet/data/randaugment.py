"""RandAugment's operations as a table, on one uint8 image, with every chance handed in."""

from __future__ import annotations

import math
from typing import Any

import tensorflow as tf

LARGEST = 10.0


def apply(image: tf.Tensor, magnitude: float, chances: tf.Tensor, fill: tf.Tensor) -> tf.Tensor:
    """Apply one operation per row of `chances`.

    Args:
        image: Uint8 `(height, width, channels)`.
        magnitude: 0 to 10, the same for all operations.
        chances: Float `(n, 3)`: which operation, its sign, and one in reserve.
        fill: Colour of what a shift or rotation brings in.

    Source: arXiv 1909.13719; the ranges are those of the authors' code for ImageNet.
    """
    level = magnitude / LARGEST
    for chance in tf.unstack(chances):
        sign = tf.where(chance[1] < 0.5, -1.0, 1.0)
        branches = [lambda op=op, image=image, sign=sign: op(image, level, sign, fill) for op in OPERATIONS.values()]
        which = tf.minimum(tf.cast(chance[0] * len(branches), tf.int32), len(branches) - 1)
        image = tf.ensure_shape(tf.switch_case(which, branches), image.shape)
    return image


def _blend(base, image, factor):
    image, base = tf.cast(image, tf.float32), tf.cast(base, tf.float32)
    return tf.saturate_cast(tf.round(base + factor * (image - base)), tf.uint8)


def _gray(image):
    weights = tf.constant([0.299, 0.587, 0.114]) if image.shape[-1] == 3 else tf.ones([image.shape[-1]]) / image.shape[-1]
    return tf.broadcast_to(tf.reduce_sum(tf.cast(image, tf.float32) * weights, -1, keepdims=True), image.shape)


def _affine(image, matrix, fill):
    """`matrix`: the six numbers that say where an output pixel comes from."""
    inside = tf.cast(image, tf.float32) - tf.cast(tf.round(fill), tf.float32)
    moved = tf.raw_ops.ImageProjectiveTransformV3(
        images=inside[None],
        transforms=tf.concat([tf.cast(tf.stack(matrix), tf.float32), [0.0, 0.0]], 0)[None],
        output_shape=tf.shape(image)[:2],
        interpolation="NEAREST",
        fill_mode="CONSTANT",
        fill_value=0.0,
    )[0]
    return tf.saturate_cast(moved + tf.cast(tf.round(fill), tf.float32), tf.uint8)


def _rotate(image, level, sign, fill):
    angle = sign * level * math.radians(30)
    cos, sin = tf.cos(angle), tf.sin(angle)
    y, x = (image.shape[0] - 1) / 2, (image.shape[1] - 1) / 2
    return _affine(image, [cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y], fill)


def _equalize(image):
    """Histogram equalisation per channel."""

    def channel(values: tf.Tensor) -> Any:
        values = tf.cast(values, tf.int32)
        counts = tf.math.bincount(tf.reshape(values, [-1]), minlength=256, maxlength=256)
        last = tf.gather(counts, tf.reduce_max(values))
        step = (tf.reduce_sum(counts) - last) // 255
        table = tf.clip_by_value((tf.cumsum(counts, exclusive=True) + step // 2) // tf.maximum(step, 1), 0, 255)
        return tf.where(step > 0, tf.gather(table, values), values)

    return tf.cast(tf.stack([channel(values) for values in tf.unstack(image, axis=-1)], -1), tf.uint8)


def _autocontrast(image):
    values = tf.cast(image, tf.float32)
    low, high = tf.reduce_min(values, [0, 1]), tf.reduce_max(values, [0, 1])
    stretched = (values - low) * 255 / tf.maximum(high - low, 1)
    return tf.saturate_cast(tf.where(high > low, stretched, values), tf.uint8)


def _sharpness(image, factor):
    values = tf.cast(image, tf.float32)[None]
    kernel = tf.constant([[1.0, 1, 1], [1, 5, 1], [1, 1, 1]])[:, :, None, None] / 13
    smooth = tf.nn.depthwise_conv2d(values, tf.tile(kernel, [1, 1, image.shape[-1], 1]), [1, 1, 1, 1], "VALID")
    inner = tf.pad(tf.ones_like(smooth), [[0, 0], [1, 1], [1, 1], [0, 0]])
    smooth = tf.where(inner > 0, tf.pad(smooth, [[0, 0], [1, 1], [1, 1], [0, 0]]), values)
    return _blend(smooth[0], image, factor)


def _posterize(image, level):
    shift = tf.cast(round(4 * level), tf.uint8)
    return tf.bitwise.left_shift(tf.bitwise.right_shift(image, shift), shift)


def _factor(level, sign):
    return 1 + 0.9 * level * sign


OPERATIONS = {
    "identity": lambda image, level, sign, fill: image,
    "autocontrast": lambda image, level, sign, fill: _autocontrast(image),
    "equalize": lambda image, level, sign, fill: _equalize(image),
    "rotate": _rotate,
    "solarize": lambda image, level, sign, fill: tf.where(tf.cast(image, tf.float32) < 256 * (1 - level), image, 255 - image),
    "color": lambda image, level, sign, fill: _blend(_gray(image), image, _factor(level, sign)),
    "posterize": lambda image, level, sign, fill: _posterize(image, level),
    "contrast": lambda image, level, sign, fill: _blend(
        tf.fill(image.shape, tf.round(tf.reduce_mean(_gray(image)))), image, _factor(level, sign)
    ),
    "brightness": lambda image, level, sign, fill: _blend(tf.zeros_like(image), image, _factor(level, sign)),
    "sharpness": lambda image, level, sign, fill: _sharpness(image, _factor(level, sign)),
    "shear_x": lambda image, level, sign, fill: _affine(image, [1.0, sign * 0.3 * level, 0.0, 0.0, 1.0, 0.0], fill),
    "shear_y": lambda image, level, sign, fill: _affine(image, [1.0, 0.0, 0.0, sign * 0.3 * level, 1.0, 0.0], fill),
    "translate_x": lambda image, level, sign, fill: _affine(
        image, [1.0, 0.0, sign * 0.45 * level * image.shape[1], 0.0, 1.0, 0.0], fill
    ),
    "translate_y": lambda image, level, sign, fill: _affine(
        image, [1.0, 0.0, 0.0, 0.0, 1.0, sign * 0.45 * level * image.shape[0]], fill
    ),
}
